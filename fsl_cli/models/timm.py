"""Any image network of the package timm (https://github.com/huggingface/pytorch-image-models) as an embedding."""

import pickle
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fsl_cli.models.embedding import Embedding, check_images
from fsl_cli.models.photographs import freeze_folded, in_colour, thaw


class Timm(Embedding):
    """Images `[n, 1 or 3, H, W]` -> the pooled features of the network, after the normalisation that it was trained with.

    Args:
        item_shape: shape of the images, `(C, H, W)`.
        name: timm's name of the network.
        weights: `hub` (timm downloads them once), a local file in timm's naming, or null for random ones.
        frozen: keep the weights and normalisation as they are; else train both further.
        size: pixels that images are resized to; null: they keep their size.
        blank: skip loading the weights, since those of a checkpoint follow.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        item_shape: tuple[int, ...],
        name: str,
        weights: str | None = "hub",
        frozen: bool = True,
        size: int | None = 224,
        blank: bool = False,
    ) -> None:
        super().__init__()
        check_images("timm", item_shape, channels=(1, 3))
        try:
            timm = import_module("timm")
        except ImportError as error:
            raise ValueError("model = timm needs a package that is not installed: pip install timm.") from error
        if not timm.is_model(name):
            close = timm.list_models(f"*{name}*")[:5] or timm.list_models(f"{name[:4]}*")[:5]
            raise ValueError(f"model.name = {name!r}, but timm has no such network. Near it: {', '.join(close) or 'none'}.")
        hub = weights == "hub" and not blank
        try:
            network = timm.create_model(name, pretrained=hub, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"model.weights = hub: timm cannot get the weights of {name} ({str(error).splitlines()[0]}). "
                "Name a file that holds them: model.weights=PATH."
            ) from error
        if weights not in (None, "hub") and not blank:
            _load(network, Path(weights))
        (freeze_folded if frozen else thaw)(network)
        config: dict[str, Any] = timm.data.resolve_model_data_config(network)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(-1, 1, 1), persistent=False)
        self.network, self.size, self.frozen = network, size, frozen
        self.pretrained = weights is not None
        try:
            with torch.no_grad():
                self.out_features = self(torch.zeros(1, *item_shape)).shape[1]
        except (AssertionError, RuntimeError) as error:  # a transformer takes one size, a convolution none too small
            raise ValueError(
                f"model.size = {size}, but {name} takes no images of {size or item_shape[-1]} pixels. Use the size that it was "
                f"trained on: model.size={config['input_size'][-1]}."
            ) from error

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.network.eval()  # no dropout, and no batch statistics in norms that were not made constant
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network((in_colour(inputs, self.size) - self.mean) / self.std)


def _load(network: Any, path: Path) -> None:
    """Loads the weights of a local file into a network, except those of a classifier at its end."""
    if not path.is_file():
        raise ValueError(f"model.weights = {path}: there is no such file. Name one, or hub.")
    safe = import_module("safetensors.torch")
    try:
        if path.suffix == ".safetensors":
            saved: dict[str, Any] = safe.load_file(path)
        else:
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, import_module("safetensors").SafetensorError) as error:
        raise ValueError(f"model.weights = {path} holds no weights that can be read. Save a state_dict alone.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"model.weights = {path} holds no weights by name. Save a state_dict alone.")
    saved = next((saved[key] for key in ("state_dict", "model") if key in saved), saved)
    own = network.state_dict()
    missing = sorted(set(own) - set(saved))
    if missing:
        raise ValueError(f"model.weights = {path} lacks {len(missing)} weights of the network (first: {missing[0]}).")
    other = sorted(name for name, weight in own.items() if weight.shape != saved[name].shape)
    if other:
        shapes = f"{list(saved[other[0]].shape)}, here {list(own[other[0]].shape)}"
        raise ValueError(f"model.weights = {path} is of another network: {other[0]} is {shapes}. Choose the model.name it is of.")
    heads = network.default_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    left = sorted(n for n in set(saved) - set(own) if n.endswith((".weight", ".bias")) and not n.startswith(heads))
    if left:
        raise ValueError(
            f"model.weights = {path} has {len(left)} weights that the network lacks (first: {left[0]}), so that it is of another "
            "one. Choose the model.name it is of."
        )
    network.load_state_dict(saved, strict=False)
