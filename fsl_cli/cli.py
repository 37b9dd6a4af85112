"""`fsl COMMAND key=value ...`: picks the command and passes the rest to Hydra. Slow imports wait until they are needed."""

import importlib
import io
import itertools
import logging
import os
import sys
from contextlib import nullcontext
from importlib.metadata import version

from fsl_cli import choices
from fsl_cli.choices import LISTS

HELP = """fsl: few-shot and meta-learning experiments.

usage: fsl COMMAND [key=value ...]

  train       meta-train, validate, test         fsl train algo=maml dataset=omniglot
  evaluate    score a checkpoint                 fsl evaluate checkpoint=runs/train/.../best.pt
  report      compare finished runs              fsl report runs=runs/sweeps
  data        pack a data set, show an episode   fsl data prepare dataset=mini_imagenet
  predict     recognise your own images          fsl predict support=my_classes/ query=unknown/
  adapt       learn your classes once            fsl adapt support=my_classes/ output=my_classifier
  export      a classifier without fsl           fsl export classifier=my_classifier
  algos       what algo=NAME can be              fsl algos maml: its options, and what they mean
  datasets    what dataset=NAME can be
  models      what model=NAME can be

fsl COMMAND --help lists every option, fsl COMMAND --cfg job the options as they would be used.
"""
COMMANDS = ("train", "evaluate", "report", "data", "predict", "adapt", "export")
# Options of shared config groups that only fsl train reads; other commands refuse them.
TRAINING = ("task.train_way", "task.train_shot", "task.train_queries", "task.tasks", "device.compile", "device.graph",
            "dataset.crop", "dataset.flip", "dataset.jitter")  # fmt: skip
# Hydra's flags, which here may stand anywhere.
FLAGS = {"-h", "--help", "--hydra-help", "--version", "-m", "--multirun", "-r", "--run", "--resolve"}
VALUED = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path"}


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print escapes for characters that the terminal lacks, such as ±
            stream.reconfigure(errors="backslashreplace")
    try:
        code = dispatch(*(sys.argv[1:] or ["--help"]))
        sys.stdout.flush()
    except BrokenPipeError:
        code = unread()
    sys.exit(code)


def dispatch(command: str, *rest: str) -> int:
    """Runs the command named by the first word; returns the exit code."""
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
    elif command in ("-V", "--version"):
        print(version("fsl-cli"))
    elif command in LISTS and rest:
        return choices.described(command, *rest)
    elif command in LISTS:
        print(choices.listing(LISTS[command]), end="")
    elif command in COMMANDS:
        return run(command, [*rest])
    else:
        known = ", ".join((*COMMANDS, *LISTS))
        print(f"There is no command {command!r}. The commands are {known}; fsl --help says more.", file=sys.stderr)
        return 2
    return 0


