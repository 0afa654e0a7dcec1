"""One thing to match."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

import torch
from annotated_types import Ge
from torch import Tensor, nn

from attar.losses import Projected, wide
from attar.losses.types import Loss
from attar.models.types import Projector
from attar.runtime import PreflightError, UsageError, eval_mode
from attar.training.optimization import Schedule

SUPPLIED = ("teacher", "labels", "mask", "ids", "offsets", "progress")

Addresses = str | tuple[str, ...]
Signal = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Term:
    """Match a signal of the student to one of the teacher.

    Args:
        loss: a function of ``attar.losses``, or one like it; options by ``functools.partial``. An
            option that is a function of progress (0 to 1) is a schedule of that option. A function
            that returns a module (a loss with weights or a memory) is called once, with example
            signals.
        student: address of the student's signal; the task's main output when left out. Several
            addresses give the loss a tuple.
        teacher: address of the teacher's signal; the student's address when left out.
        weight: factor of the term, or a function of progress that gives it.
        projector: builds a small trained adapter on the student's side from example signals.
        teacher_projector: builds a fixed map on the teacher's side, which must train nothing.
        pairing: ``auto`` makes this a term for each pair of features that
            ``attar.signals.pairs`` proposes, each with this weight; see ``paired``.
    """

    loss: Loss
    student: str | Sequence[str] | None = None
    teacher: str | Sequence[str] | None = None
    weight: Annotated[float, Ge(0)] | Schedule = 1.0
    projector: Projector | None = None
    teacher_projector: Projector | None = None
    pairing: Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if not callable(self.loss):
            raise UsageError(
                f"a term's loss must be a function, not {self.loss!r}; pass attar.losses.NAME"
            )
        if not callable(self.weight) and not self.weight >= 0:
            raise UsageError(f"a term's weight is {self.weight}; it must be 0 or more")
        for side in ("student", "teacher"):
            if isinstance(given := getattr(self, side), list):
                object.__setattr__(self, side, tuple(given))
        if self.pairing is not None:
            self._check_pairing()

    def _check_pairing(self) -> None:
        if self.pairing != "auto":
            raise UsageError(f"a term's pairing is {self.pairing!r}; it is auto, or left out")
        if self.student is not None or self.teacher is not None:
            raise UsageError(
                "a term with pairing: auto finds its signals itself; leave student and teacher "
                "out, or pairing"
            )
        if "teacher" not in supplied(self.loss):
            raise UsageError(
                f"pairing: auto is for a loss that compares with a teacher; {loss_name(self.loss)} "
                "does not; leave pairing out"
            )


def loss_name(loss: Callable[..., Any]) -> str:
    """The name a loss goes by in logs and messages."""
    loss = _function(loss)
    return getattr(loss, "__name__", type(loss).__name__)


def names_of(loss: Callable[..., Any]) -> frozenset[str]:
    """The parameters of a loss, or of what makes it."""
    return frozenset(inspect.signature(loss).parameters)


def supplied(loss: Callable[..., Any]) -> frozenset[str]:
    """Which of the things a stage can supply this loss names: its signature is the contract."""
    bound = loss.forward if isinstance(loss, nn.Module) else loss
    names = inspect.signature(bound).parameters
    given = loss.keywords if isinstance(loss, partial) else {}
    return frozenset(name for name in SUPPLIED if name in names and name not in given)


def is_factory(loss: Callable[..., Any]) -> bool:
    """Whether the loss is built from example signals: a class or function that gives a module."""
    made = _function(loss)
    return _gives_module(made if inspect.isclass(made) else _hint(made, "return"))


def takes_tuples(function: Callable[..., Any]) -> bool:
    """Whether the first parameter is annotated as a tuple of signals."""
    function = function.forward if isinstance(function, nn.Module) else _function(function)
    first = next(iter(inspect.signature(function).parameters), "")
    return "tuple" in str(_hint(function, first))


def teacher_address(term: Term, main: str) -> Addresses | None:
    """What the term compares with; None for a term on labels alone."""
    if "teacher" not in supplied(term.loss):
        return None
    return term.teacher or term.student or main  # type: ignore[return-value]


def each(addresses: str | Sequence[str] | None) -> tuple[str, ...]:
    """One address or several, as several."""
    if addresses is None:
        return ()
    return (addresses,) if isinstance(addresses, str) else tuple(addresses)


def asked_of_teacher(terms: Sequence[Term], main: str) -> list[str]:
    """The addresses that a teacher has to answer for these terms."""
    asked = [a for term in terms for a in each(teacher_address(term, main))]
    return list(dict.fromkeys(a for a in asked if not a.startswith("self:")))


def _function(loss: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(loss, partial):
        loss = loss.func
    return loss


def _hint(function: Callable[..., Any], name: str) -> Any:
    try:
        return get_type_hints(function).get(name)
    except (NameError, TypeError):
        return getattr(function, "__annotations__", {}).get(name)


def _gives_module(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, nn.Module)


def _schedules(loss: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Schedule]]:
    """The loss without those of its options that are functions of progress, and these."""
    if not isinstance(loss, partial):
        return loss, {}
    moving = {
        name: value
        for name, value in loss.keywords.items()
        if callable(value) and "Callable" not in str(_hint(_function(loss), name))
    }
    if not moving:
        return loss, {}
    still = {name: value for name, value in loss.keywords.items() if name not in moving}
    return partial(loss.func, *loss.args, **still), moving


class BoundTerm(nn.Module):
    """A term with its addresses settled and its modules built; part of an objective."""

    def __init__(self, term: Term, main: str, name: str) -> None:
        super().__init__()
        if term.pairing is not None:
            raise UsageError(
                f"the term '{name}' has pairing: auto, which distill makes terms of; for an "
                "objective of your own use attar.training.paired(...)"
            )
        self.name = name
        self.student: Addresses = term.student or main  # type: ignore[assignment]
        self.teacher = teacher_address(term, main)
        # "self:" on the teacher's side is the student's own signal of the same pass.
        own = {address.startswith("self:") for address in each(self.teacher)}
        self.own = True in own
        self.target = _without_self(self.teacher)
        self.weight = term.weight
        self.projector: nn.Module | None = None
        self.teacher_projector: nn.Module | None = None
        self.kind = loss_name(term.loss)
        self.unbuilt = is_factory(term.loss)
        self._settle(*_schedules(term.loss))
        if len(own) > 1:
            raise UsageError(
                f"the term '{name}' compares with the teacher and with the student itself at once; "
                "make it two terms"
            )

    def _settle(self, loss: Callable[..., Any], scheduled: dict[str, Schedule]) -> None:
        self.loss = loss
        self.scheduled = scheduled
        self.needs = supplied(loss)
        self.whole = "mask" in self.needs  # sees whole signals, one value an example
        self._of_parameters = all(a.startswith("param:") for a in each(self.student))
        # The common case, and the loop's hot path.
        self._plain = self.needs == {"teacher"} and not scheduled and not self._of_parameters

    def build(
        self, term: Term, heard: dict[str, Any], told: dict[str, Any], extra: dict[str, Any]
    ) -> None:
        """Build what is sized from example signals: projectors, and a loss with a state.

        Args:
            extra: what a factory may name besides: ``model`` (the teacher's), ``rows``.
        """
        student = _gathered(heard, self.student)
        self.refuse_wide(student)
        teacher = None
        if self.teacher is not None:
            teacher = _gathered(heard if self.own else told, self.target)
        # The teacher's side first: what it becomes is what the student's side is sized to. In eval
        # mode, so that no example is in a statistic.
        if term.teacher_projector is not None:
            made = self._fixed(_projector(term.teacher_projector, teacher, student, extra), term)
            self.teacher_projector = made
            with eval_mode(made):
                teacher = made(teacher)
        if term.projector is not None:
            self.projector = _projector(term.projector, student, teacher, extra)
        if self.unbuilt:
            self.unbuilt = False
            if self.projector is not None:
                with eval_mode(self.projector):
                    student = self.projector(student)
            made = self.loss(student, teacher, **_named(self.loss, extra))
            self._settle(made, self.scheduled)

    def refuse_wide(self, student: Any) -> None:
        """Refuse logits that are made block by block, where this term needs them all at once."""
        if not isinstance(student, Projected):
            return
        size = 4 * math.prod(student.shape) / 2**20
        raise PreflightError(
            f"the term '{self.name}' needs all logits {list(student.shape)} of a batch at once, "
            f"which would be {size:,.1f} MiB; they are made block by block, for a loss that gives "
            "a value a row, without a projector"
        )

    def _fixed(self, made: nn.Module, term: Term) -> nn.Module:
        if any(p.requires_grad for p in made.parameters()):
            assert term.teacher_projector is not None
            raise UsageError(
                f"the term '{self.name}': a teacher_projector must train nothing, and "
                f"{loss_name(term.teacher_projector)} does; put it on the student's side: projector"
            )
        return made

    def value(
        self,
        heard: dict[str, Any],
        told: dict[str, Any],
        batch: dict[str, Tensor],
        counted: Counted,
        progress: float,
    ) -> Tensor:
        """The loss's own value: one a counted position, one an example, or a scalar."""
        return self.compare(*self.operands(heard, told, batch, counted, progress), counted)

    def compare(self, student: Any, given: dict[str, Any], counted: Counted) -> Tensor:
        """The value of ``operands``; of features of tokens its mean over an example's real ones."""
        if isinstance(student, Projected):
            return wide.apply(self.loss, student, **given)
        if isinstance(teacher := given.get("teacher"), Projected):
            given = {**given, "teacher": teacher.dense()}
        apart = self.whole or self._of_parameters
        tokens = None if apart else counted.tokens_of(student)
        if tokens is not None:
            given = {name: _at(value, tokens) for name, value in given.items()}
            return self._by_example(self.loss(_at(student, tokens), **given), tokens)
        value = self.loss(student, **given)
        return value.mean() if self._of_parameters else value  # its rows are no examples

    def _by_example(self, value: Tensor, tokens: Tensor) -> Tensor:
        """The mean over each example's tokens, [N], of a value a real token."""
        if value.shape != (int(tokens.sum()),):
            raise UsageError(
                f"the loss '{self.name}' compares examples with one another, and the signal has a "
                "vector for each of their tokens; name one with a vector an example"
            )
        sums = value.new_zeros(tokens.shape).masked_scatter(tokens, value).sum(1)
        return sums / tokens.sum(1).clamp(min=1)

    def operands(
        self,
        heard: dict[str, Any],
        told: dict[str, Any],
        batch: dict[str, Tensor],
        counted: Counted,
        progress: float,
    ) -> tuple[Any, dict[str, Any]]:
        """The student's side, and what the loss names besides, at the counted positions."""
        student = _gathered(heard, self.student)
        if self.projector is not None:
            student = self.projector(student)
        needs = self.needs
        given: dict[str, Any] = {}
        if self.teacher is not None:
            given["teacher"] = self._compared(heard, told)
            if counted.mask is None and self._plain:
                return student, given
        if "labels" in needs:
            given["labels"] = batch["labels"]
        if self.whole:
            given["mask"] = counted.tokens if counted.mask is None else counted.mask
        elif counted.mask is not None and not self._of_parameters:
            student = counted(student)
            given = {key: counted(value) for key, value in given.items()}
        for key in ("ids", "offsets"):
            if key in needs:
                given[key] = batch[key]
        if "progress" in needs:
            given["progress"] = progress
        given |= {name: schedule(progress) for name, schedule in self.scheduled.items()}
        return student, given

    def _compared(self, heard: dict[str, Any], told: dict[str, Any]) -> Signal:
        teacher = _gathered(heard if self.own else told, self.target)
        if self.own:
            teacher = _mapped(Tensor.detach, teacher)
        if self.teacher_projector is not None:
            with torch.no_grad():
                teacher = self.teacher_projector(teacher)
        return teacher


def _without_self(addresses: Addresses | None) -> Addresses:
    if addresses is None:
        return ""
    if isinstance(addresses, str):
        return addresses.removeprefix("self:")
    return tuple(address.removeprefix("self:") for address in addresses)


def _gathered(signals: dict[str, Any], addresses: Addresses) -> Any:
    if isinstance(addresses, str):
        return signals[addresses]
    return tuple(signals[address] for address in addresses)


def _mapped(function: Callable[[Tensor], Tensor], signal: Signal) -> Signal:
    if isinstance(signal, tuple):
        return tuple(function(part) for part in signal)
    return function(signal)  # a tensor, or what stands for one


class Counted:
    """Signals at the counted positions; all of them where ``mask`` is None.

    ``tokens`` says which tokens are real where an example counts as one but has features of many.

    Logits that are not made are taken once, however many terms compare them: so they know that
    they can share one pass.
    """

    def __init__(self, mask: Tensor | None, tokens: Tensor | None = None) -> None:
        self.mask = mask
        self.tokens = tokens if mask is None else None
        self._taken: list[tuple[Projected, Projected]] = []

    def tokens_of(self, signal: Any) -> Tensor | None:
        """Which tokens are real, where the signal has a vector for each; None elsewhere."""
        known = self.tokens is not None and _of_tokens(signal, self.tokens)
        return self.tokens if known else None

    def __call__(self, signal: Any) -> Any:
        if self.mask is None:
            return signal
        if isinstance(signal, tuple):
            return tuple(map(self, signal))
        if not isinstance(signal, Projected):
            return signal[self.mask]
        for known, rows in self._taken:
            if known is signal:
                return rows
        self._taken.append((signal, signal[self.mask]))
        return self._taken[-1][1]


def _of_tokens(signal: Any, tokens: Tensor) -> bool:
    if isinstance(signal, tuple):
        return all(_of_tokens(part, tokens) for part in signal)
    return isinstance(signal, Tensor) and signal.ndim == 3 and signal.shape[:2] == tokens.shape


def _at(signal: Any, tokens: Tensor) -> Any:
    """The real tokens, [P, D], of a signal that has a vector for each; another as it is."""
    if isinstance(signal, tuple):
        return tuple(_at(part, tokens) for part in signal)
    return signal[tokens] if _of_tokens(signal, tokens) else signal


class _Each(nn.ModuleList):
    """A projector for each signal of a tuple."""

    def forward(self, signals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part(signal) for part, signal in zip(self, signals, strict=True))


def _projector(make: Projector, own: Any, other: Any, extra: dict[str, Any]) -> nn.Module:
    named = _named(make, extra)
    if isinstance(own, Tensor) or takes_tuples(make):
        return make(own, other, **named)
    others = other if isinstance(other, tuple) else (other,) * len(own)
    return _Each(make(a, b, **named) for a, b in zip(own, others, strict=True))


def _named(make: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """What the factory names of what a stage can supply."""
    names = inspect.signature(make).parameters
    return {name: value for name, value in extra.items() if name in names}
