"""A part of the teacher's parameter, as large as the student's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.runtime import UsageError


class Selected(nn.Module):
    """Evenly spaced entries of every dimension that is larger than wanted."""

    def __init__(self, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        super().__init__()
        self._axes: list[int] = []
        for axis, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
            if size != count:
                self._axes.append(axis)
                self.register_buffer(f"axis{axis}", even(size, count), persistent=False)

    def forward(self, parameter: Tensor) -> Tensor:
        """The entries, in order; of each dimension by itself."""
        for axis in self._axes:
            parameter = parameter.index_select(axis, getattr(self, f"axis{axis}"))
        return parameter


def even(size: int, count: int) -> Tensor:
    """Which of *size* entries *count* evenly spaced ones are.

    >>> even(8, 4), even(7, 3)
    (tensor([0, 2, 4, 6]), tensor([0, 3, 6]))
    """
    if size % count == 0:
        return torch.arange(count) * (size // count)
    return torch.linspace(0, size - 1, count, dtype=torch.float64).round().long()


def select(teacher: Tensor, student: Tensor) -> nn.Module:
    """Evenly spaced rows, columns and channels of the teacher's parameter: for its side of a term.

    An index map from a large layer to a small one, for terms on ``param:PATH``: every dimension
    that is larger keeps evenly spaced entries, the same for all parameters of the same two sizes,
    so that what one layer writes and the next reads stays together. Weight selection, Xu et al.,
    "Initializing Models with Larger Ones", ICLR 2024, uses this map for a start.

    Attention heads are mixed where the spacing crosses them.

    Errors: another number of dimensions, or one in which the teacher is smaller (UsageError).
    """
    for side, signal in (("teacher", teacher), ("student", student)):
        if not isinstance(signal, Tensor) or not signal.is_floating_point():
            kind = signal.dtype if isinstance(signal, Tensor) else type(signal).__name__
            raise UsageError(
                f"projector select: the {side}'s signal must be one floating tensor, not {kind}; "
                "name parameters with param:PATH"
            )
    shapes = f"teacher {list(teacher.shape)}, student {list(student.shape)}"
    if teacher.ndim != student.ndim:
        raise UsageError(
            f"projector select: the parameters have different numbers of dimensions; {shapes}; "
            "name two of one kind"
        )
    if any(t < s for t, s in zip(teacher.shape, student.shape, strict=True)):
        raise UsageError(
            f"projector select: the teacher's parameter is smaller in a dimension, so nothing can "
            f"be selected; {shapes}; name a larger one"
        )
    return Selected(tuple(teacher.shape), tuple(student.shape)).to(teacher.device)
