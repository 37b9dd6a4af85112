"""Loads an algorithm, ready to adapt, from a checkpoint, a classifier file or a pretrained network.

Shared by `fsl predict`, `fsl adapt`, `fsl export` and Python.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fsl_cli import checkpoint, device
from fsl_cli.algos.base import Algorithm
from fsl_cli.classifier import Classifier, Trained, restored
from fsl_cli.config import arguments, build, check, composed, head_width, locate, offer
from fsl_cli.datasets.images import check_size, shown
from fsl_cli.datasets.packed import Dataset
from fsl_cli.datasets.texts import is_table
from fsl_cli.errors import explain
from fsl_cli.models.embedding import Embedding
from fsl_cli.models.texts import TextEmbedding
from fsl_cli.overrides import quoted, refuse_unread, typed
from fsl_cli.schema import register

TRAINED = ("model", "algo", "task")  # the config groups that a checkpoint provides
NAMES = (*TRAINED, "dataset")
UNLEARNED = ("model.", "classifier.")  # weights of the network and of pre-training; others are learned by the algorithm
MUST_TRAIN = "algo = {} must be trained first. Give checkpoint=best.pt, or leave algo= out."
# Options of fsl predict that load() does not take, and what to use in Python.
ELSEWHERE = {
    "reject_below": "it is an argument of a classifier",
    "leave_one_out": "it is a method of a classifier",
    "support": "adapt() takes images and labels",
    "query": "a classifier takes images",
    "out": "nothing is written",
    "checkpoint": "it is the first argument of load()",
    "classifier": "it is the argument of load_classifier()",
}
SIZE, CHANNELS = 225, 3  # of images if there is no checkpoint: those of efficientnet_lite0

register()


def prepare(overrides: list[str]) -> list[str]:
    """Opens the checkpoint or classifier, and registers its settings with Hydra."""
    words = typed(overrides)
    if words.get("device") == "ddp":
        raise ValueError("device = ddp, but predictions are made by one process. Use device=auto, cpu or cuda.")
    for key in words:
        if key.partition(".")[0] == "task":
            raise ValueError(f"{key} = {words[key]}, but the support says how many classes there are, and of what. Leave it out.")
    keys = [key for key in ("checkpoint", "classifier") if words.get(key, "null") != "null"]
    if not keys:  # the pretrained default: for texts if the support is a table
        return ["model=text_encoder", *overrides] if is_table(words.get("support", "")) and "model" not in words else overrides
    if len(keys) == 2:
        raise ValueError("classifier already holds what its checkpoint did. Give checkpoint or classifier, not both.")
    for key in words:
        if keys == ["classifier"] and key.partition(".")[0] in ("algo", "model", "size"):
            raise ValueError(
                f"{key} = {words[key]}, but the classifier has learned its classes, and how sure to be, with what it has. Leave "
                f"{key} out, or run fsl adapt again."
            )
    offer(checkpoint.groups(checkpoint.load(words[keys[0]], keys[0]), TRAINED))
    return [*(f"{group}=trained" for group in TRAINED if group not in words), *overrides]


def open_trained(cfg: DictConfig, choices: Mapping[str, str], overrides: Iterable[str]) -> tuple[Trained, dict[str, Any]]:
    """The algorithm of the config, with its weights, and the content of its checkpoint or a substitute for one.

    `overrides`: as typed.
    """
    key = "classifier" if "classifier" in cfg and cfg.classifier is not None else "checkpoint"
    path = cfg[key]
    if path is None:
        refuse_untrained(cfg, choices)
    check(cfg)
    content = checkpoint.load(path, key) if path is not None else blank(cfg, choices)
    names = {name: content["choices"][name] if choices.get(name, "trained") == "trained" else choices[name] for name in NAMES}
    shape = tuple(content["data"]["item_shape"])
    if len(shape) not in (0, 3):
        raise ValueError(f"{key} = {path} was trained on items of shape {list(shape)}, neither images nor texts. Use another.")
    if cfg.size is not None and not shape:
        raise ValueError(f"size = {cfg.size}, but texts have none. Leave it out.")
    if cfg.size is not None:
        check_size(cfg.size, "size")
        shape = (shape[0], cfg.size, cfg.size)
    source = OmegaConf.create(content["config"]).dataset
    maker: type[Dataset] = Dataset if source is None else locate(source["_target_"], "dataset")
    place = device.choose(cfg.device.name, None if cfg.device.threads == "auto" else cfg.device.threads)
    algo = rebuild(cfg, choices, overrides, content if path is not None else None, key, shape, place)
    algo.use_norm(norm(cfg.norm, algo, content))
    config = OmegaConf.masked_copy(cfg, [*TRAINED])
    with open_dict(config):
        config.dataset = source
    origin = {
        "config": OmegaConf.to_yaml(config),
        "choices": names,
        "data": {"item_shape": list(shape), "classes": content["data"]["classes"]},
    }
    return Trained(algo, maker.item, shape, origin, head_width(cfg.algo)), content


def rebuild(
    cfg: DictConfig,
    choices: Mapping[str, str],
    overrides: Iterable[str],
    content: dict[str, Any] | None,
    key: str,
    item_shape: tuple[int, ...],
    place: torch.device,
    regression: bool = False,
) -> Algorithm:
    """The algorithm of a config on its device, with the weights of a checkpoint or of its pretrained network."""
    own = content is not None and choices.get("algo", "trained") in ("trained", content["choices"]["algo"])
    refuse_unread(cfg.algo, typed(overrides), training=False, learned=own)
    if own and content is not None and not regression:
        refuse_other_way(cfg, content)
    if content is None:
        model, classes = pretrained(cfg, choices, item_shape), 1
    else:
        model, classes = build(cfg.model, "model", item_shape=item_shape, blank=True), content["data"]["classes"]
    algo = build(cfg.algo, "algo", model=model, classes=classes, regression=regression)
    algo = device.settle(algo, place, cfg.device.precision.value)
    give_weights(algo, choices, content, key)
    return algo


def refuse_other_way(cfg: DictConfig, content: dict[str, Any]) -> None:
    """Refuses a number of classes other than that of a checkpoint's head."""
    name, made, asked = content["choices"]["algo"], head_width(OmegaConf.create(content["config"]).algo), head_width(cfg.algo)
    if None not in (made, asked) and made != asked:
        raise ValueError(
            f"task.way = {asked}, but the head of algo={name} was trained for task.way={made}. Leave task.way out, or train an "
            "algorithm that takes any, such as algo=protonet."
        )


