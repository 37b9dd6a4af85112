"""Nested structures of tensors: tuples, named tuples and dictionaries."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(structure: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Applies `change` to every tensor of a structure."""
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, Mapping):
        return {name: map_tensors(part, change) for name, part in structure.items()}
    parts = [map_tensors(part, change) for part in structure]
    return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)


def stack(structures: list[Any]) -> Any:
    """Stacks the tensors of equal structures along a new first dimension."""
    columns = zip(*(leaves(structure) for structure in structures), strict=True)
    stacked = iter([torch.stack(column) for column in columns])
    return map_tensors(structures[0], lambda _: next(stacked))


def leaves(structure: Any) -> Iterator[Tensor]:
    """Iterates over the tensors of a structure."""
    if isinstance(structure, Tensor):
        yield structure
    else:
        for part in structure.values() if isinstance(structure, Mapping) else structure:
            yield from leaves(part)
