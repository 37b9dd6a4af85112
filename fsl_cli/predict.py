"""`fsl predict support=FOLDER query=FOLDER`: learn classes from labelled images, say what the other images are.

The algorithm is that of `checkpoint=PATH`, or a pretrained embedding with its nearest class mean; `classifier=PATH` has
learned its classes before, in `fsl adapt`.
"""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fsl_cli import folders, loading
from fsl_cli.classifier import BATCH, Classifier, Prediction, Trained, restored
from fsl_cli.config import run_folder
from fsl_cli.errors import told
from fsl_cli.schema import register

log = logging.getLogger(__name__)
prepare = loading.prepare

SHOWN = 50  # lines of the table

register()


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Runs one prediction."""
    told(run, cfg)


def run(cfg: DictConfig) -> None:
    """Adapts to the support images, or takes a classifier that has, and writes predictions.csv and predictions.json."""
    folder = run_folder()
    if (folder / "predictions.json").exists():
        raise ValueError(f"out = {folder} already holds predictions. Choose another folder.")
    if cfg.query is None:
        raise ValueError("query has no value. Name an image, or a folder of images: query=unknown/.")
    below = cfg.reject_below
    if not (below in (None, "auto") or (isinstance(below, int | float) and not isinstance(below, bool) and 0 <= below <= 1)):
        raise ValueError(f"reject_below = {below}, but it must be a probability from 0 to 1, auto, or null.")
    files = folders.images(cfg.query)
    trained, content = loading.assemble(cfg, HydraConfig.get().runtime.choices)
    reader = folders.Reader(trained.item)
    if cfg.classifier is None:
        classifier = adapted(trained, cfg.support, reader)
    elif cfg.support is not None:
        raise ValueError(f"support = {cfg.support}, but the classifier has learned its classes. Leave one of them away.")
    else:
        classifier = restored(trained, content["classifier"])
    log.info(line(classifier))
    found = assess(classifier) if cfg.leave_one_out else {}
    refusal = chosen(classifier) if below == "auto" else {"reject_below": below}
    answers = judged(classifier, files, reader, refusal["reject_below"])
    for words in table(answers):
        log.info(words)
    write(folder, answers, {**protocol(classifier), **refusal, **found, "skipped": reader.skipped})
    log.info(f"{len(answers)} predictions are in {folder / 'predictions.csv'} and predictions.json")
    reader.raise_if_skipped(folder / "predictions.csv")


def adapted(trained: Trained, support: str | None, reader: folders.Reader) -> Classifier:
    """The classifier of the images in `support/<class>/`."""
    if support is None:
        raise ValueError("support has no value. Name a folder with a folder of images for each class: support=my_classes/.")
    files = folders.labelled(support)
    with folders.bar(len(files), "learning") as bar:
        items, kept = reader.read([file.path for file in files], bar)
    labels = [file.name for file, keep in zip(files, kept, strict=True) if keep]
    lost = sorted({file.name for file in files} - set(labels))
    if lost:
        raise ValueError(
            f"support: none of the images in class folder {Path(support) / lost[0]} can be read "
            f"({next(iter(reader.skipped.values()))}). Put one in that can, or remove the folder."
        )
    return trained.learn(items, labels)


def line(classifier: Classifier) -> str:
    """What has been learned, in one line."""
    counts = sorted(classifier.support.targets.sum(0).int().tolist())
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    names = classifier.trained.origin["choices"]
    return (
        f"{len(classifier.names)} classes of {each} images each, learned by {names['algo']} with {names['model']} "
        f"({names['dataset']}), norm {classifier.trained.algo.norm}, temperature {classifier.temperature:.2f}"
    )


def assess(classifier: Classifier) -> dict[str, Any]:
    """Logs the accuracy on the support images, each left out in turn; returns it for predictions.json."""
    found = classifier.leave_one_out()
    log.info(
        f"Leave-one-out accuracy on the support images: {100 * found.accuracy:.1f} % "
        f"(95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %, {found.images} images)"
    )
    return {"leave_one_out": found._asdict()}


def chosen(classifier: Classifier) -> dict[str, Any]:
    """Logs the probability below which answers are refused, chosen on the support images; returns it for predictions.json."""
    found = classifier.rejection()
    log.info(
        f"reject_below = {found.threshold:.3f}, chosen on the support images: it keeps {100 * found.kept:.0f} % of {found.known} "
        f"that were left out alone, and refuses {100 * found.refused:.0f} % of {found.unknown} left out with their whole class"
    )
    return {"reject_below": found.threshold, "rejection": found._asdict()}


def judged(
    classifier: Classifier, files: list[Path], reader: folders.Reader, reject_below: float | None
) -> dict[str, Prediction]:
    """What each file is, by its name; a file that cannot be read is left to the reader's account."""
    answers: dict[str, Prediction] = {}
    with folders.bar(len(files), "predicting") as bar:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            items, kept = reader.read(part, bar)
            names = [str(file) for file, keep in zip(part, kept, strict=True) if keep]
            answers |= dict(zip(names, classifier.classify(items, reject_below), strict=True))
    return answers


def protocol(classifier: Classifier) -> dict[str, Any]:
    """How answers were made."""
    counts = classifier.support.targets.sum(0).int().tolist()
    return {
        **{name: classifier.trained.origin["choices"][name] for name in loading.NAMES if name != "task"},
        "norm": classifier.trained.algo.norm,
        "temperature": classifier.temperature,
        "support_images": dict(zip(classifier.names, counts, strict=True)),
    }


def table(answers: dict[str, Prediction]) -> list[str]:
    """The lines that are shown: file, predicted class, its probability, runner-up."""
    rows = [("file", "class", "probability", "runner-up")]
    for file, answer in list(answers.items())[:SHOWN]:
        name, chance = answer.ranking[1]
        rows.append((file, answer.label, f"{100 * answer.probability:.1f} %", f"{name} ({100 * chance:.1f} %)"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + ([f"... and {len(answers) - SHOWN} more"] if len(answers) > SHOWN else [])


def write(folder: Path, answers: dict[str, Prediction], summary: dict[str, Any]) -> None:
    """Writes predictions.csv, a line for each image, and predictions.json, which also says how they were made."""
    with (folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["file", "prediction", "probability", "class", "runner_up", "runner_up_probability"])
        for name, answer in answers.items():
            lines.writerow([name, answer.label, answer.probability, answer.ranking[0][0], *answer.ranking[1]])
    rows = [{"file": name, **answer._asdict(), "ranking": dict(answer.ranking)} for name, answer in answers.items()]
    text = json.dumps({**summary, "predictions": rows}, indent=2, ensure_ascii=False)
    (folder / "predictions.json").write_text(text + "\n", encoding="utf-8")
