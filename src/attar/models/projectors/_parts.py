"""What projectors are made of: layers that take half precision, and parts in a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` that takes a signal of half precision outside autocast too."""

    def forward(self, signal: Tensor) -> Tensor:
        return super().forward(signal.to(self.weight.dtype))


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that takes a signal of half precision outside autocast too."""

    def forward(self, signal: Tensor) -> Tensor:
        return super().forward(signal.to(self.weight.dtype))


class ConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` that takes a signal of half precision outside autocast too."""

    def forward(self, signal: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(signal.to(self.weight.dtype), output_size)


class Mean(nn.Module):
    """The mean over positions: [N, T, C] or [N, C, H, W] to [N, C]."""

    def forward(self, signal: Tensor) -> Tensor:
        return signal.mean((2, 3) if signal.ndim == 4 else 1)


class Row(nn.Sequential):
    """Parts one after the other, told in one line."""

    def __repr__(self) -> str:
        return " > ".join(repr(part).replace("\n", "") for part in self)


def row(*parts: nn.Module | None) -> nn.Module:
    """The parts that there are: one as itself, several in a row, none as the identity."""
    there = [part for part in parts if part is not None]
    if not there:
        return nn.Identity()
    return there[0] if len(there) == 1 else Row(*there)


def place(signal: Tensor) -> dict[str, Any]:
    """Where weights for *signal* live: on its device, in float64 for float64, else in float32.

    A bf16 or fp16 signal comes from autocast, which casts weights as well.
    """
    dtype = torch.float64 if signal.dtype == torch.float64 else torch.float32
    return {"device": signal.device, "dtype": dtype}


def channels(signal: Tensor) -> int:
    """How many channels the signal has: its second size for a map, its last otherwise."""
    return signal.shape[1] if signal.ndim == 4 else signal.shape[-1]


def channelwise(student: Tensor, form: int, outputs: int, *, inputs: int = 0) -> nn.Module:
    """A linear map of channels at each position of a signal of *form* dimensions.

    Args:
        student: where weights live, and how many *inputs* there are when these are left out.
    """
    inputs = inputs or channels(student)
    if form == 4:
        return Conv2d(inputs, outputs, 1, **place(student))
    return Linear(inputs, outputs, **place(student))
