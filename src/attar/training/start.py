"""Where a stage starts: from the student as it is, or from the weights of another model."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from attar.models import Transfer, head_of, load, read_extra, transfer, transferable
from attar.runtime import DataError
from attar.tasks import Task
from attar.training.checkpoint import digest_of
from attar.training.plan import Plan
from attar.training.state import tensors_of


class Start(NamedTuple):
    """Which of the student's parameters know something already, and what: a digest."""

    inherited: frozenset[str]
    digest: str


def started(
    student: nn.Module, init: str | nn.Module | None, task: Task, plan: Plan
) -> Start | None:
    """Take the weights of *init*; None where there is none and the plan asks for no start."""
    if init is None:
        if plan.l2_sp is None:
            return None
        names = [name for name, _ in student.named_parameters()]
        inherited = frozenset(names) - set(head_of(student))
    else:
        source, head = _source(init, task)
        inherited = frozenset(transfer(student, source, head=head).tensors)
    own = tensors_of(student)
    return Start(inherited, digest_of({name: own[name] for name in sorted(inherited)}))


def given(student: nn.Module, init: str | nn.Module, task: Task) -> Transfer:
    """What *init* would give the student; changes nothing."""
    source, head = _source(init, task)
    return transferable(student, source, head=head)


def _source(init: str | nn.Module, task: Task) -> tuple[nn.Module, bool]:
    """The model, and whether its last layer is for the classes of this task."""
    if isinstance(init, nn.Module):
        return init, False
    return load(init), _saved_for(init) == task.describe()


def _saved_for(folder: str) -> object:
    try:
        return read_extra(folder).get("task")
    except DataError:
        return None
