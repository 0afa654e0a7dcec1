"""ReviewKD's fusion of stages."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.models.projectors._forms import check_pair
from attar.models.projectors._parts import Conv2d, place
from attar.models.types import Size
from attar.runtime import UsageError

WIDEST = 512


def fusion(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], *, width: Size | None = None
) -> nn.Module:
    """Each stage of the student joined with all deeper ones, to the teacher's stages (ReviewKD).

    Attention-based fusion, top-down (arXiv:2104.09044, section 3.3). From the deepest stage up,
    with ``y`` what came from below::

        x = BN(conv1x1(f))                                  to *width* channels
        y = nearest(y) to the size of x
        a, b = sigmoid(conv1x1([x, y]))                     one weight a position each
        x = a x + b y                                       not at the deepest
        x = nearest(x) to the teacher's size
        out = BN(conv3x3(x))                                to the teacher's channels

    and ``x`` goes on to the next stage. Signals are tuples of maps [N, C, H, W] from shallow to
    deep; a vector [N, C] counts as a map of one position. Gives a tuple in the teacher's shapes
    and order, for `hierarchical_context` summed over stages. Weights are placed as in `linear`.

    Args:
        width: channels while fusing; those of the student's deepest stage when left out, at most
            512.

    Errors: no tuples, other lengths, signals that are no maps, stages that grow (UsageError).
    """
    _check(student, teacher)
    inner = width or min(WIDEST, student[-1].shape[1])
    levels = [
        Level(own, inner, other, deepest=index == len(student) - 1)
        for index, (own, other) in enumerate(zip(student, teacher, strict=True))
    ]
    return Fusion(levels)


class Level(nn.Module):
    """One stage: narrowed or widened, fused with what came from below, brought to the teacher's."""

    def __init__(self, student: Tensor, inner: int, teacher: Tensor, *, deepest: bool) -> None:
        super().__init__()
        where = place(student)
        self.flat = teacher.ndim == 2
        self.size = (1, 1) if self.flat else (teacher.shape[2], teacher.shape[3])
        first = Conv2d(student.shape[1], inner, 1, bias=False, **where)
        last = Conv2d(inner, teacher.shape[1], 3, padding=1, bias=False, **where)
        for layer in (first, last):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # as the authors do
        self.narrow = nn.Sequential(first, nn.BatchNorm2d(inner, **where))
        self.widen = nn.Sequential(last, nn.BatchNorm2d(teacher.shape[1], **where))
        self.attention = None if deepest else Conv2d(2 * inner, 2, 1, **where)

    def forward(self, signal: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher, and what goes up."""
        signal = signal[:, :, None, None] if signal.ndim == 2 else signal
        fused = self.narrow(signal)
        if self.attention is not None and below is not None:
            below = F.interpolate(below, fused.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([fused, below], dim=1)).sigmoid()
            fused = fused * shares[:, :1] + below * shares[:, 1:]
        if fused.shape[2:] != self.size:
            fused = F.interpolate(fused, self.size, mode="nearest")
        out = self.widen(fused)
        return (out.flatten(1) if self.flat else out), fused


class Fusion(nn.Module):
    """Levels from shallow to deep, run from deep to shallow."""

    def __init__(self, levels: list[Level]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)

    def forward(self, signals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        below: Tensor | None = None
        found: list[Tensor] = []
        for level, signal in zip(reversed(self.levels), reversed(signals), strict=True):
            out, below = level(signal, below)
            found.append(out)
        return tuple(reversed(found))

    def __repr__(self) -> str:
        return f"Fusion of {len(self.levels)} stages"


def _check(student: object, teacher: object) -> None:
    if not (isinstance(student, tuple) and isinstance(teacher, tuple) and student):
        raise UsageError(
            "projector fusion: the student's and the teacher's signal must be tuples of stages; "
            "list several addresses: student: [feature:stage1, feature:stage2]"
        )
    if len(student) != len(teacher):
        raise UsageError(
            f"projector fusion: the student has {len(student)} stages and the teacher "
            f"{len(teacher)}; list as many addresses on both sides"
        )
    for own, other in zip(student, teacher, strict=True):
        check_pair("fusion", own, other)
        if 3 in (own.ndim, other.ndim):
            raise UsageError(
                "projector fusion: stages must be maps [N, C, H, W] or vectors [N, C], not "
                f"{list((own if own.ndim == 3 else other).shape)}; choose others"
            )
    sizes = [stage.shape[2:].numel() for stage in student]
    if any(deep > shallow for shallow, deep in pairwise(sizes)):
        raise UsageError(
            "projector fusion: stages must go from shallow to deep, and these grow: "
            f"{[list(stage.shape) for stage in student]}; list the larger maps first"
        )
