"""The convolutional projector."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.models.projectors._forms import average, check_pair, told
from attar.models.projectors._parts import Conv2d, ConvTranspose2d, place, row
from attar.runtime import UsageError

Kernel = Annotated[int, Ge(1), Le(99)]


def conv(student: Tensor, teacher: Tensor, *, kernel: Kernel = 3, relu: bool = True) -> nn.Module:
    """A trained convolution from the student's map to the teacher's, with batch normalisation.

    The regressor of FitNets (arXiv:1412.6550) as RepDistiller has it:

    - maps of one size: *kernel* x *kernel*;
    - the student's is larger by a whole factor: with that stride; by another, it is averaged
      to the teacher's size first;
    - the teacher's is larger by a whole factor: transposed, with that stride.

    Weights as in `linear`. Its statistics are those of a batch while it is trained.

    Args:
        kernel: edge of the kernel, odd; with a stride at least twice that, less one, so that
            each position is read. A transposed kernel has twice its stride, less one where that
            is odd.
        relu: end with a ReLU: for a teacher's signal that is never negative.

    Errors: signals that are no maps; a teacher's map that is larger by no whole factor, or in
    one of height and width only while the student's is in the other; an even kernel (UsageError).
    """
    check_pair("conv", student, teacher)
    if kernel % 2 == 0:
        raise UsageError(f"projector conv: kernel must be odd, not {kernel}; use {kernel + 1}")
    if student.ndim != 4 or teacher.ndim != 4:
        raise UsageError(
            f"projector conv: both signals must be maps [N, C, H, W]; {told(student, teacher)}; "
            "use projector: tokens for tokens, linear or mlp for vectors"
        )
    layers = _transposed(student, teacher) if _larger(teacher, student) else None
    layers = layers or _strided(student, teacher, kernel)
    norm = nn.BatchNorm2d(teacher.shape[1], **place(student))
    return row(*layers, norm, nn.ReLU() if relu else None)


def _larger(one: Tensor, other: Tensor) -> bool:
    return any(a > b for a, b in zip(one.shape[2:], other.shape[2:], strict=True))


def _strided(student: Tensor, teacher: Tensor, kernel: int) -> list[nn.Module]:
    factors = _factors(student, teacher)
    front = None if factors else average(student, teacher)
    stride = factors or (1, 1)
    # A narrower kernel would leave positions at the far edge that nothing reads.
    edges = [max(kernel, 2 * s - 1) for s in stride]
    layer = Conv2d(
        student.shape[1],
        teacher.shape[1],
        (edges[0], edges[1]),
        stride,
        (edges[0] // 2, edges[1] // 2),
        bias=False,
        **place(student),
    )
    return [layer] if front is None else [front, layer]


def _transposed(student: Tensor, teacher: Tensor) -> list[nn.Module]:
    factors = _factors(teacher, student)
    if factors is None:
        raise UsageError(
            "projector conv: the teacher's map must be larger by a whole factor in height and in "
            f"width, or not at all; {told(student, teacher)}; average it to the student's size: "
            "teacher_projector: pool"
        )
    layer = ConvTranspose2d(
        student.shape[1],
        teacher.shape[1],
        (2 * factors[0] - factors[0] % 2, 2 * factors[1] - factors[1] % 2),
        factors,
        (factors[0] // 2, factors[1] // 2),
        bias=False,
        **place(student),
    )
    return [layer]


def _factors(larger: Tensor, smaller: Tensor) -> tuple[int, int] | None:
    """By which whole factors the one map is larger than the other."""
    (height, width), (h, w) = larger.shape[2:], smaller.shape[2:]
    return None if height % h or width % w else (height // h, width // w)
