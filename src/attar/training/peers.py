"""Students that teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from attar.losses import cross_entropy, kl_divergence
from attar.losses.types import Loss
from attar.models import Group
from attar.runtime import PreflightError
from attar.signals import parse
from attar.tasks import Regression, Task
from attar.training.optimization import Schedule
from attar.training.term import Term, each, supplied

PAPERS = partial(kl_divergence, temperature=1.0)


def mutual(group: Group, loss: Loss = PAPERS, *, labels: Loss | None = cross_entropy) -> list[Term]:
    """Terms of deep mutual learning (DML): each student learns from the labels and from the others.

    ``L_i = labels_i + 1 / (K - 1) * sum_j loss(student i, student j)``, over the other students j,
    which are detached: each is a fixed teacher to the others within a step. Train with
    ``label_weight=0``, as the terms hold every member's loss on the labels.

    Zhang et al., "Deep Mutual Learning", CVPR 2018. The authors' code leaves out the
    1 / (K - 1), and steps the students one after the other.

    Args:
        group: the students.
        loss: what a student is compared to another by; the paper's is KL at temperature 1.
        labels: the loss on labels; None for students that only learn from each other.

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.TabularClassification(classes=3)
        >>> rows = attar.data.TensorSource(torch.rand(9, 4), torch.arange(9) % 3, classes=3)
        >>> pair = attar.Group([nn.Linear(4, 3), nn.Linear(4, 3)], task)
        >>> pair = attar.distill(pair, None, rows, task, attar.mutual(pair), label_weight=0)
    """
    names = [f"output:{index}" for index in range(len(group))]
    own = [] if labels is None else [Term(labels, student=name) for name in names]
    return own + between([Term(loss)], len(group), group.main)


def between(terms: Sequence[Term], members: int, main: str) -> list[Term]:
    """Each term from every member of a group to every other, with 1 / (members - 1) of its weight.

    A term on labels alone, or on ``self:``, is each member's own, with its whole weight.

    Args:
        main: the task's main output, which is all that a group gives of its members' outputs.

    Raises:
        PreflightError: a signal that a group does not give; ``pairing``.
    """
    found: list[Term] = []
    for term in terms:
        if term.pairing is not None:
            raise PreflightError(
                "pairing: auto is for a student and a teacher of other layers, and students that "
                "teach each other have the same; name a layer, such as student: feature:stage3"
            )
        for member in range(members):
            found += _from(term, member, members, main)
    return found


def labels_of(task: Task, members: int, weight: float) -> list[Term]:
    """The task's own loss on labels of each member but the first, whose loss is the stage's."""
    own = task
    if isinstance(task, Regression):  # a term is given labels in the units of the output
        zeros, ones = ((value,) * (task.width or 1) for value in (0.0, 1.0))
        own = replace(task, mean=zeros, std=ones)

    def labels_loss(student: Tensor, labels: Tensor) -> Tensor:
        return own.loss(student, {"labels": labels})

    return [
        Term(labels_loss, student=f"output:{member}", weight=weight) for member in range(1, members)
    ]


def _from(term: Term, member: int, members: int, main: str) -> list[Term]:
    """What one member learns by a term."""
    heard = each(term.student) or (f"output:{main}",)
    mine = replace(term, student=_numbered(heard, member, main))
    if "teacher" not in supplied(term.loss):
        return [mine]
    told = each(term.teacher) or heard
    if all(address.startswith("self:") for address in told):
        return [replace(mine, teacher=_numbered(told, member, main))]
    others = [other for other in range(members) if other != member]
    weight = _shared(term.weight, 1 / len(others))
    return [
        replace(
            mine,
            teacher=_numbered([f"self:{address}" for address in told], other, main),
            weight=weight,
        )
        for other in others
    ]


def _numbered(addresses: Sequence[str], member: int, main: str) -> str | tuple[str, ...]:
    """The same signals, of a member of a group."""
    found = tuple(_of(address, member, main) for address in addresses)
    return found[0] if len(found) == 1 else found


def _of(text: str, member: int, main: str) -> str:
    address = parse(text)
    if address.kind == "grad" or (address.kind == "output" and address.path != main):
        raise PreflightError(
            f"'{text}': students that teach each other give one another output:{main}, and "
            "feature:, input: and param: of their layers; choose one of those"
        )
    kind, _, rest = text.removeprefix("self:").partition(":")
    inner = rest.removeprefix(main) if kind == "output" else f".{rest}" * bool(rest)
    return f"{'self:' * address.own}{kind}:{member}{inner}"


def _shared(weight: float | Schedule, share: float) -> float | Schedule:
    if share == 1:
        return weight
    return partial(_times, schedule=weight, share=share) if callable(weight) else weight * share


def _times(progress: float, *, schedule: Schedule, share: float) -> float:
    return schedule(progress) * share
