"""Resuming a run, by `resume=PATH` or `resume=auto`: finds its checkpoint, and checks which settings may change."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fsl_cli import checkpoint, parallel
from fsl_cli.config import GROUPS, PLACES, differences
from fsl_cli.overrides import quoted, sweeps, typed
from fsl_cli.tracking import busy

RUNS = Path("runs/train")
STAGE = "pretrain"  # the sub-folder of a run for its first stage
FREE = (*PLACES, "steps", "episodes", "eval_every", "checkpoint_every", "log_every", "early_stop")


def prepare(overrides: list[str]) -> list[str]:
    """Adds the overrides that the run was started with to the typed ones, which take precedence."""
    words = typed(overrides)
    resume = words.get("resume", "null")
    if sweeps(overrides) and resume not in ("null", "", "auto"):
        raise ValueError(
            f"resume = {resume}, but the jobs of a sweep have folders of their own. Go on with one run at a time, without -m; or "
            "with all of a sweep: hydra.sweep.dir=FOLDER resume=auto."
        )
    if resume in ("null", "") or sweeps(overrides):
        return overrides
    if resume == "auto":
        path = Path(words["out"]) / "last.pt" if "out" in words else _unfinished(words)
        if path is None and parallel.speaks():
            print(f"There is no unfinished run like that in {RUNS}: a new one begins.", file=sys.stderr)
        if path is None or not path.exists():  # a new run, even if out= names its folder
            return overrides
    else:
        path = _file(resume)
    started, folder, first = _started(path)
    if "out" in words and Path(words["out"]).resolve() != folder.resolve():
        raise ValueError(f"out = {words['out']}, but resume={path} goes on in its own folder. Do not type out=.")
    if path.name != "last.pt":
        raise ValueError(
            f"resume = {resume}, but a run goes on from last.pt, in its own folder. Name that file or the folder; or start "
            f"a new run from this network: pretrain={resume}."
        )
    kept = [word for word in started if not set(typed([word])) & {*words, "out", "resume"}]
    if words.get("device", "") not in ("", typed(started).get("device")):  # options of the former device no longer apply
        kept = [word for word in kept if not any(key.startswith("device.") for key in typed([word]))]
    place = [] if "out" in words else [f"out={folder}"]
    rest = [word for word in overrides if "resume" not in typed([word])]
    return [*kept, *rest, *quoted([*place, f"resume={'auto' if first else path}"])]


def source(resume: str | None, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to resume a run in `folder` from, or None for a new run."""
    last = folder / "last.pt"
    if resume in (None, "auto") and not last.exists() and (folder / "result.json").exists():
        raise ValueError(f"out = {folder} already holds a result. Choose another folder.")
    if resume in (None, "auto") and not last.exists() and (folder / "best.pt").exists():
        raise ValueError(
            f"out = {folder} holds best.pt of a run whose last.pt is gone, and it would be overwritten. Choose another folder."
        )
    if resume is None:
        if last.exists():
            raise ValueError(f"out = {folder} already holds a run. Go on with resume=auto, or choose another folder.")
        return None
    if resume == "auto" and not last.exists():
        return None
    content = checkpoint.load(last if resume == "auto" else _file(resume), "resume")
    if content["progress"]["best_step"] and not (folder / "best.pt").exists():
        raise ValueError(
            f"resume = {resume}, but best.pt, the best checkpoint of that run until now, is gone from {folder}. Score the last "
            f"one, fsl evaluate checkpoint={last}, or start a new run from it: pretrain={last}."
        )
    return content