def give_weights(algo: Algorithm, choices: Mapping[str, str], content: dict[str, Any] | None, key: str) -> None:
    """Loads the weights of a checkpoint into `algo`: all of them, or only the network if another algorithm was chosen.

    Without a checkpoint the network is pretrained, and an algorithm with other weights to learn is refused.
    """
    asked = choices.get("algo", "trained")
    learned = any(not name.startswith(UNLEARNED) and value.numel() > 1 for name, value in algo.state_dict().items())
    if content is None:
        if learned:
            raise ValueError(MUST_TRAIN.format(asked))
        return None
    own = content["choices"]["algo"]
    if key == "classifier" or asked in ("trained", own):
        return checkpoint.load_weights(algo, content, key)
    if learned or not all("running" in norms for norms in (checkpoint.trainer(content).norms, algo.norms)):
        raise ValueError(
            f"algo = {asked}, but the checkpoint was trained by algo={own}. Leave algo out. (The network of what is not trained "
            "through inner steps can be used with another head that needs no training: algo=centroid, logistic, r2d2, "
            "metaoptnet, knn or finetune.)"
        )
    return checkpoint.load_network(algo, content, key)


def refuse_untrained(cfg: DictConfig, choices: Mapping[str, str]) -> None:
    """Without a checkpoint, refuses an algorithm whose head has the width of a training task."""
    if "way" in cfg.algo:
        raise ValueError(MUST_TRAIN.format(choices["algo"]))


def pretrained(cfg: DictConfig, choices: Mapping[str, str], item_shape: tuple[int, ...]) -> Embedding:
    """Builds the pretrained network of a config without a checkpoint."""
    model = build(cfg.model, "model", item_shape=item_shape)
    if not model.pretrained:
        raise ValueError(
            f"model = {choices['model']} has no weights yet. Give checkpoint=best.pt that fsl train wrote, or choose "
            "model=efficientnet_lite0 or, for texts, text_encoder, which come with weights."
        )
    return model


def blank(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """The content of a checkpoint, as far as it is needed, for an algorithm without one."""
    names = {name: choices[name] for name in TRAINED} | {"dataset": "trained elsewhere"}
    config = OmegaConf.create({"dataset": None})
    texts = issubclass(arguments(cfg.model, "model")[0], TextEmbedding)
    shape = [] if texts else [CHANNELS, cfg.size or SIZE, cfg.size or SIZE]
    return {"config": OmegaConf.to_yaml(config), "choices": names, "data": {"item_shape": shape, "classes": 1}}


def norm(asked: str | None, algo: Algorithm, content: dict[str, Any]) -> str:
    """The norm protocol for predictions: one under which an answer does not depend on the other queries."""
    if asked == "transductive":
        raise ValueError(
            "norm = transductive would let each answer depend on the other images. Choose running, support or one_query."
        )
    if "classifier" not in content:
        return asked or next(protocol for protocol in ("running", "support") if protocol in algo.norms)
    own = content["classifier"]["norm"]
    if asked not in (None, own):
        raise ValueError(f"norm = {asked}, but the classifier has learned its classes under {own}. Leave norm= out.")
    return own


def load(path: str | Path | None = None, *overrides: str) -> Trained:
    """Returns an object with `adapt(images, labels)`: the algorithm of a checkpoint, or the pretrained default.

    Args:
        path: a best.pt or last.pt that `fsl train` wrote; None: the pretrained default.
        overrides: options of `fsl predict`, such as `"device=cpu"` or `"algo.head_epochs=50"`.

    Raises:
        ValueError: the file is missing, damaged or of another kind, or an option is wrong; the message says how to fix it.
    """
    return _opened(overrides, "checkpoint", path)[0]


def load_classifier(path: str | Path, *overrides: str) -> Classifier:
    """The classifier in a file that `fsl adapt` or `Classifier.save` wrote; other arguments and errors as in `load`."""
    trained, content = _opened(overrides, "classifier", path)
    return restored(trained, content["classifier"])


def _opened(overrides: Iterable[str], key: str, path: str | Path | None) -> tuple[Trained, dict[str, Any]]:
    if not isinstance(path, str | Path | None):
        raise ValueError(f"The first argument is {shown(path)}, expected the name of a file that fsl wrote.")
    for word in overrides:
        if not isinstance(word, str):
            raise ValueError(f"The option {shown(word)} is no text. Write it as key=value, as in load(PATH, 'device=cpu').")
    unread = [name for name in typed(overrides) if name in ELSEWHERE or name.startswith("hydra.")]
    if unread:
        raise ValueError(f"{unread[0]} is not read here: {ELSEWHERE.get(unread[0], 'only commands do')}. Leave it out.")
    words = [*overrides, *([] if path is None else [f"{key}={path}"])]
    try:
        return open_trained(*composed("predict", prepare(quoted(words))), words)
    except (HydraException, OmegaConfBaseException) as error:
        explained = explain(error)
        assert explained is not None, "errors of Hydra are told"
        raise ValueError(explained[0]) from error
