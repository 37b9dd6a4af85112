"""Turns errors into one sentence on stderr and in the run's log, with exit code 2 for usage and 1 for a failed run."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import distributed

from fsl_cli.config import GROUPS, flat, must_be, suggest
from fsl_cli.schema import COMMANDS

# Messages of failed allocations without an exception type of their own: on a CPU, and in libraries on a GPU.
NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine",
)
# OmegaConf's names of types, in plain words.
KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}

log = logging.getLogger(__name__)


class RunError(RuntimeError):
    """A failed run whose command was correct (exit code 1)."""


class Told(Exception):  # noqa: N818 - not an error itself, but the exit code of one already reported
    """Ends the program after the error has been reported."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def run_and_report(run: Callable[[DictConfig], Any], cfg: DictConfig) -> Any:
    """Runs a job; logs an error that `explain` knows at once, so that every failed job of a sweep says why."""
    record = Path(HydraConfig.get().runtime.output_dir) / f"{HydraConfig.get().job.name}.log"
    before = _size(record)
    try:
        return run(cfg)
    except (ValueError, OSError, RuntimeError, MemoryError, HydraException, OmegaConfBaseException) as error:
        explained = explain(error)
        if explained is None:
            raise
        if explained[1] == 2 and _size(record) == before:  # refused before it wrote anything: leave the folder's log alone
            for handler in log.handlers[:]:
                if isinstance(handler, logging.FileHandler):
                    log.removeHandler(handler)
            _leave_nothing(record)
        log.error(explained[0])
        # Hydra continues with the next job, but not with several processes: one would start it while others wait in this one.
        if HydraConfig.get().mode == RunMode.MULTIRUN and not distributed.is_initialized():
            raise Told(*explained) from error
        raise SystemExit(explained[1]) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _leave_nothing(record: Path) -> None:
    """Removes the folder of a run that was refused before it wrote anything; `record`: its log."""
    with suppress(OSError):  # no log, an open file on Windows, or more in the folder
        if not _size(record):
            record.unlink()
            record.parent.rmdir()


def explain(error: BaseException) -> tuple[str, int] | None:
    """The sentence and exit code for an error; None for a bug, whose traceback is shown."""
    if isinstance(error, OmegaConfBaseException | HydraException):
        return _configuration(error), 2
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        place = f"{error.problem_mark.name}, line {error.problem_mark.line + 1}"
        return f"{place}: it is no YAML ({error.problem}). Mend it.", 2
    if out_of_memory(error):
        said = f" ({str(error).splitlines()[0][:120]})" if str(error) else ""  # GPU libraries may mean another error
        return f"Out of memory{said}. Lower device.task_chunk or task.tasks, or use a smaller model.", 1
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror or error}. If it is where the run writes, choose another folder with out=PATH "
            "(packed data: cache_dir=PATH, a classifier: output=PATH).",
            1,
        )
    return (str(error), 2) if isinstance(error, ValueError) else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in NO_MEMORY)


def _configuration(error: BaseException) -> str:
    """One sentence for an error of Hydra or OmegaConf, whose cause has the reason."""
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file and link.options:
            group, _, name = link.missing_cfg_file.rpartition("/")
            if task := re.fullmatch(r"(\d+)_?way_?(\d+)_?shot", name) if group == "task" else None:
                return f"task = {name!r}, but there is no configs/task/{name}.yaml. Write task.way={task[1]} task.shot={task[2]}."
            return f"{group} = {name!r}, but there is no configs/{group}/{name}.yaml.{suggest(name, link.options)}"
    for link in chain:
        key = getattr(link, "full_key", None)
        if isinstance(link, OmegaConfBaseException) and key:
            reason = str(link.msg or link).splitlines()[0]
            if key == "experiment":
                return "experiment: the first line of its file must be `# @package _global_`. Add it, as in configs/experiment."
            if "not in" in reason:
                parent = getattr(link, "parent_node", None)
                known = (
                    [str(name) for name in parent if name not in ("_target_", "hydra")] if isinstance(parent, DictConfig) else []
                )
                group, _, name = str(key).rpartition(".")
                others = [command.__name__.lower() for command in COMMANDS if key in {field.name for field in fields(command)}]
                if others:
                    return f"There is no key {key} here: it is an option of fsl {', '.join(others)}. Leave it out."
                if not group and isinstance(parent, DictConfig) and (inner := _within(parent, name)):
                    return f"There is no key {name}. Did you mean {inner}?"
                place = f" in the {group} that is chosen ({group}=NAME chooses another)" if group in GROUPS else ""
                return f"There is no key {key}{place}.{suggest(name, known) if known else ''}"
            if "not Optional" in reason:
                return f"{key} = null, but it must have a value. Give it one: {key}=..."
            typed = re.fullmatch(r"Value (.+?) (?:of type '\w+' could not be converted to|is not a valid) (\w+).*", reason)
            if typed:
                return must_be(str(key), typed[1], KINDS.get(typed[2], typed[2]))
            return f"{key}: {reason}."
    if isinstance(chain[0], OverrideParseException):
        return (
            f"{chain[0].override} cannot be read as key=value. Put quotes around a value that holds other signs than letters, "
            "digits and -_./: key='\"VALUE\"'."
        )
    if twice := re.match(r"Multiple values for ([\w/]+)", str(chain[0])):
        return f"{twice[1]} has two values. Write {twice[1]}=... once, without +."
    setting = re.search(r"In 'algo/(\w+)': Could not override '\w+'", str(chain[0]))
    if setting:  # its optimizer or schedule, which only fsl train has
        return (
            f"algo = {setting[1]} must be trained first. Run fsl train algo={setting[1]}, then give checkpoint=best.pt that it "
            "wrote, and leave algo out."
        )
    if group := re.match(r"Could not override '([\w/]+)'", str(chain[0])):
        return f"{group[1]} is not an option of this command. Leave it out; --help lists the options."
    lines = [line.strip() for line in str(chain[0]).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", ". ".join(lines[:2]))


def _within(config: DictConfig, name: str) -> str | None:
    """The path of the option `name` in some group of a config; the task comes first if several have it."""
    leaves = flat(OmegaConf.to_container(config, throw_on_missing=False))
    own = [key for key in leaves if key.endswith(f".{name}") and key.partition(".")[0] in (*GROUPS, "task", "device")]
    return min(own, key=lambda key: (not key.startswith("task."), key), default=None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
