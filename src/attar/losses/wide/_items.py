"""What is asked of wide logits, and how it is shared out: one softmax a temperature and teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar.losses._rows import refuse_labels
from attar.losses._softmax import can_be_asked
from attar.losses.projected import Projected
from attar.losses.response import cross_entropy
from attar.losses.sparse import TopK
from attar.losses.wide._kernels import KERNELS, Kernel

Teacher = Projected | TopK | Tensor
# Signals of a whole batch, which chunks of its rows would be wrong for.
WHOLE = ("mask", "offsets")


@dataclass(frozen=True)
class Item:
    """One loss on a student's wide logits.

    Args:
        loss: a loss of `attar.losses`, or any function of (student, teacher, ...) that gives [N],
            each value from its own row; options by `functools.partial`.
        weight: the factor of its values in the total.
        teacher: the other side's logits [N, V], whole, as a `Projected` or as a `TopK`; None for a
            loss without a teacher.
        supplied: what else the loss takes, by name. A tensor has a first dimension of N, and its
            rows go with those of the student; a number is passed on as it is.
    """

    loss: Callable[..., Tensor]
    weight: float = 1.0
    teacher: Teacher | None = None
    supplied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the loss is called."""
        loss = unwrapped(self.loss)[0]
        return getattr(loss, "__name__", type(loss).__name__)

    def __getitem__(self, rows: slice | Tensor) -> Item:
        """The same of some of the rows."""
        parts = {n: v[rows] if _has_rows(v) else v for n, v in self.supplied.items()}
        teacher = None if self.teacher is None else self.teacher[rows]
        return replace(self, teacher=teacher, supplied=parts)


@dataclass
class Group:
    """Items that share probabilities: those of one temperature, and of one teacher if they have."""

    temperature: float
    teacher: Teacher | None = None
    divergences: list[tuple[int, Kernel, dict[str, Any]]] = field(default_factory=list)
    labels: list[tuple[int, float]] = field(default_factory=list)  # with its smoothing

    @property
    def numbers(self) -> list[int]:
        """The items of this group."""
        return [n for n, *_ in self.divergences] + [n for n, _ in self.labels]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def unwrapped(loss: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any] | None]:
    """(the function, its options), of a function in `functools.partial`; None if not by name."""
    options: dict[str, Any] | None = {}
    while isinstance(loss, partial):
        by_name = not loss.args and options is not None
        options = {**loss.keywords, **(options or {})} if by_name else None
        loss = loss.func
    return loss, options


def grouped(items: Sequence[Item]) -> tuple[list[Group], list[int]]:
    """The groups of items that have a kernel, and the numbers of those that have none."""
    groups: list[Group] = []
    rest = [n for n, item in enumerate(items) if not _join(groups, n, item)]
    rest = [n for n in rest if not _join_labels(groups, n, items[n])]
    return groups, rest


def _join(groups: list[Group], number: int, item: Item) -> bool:
    options = _options(item)
    loss = unwrapped(item.loss)[0]
    if options is None or loss not in KERNELS or item.teacher is None or item.supplied:
        return False
    if isinstance(item.teacher, TopK) and not item.teacher.ids.shape[-1]:
        return False  # the loss itself says what is missing
    temperature = options.pop("temperature", 1.0)
    for group in groups:
        if group.teacher is item.teacher and group.temperature == temperature:
            break
    else:
        groups.append(group := Group(temperature, item.teacher))
    group.divergences.append((number, KERNELS[loss], options))
    return True


def _join_labels(groups: list[Group], number: int, item: Item) -> bool:
    options = _options(item)
    if options is None or unwrapped(item.loss)[0] is not cross_entropy or item.teacher is not None:
        return False
    if set(item.supplied) != {"labels"}:
        return False
    smoothing = options["label_smoothing"]
    plain = not smoothing and not item.supplied["labels"].is_floating_point()
    for group in groups:
        if group.temperature == 1 and (plain or not isinstance(group.teacher, TopK)):
            break
    else:
        groups.append(group := Group(1.0))
    group.labels.append((number, smoothing))
    return True


def _options(item: Item) -> dict[str, Any] | None:
    """All the loss's options by name, None where a kernel would not know one of them."""
    loss, given = unwrapped(item.loss)
    if given is None or (loss not in KERNELS and loss is not cross_entropy):
        return None
    known = inspect.signature(loss).parameters
    options = {n: p.default for n, p in known.items() if p.kind is p.KEYWORD_ONLY} | given
    plain = all(n in known and isinstance(v, int | float) for n, v in options.items())
    return options if plain else None


def check(student: Projected, items: Sequence[Item]) -> None:
    """Refuse what cannot be done in chunks of rows, and what does not fit together."""
    if student.hidden.ndim != 2 or student.shape[1] < 2:
        raise ValueError(
            f"wide logits must have shape [N, V] with at least two columns, got "
            f"{tuple(student.shape)}; select the rows that count, student[mask]."
        )
    for item in items:
        _check_loss(item)
        if item.teacher is not None:
            _check_shape(student, item.teacher)
        for name, value in item.supplied.items():
            _check_supplied(student, item, name, value)


def _check_shape(student: Projected, teacher: Teacher) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


def _check_loss(item: Item) -> None:
    loss = unwrapped(item.loss)[0]
    if isinstance(loss, nn.Module):
        raise ValueError(
            f"{item.name} has weights or a memory, and wide logits come in chunks of rows; "
            f"give it whole logits, dense(), or use another loss."
        )
    whole = [name for name in WHOLE if name in _parameters(loss)]
    if whole:
        raise ValueError(
            f"{item.name} takes '{whole[0]}', so it is of whole signals, and wide logits come in "
            f"chunks of rows; give it whole logits, dense(), or use another loss."
        )
    given = unwrapped(item.loss)[1]
    if given and (loss in KERNELS or loss is cross_entropy):
        _try_options(loss, given)


def _parameters(loss: Callable[..., Any]) -> Mapping[str, Any]:
    try:
        return inspect.signature(loss).parameters
    except (TypeError, ValueError):  # of a builtin nothing is known
        return {}


def _try_options(loss: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
    """What the loss itself says of its options, asked with one row of two classes."""
    one = torch.zeros(1, 2)
    loss(one, torch.zeros(1, dtype=torch.int64) if loss is cross_entropy else one, **options)


def _check_supplied(student: Projected, item: Item, name: str, value: Any) -> None:
    if not _has_rows(value):
        return
    if name == "labels":
        whole = student.shape if value.is_floating_point() else student.shape[:1]
        if value.shape != whole:
            raise ValueError(
                f"labels must be class numbers [N] or float probabilities [N, V] of the same rows "
                f"as the logits, got {value.dtype} {tuple(value.shape)} and {tuple(student.shape)}."
            )
        if not value.is_floating_point() and can_be_asked(value):
            refuse_labels(value, student)  # type: ignore[arg-type]  # only its shape is read
    if value.shape[:1] != student.shape[:1]:
        raise ValueError(
            f"{name} of {item.name} must have a row for each of the student's, "
            f"{student.shape[0]}, got {tuple(value.shape)}; give what is no row as an option, "
            f"by functools.partial."
        )
