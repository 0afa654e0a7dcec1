"""Vectors, tokens and maps: which pairs of signals can meet, and what averages one for that.

One rule for every projector: the larger map is averaged to the smaller one's size, on its own
side: the student's by ``projector``, the teacher's by ``teacher_projector``.
"""

from __future__ import annotations

from torch import Tensor, nn

from attar.models.projectors._parts import Mean
from attar.runtime import UsageError

SIDES = ("student", "teacher")


def check_signal(name: str, side: str, signal: object) -> None:
    """Refuse what is no floating tensor of a known form."""
    if not isinstance(signal, Tensor) or not signal.is_floating_point():
        kind = signal.dtype if isinstance(signal, Tensor) else type(signal).__name__
        raise UsageError(
            f"projector {name}: the {side}'s signal must be one floating tensor, not {kind}; "
            "address a part of it with PATH[0] or PATH[key]"
        )
    if signal.ndim not in (2, 3, 4):
        raise UsageError(
            f"projector {name}: the {side}'s signal must be [N, C], [N, T, C] or [N, C, H, W], "
            f"not {list(signal.shape)}; address another one"
        )


def check_pair(name: str, first: Tensor, second: Tensor, sides: tuple[str, str] = SIDES) -> None:
    """Refuse signals that are no floating tensors of a known form, or of other examples."""
    for side, signal in zip(sides, (first, second), strict=True):
        check_signal(name, side, signal)
    if len(first) != len(second):
        raise UsageError(
            f"projector {name}: both signals must be of the same examples; "
            f"{told(first, second, sides)}; address what has one entry an example"
        )


def told(first: Tensor, second: Tensor, sides: tuple[str, str] = SIDES) -> str:
    """Both shapes, for a message."""
    return f"{sides[0]} {list(first.shape)}, {sides[1]} {list(second.shape)}"


def average(first: Tensor, second: Tensor) -> nn.Module | None:
    """What averages *first* to the smaller of the two sizes; None where it is that already.

    A map to a smaller map; a map or tokens to a vector.
    """
    if second.ndim == 2:
        return None if first.ndim == 2 else Mean()
    if first.ndim != 4 or second.ndim != 4:
        return None
    own, other = first.shape[2:], second.shape[2:]
    goal = [min(a, b) for a, b in zip(own, other, strict=True)]
    if goal == list(own):
        return None
    if all(a % b == 0 for a, b in zip(own, goal, strict=True)):
        # The same numbers, faster, and with a backward pass that CUDA makes deterministic.
        return nn.AvgPool2d((own[0] // goal[0], own[1] // goal[1]))
    return nn.AdaptiveAvgPool2d((goal[0], goal[1]))


def meeting(name: str, student: Tensor, teacher: Tensor) -> nn.Module | None:
    """What averages the student's signal to the teacher's form, its channels aside.

    Errors: averaging alone does not do that; the message names the projector that does.
    """
    check_pair(name, student, teacher)
    shapes = told(student, teacher)
    if student.ndim < teacher.ndim and student.ndim == 2:
        raise UsageError(
            f"projector {name}: the student's signal has no positions, and the teacher's has; "
            f"{shapes}; average the teacher's: teacher_projector: pool"
        )
    if teacher.ndim != 2 and (student.ndim != teacher.ndim or _other_tokens(student, teacher)):
        raise UsageError(
            f"projector {name}: the positions of the two signals differ; {shapes}; use "
            "projector: tokens, which joins maps and tokens of any grid"
        )
    larger = teacher.ndim == 4 and any(
        own < other for own, other in zip(student.shape[2:], teacher.shape[2:], strict=True)
    )
    if student.ndim == 4 and larger:
        raise UsageError(
            f"projector {name}: the teacher's map is larger in height or width; {shapes}; average "
            "it to the student's size: teacher_projector: pool"
        )
    return average(student, teacher)


def _other_tokens(student: Tensor, teacher: Tensor) -> bool:
    return student.ndim == 3 and student.shape[1] != teacher.shape[1]