def checked(command: str, overrides: list[str]) -> list[str]:
    """The overrides with file names quoted; refuses what would end in an error of Hydra."""
    from fsl_cli.config import RECIPES, suggest
    from fsl_cli.overrides import PATHS, expanded, quoted, sweeps, typed

    flags, others = apart(overrides)
    for word in others[1:] if command == "data" else others:  # the first word of fsl data is an action
        key, equals, value = word.partition("=")
        if key.startswith("-"):
            raise ValueError(
                f"{word} begins with a dash. Options are written key=value: {word.lstrip('-') if equals else 'steps=20'}."
            )
        if not equals and not word.startswith("~"):
            raise ValueError(
                f"{word!r} is not of the form key=value. Write it so, without blanks, or with quotes around all of it."
            )
        several = "," in value and value[0] not in "'\"[{" and "(" not in value and "${" not in value
        if several and key not in PATHS and not sweeps(flags):
            raise ValueError(f"{word} gives several values. Add -m to run each of them: fsl {command} -m {word}.")
    words = typed(overrides)
    unread = [key for key in TRAINING if key in words and command != "train"]
    if unread:
        raise ValueError(f"{unread[0]} = {words[unread[0]]}, but only fsl train reads it. Leave it out.")
    removed = {word[1:].partition("=")[0] for word in others if word.startswith("~")}
    for group in ("algo", "dataset", "task", "device", *(("model", "optimizer", "schedule") if command == "train" else ())):
        value = "null" if group in removed else words.get(group)
        if value in ("", "null") or (value and value[0] in "[{"):
            raise ValueError(
                f"{group} = {value or 'null'}, but one must be chosen: {group}=NAME. fsl {command} --help lists them."
            )
    known = choices.options("recipe")
    for name in words["recipe"].split(",") if "recipe" in words else ():
        if name in ("", "null"):
            raise ValueError("recipe = null, but a run without its recipe is asked for by ~recipe. Write that.")
        if name not in known:  # Hydra would ignore it, because recipes are optional
            raise ValueError(f"recipe = {name!r}, but there is no configs/recipe/{name}.yaml.{suggest(name, known)}")
    if "recipe" in removed:  # also removes the recipes of task and model
        overrides = [*overrides, *(f"~{group}" for group in RECIPES[1:] if group not in removed)]
    if not sweeps(flags):
        return quoted(overrides)
    if "out" in words:
        raise ValueError(
            f"out = {words['out']}, but the jobs of a sweep have a folder each. Name the one that holds them: "
            f"hydra.sweep.dir={words['out']}."
        )
    for key in ("checkpoint", "classifier"):
        if "," in words.get(key, ""):
            raise ValueError(f"{key} = {words[key]}, but a sweep has one. Run fsl {command} for each of them.")
    # A comma separates the values of a sweep, also between paths.
    return [expanded(word) if "," in word else quoted([word])[0] for word in overrides]


def apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Separates Hydra's flags, with their values, from the other words."""
    flags: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in VALUED:
            flags += [word, *itertools.islice(rest, 1)]
        elif word in FLAGS or word.partition("=")[0] in VALUED:
            flags.append(word)
        else:
            others.append(word)
    return flags, others


def interrupted() -> int:
    """Reports the interruption; returns the exit code."""
    print("Interrupted.", file=sys.stderr)
    return 130


def unread() -> int:
    """Ends without an error if the reader of a pipe has closed it; returns the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the final flush succeeds
    return 0


def refuse_folder(error: Exception, key: str) -> None:
    """Refuses a run folder that cannot be created, or in which the log cannot be written, naming its key."""
    cause = error.__cause__ if isinstance(error, ValueError) else error  # logging hides the reason behind a ValueError
    if isinstance(cause, OSError) and cause.filename:
        raise ValueError(
            f"{key}: {cause.filename} cannot be made or written ({cause.strerror}). Choose another folder: {key}=PATH."
        ) from error


def run(command: str, overrides: list[str]) -> int:
    """Runs a command through Hydra; returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and we print the sentence
    # Read when torch is imported. The other library, MAGMA, synchronises, which a CUDA graph cannot capture.
    os.environ.setdefault("TORCH_LINALG_PREFER_CUSOLVER", "1")
    logging.raiseExceptions = False  # a pipe may be closed by its reader
    try:
        from fsl_cli.errors import Told, explain
    except KeyboardInterrupt:  # the import takes seconds
        return interrupted()
    try:
        module = importlib.import_module(f"fsl_cli.{command}")
        from fsl_cli import parallel
        from fsl_cli.overrides import asks_help, sweeps

        completed = module.prepare(checked(command, overrides))
        processes = parallel.processes_asked(completed)
        if processes is not None:
            return parallel.launch(processes, command, overrides)
        flags, others = apart(parallel.quiet(completed))
        sys.argv = [f"fsl {command}", *flags, *others]
        try:
            with choices.explaining(command) if asks_help(flags) and "--hydra-help" not in flags else nullcontext():
                module.main()
        except (OSError, ValueError) as error:  # raised by Hydra; errors of a job are reported there
            refuse_folder(error, "hydra.sweep.dir" if sweeps(flags) else "out")
            raise
        parallel.leave()
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:
        return unread()
    except Told as error:
        return error.code
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        print(explained[0], file=sys.stderr)
        return explained[1]
    return 0