def refuse_contradictions(cfg: DictConfig, choices: dict[str, str], overrides: list[str], content: dict[str, Any]) -> None:
    """Refuses to resume with settings that would have led to another checkpoint."""
    before = DictConfig(OmegaConf.create(content["config"]))
    if cfg.steps < content["step"]:
        raise ValueError(f"steps = {cfg.steps}, but the checkpoint stands at step {content['step']}. Ask for more steps.")
    if "${steps}" in OmegaConf.to_yaml(before.schedule):
        refuse_other_length(cfg, content, "schedule")
    words = typed(overrides)
    chosen = {group: (choices[group], content["choices"][group]) for group in ("algo", *GROUPS)}
    changed = {
        key: (here, there)
        for key, (here, there) in {**chosen, **differences(cfg, before)}.items()
        if here != there and key not in FREE and not key.startswith("device.")
    }
    if changed:
        key = min(changed, key=lambda key: key not in words)  # name a typed key first: other changes may follow from it
        here, there = changed[key]
        value = there if isinstance(there, str) else json.dumps(there, separators=(",", ":"))  # null, true, [1,2]
        mend = f"Leave {key} out" if key in words else f"The configs have changed since: type {key}={value}"
        raise ValueError(
            f"{key} = {here}, but the checkpoint of resume={cfg.resume} was trained with {key} = {there}. "
            f"{mend} to go on, or start a new run without resume."
        )


def refuse_other_length(cfg: DictConfig, content: dict[str, Any], *keys: str) -> None:
    """Refuses another number of steps if there are `keys`: settings through which each step depends on that number."""
    before = OmegaConf.create(content["config"]).steps
    if keys and cfg.steps != before:
        raise ValueError(
            f"steps = {cfg.steps}, but the run was started for {before}, and what its steps compute depends on that "
            f"({', '.join(keys)}). Leave steps out to go on, or start a new run from the network of this one: "
            f"pretrain={Path(cfg.resume).with_name('best.pt') if cfg.resume else 'PATH/best.pt'}."
        )


def refuse_other_data(content: dict[str, Any], holds: str | None) -> None:
    """Refuses to resume if the validation classes have changed, on which the best checkpoint was chosen."""
    if content["data"].get("contents", holds) != holds:  # missing in checkpoints of earlier versions
        raise ValueError(
            "dataset: its classes or items have changed since the run began, and its best checkpoint was chosen on those of "
            "before. Put them back to go on, or start a new run without resume."
        )


def refuse_other_test(cfg: DictConfig, folder: Path) -> None:
    """Refuses to test a finished run again on another number of episodes, which would overwrite its result."""
    path = folder / "result.json"
    if path.exists():
        episodes = json.loads(path.read_text(encoding="utf-8"))["episodes"]
        if episodes != cfg.episodes:
            raise ValueError(
                f"episodes = {cfg.episodes}, but the run in {folder} is finished, and was tested on {episodes}. Score it anew "
                f"with fsl evaluate checkpoint={folder / 'best.pt'} episodes={cfg.episodes}."
            )


def _file(resume: str) -> Path:
    path = Path(resume)
    return path / "last.pt" if path.is_dir() else path


def _started(path: Path) -> tuple[list[str], Path, bool]:
    """The overrides of a checkpoint's run, the run folder, and whether the checkpoint belongs to the first stage."""
    best = path.with_name("best.pt")
    if path.name == "last.pt" and best.exists() and not path.exists():
        raise ValueError(
            f"resume = {path}: there is no such file, and a run can go on from that alone. Score the best checkpoint, fsl "
            f"evaluate checkpoint={best}, or start a new run from it: pretrain={best}."
        )
    content = checkpoint.load(path, "resume")
    first = content["choices"].get("stage") == STAGE
    return content["overrides"], path.parents[1] if first else path.parent, first


def _unfinished(words: dict[str, str]) -> Path | None:
    """The last.pt of the newest idle run without a result, started with the same overrides (with any, if none are typed)."""
    asked = {key: value for key, value in words.items() if key != "resume"}
    found = [path for path in RUNS.glob("*/last.pt") if not (path.parent / "result.json").exists()]
    later = ("last.pt", "result.json")  # of the second stage
    firsts = RUNS.glob(f"*/{STAGE}/last.pt")
    found += [path for path in firsts if not any((path.parents[1] / name).exists() for name in later)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            started, folder, first = _started(path)
        except ValueError as error:
            print(f"Passed over: {error}", file=sys.stderr)
            continue
        if path.parent.name == STAGE and not first:
            continue
        if busy(path.parent) or busy(folder):
            print(f"Passed over: another process is at work on {folder}.", file=sys.stderr)
            continue
        if not asked or asked == {key: value for key, value in typed(started).items() if key not in ("out", "resume")}:
            return path
    return None
