"""A bag of words: a sum of learned vectors, which ignores the order of words and needs no pretrained weights.

Words are not listed but hashed (Weinberger et al., 2009, https://arxiv.org/abs/0902.2206), so that words never seen in training
have vectors too: random ones, by which equal words are recognised. The beginning of a longer word is added as a further word,
so that `transfer`, `transfers` and `transferring` are alike.
"""

import math
import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.models.texts import TextEmbedding, check_texts

WORD = re.compile(r"\w+(?:['’]\w+)*")
BEGINNING = 4  # letters of a word's beginning
SPREAD = 2.4  # length of an embedding before training: unlike texts have a squared distance of about 10, which suits a softmax


class BagOfWords(TextEmbedding):
    """Tokens `[n, length]` -> embeddings `[n, features]`: the sum of their vectors over the square root of their number.

    Args:
        item_shape: shape of a text, ().
        features: length of a vector.
        buckets: number of vectors; words share them by their hash.
        length: how many words and beginnings of a text are read.
    """

    def __init__(self, item_shape: tuple[int, ...], features: int, buckets: int, length: int) -> None:
        super().__init__()
        check_texts("bag_of_words", item_shape)
        for name, value, least in (("features", features, 1), ("buckets", buckets, 2), ("length", length, 1)):
            if value < least:
                raise ValueError(f"model.{name} = {value}, but it must be at least {least}.")
        self.out_features, self.buckets, self.length = features, buckets, length
        self.vectors = nn.Parameter(torch.randn(buckets, features) * SPREAD / math.sqrt(features))  # row 0 (padding) is unused

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        tokens = np.zeros((len(texts), self.length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = WORD.findall(text.lower())
            words += [f"{word[:BEGINNING]}-" for word in words if len(word) > BEGINNING]
            own = [1 + zlib.crc32(word.encode()) % (self.buckets - 1) for word in words[: self.length]]
            row[: len(own)] = own
        return tokens

    def forward(self, inputs: Tensor) -> Tensor:
        there = inputs.ne(0).unsqueeze(-1)  # [n, length, 1]
        vectors = functional.embedding(inputs, self.vectors) * there  # [n, length, features]
        return vectors.sum(1) / there.sum(1).clamp(min=1).sqrt()
