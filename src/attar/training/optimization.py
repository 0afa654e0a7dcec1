"""Optimisers, schedules and averaging."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.optim import Optimizer

from attar.runtime import UsageError

OptimizerFactory = Annotated[Callable[..., Optimizer], "room:optimizers"]
Schedule = Annotated[Callable[[float], float], "room:schedules"]

# Decaying these pulls a scale or an offset to 0 without making the function simpler.
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def sgd(
    params: Iterable[Any],
    *,
    lr: Annotated[float, Gt(0)] = 0.1,
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9,
    weight_decay: Annotated[float, Ge(0)] = 5e-4,
    nesterov: bool = False,
    fused: bool | None = None,
) -> Optimizer:
    """Stochastic gradient descent with momentum; ``fused`` is chosen where it is left out."""
    return torch.optim.SGD(
        params,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        fused=fused,
    )


def adamw(
    params: Iterable[Any],
    *,
    lr: Annotated[float, Gt(0)] = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Annotated[float, Ge(0)] = 0.01,
    fused: bool | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); ``fused`` as in `sgd`."""
    return torch.optim.AdamW(
        params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
    )


def constant(progress: float, *, warmup: Annotated[float, Interval(ge=0, le=1)] = 0.0) -> float:
    """The whole rate after a linear warm-up over the share *warmup* of all steps."""
    return _warmed(progress, warmup)


def linear(
    progress: float,
    *,
    warmup: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    final: Annotated[float, Interval(ge=0, le=1)] = 0.0,
) -> float:
    """Linear warm-up, then a straight line down to the share *final* of the rate."""
    return _warmed(progress, warmup) * (1 - (1 - final) * _decayed(progress, warmup))


def cosine(
    progress: float,
    *,
    warmup: Annotated[float, Interval(ge=0, le=1)] = 0.0,
    final: Annotated[float, Interval(ge=0, le=1)] = 0.0,
) -> float:
    """Linear warm-up, then half a cosine down to *final* (Loshchilov & Hutter 2017).

    >>> [round(cosine(p, warmup=0.2), 3) for p in (0.1, 0.2, 0.6, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    wave = (1 + math.cos(math.pi * _decayed(progress, warmup))) / 2
    return _warmed(progress, warmup) * (final + (1 - final) * wave)


def ramp(
    progress: float,
    *,
    start: float = 0.0,
    end: float = 1.0,
    after: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
    until: Annotated[float, Interval(gt=0, le=1)] = 1.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """From *start* to *end* between two shares of all steps, straight or as half a cosine.

    For the weight of a term or an option of its loss: a warm-up of a weight is
    ``ramp(end=0.9, until=0.1)``, a temperature that falls is ``ramp(start=8, end=2)``.

    >>> [ramp(p, start=8.0, end=2.0, after=0.5) for p in (0.0, 0.5, 0.75, 1.0)]
    [8.0, 8.0, 5.0, 2.0]
    """
    if until <= after:
        raise UsageError(f"ramp goes from after: {after} until: {until}; until must be later")
    share = min(1.0, max(0.0, (progress - after) / (until - after)))
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return start + (end - start) * share


def _warmed(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) if warmup else 1.0


def _decayed(progress: float, warmup: float) -> float:
    return 0.0 if warmup >= 1 else max(0.0, (progress - warmup) / (1 - warmup))


class Place(NamedTuple):
    """The share of the rate that a parameter learns with, and with which others it begins to.

    Parameters that begin at different steps must not be in one group: torch's fused kernels take
    the moments of all of a group, or of none. What is no part of the student begins at once, and
    so is of no level of it.
    """

    share: float = 1.0
    level: int = -1


def parameter_groups(
    module: nn.Module,
    places: Mapping[Tensor, Place] | None = None,
    anchored: Collection[Tensor] = (),
) -> list[dict[str, Any]]:
    """Weights, and what must not decay (biases, norms, single numbers); apart by place.

    Args:
        places: where a parameter stands that does not learn like all others.
        anchored: what is pulled elsewhere than to 0, and so does not decay either.
    """
    spared: set[int] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, NORMS) or name == "bias" or parameter.ndim < 2:
                spared.add(id(parameter))
    spared |= {id(p) for p in anchored}
    parts: dict[tuple[Place, bool], list[Tensor]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            place = (places or {}).get(parameter, Place())
            parts.setdefault((place, id(parameter) in spared), []).append(parameter)
    # The whole rate first: it is the one that the log shows.
    order = sorted(parts, key=lambda key: (-key[0].share, key[0].level, key[1]))
    return [
        {"params": parts[place, still], "share": place.share}
        | ({"weight_decay": 0.0} if still else {})
        for place, still in order
    ]


def make_optimizer(
    factory: Callable[..., Optimizer],
    module: nn.Module,
    places: Mapping[Tensor, Place] | None = None,
    anchored: Collection[Tensor] = (),
) -> Optimizer:
    """Build the optimiser over the trainable parameters and remember each group's own rate.

    Args as in ``parameter_groups``.
    """
    groups = parameter_groups(module, places, anchored)
    if not groups:
        raise UsageError("nothing can be trained: every parameter has requires_grad False")
    try:
        optimizer = _fastest(factory, groups)
        if len(groups) > 1 and not places and not optimizer.defaults.get("weight_decay"):
            # Nothing decays, so nothing is spared, and one group costs a step less than two.
            optimizer = _fastest(factory, [p for group in groups for p in group["params"]])
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer cannot be built: {error}") from None
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * group.pop("share", 1.0)
    return optimizer


def _fastest(factory: Callable[..., Optimizer], params: list[Any]) -> Optimizer:
    """The fused kernel where the optimiser has one for these parameters and nobody chose."""
    chosen = inspect.signature(factory).parameters.get("fused")
    if chosen is not None and chosen.default is None and not _shared(params):
        try:
            return factory(params, fused=True)
        except RuntimeError:  # no such kernel for this device, or another one was asked for
            pass
    return factory(params)


def _shared(params: list[Any]) -> bool:
    """Whether ranks hold parts of the parameters, for which not every fused kernel is there."""
    first = params[0]["params"][0] if isinstance(params[0], dict) else params[0]
    return hasattr(first, "full_tensor")


class Average:
    """Exponential moving average of a module's weights and statistics (Polyak averaging).

    The decay grows as ``min(decay, (1 + n) / (10 + n))`` over n updates, so that a short run is
    not held back by its random start. Integer buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        # Apart, as those of a module that is shared among ranks are not of one kind.
        self._parameters = [p.detach() for p in module.parameters()]
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._live = self._parameters + buffers
        self.mean = [tensor.detach().clone() for tensor in self._live]
        self._decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages toward the weights as they are now."""
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        cut = len(self._parameters)
        for part in (slice(0, cut), slice(cut, None)):
            if self._live[part]:
                torch._foreach_lerp_(self.mean[part], self._live[part], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the averages; a second call puts them back."""
        for live, mean in zip(self._live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


@contextmanager
def averaged(average: Average | None) -> Iterator[None]:
    """The averaged weights inside, the live ones after, errors included."""
    if average is None:
        yield
        return
    average.swap()
    try:
        yield
    finally:
        average.swap()
