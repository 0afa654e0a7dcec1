"""What a stage changes: everything that must come back for a run to go on as if never stopped.

Each item takes its part of the state as named tensors and JSON facts, and gives it back. Nothing
else may change a run; a test drops each item in turn and sees the run go another way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.runtime import (
    DataError,
    Ranks,
    other_generators,
    set_other_generators,
    set_torch_generators,
    torch_generators,
)

if TYPE_CHECKING:
    from attar.training.choice import Choice
    from attar.training.loop import Loop

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


@dataclass
class Session:
    """The moving parts of one stage; ``seconds`` are those of training and validation so far."""

    loop: Loop
    choice: Choice
    data: Any
    device: torch.device
    _before: float = 0.0
    _since: float = field(default_factory=perf_counter)

    @property
    def seconds(self) -> float:
        return self._before + perf_counter() - self._since

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._before, self._since = value, perf_counter()


class Item(NamedTuple):
    """One part of the state: how it is taken, and how it is given back."""

    take: Callable[[Session], tuple[Tensors, Facts]]
    give: Callable[[Session, Tensors, Facts], None]


def taken(session: Session) -> tuple[dict[str, Tensors], Facts]:
    """The whole state: tensors by item, where it has any, and the facts of every item."""
    parts, facts = {}, {}
    for name, item in ITEMS.items():
        tensors, facts[name] = item.take(session)
        if tensors:
            parts[name] = tensors
    return parts, facts


def give_back(session: Session, parts: Mapping[str, Tensors], facts: Facts) -> None:
    """Put a state back; an item that is missing is refused, never passed over."""
    for name in ITEMS:
        if name not in facts:
            raise DataError(f"the checkpoint has no '{name}'; it is of another release of attar")
    for name, item in ITEMS.items():  # generators last: to restore the rest may draw numbers
        item.give(session, dict(parts.get(name, {})), facts[name])


def tensors_of(module: nn.Module) -> Tensors:
    """Parameters and all buffers, tied ones once, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def _fill(ranks: Ranks, own: Tensors, saved: Tensors, what: str) -> None:
    if own.keys() != saved.keys():
        odd = min(own.keys() ^ saved.keys())
        raise DataError(f"the checkpoint's {what} is of another model: it differs in '{odd}'")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise DataError(
                f"the checkpoint's {what} is of another model: '{name}' is "
                f"{list(saved[name].shape)} there and {list(tensor.shape)} here"
            )
        tensor.copy_(ranks.like(saved[name], tensor))


def _take_objective(session: Session) -> tuple[Tensors, Facts]:
    own, full = tensors_of(session.loop.objective), session.loop.ranks.full
    return {name: full(tensor.detach()) for name, tensor in own.items()}, {}


def _give_objective(session: Session, tensors: Tensors, facts: Facts) -> None:
    _fill(session.loop.ranks, tensors_of(session.loop.objective), tensors, "objective")


