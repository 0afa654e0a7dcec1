"""The linear projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attar.runtime import UsageError


def linear(student: Tensor, teacher: Tensor) -> nn.Module:
    """A trained linear map from the student's signal to the teacher's size, with bias.

    As in FitNets (arXiv:1412.6550). Built from one example of each signal:

    - [N, C, H, W] to [N, D, H, W]: a 1x1 convolution from C to D channels;
    - [N, C] to [N, D] or [N, T, C] to [N, T, D]: ``nn.Linear(C, D)``.

    Its weights are on the student's device, in float64 for a float64 signal and in float32 for
    every other (a bf16 or fp16 signal comes from autocast, which casts the weights as well).

    Errors: signals that are no floating tensors, whose ranks differ, or whose sizes differ in
    another place than the mapped one (UsageError, with both shapes).
    """
    _check(student, teacher)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if student.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1, device=student.device, dtype=dtype)
    return nn.Linear(student.shape[-1], teacher.shape[-1], device=student.device, dtype=dtype)


def _check(student: Tensor, teacher: Tensor) -> None:
    for side, signal in (("student", student), ("teacher", teacher)):
        if not isinstance(signal, Tensor) or not signal.is_floating_point():
            kind = signal.dtype if isinstance(signal, Tensor) else type(signal).__name__
            raise UsageError(
                f"projector linear: the {side}'s signal must be one floating tensor, not {kind}; "
                "address a part of it with PATH[0] or PATH[key]"
            )
    shapes = f"student {list(student.shape)}, teacher {list(teacher.shape)}"
    if student.ndim != teacher.ndim or student.ndim not in (2, 3, 4):
        raise UsageError(
            "projector linear: both signals must be [N, C], [N, T, C] or [N, C, H, W]; "
            f"{shapes}; choose signals of one kind"
        )
    if student.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        raise UsageError(
            f"projector linear: height and width must agree; {shapes}; choose stages of the same "
            "resolution, or compare pooled features"
        )
    mapped = 1 if student.ndim == 4 else student.ndim - 1
    if any(student.shape[axis] != teacher.shape[axis] for axis in range(mapped)):
        raise UsageError(
            f"projector linear: only size {mapped} may differ, counted from 0 (the batch and the "
            f"positions must agree); {shapes}; choose signals of the same positions"
        )
