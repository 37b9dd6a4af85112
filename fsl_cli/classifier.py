"""A few-shot algorithm applied to images or texts: `Trained.adapt(images, labels)` returns a Classifier."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fsl_cli import checkpoint
from fsl_cli.algos.base import Algorithm
from fsl_cli.calibration import Estimate, Rejection, check_threshold, estimate, evened, held_out, left_out, rejection, temperature
from fsl_cli.datasets.images import ARRAY_CHANNELS, as_image, open_image, shown
from fsl_cli.datasets.texts import to_items, to_texts
from fsl_cli.episodes import Examples
from fsl_cli.models.texts import TextEmbedding

UNKNOWN = "unknown"
BATCH = 32  # images embedded at once
BEST = 5  # classes in a ranking
CALIBRATION = 50  # most images held out to choose the temperature and the threshold
ENOUGH = 3  # images of a class, at least, to calibrate on it: of two, leaving one out leaves a single example

Picture = Image.Image | np.ndarray | Tensor | str | Path  # or a text, as a str, for a model that takes texts


class Prediction(NamedTuple):
    """The answer for an image or text."""

    label: str  # the most probable class, or `unknown` if it is not probable enough
    probability: float  # of the most probable class
    ranking: list[tuple[str, float]]  # the most probable classes, best first, with their probabilities


class Trained:
    """An algorithm with its weights, ready to adapt to classes of images or texts.

    Args:
        algo: in eval mode, with its norm protocol set.
        make: converts a picture to a uint8 item of a given shape, as the data set of the training did.
        shape: of an item: `[C, H, W]`, or `[]` for texts.
        origin: config, choices and data of the checkpoint, as plain values, for files written by `save`.
        way: the number of classes of a fixed head; None: any.
    """

    def __init__(
        self,
        algo: Algorithm,
        make: Callable[[Image.Image, tuple[int, ...]], np.ndarray],
        shape: tuple[int, ...],
        origin: dict[str, Any],
        way: int | None = None,
    ) -> None:
        self.algo, self.make, self.shape, self.origin, self.way = algo.eval(), make, shape, origin, way
        self.device = next(algo.parameters()).device
        self.what = "images" if shape else "texts"
        self.embeds = algo.bulk and algo.norm == "running"  # embeddings do not depend on the episode

    def adapt(self, images: Iterable[Picture], labels: Iterable[object]) -> "Classifier":
        """Learns classes from labelled images or texts, any number of each class.

        Args:
            images: files, Pillow images, arrays or tensors `[H, W]`, `[H, W, C]` or `[C, H, W]`; or texts.
            labels: one for each; the names of the classes are `str(label)`.

        Raises:
            ValueError: an image or label cannot be read, their numbers differ, there are fewer than two classes, or another
                number than that of a fixed head.
        """
        if _is_one(labels):
            raise ValueError(f"The labels are {shown(labels)}, expected a list of them, one for each of the {self.what}.")
        return self.learn(self.items(images), [_class_name(label, number) for number, label in enumerate(labels, start=1)])

    def items(self, images: Iterable[Picture]) -> np.ndarray:
        """Items `[n, C, H, W]` of pictures of any kind, or `[n]` of texts."""
        if _is_one(images):
            raise ValueError(f"The {self.what} are {shown(images)}, expected a list of them. Put a single one into brackets.")
        if self.what == "texts":
            items = to_items(cast(Iterable[str], images))
        else:
            items = [self.item(image, number) for number, image in enumerate(images, start=1)]
        if not len(items):
            raise ValueError(f"There are no {self.what}, expected a list of one or more. Add some.")
        return items if isinstance(items, np.ndarray) else np.stack(items)

    def item(self, image: Picture, number: int = 1) -> np.ndarray:
        """The item `[C, H, W]` of a picture of any kind; `number`: its number in error messages."""
        if isinstance(image, Tensor):
            image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.cpu().numpy()
        return self.make(open_image(Path(image)) if isinstance(image, str | Path) else as_image(image, number), self.shape)

    @torch.no_grad()
    def learn(self, items: np.ndarray, labels: Sequence[str]) -> "Classifier":
        """Learns classes from items `[n, C, H, W]`, or `[n]` if these are texts."""
        names = sorted(set(labels))
        if len(items) != len(labels):
            raise ValueError(f"There are {len(items)} {self.what}, but {len(labels)} labels. Give one label for each.")
        if len(names) < 2:
            raise ValueError(
                f"The {self.what} are of {len(names)} class, expected two or more. Add {self.what} of another class."
            )
        if self.way not in (None, len(names)):
            raise ValueError(
                f"The support {self.what} are of {len(names)} classes, but algo = {self.origin['choices']['algo']} has a head "
                f"for the task.way = {self.way} that it was trained with. Give {self.way} classes, train with "
                f"task.way={len(names)}, or use an algorithm without a fixed head, such as algo=protonet."
            )
        slots = np.array([names.index(label) for label in labels])
        order = np.argsort(slots, kind="stable")  # sorted by class, as in episodes: some algorithms then take one of each in turn
        targets = functional.one_hot(torch.from_numpy(slots[order]).to(self.device), len(names)).float()
        support = Examples(self.embed(items[order]), targets)
        sure = temperature(*held_out(self.algo, support, self.embeds, ENOUGH, CALIBRATION))
        return Classifier(self, support, names, sure)

    def embed(self, items: np.ndarray) -> Tensor:
        """Embeddings `[n, ...]` of items if they do not depend on the episode, else the network's inputs."""
        parts = [self.inputs(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
        return torch.cat([self.algo.embed(part) if self.embeds else part for part in parts])

    def inputs(self, items: np.ndarray) -> Tensor:
        """The network's inputs: images as floats in [0, 1], or texts as tokens."""
        if isinstance(self.algo.model, TextEmbedding):
            tokens = torch.from_numpy(self.algo.model.encode(to_texts(items)))
            # Support and query need the same length only if they pass through the network together.
            return (tokens[:, : max(1, int(tokens.count_nonzero(1).max()))] if self.embeds else tokens).to(self.device)
        return torch.from_numpy(np.ascontiguousarray(items)).to(self.device).float() / 255


class Classifier:
    """An algorithm adapted to classes: `classifier(images)` predicts the class of each image.

    Args:
        trained: the algorithm.
        support: its support set: embeddings `[n, features]`, or the network's inputs if `trained.embeds` is false.
        names: of the classes.
        temperature: divides the logits, so that probabilities are calibrated.
    """

    @torch.no_grad()
    def __init__(self, trained: Trained, support: Examples, names: list[str], temperature: float) -> None:
        self.trained, self.support, self.names, self.temperature = trained, support, names, temperature
        if trained.embeds:
            predictor = trained.algo.adapt(evened(trained.algo, support))
            self.predictor = lambda inputs: predictor(trained.algo.embed(inputs))
        else:
            self.predictor = trained.algo.fit(evened(trained.algo, support))

    def __call__(self, images: Iterable[Picture], reject_below: float | None = None) -> list[Prediction]:
        """Predicts the class of each image or text.

        Args:
            images: as for `Trained.adapt`.
            reject_below: the answer is `unknown` if no class has this probability.

        Raises:
            ValueError: an image cannot be read, `reject_below` is no probability, or a class has the name `unknown`.
        """
        return self.classify(self.trained.items(images), reject_below)

    @torch.no_grad()
    def classify(self, items: np.ndarray, reject_below: float | None = None) -> list[Prediction]:
        """Predicts the class of each of the items `[n, C, H, W]`, or texts `[n]`."""
        check_threshold(reject_below)
        if reject_below is not None:
            self._refuse_unknown()
        answers = []
        for start in range(0, len(items), BATCH):
            sure = self.probabilities(self.trained.inputs(items[start : start + BATCH]))  # [n, way]
            best = sure.topk(min(BEST, len(self.names)))
            for values, slots in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                ranking = [(self.names[slot], value) for slot, value in zip(slots, values, strict=True)]
                rejected = reject_below is not None and values[0] < reject_below
                answers.append(Prediction(UNKNOWN if rejected else ranking[0][0], values[0], ranking))
        return answers

    def probabilities(self, inputs: Tensor) -> Tensor:
        """Probabilities `[n, way]` for network inputs `[n, ...]`."""
        return functional.softmax(self.predictor(inputs) / self.temperature, dim=-1)

    @torch.no_grad()
    def leave_one_out(self) -> Estimate:
        """The accuracy on support items that are left out, one of each class at a time."""
        return estimate(*held_out(self.trained.algo, self.support, self.trained.embeds))

    @torch.no_grad()
    def rejection(self) -> Rejection:
        """The `reject_below` that best separates support items left out alone from those left out with their whole class."""
        self._refuse_unknown()
        trained, support = self.trained, self.support
        if len(self.names) < 3 or support.targets.sum(0).max() < 2:
            raise ValueError(
                "reject_below = auto leaves support images out, alone and with their classes, and needs three classes, one with "
                "two images. Add images, or give a probability: reject_below=0.8."
            )
        known, _ = held_out(trained.algo, support, trained.embeds, limit=CALIBRATION)
        unknown = left_out(trained.algo, support, trained.embeds, trained.way is not None, CALIBRATION)
        if not unknown.isfinite().all():
            raise ValueError(
                f"reject_below = auto leaves classes out, but algo = {trained.origin['choices']['algo']} needs all of them. Give "
                "a probability: reject_below=0.8."
            )
        return rejection(*(functional.softmax(logits / self.temperature, dim=-1).amax(-1) for logits in (known, unknown)))

    def _refuse_unknown(self) -> None:
        if UNKNOWN in self.names:
            raise ValueError(
                f"reject_below answers {UNKNOWN} where no class is probable enough, but a class is called {UNKNOWN} too. "
                "Call the class otherwise, or leave reject_below out."
            )

    def save(self, path: str | Path) -> None:
        """Writes a classifier file: the weights and the support set, as tensors and plain values."""
        pixels = not self.trained.embeds and self.support.inputs.is_floating_point()
        inputs = (self.support.inputs * 255).round().to(torch.uint8) if pixels else self.support.inputs
        learned = {
            "inputs": inputs.cpu(),
            "slots": self.support.targets.argmax(1).cpu(),
            "names": self.names,
            "temperature": self.temperature,
            "norm": self.trained.algo.norm,
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(Path(path), {**self.trained.origin, "algo": self.trained.algo.state_dict(), "classifier": learned})


def restored(trained: Trained, learned: dict[str, Any]) -> Classifier:
    """Restores the classifier from what its `save` wrote."""
    inputs, names = learned["inputs"].to(trained.device), learned["names"]
    targets = functional.one_hot(learned["slots"].to(trained.device), len(names)).float()
    inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
    return Classifier(trained, Examples(inputs, targets), names, learned["temperature"])


def _is_one(images: object) -> bool:
    """Whether this is a single image, text or label instead of several, whose rows or letters would be taken for them."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim in (0, 2) or (images.ndim == 3 and bool({*ARRAY_CHANNELS} & {images.shape[0], images.shape[2]}))
    return isinstance(images, str | bytes) or not isinstance(images, Iterable)


def _class_name(label: object, number: int) -> str:
    value = label.item() if isinstance(label, Tensor | np.generic) else label
    if value is None or value != value or not str(value).strip():
        raise ValueError(f"Label {number} is {value!r}, expected the name of a class. Give it one, or leave its item out.")
    return str(value)
