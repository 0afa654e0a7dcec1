"""What the losses share: checks of arguments, the width of arithmetic, columns that are absent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The losses that compare with a `TopK`.
TAKE_TOP_K = (
    "kl_divergence",
    "reverse_kl",
    "skewed_kl",
    "jensen_shannon",
    "total_variation",
    "alpha_beta_divergence",
    "sampled_kl",
)


def wide(values: Tensor) -> Tensor:
    """Values in float32 or float64; a copy is made only of narrower types."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def absent(student: Tensor, teacher: Tensor) -> Tensor:
    """True where both are -inf: the class does not exist (a padded vocabulary, a masked action)."""
    return (student == -math.inf) & (teacher == -math.inf)


def check_same_shape(student: Tensor, teacher: Any, *, sparse: bool = False) -> None:
    """Refuse a pair that broadcasting would quietly compare, and a TopK unless `sparse`."""
    if not sparse:
        check_whole(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


def check_whole(teacher: Any) -> None:
    """Refuse a teacher's side that holds some of its logits: a TopK."""
    if not isinstance(teacher, Tensor) and hasattr(teacher, "log_tail"):
        raise ValueError(
            f"this loss compares with all of a teacher's values, and the teacher is a TopK, which "
            f"holds some of its logits; keep them all, or use one of {', '.join(TAKE_TOP_K)}."
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Two tensors of logits [N, C] with C >= 2."""
    check_whole(teacher)
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2:
        check_same_shape(student, teacher)
        check_classes(student)


def check_classes(logits: Tensor) -> None:
    """One softmax is one row, and a softmax over a single class says nothing."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape [N, C] with at least two classes, got {tuple(logits.shape)}."
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Class numbers [N] in [0, C), or class probabilities [N, C]."""
    check_classes(logits)
    if labels.shape != (logits.shape if labels.is_floating_point() else logits.shape[:1]):
        raise ValueError(
            f"labels must be class numbers [N] or float probabilities [N, C] of the same rows as "
            f"the logits, got {labels.dtype} {tuple(labels.shape)} and {tuple(logits.shape)}."
        )


def refuse_labels(labels: Tensor, logits: Tensor) -> None:
    """Say which class number is outside [0, C), after torch met one."""
    wrong = labels[(labels < 0) | (labels >= logits.shape[1])]
    if len(wrong):
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}), got {int(wrong[0])}.")


def check_positive(name: str, value: float) -> None:
    """Refuse zero, negative numbers, infinity and NaN."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value}.")


def check_not_negative(name: str, value: float) -> None:
    """Refuse negative numbers, infinity and NaN."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least 0, got {value}.")


def check_share(name: str, value: float) -> None:
    """Refuse what is not strictly between nothing and all."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}.")
