"""How much of a student learns, and how far it may go: for a student that knows something already.

Freezing by name, thawing from the output on (ULMFiT, arXiv:1801.06146), rates that fall with the
distance from the output, batch norms that keep their statistics, and a pull toward the start
(L2-SP, arXiv:1802.01483).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from attar.models import head_of
from attar.models.matching import first_names, matching
from attar.runtime import PreflightError, UsageError
from attar.runtime.blocks import blocks
from attar.training.optimization import Place
from attar.training.plan import Plan


def levels(module: nn.Module) -> list[list[str]]:
    """Names of the parameters from the input to the output, a block or a layer a level.

    The order is that of registration, which is the order of the pass in almost every network.
    The last level is the last layer alone: the head.

    >>> levels(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    [['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    whole = {id(block) for block in blocks(module)}
    found: list[list[str]] = [[]]

    def visit(part: nn.Module, path: str) -> None:
        prefix = f"{path}." if path else ""
        inner = any(id(deeper) in whole for deeper in part.modules())
        if path and (id(part) in whole or not inner):
            found.append([prefix + name for name, _ in part.named_parameters()])
            return
        # What a part holds beside its blocks (a class token) belongs to the level before them.
        found[-1] += [prefix + name for name, _ in part.named_parameters(recurse=False)]
        for name, child in part.named_children():
            visit(child, prefix + name)

    visit(module, "")
    named = dict(module.named_parameters())  # a tied tensor has its first name alone
    first = first_names(module)
    head = {first[name] for name in head_of(module)}
    parts = [[name for name in names if name in named and name not in head] for names in found]
    return [names for names in [*parts, [name for name in named if name in head]] if names]


def frozen(module: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Names of the tensors that *patterns* freeze; of a tied tensor, its first name.

    A pattern is the path of a part or a parameter, with ``*`` for any letters; one that begins
    with ``!`` takes back what those before it froze. ``head`` is the last layer, whatever it is
    called.

    >>> sorted(frozen(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["*", "!1"]))
    ['0.bias', '0.weight']
    """
    try:
        return matching(module, patterns, "freeze: the student")
    except UsageError as error:
        raise PreflightError(str(error)) from None


@contextmanager
def freezing(student: nn.Module, plan: Plan) -> Iterator[list[nn.Module]]:
    """The parameters that the plan freezes do not ask for gradients; yields its still batch norms.

    Raises:
        PreflightError: a pattern names nothing, or nothing is left to train.
    """
    chosen = frozen(student, plan.freeze)
    asked = [p for name, p in student.named_parameters() if name in chosen and p.requires_grad]
    if asked and len(asked) == sum(p.requires_grad for p in student.parameters()):
        raise PreflightError(
            f"freeze: {', '.join(plan.freeze)} leaves nothing of the student to train; spare its "
            'head: freeze: ["*", "!head"]'
        )
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield [
            part
            for path, part in student.named_modules()
            if _has_statistics(part)
            and (plan.frozen_batch_norm or f"{path}.running_mean".lstrip(".") in chosen)
        ]
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _has_statistics(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None


class Thaw:
    """Which levels learn: the head in the first epochs, then one more every so many.

    Levels that are frozen as a whole are passed over: no epoch goes by without one that learns.
    Gradients of the others are dropped before a step, so that they gather no momentum and no
    decay. (They are computed: parameters that begin to ask for gradients in the middle would
    have to be wrapped anew on several ranks. ``freeze`` saves their cost.)
    """

    def __init__(self, student: nn.Module, every: int) -> None:
        named = dict(student.named_parameters())
        self._levels = [[named[name] for name in names] for names in levels(student)]
        self._learning = [
            depth for depth, level in enumerate(self._levels) if any(p.requires_grad for p in level)
        ]
        self._norms = _norms_by_level(student, self._levels)
        self._every = every

    def asleep(self, epoch: int) -> list[nn.Parameter]:
        """The parameters that do not learn in this epoch."""
        return [p for level in self._levels[: self._count(epoch)] for p in level]

    def still(self, epoch: int) -> list[nn.Module]:
        """The batch norms among them, which keep their statistics meanwhile."""
        return [part for parts in self._norms[: self._count(epoch)] for part in parts]

    def _count(self, epoch: int) -> int:
        last = len(self._learning) - 1 - epoch // self._every
        return self._learning[last] if last > 0 else 0


def _norms_by_level(student: nn.Module, levels: list[list[nn.Parameter]]) -> list[list[nn.Module]]:
    """The batch norms of each level; one without parameters is of the level around or before it."""
    depths = {p: depth for depth, level in enumerate(levels) for p in level}
    found: list[list[nn.Module]] = [[] for _ in levels]
    now = 0
    for part in student.modules():
        now = next((depths[p] for p in part.parameters() if p in depths), now)
        if _has_statistics(part):
            found[now].append(part)
    return found


class Anchor:
    """The pull toward the start, L2-SP, decoupled from the gradient as AdamW's decay is.

    After each step ``w <- w - rate * strength * (w - start)``.
    """

    def __init__(self, parameters: Iterable[Tensor], strength: float) -> None:
        self._strength = strength
        self._starts = {p: p.detach().clone() for p in parameters}

    @torch.no_grad()
    def pull(self, optimizer: Optimizer) -> None:
        """Move every anchored weight that has just been stepped toward its start."""
        for group in optimizer.param_groups:
            held = [p for p in group["params"] if p in self._starts and p.grad is not None]
            if held:
                starts: list[Tensor] = [self._starts[p] for p in held]
                torch._foreach_lerp_(held, starts, group["lr"] * self._strength)


@dataclass
class Tuning:
    """What a stage does with a student that knows something.

    Attributes:
        places: how each parameter learns, where they do not all learn alike.
        anchored: what is pulled toward its start.
        anchor: what pulls it.
        thaw: which levels learn when.
        asleep: the parameters that do not learn in this epoch.
    """

    places: dict[Tensor, Place]
    anchored: set[Tensor]
    anchor: Anchor | None
    thaw: Thaw | None
    asleep: list[nn.Parameter] = field(default_factory=list)

    @classmethod
    def of(cls, student: nn.Module, plan: Plan, inherited: Collection[str] | None) -> Tuning:
        """What *plan* asks for; ``inherited`` names what is anchored, None for all but the head."""
        named = dict(student.named_parameters())
        apart = plan.layer_decay is not None or plan.unfreeze_every is not None
        steps = levels(student) if apart else []
        places: dict[Tensor, Place] = {
            named[name]: Place((plan.layer_decay or 1.0) ** (len(steps) - 1 - depth), depth)
            for depth, names in enumerate(steps)
            for name in names
        }
        anchored: set[Tensor] = set()
        if plan.l2_sp is not None:
            names = named.keys() - set(head_of(student)) if inherited is None else inherited
            anchored = {
                named[name] for name in names if name in named and named[name].requires_grad
            }
        return cls(
            places,
            anchored,
            Anchor(anchored, plan.l2_sp) if plan.l2_sp is not None else None,
            Thaw(student, plan.unfreeze_every) if plan.unfreeze_every is not None else None,
        )

    def wake(self, epoch: int) -> None:
        """Say which parameters learn in this epoch, and still the batch norms of the others."""
        if self.thaw is None:
            return
        self.asleep = self.thaw.asleep(epoch)
        for part in self.thaw.still(epoch):
            part.training = False
