"""From tokens to maps and back, with or without a class token."""

from __future__ import annotations

from math import gcd, isqrt
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.models.projectors._forms import check_pair, told
from attar.models.projectors._parts import Linear, channels, place
from attar.runtime import UsageError

Prefix = Annotated[int, Ge(0), Le(1000)]


def tokens(
    student: Tensor, teacher: Tensor, *, prefix: Prefix | None = None, trained: bool = True
) -> nn.Module:
    """The first signal in the form of the second: between maps and tokens, and between grids.

    Joins a convolutional network and a vision transformer, or transformers of other patch sizes.
    Tokens [N, T, C] are *prefix* tokens (the class token and the like), then a grid of patches
    row by row; a map [N, C, H, W] is a grid alone.

    - A grid becomes the second's: averaged (adaptive average pooling) along an axis where it is
      larger, bilinear where it is smaller.
    - Prefix tokens go one to one; surplus ones are dropped, and one that the first signal has not
      is the mean of its grid, which is what takes a class token's place in a convolutional
      network.
    - Channels are mapped by a trained ``nn.Linear``, with weights as in `linear`.

    For the teacher's side say ``trained: false``, which keeps channels and trains nothing; its
    first signal is the teacher's.

    Args:
        prefix: tokens before the patches, in every signal that has tokens. Left out, it is 0 or
            1, whichever leaves a grid: of the map's proportions beside a map, square otherwise.
        trained: map channels to the second signal's.

    Errors: no grid is found, a signal without positions, or none that is a floating tensor
    (UsageError).
    """
    check_pair("tokens", student, teacher, ("first", "second"))
    if 2 in (student.ndim, teacher.ndim):
        raise UsageError(
            "projector tokens: both signals must have positions, [N, T, C] or [N, C, H, W]; "
            f"{told(student, teacher, ('first', 'second'))}; use linear, or pool on the "
            "teacher's side, to average positions"
        )
    mapped = None
    if trained:
        mapped = Linear(channels(student), channels(teacher), **place(student))
    if student.ndim == teacher.ndim == 3 and student.shape[1] == teacher.shape[1]:
        return mapped or nn.Identity()
    return Tokens(_layout(student, teacher, prefix), _layout(teacher, student, prefix), mapped)


class Layout(NamedTuple):
    """How positions lie: prefix tokens (None for a map), then a grid."""

    prefix: int | None
    height: int
    width: int


class Tokens(nn.Module):
    """Positions from one layout to another, channels by *mapped* where it is given."""

    def __init__(self, source: Layout, goal: Layout, mapped: nn.Module | None) -> None:
        super().__init__()
        self.source = source
        self.goal = goal
        self.mapped = mapped

    def forward(self, signal: Tensor) -> Tensor:
        lead, grid = self._split(signal)
        patches = self._resized(grid).flatten(2).transpose(1, 2)
        if self.goal.prefix:
            lead = lead[:, : self.goal.prefix]
            absent = self.goal.prefix - lead.shape[1]
            mean = grid.mean((2, 3))[:, None].expand(-1, absent, -1)
            patches = torch.cat([lead, mean, patches], dim=1)
        if self.mapped is not None:
            patches = self.mapped(patches)
        if self.goal.prefix is not None:
            return patches
        return patches.transpose(1, 2).unflatten(2, (self.goal.height, self.goal.width))

    def _split(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix tokens [N, P, C] and the grid [N, C, H, W]."""
        prefix, height, width = self.source
        if prefix is None:
            return signal.new_empty(len(signal), 0, signal.shape[1]), signal
        grid = signal[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
        return signal[:, :prefix], grid

    def _resized(self, grid: Tensor) -> Tensor:
        goal = self.goal.height, self.goal.width
        if tuple(grid.shape[2:]) == goal:
            return grid
        small = min(grid.shape[2], goal[0]), min(grid.shape[3], goal[1])
        grid = F.adaptive_avg_pool2d(grid, small)
        return grid if small == goal else F.interpolate(grid, goal, mode="bilinear")

    def __repr__(self) -> str:
        last = "" if self.mapped is None else f" > {self.mapped!r}"
        return f"Tokens({_said(self.source)} to {_said(self.goal)}){last}"


def _layout(signal: Tensor, other: Tensor, prefix: int | None) -> Layout:
    if signal.ndim == 4:
        return Layout(None, signal.shape[2], signal.shape[3])
    height, width = other.shape[2:] if other.ndim == 4 else (1, 1)
    for lead in (0, 1) if prefix is None else (prefix,):
        grid = _grid(signal.shape[1] - lead, height, width)
        if grid is not None:
            return Layout(lead, *grid)
    proportions = "a square" if height == width else f"a grid of {height} to {width}"
    tried = "neither none nor one" if prefix is None else f"not {prefix}"
    raise UsageError(
        f"projector tokens: of {signal.shape[1]} tokens {tried} can stand before {proportions} "
        f"of patches; {told(signal, other, ('one', 'the other'))}; say how many do: prefix"
    )


def _grid(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Height and width of *count* patches in the proportions of *height* to *width*."""
    common = gcd(height, width)
    height, width = height // common, width // common
    times = isqrt(max(count, 0) // (height * width))
    return (times * height, times * width) if times and times**2 * height * width == count else None


def _said(layout: Layout) -> str:
    grid = f"{layout.height}x{layout.width}"
    return f"map {grid}" if layout.prefix is None else f"{layout.prefix} + {grid} tokens"
