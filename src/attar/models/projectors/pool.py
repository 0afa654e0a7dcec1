"""Averaging, without weights."""

from __future__ import annotations

from torch import Tensor, nn

from attar.models.projectors._forms import average, check_pair
from attar.models.projectors._parts import row
from attar.runtime import UsageError


def pool(student: Tensor, teacher: Tensor) -> nn.Module:
    """The first signal, averaged to the smaller of the two sizes; nothing is trained.

    For either side: as a ``projector`` its first signal is the student's, as a
    ``teacher_projector`` the teacher's, and with both the two always meet.

    - [N, C, H, W] beside [N, D, h, w]: adaptive average pooling to the smaller height and the
      smaller width;
    - [N, C, H, W] or [N, T, C] beside [N, D]: the mean over positions, [N, C];
    - a signal that is the smaller one already is left as it is.

    Errors: signals that are no floating tensors; tokens beside a map or beside another number of
    tokens, which `tokens` joins (UsageError).
    """
    check_pair("pool", student, teacher, ("first", "second"))
    forms = {student.ndim, teacher.ndim}
    if forms == {3, 4} or (forms == {3} and student.shape[1] != teacher.shape[1]):
        raise UsageError(
            f"projector pool: the positions of {list(student.shape)} and {list(teacher.shape)} "
            "cannot be averaged to each other; use tokens, with trained: false on the teacher's "
            "side"
        )
    return row(average(student, teacher))
