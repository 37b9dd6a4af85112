"""What networks that take texts share: each decides how a text becomes numbers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from fsl_cli.models.embedding import Embedding


class TextEmbedding(Embedding, ABC):
    """Tokens int64 `[n, length]`, padded with 0 -> embeddings `[n, features]`, which do not depend on the padding."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as tokens int64 `[n, length]`, numbered from 1 and padded with 0; `length` is the same in every call."""


def check_texts(name: str, item_shape: tuple[int, ...]) -> None:
    """Refuses items that are not texts."""
    if item_shape:
        raise ValueError(f"model={name} takes texts, but the items of the data set are {list(item_shape)}. Use model=conv4.")