def _take_optimizer(session: Session) -> tuple[Tensors, Facts]:
    """The state of each parameter by its number; what is no tensor goes to the facts."""
    optimizer = session.loop.optimizer
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for index, parameter in enumerate(session.loop.parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{index}.{key}"
            if isinstance(value, Tensor):
                tensors[name] = session.loop.ranks.full(value)
            else:
                numbers[name] = value
    return tensors, {
        "numbers": numbers,
        "cpu": sorted(name for name, tensor in tensors.items() if tensor.is_cpu),
        "rates": [group["lr"] for group in optimizer.param_groups],
    }


def _give_optimizer(session: Session, tensors: Tensors, facts: Facts) -> None:
    loop = session.loop
    loop.optimizer.state.clear()
    for group, rate in zip(loop.optimizer.param_groups, facts["rates"], strict=True):
        group["lr"] = rate
    for name, value in {**tensors, **facts["numbers"]}.items():
        index, _, key = name.partition(".")
        parameter = loop.parameters[int(index)]
        if isinstance(value, Tensor):
            # Some optimisers count steps on the CPU wherever the weights are.
            value = value.clone() if name in facts["cpu"] else value.to(parameter.device, copy=True)
            if value.shape == parameter.shape:
                value = loop.ranks.like(value, parameter)
        loop.optimizer.state[parameter][key] = value


def _take_average(session: Session) -> tuple[Tensors, Facts]:
    average = session.loop.average
    if average is None:
        return {}, {}
    full = session.loop.ranks.full
    means = {str(index): full(mean) for index, mean in enumerate(average.mean)}
    return means, {"updates": average.updates}


def _give_average(session: Session, tensors: Tensors, facts: Facts) -> None:
    average = session.loop.average
    if average is not None:
        own = {str(index): mean for index, mean in enumerate(average.mean)}
        _fill(session.loop.ranks, own, tensors, "average")
        average.updates = facts["updates"]


def _take_scaler(session: Session) -> tuple[Tensors, Facts]:
    scaler = session.loop.scaler
    return {}, {} if scaler is None else scaler.state_dict()


def _give_scaler(session: Session, tensors: Tensors, facts: Facts) -> None:
    if session.loop.scaler is not None:
        session.loop.scaler.load_state_dict(facts)


def _take_place(session: Session) -> tuple[Tensors, Facts]:
    loop = session.loop
    return {}, {
        "epoch": loop.number,
        "batches": loop.taken,
        "steps": loop.done,
        "skipped": loop.skipped,
        "seconds": session.seconds,
        "teacher_seconds": loop.teacher_seconds,
    }


def _give_place(session: Session, tensors: Tensors, facts: Facts) -> None:
    loop = session.loop
    loop.number, loop.taken = facts["epoch"], facts["batches"]
    loop.done, loop.skipped = facts["steps"], facts["skipped"]
    session.seconds, loop.teacher_seconds = facts["seconds"], facts["teacher_seconds"]


def _take_choice(session: Session) -> tuple[Tensors, Facts]:
    return session.choice.state()


def _give_choice(session: Session, tensors: Tensors, facts: Facts) -> None:
    session.choice.load(tensors, facts)


def _take_record(session: Session) -> tuple[Tensors, Facts]:
    return session.loop.record.state()


def _give_record(session: Session, tensors: Tensors, facts: Facts) -> None:
    session.loop.record.load(tensors, facts)


def _take_teacher(session: Session) -> tuple[Tensors, Facts]:
    """A teacher that moves has a state; one that only answers has none."""
    teacher = session.loop.teacher
    if teacher is None or not hasattr(teacher, "state_dict"):
        return {}, {}
    return dict(teacher.state_dict()), {}


def _give_teacher(session: Session, tensors: Tensors, facts: Facts) -> None:
    teacher = session.loop.teacher
    if teacher is not None and hasattr(teacher, "load_state_dict"):
        teacher.load_state_dict(tensors)


def _take_source(session: Session) -> tuple[Tensors, Facts]:
    """A source whose batches follow from (seed, epoch) alone has none."""
    return {}, session.data.state() if hasattr(session.data, "state") else {}


def _give_source(session: Session, tensors: Tensors, facts: Facts) -> None:
    if hasattr(session.data, "load"):
        session.data.load(facts)


def _take_torch(session: Session) -> tuple[Tensors, Facts]:
    states = torch_generators(session.device)
    return session.loop.ranks.gather({name: state[None] for name, state in states.items()}), {}


def _give_torch(session: Session, tensors: Tensors, facts: Facts) -> None:
    """A rank that was not there before keeps the state that its own seed has given it."""
    rank = session.loop.ranks.rank
    if rank < len(tensors["cpu"]):
        own = {name: states[rank].clone() for name, states in tensors.items()}
        set_torch_generators(own, session.device)


def _take_others(session: Session) -> tuple[Tensors, Facts]:
    return {}, {"ranks": session.loop.ranks.everyone(other_generators())}


def _give_others(session: Session, tensors: Tensors, facts: Facts) -> None:
    rank = session.loop.ranks.rank
    if rank < len(facts["ranks"]):
        set_other_generators(facts["ranks"][rank])


ITEMS: dict[str, Item] = {
    "objective": Item(_take_objective, _give_objective),
    "optimizer": Item(_take_optimizer, _give_optimizer),
    "average": Item(_take_average, _give_average),
    "scaler": Item(_take_scaler, _give_scaler),
    "place": Item(_take_place, _give_place),
    "choice": Item(_take_choice, _give_choice),
    "record": Item(_take_record, _give_record),
    "teacher": Item(_take_teacher, _give_teacher),
    "source": Item(_take_source, _give_source),
    "generators_torch": Item(_take_torch, _give_torch),
    "generators_other": Item(_take_others, _give_others),
}
