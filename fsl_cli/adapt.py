"""`fsl adapt support=FOLDER output=FILE`: learn classes from labelled images once, for `fsl predict classifier=FILE`."""

import logging
import shlex

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fsl_cli import folders, loading
from fsl_cli.errors import run_and_report
from fsl_cli.schema import register
from fsl_cli.support import adapted, assess, line

log = logging.getLogger(__name__)
prepare = loading.prepare

register()


@hydra.main(version_base="1.3", config_path="pkg://fsl_cli.configs", config_name="adapt")
def main(cfg: DictConfig) -> None:
    """Runs one adaptation."""
    run_and_report(run, cfg)


def run(cfg: DictConfig) -> None:
    """Adapts to the support images, and writes the classifier."""
    if cfg.output is None:
        raise ValueError("output has no value. Name the file to be written: output=my_classifier.")
    output = folders.new(cfg.output, "output")
    job = HydraConfig.get()
    trained, _ = loading.open_trained(cfg, job.runtime.choices, job.overrides.task)
    reader = folders.Reader(trained.item)
    classifier = adapted(trained, cfg.support, reader)
    log.info(line(classifier))
    if cfg.leave_one_out:
        assess(classifier)
    classifier.save(output)
    log.info(
        f"Use it with: fsl predict {shlex.quote(f'classifier={output}')} query={'FILE' if trained.what == 'texts' else 'FOLDER'}"
    )
    reader.raise_if_skipped(output)
