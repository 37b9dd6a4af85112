"""Learns a classifier from the user's support files, and describes it; shared by `fsl predict` and `fsl adapt`."""

import logging
from pathlib import Path
from typing import Any

from fsl_cli import folders
from fsl_cli.classifier import Classifier, Trained
from fsl_cli.datasets.archives import writable
from fsl_cli.datasets.texts import read_labelled

log = logging.getLogger(__name__)


def adapted(trained: Trained, support: str | None, reader: folders.Reader) -> Classifier:
    """The classifier of the images in `support/<class>/`, or of the texts in the table `support`."""
    if support is None:
        raise ValueError(
            "support has no value. Name a folder with a folder of images for each class, support=my_classes/, or a table of "
            "text,label."
        )
    if trained.what == "texts":
        return trained.adapt(*zip(*folders.table(support, "support", read_labelled), strict=True))
    files = folders.labelled(support)
    with folders.bar(len(files), "learning") as bar:
        items, kept = reader.read([file.path for file in files], bar)
    labels = [file.name for file, keep in zip(files, kept, strict=True) if keep]
    lost = sorted({file.name for file in files} - set(labels))
    if lost:
        first = next(file.path for file in files if file.name == lost[0])
        raise ValueError(
            f"support: none of the images in class folder {Path(support) / lost[0]} can be read "
            f"({reader.skipped[writable(first)]}). Put one in that can, or remove the folder."
        )
    return trained.learn(items, labels)


def line(classifier: Classifier) -> str:
    """Describes a classifier in one line."""
    counts = sorted(classifier.support.targets.sum(0).int().tolist())
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    names = classifier.trained.origin["choices"]
    return (
        f"{len(classifier.names)} classes of {each} {classifier.trained.what} each, learned by {names['algo']} with "
        f"{names['model']} ({names['dataset']}), norm {classifier.trained.algo.norm}, temperature {classifier.temperature:.2f}"
    )


def assess(classifier: Classifier) -> dict[str, Any]:
    """Logs the leave-one-out accuracy on the support set; returns it for predictions.json."""
    found = classifier.leave_one_out()
    log.info(
        f"Leave-one-out accuracy on the support {classifier.trained.what}: {100 * found.accuracy:.1f} % "
        f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %, {found.images} {classifier.trained.what})"
    )
    return {"leave_one_out": found._asdict()}
