"""`fsl predict support=FOLDER query=FOLDER`: learns classes from labelled images or texts, and predicts those of others.

The support is a folder of images for each class, or a table of labelled texts. The algorithm comes from `checkpoint=PATH`;
without one, it is the nearest class mean on a pretrained network. A file of `fsl adapt` (`classifier=PATH`) replaces both.
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
from fsl_cli.calibration import check_threshold
from fsl_cli.classifier import BATCH, Classifier, Prediction, restored
from fsl_cli.config import run_folder
from fsl_cli.datasets.texts import read_texts
from fsl_cli.errors import RunError, run_and_report
from fsl_cli.schema import register
from fsl_cli.support import adapted, assess, line
from fsl_cli.whole import whole

log = logging.getLogger(__name__)
prepare = loading.prepare

SHOWN = 50  # most lines of the table
TEXT = 80  # most characters of a text in it

Answers = list[tuple[str, Prediction]]  # by file or text

register()


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Runs one prediction."""
    run_and_report(run, cfg)


def run(cfg: DictConfig) -> None:
    """Adapts to the support set, or loads a classifier, and writes predictions.csv and predictions.json."""
    folder = run_folder()
    if (folder / "predictions.json").exists():
        raise ValueError(f"out = {folder} already holds predictions. Choose another folder.")
    if cfg.query is None:
        raise ValueError("query has no value. Name an image, a folder of images, or a file of texts: query=unknown/.")
    below = cfg.reject_below
    check_threshold(below, auto=True)
    folders.there(cfg.query, "query")
    job = HydraConfig.get()
    trained, content = loading.open_trained(cfg, job.runtime.choices, job.overrides.task)
    # Checked before adapting, which can take minutes.
    asked = folders.table(cfg.query, "query", read_texts) if trained.what == "texts" else folders.images(cfg.query)
    reader = folders.Reader(trained.item)
    if cfg.classifier is None:
        classifier = adapted(trained, cfg.support, reader)
    elif cfg.support is not None:
        raise ValueError(f"support = {cfg.support}, but the classifier has learned its classes. Leave one of them out.")
    else:
        classifier = restored(trained, content["classifier"])
    log.info(line(classifier))
    found = assess(classifier) if cfg.leave_one_out else {}
    refusal = choose_threshold(classifier) if below == "auto" else {"reject_below": below}
    answers = judged(classifier, asked, reader, refusal["reject_below"])
    if not answers:
        raise RunError(f"query = {cfg.query}: nothing in it could be read as an image. {list(reader.skipped.values())[-1]}")
    column = "file" if trained.what == "images" else "text"
    for words in table(answers, column):
        log.info(words)
    write(folder, answers, column, {**protocol(classifier), **refusal, **found, "skipped": reader.skipped})
    many = "1 prediction is" if len(answers) == 1 else f"{len(answers)} predictions are"
    log.info(f"{many} in {folder / 'predictions.csv'} and predictions.json")
    reader.raise_if_skipped(folder / "predictions.csv")


def choose_threshold(classifier: Classifier) -> dict[str, Any]:
    """Chooses the threshold for refusing answers on the support items; logs it, and returns it for predictions.json."""
    found = classifier.rejection()
    if not found.threshold:
        log.info(f"No threshold tells unknown classes from these by their support {classifier.trained.what}: nothing is refused")
    else:
        log.info(
            f"reject_below = {found.threshold:.6g}, chosen on the support {classifier.trained.what}: it keeps "
            f"{100 * found.kept:.0f} % of {found.known} that were left out, and refuses {100 * found.refused:.0f} % of "
            f"{found.unknown} left out with their whole class"
        )
    return {"reject_below": found.threshold, "rejection": found._asdict()}


def judged(classifier: Classifier, asked: list[Any], reader: folders.Reader, reject_below: float | None) -> Answers:
    """The answer for each file or text; the reader records files that cannot be read."""
    if classifier.trained.what == "texts":
        return list(zip(asked, classifier(asked, reject_below), strict=True))
    answers: Answers = []
    with folders.bar(len(asked), "predicting") as bar:
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            items, kept = reader.read(part, bar)
            names = [str(file) for file, keep in zip(part, kept, strict=True) if keep]
            answers += zip(names, classifier.classify(items, reject_below), strict=True)
    return answers


def protocol(classifier: Classifier) -> dict[str, Any]:
    """How the answers were computed."""
    counts = classifier.support.targets.sum(0).int().tolist()
    return {
        **{name: classifier.trained.origin["choices"][name] for name in loading.NAMES if name != "task"},
        "norm": classifier.trained.algo.norm,
        "temperature": classifier.temperature,
        f"support_{classifier.trained.what}": dict(zip(classifier.names, counts, strict=True)),
    }


def table(answers: Answers, column: str) -> list[str]:
    """The printed table: file or text, predicted class, probability, runner-up."""
    rows = [(column, "class", "probability", "runner-up")]
    for item, answer in answers[:SHOWN]:
        name, chance = answer.ranking[1]
        rows.append(
            (
                _shortened(item) if column == "text" else item,
                answer.label,
                f"{100 * answer.probability:.1f} %",
                f"{name} ({100 * chance:.1f} %)",
            )
        )
    rows = [tuple(map(_printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + ([f"... and {len(answers) - SHOWN} more"] if len(answers) > SHOWN else [])


def _shortened(text: str) -> str:
    """The beginning of a text on one line, cut even within a word, since not all languages have blanks between words."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[: TEXT - 4]} ..."


def _printable(word: str) -> str:
    """Escapes characters such as line breaks, which would end the row."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in word)


def write(folder: Path, answers: Answers, column: str, summary: dict[str, Any]) -> None:
    """Writes predictions.csv, with a line for each image or text, and predictions.json, which also has the protocol."""
    with whole(folder / "predictions.csv", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([column, "prediction", "probability", "class", "runner_up", "runner_up_probability"])
        for name, answer in answers:
            lines.writerow([name, answer.label, answer.probability, answer.ranking[0][0], *answer.ranking[1]])
    rows = [{column: name, **answer._asdict(), "ranking": dict(answer.ranking)} for name, answer in answers]
    with whole(folder / "predictions.json") as file:
        file.write(json.dumps({**summary, "predictions": rows}, indent=2, ensure_ascii=False) + "\n")
