"""A bag of words: the sum of learned vectors, which knows no order but that of word pairs, and needs no other weights.

Words are not listed but hashed (Weinberger et al., 2009, https://arxiv.org/abs/0902.2206), so that words never seen in training
have vectors too, random ones, by which equal words are recognised.
"""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fsl_cli.models.texts import TextEmbedding, check_texts, mean_of

WORD = re.compile(r"\w+(?:['’]\w+)*")


class BagOfWords(TextEmbedding):
    """Tokens `[n, length]` -> embeddings `[n, features]`.

    Args:
        item_shape: of a text, ().
        features: of a vector.
        buckets: vectors in all; words and pairs share them by their hash.
        length: words and pairs of a text that are looked at, from its beginning.
        pairs: neighbouring words have a vector in common, beside their own.
    """

    def __init__(self, item_shape: tuple[int, ...], features: int, buckets: int, length: int, pairs: bool) -> None:
        super().__init__()
        check_texts("bag_of_words", item_shape)
        for name, value, least in (("features", features, 1), ("buckets", buckets, 2), ("length", length, 1)):
            if value < least:
                raise ValueError(f"model.{name} = {value}, but it must be at least {least}.")
        self.out_features, self.buckets, self.length, self.pairs = features, buckets, length, pairs
        self.vectors = nn.Parameter(torch.randn(buckets, features))  # that of bucket 0 stays as it is

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        tokens = np.zeros((len(texts), self.length), np.int64)
        for row, text in zip(tokens, texts, strict=True):
            words = WORD.findall(text.lower())
            both = words + [f"{one} {other}" for one, other in pairwise(words)] if self.pairs else words
            own = [1 + zlib.crc32(word.encode()) % (self.buckets - 1) for word in both[: self.length]]
            row[: len(own)] = own
        return tokens

    def forward(self, inputs: Tensor) -> Tensor:
        return mean_of(functional.embedding(inputs, self.vectors), inputs)
