"""What networks that take texts have in common here: they own the way in which a text becomes numbers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from fsl_cli.models.embedding import Embedding


class TextEmbedding(Embedding, ABC):
    """Tokens int64 `[n, length]`, 0 where a text has ended, -> embeddings `[n, features]`, whatever the number of zeros."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as tokens int64 `[n, length]`, from 1 on, with 0 behind the last; `length` is the same for all texts."""


def check_texts(name: str, item_shape: tuple[int, ...]) -> None:
    """Refuses items that are no texts."""
    if item_shape:
        raise ValueError(f"model={name} takes texts, but the items of the data set are {list(item_shape)}. Use model=conv4.")
