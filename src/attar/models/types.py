"""The types that a model's signature is written in; the recipe resolver reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

from annotated_types import Ge, Le, Len
from torch import nn

# The upper bounds are far above any real model: they keep a file that asks for an absurd one
# from being built at all.
Size = Annotated[int, Ge(1), Le(2**24)]
Count = Annotated[int, Ge(1), Le(1000)]
Widths = Annotated[tuple[Size, ...], Len(0, 1000)]
Shape = Annotated[tuple[Size, ...], Len(1, 8)]
Numbers = tuple[float, ...] | None
Pair = tuple[Size, Size] | None
Labels = tuple[str, ...] | None

Model = Annotated[Callable[..., nn.Module], "room:models"]
Projector = Annotated[Callable[..., nn.Module], "room:projectors"]


class DataLike(Protocol):
    """What `build` asks of a data source."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""

    @property
    def outputs(self) -> int | None:
        """Number of classes or targets; None when the data do not tell."""

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation along the first dimension of `shape`."""
