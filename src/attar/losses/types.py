"""The types that signatures of losses, and of what takes a loss, are written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

Loss = Annotated[Callable[..., Tensor], "room:losses"]

Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Lt(1)]
# One tensor, or several that are compared pair by pair.
Tensors = Tensor | tuple[Tensor, ...]
