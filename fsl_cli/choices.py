"""`fsl algos`, `datasets`, `models` and --help: options and the meaning of their keys, from the comments in the YAML files."""

import ast
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.resources import files
from importlib.resources.abc import Traversable

LISTS = {"algos": "algo", "datasets": "dataset", "models": "model"}
# A key with its indentation, and the comment after its value, if any.
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>(?:(?! # ).)*)(?: # (?P<comment>.+))?")


def options(group: str) -> dict[str, Traversable]:
    """The files of a config group by option name, sorted."""
    entries = files("fsl_cli.configs").joinpath(group).iterdir()
    found = {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def listing(group: str) -> str:
    """A line for each option of a config group: its name and the first comment of its file."""
    first = {name: entry.read_text(encoding="utf-8").splitlines()[0] for name, entry in options(group).items()}
    width = max(map(len, first))
    return "".join(f"{name:<{width}}  {line.removeprefix('# ')}\n" for name, line in first.items())


def described(command: str, name: str, *rest: str) -> int:
    """Prints the YAML file of one option, whose comments explain its keys; returns the exit code."""
    from fsl_cli.config import suggest

    known = options(LISTS[command])
    if rest:
        print(f"fsl {command} takes one name, but was given {rest[0]!r} too. Leave it out.", file=sys.stderr)
        return 2
    if name not in known:
        print(f"{name!r} is none of {command}.{suggest(name, known)}", file=sys.stderr)
        return 2
    print(known[name].read_text(encoding="utf-8"), end="")
    return 0


@contextmanager
def explaining(command: str) -> Iterator[None]:
    """Within it, Hydra's help is printed with the meaning of each key beside it."""
    listed = io.StringIO()
    try:
        with redirect_stdout(listed):
            yield
    finally:  # Hydra exits by SystemExit
        print(_explained(listed.getvalue(), command), end="")


def _explained(listed: str, command: str) -> str:
    """Adds the meanings to Hydra's help, one line of which lists the choices of all groups."""
    before, mark, config = listed.partition(", with {")
    if not mark:
        return listed
    line, _, config = config.partition("\n")
    named = {group: name for group, name in ast.literal_eval("{" + line).items() if name and "/" not in group}
    chosen = {
        group: name for group, name in named.items() if name == "trained" or name in options(group)
    }  # not all have a recipe
    own = files("fsl_cli.configs").joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    meanings = {"": _comments(own)} | {group: _meanings(group, name) for group, name in chosen.items()}
    said = " ".join(f"{group}={name}" for group, name in chosen.items())
    group, written = "", [f"{before}, with {said}:" if said else f"{before}:"]
    for text in config.splitlines():
        found = KEY.fullmatch(text)
        if found and not found["indent"]:
            group = found["key"]
        comment = meanings.get(group if found["indent"] else "", {}).get(found["key"]) if found else None
        written.append(f"{text}  # {comment}" if comment else text)
    return "\n".join([*written, ""])


def _meanings(group: str, name: str) -> dict[str, str]:
    """The comments on the keys of an option, including those of the files that it builds on."""
    known = options(group)
    if name not in known:  # the option `trained`, of a checkpoint
        return {}
    text = known[name].read_text(encoding="utf-8")
    below = [_meanings(group, base) for base in re.findall(r"^  - (\w+)$", text, re.MULTILINE) if base != "_self_"]
    return {key: comment for part in (*below, _comments(text)) for key, comment in part.items()}


def _comments(text: str) -> dict[str, str]:
    """The comments on the top-level keys of a file."""
    found = map(KEY.fullmatch, text.splitlines())
    return {line["key"]: line["comment"] for line in found if line and not line["indent"] and line["comment"]}
