"""The contract of a model: a module that turns items into flat embeddings and says how wide they are."""

from torch import nn


class Embedding(nn.Module):
    """Items `[n, *item]` -> embeddings `[n, out_features]`. `build` passes `item_shape` to the constructor."""

    out_features: int
    pretrained: bool = False  # whether it comes with weights that were trained elsewhere

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of an embedding before it was flattened: `(features,)`, or `(channels, height, width)`."""
        return (self.out_features,)


def check_images(name: str, item_shape: tuple[int, ...], channels: tuple[int, ...] = ()) -> None:
    """Refuses items that are not images, or whose number of channels is not in `channels` (empty: any)."""
    if len(item_shape) != 3 or (channels and item_shape[0] not in channels):
        first = " or ".join(map(str, channels)) or "C"
        raise ValueError(f"model={name} takes images [{first}, H, W], but the items of the data set are {described(item_shape)}.")


def described(item_shape: tuple[int, ...]) -> str:
    """How messages describe items of a shape; those of shape () are texts."""
    return str(list(item_shape)) if item_shape else "texts (for which there are model=bag_of_words and text_encoder)"
