"""Which part of a model reads what another wrote, seen in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Bounds = tuple[float | None, float | None]

# What a step lets pass, by its name in aten: no sign, or nothing beyond its own two limits.
_RAMPS = {"relu", "relu_"}
_CLAMPS = {"hardtanh", "hardtanh_", "clamp", "clamp_"}


@dataclass(frozen=True)
class Step:
    """One operation: its name, the values it reads, the value it makes, its other arguments."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    numbers: tuple[Any, ...]


@dataclass
class Flow:
    """The values of a pass, numbered.

    Attributes:
        reads: by path of a part, the value of each call's first argument.
        writes: by path, the value of each call's answer.
        steps: by value, the operations that read it.
        limits: by value, the smallest and the largest number, for what a part read or wrote.
    """

    reads: dict[str, list[int]] = field(default_factory=dict)
    writes: dict[str, list[int]] = field(default_factory=dict)
    steps: dict[int, list[Step]] = field(default_factory=dict)
    limits: dict[int, tuple[float, float]] = field(default_factory=dict)

    def only_step(self, value: int) -> Step | None:
        """The one operation that reads *value*; None where there are none or several."""
        steps = self.steps.get(value, [])
        return steps[0] if len(steps) == 1 else None

    def through(self, value: int) -> tuple[int, Bounds]:
        """The value after the ReLU that alone reads *value*, and its bounds; else *value*."""
        step = self.only_step(value)
        if step is not None and step.name in _RAMPS:
            return step.makes[0], (0.0, None)
        if step is not None and step.name in _CLAMPS:
            low, high = (*step.numbers, None, None)[:2]
            # A grid needs a zero, so other limits than these stay a step of their own.
            if low == 0 and (high is None or high > 0):
                return step.makes[0], (0.0, None if high is None else float(high))
        return value, (None, None)


class _Recorder(TorchDispatchMode):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.next = 0
        self.paused = False

    def value(self, tensor: Tensor) -> int:
        """The number of what *tensor* holds now."""
        return self.numbers[id(tensor)] if id(tensor) in self.numbers else self.made(tensor)

    def made(self, tensor: Tensor) -> int:
        """A new number, for a tensor that was made or written over."""
        self.alive.append(tensor)
        self.numbers[id(tensor)] = self.next
        self.next += 1
        return self.next - 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs))
        reads = tuple(self.value(each) for each in given if isinstance(each, Tensor))
        out = func(*args, **(kwargs or {}))
        makes = tuple(self.made(each) for each in tree_leaves(out) if isinstance(each, Tensor))
        numbers = tuple(each for each in args[1:] if not isinstance(each, Tensor))
        step = Step(func.overloadpacket.__name__, reads, makes, numbers)
        for value in set(reads):
            self.flow.steps.setdefault(value, []).append(step)
        return out


@torch.no_grad()
def flow_of(model: nn.Module, paths: Iterable[str], forward: Callable[[], object]) -> Flow:
    """What the parts at *paths* read and wrote while *forward* ran *model*."""
    flow = Flow()
    recorder = _Recorder(flow)
    with _listening(model, paths, recorder), recorder:
        forward()
    return flow


@contextmanager
def _listening(model: nn.Module, paths: Iterable[str], recorder: _Recorder) -> Iterator[None]:
    flow = recorder.flow

    def note(held: dict[str, list[int]], path: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            value = recorder.value(tensor)
            held.setdefault(path, []).append(value)
            if value not in flow.limits and tensor.is_floating_point() and tensor.numel():
                recorder.paused = True  # now, since a step in place may write over it
                low, high = tensor.float().aminmax()
                flow.limits[value] = float(low), float(high)
                recorder.paused = False

    def before(path: str) -> Callable[..., None]:
        return lambda part, args: note(flow.reads, path, args[0] if args else None)

    def after(path: str) -> Callable[..., None]:
        return lambda part, args, out: note(flow.writes, path, out)

    handles = []
    for path in paths:
        part = model.get_submodule(path)
        handles.append(part.register_forward_pre_hook(before(path)))
        handles.append(part.register_forward_hook(after(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
