"""Where the context parameters of CAVIA enter a network that is otherwise the same for all episodes."""

from torch import Tensor, nn

from fsl_cli.models.embedding import Embedding
from fsl_cli.models.norm import Norm
from fsl_cli.models.texts import TextEmbedding


class Context(nn.Module):
    """Turns a context `[size]` into weights that replace some of a model's own; a context of zeros gives the model's own.

    In a model with normalisation, a linear function of the context scales and shifts every normalised map (FiLM; the paper does
    so in one of its four layers). In any other, the context acts as a further input: a linear function of it is added to the
    bias of the first linear layer that has one.
    """

    def __init__(self, model: Embedding, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"algo.context = {size}, but algo.adapts = context needs at least 1 number to adapt.")
        if isinstance(model, TextEmbedding):
            raise ValueError("algo.adapts = context, but a model of texts has no place for a context. Use algo=anil.")
        modules = dict(model.named_modules())
        widths = {name: len(layer.scale) for name, layer in modules.items() if isinstance(layer, Norm)}
        layers = {name: layer for name, layer in modules.items() if isinstance(layer, nn.Linear)}
        linear = {name: layer.out_features for name, layer in layers.items() if layer.bias is not None}
        if not widths and not linear:
            raise ValueError(
                "algo.adapts = context, but the model has neither a normalisation of ours nor a linear layer with a bias, "
                "where the context could enter. Choose model=conv4 or model=mlp."
            )
        self.size, self.scales = size, bool(widths)
        self.places = list(widths) or list(linear)[:1]
        outs = [2 * width for width in widths.values()] or list(linear.values())[:1]
        self.entries = nn.ModuleList(nn.Linear(size, out, bias=False) for out in outs)
        for weight in self.entries.parameters() if self.scales else ():
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")  # as published; it also sets the size of an inner step

    def forward(self, context: Tensor, model: Embedding) -> dict[str, Tensor]:
        """The weights of `model` that the context changes, by name."""
        weights = {}
        for name, entry in zip(self.places, self.entries, strict=True):
            change = entry(context)
            if self.scales:
                scale, shift = (model.get_parameter(f"{name}.{part}") for part in ("scale", "shift"))
                gain, offset = change.chunk(2)
                weights[f"{name}.scale"] = (1 + gain) * scale
                weights[f"{name}.shift"] = (1 + gain) * shift + offset
            else:
                weights[f"{name}.bias"] = model.get_parameter(f"{name}.bias") + change
        return weights
