"""Logits of a wide last layer that are not made: hidden states, and the layer that reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attar.losses._rows import wide


@dataclass(frozen=True, eq=False)
class Projected:
    """Logits [..., V] as the product that they are: a last layer, and what goes into it.

    logits = scale * (hidden @ weight.T + bias), and with a soft-cap c, c * tanh(logits / c).

    Args:
        hidden: float [..., D], what the last layer reads.
        weight: float [V, D], the last layer.
        bias: float [V]; -inf where a column is absent (a padded vocabulary).
        scale: what the logits are multiplied by.
        softcap: c, above 0: logits then lie in (-c, c).

    `attar.losses.wide` compares these, rows in chunks, so that no [N, V] is ever there. A loss of
    `attar.losses` takes `dense()`.

    >>> import torch
    >>> wide = Projected(torch.tensor([[1.0, 2.0]]), torch.eye(3, 2), scale=2.0)
    >>> wide.shape, wide.dense()
    (torch.Size([1, 3]), tensor([[2., 4., 0.]]))
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2 or self.hidden.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(
                f"a Projected has hidden [..., D] and weight [V, D], "
                f"got {tuple(self.hidden.shape)} and {tuple(self.weight.shape)}."
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"the bias of a Projected must have shape [{self.weight.shape[0]}], one number a "
                f"row of its weight, got {tuple(self.bias.shape)}."
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a number above 0, or None, got {self.softcap}.")

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits that this stands for."""
        return torch.Size([*self.hidden.shape[:-1], self.weight.shape[0]])

    @property
    def requires_grad(self) -> bool:
        """Whether there is anything behind it to be trained."""
        parts = (self.hidden, self.weight, self.bias)
        return any(part is not None and part.requires_grad for part in parts)

    def dense(self) -> Tensor:
        """The logits, [..., V], in float32 or wider."""
        hidden, weight = wide(self.hidden), wide(self.weight)
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        logits = hidden.to(dtype) @ weight.to(dtype).T
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def __getitem__(self, rows: Any) -> Projected:
        """Some of the rows: an index, a slice or a mask of the dimensions before the last."""
        hidden = self.hidden[rows]
        if isinstance(rows, tuple):  # may reach into the last dimension, which is not of rows
            with torch.no_grad():
                lead = self.hidden[..., 0][rows].shape
            if hidden.shape != (*lead, self.hidden.shape[-1]):
                raise IndexError(
                    f"a Projected is indexed by its rows, {tuple(self.hidden.shape[:-1])}, not by "
                    f"its columns, got {rows}; take columns of dense()."
                )
        return replace(self, hidden=hidden)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getattr__(self, name: str) -> Any:
        """Whoever takes this for a tensor is told what it is."""
        raise AttributeError(
            f"a Projected has no '{name}': it stands for logits that are not made; use a loss of "
            f"attar.losses.wide, or dense()."
        )

    def detach(self) -> Projected:
        """The same, without a graph behind it."""
        return self._each(Tensor.detach)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Projected:
        """The same on another device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Projected:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        new: dict[str, Any] = {n: change(p) for n, p in parts.items() if isinstance(p, Tensor)}
        return replace(self, **new)
