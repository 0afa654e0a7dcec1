"""Divergences on probabilities that are already there: their value, and what the gradient needs.

A kernel has (log_q, q) of the student, (log_p, p) of the teacher, both at one temperature and the
logarithms finite, two spare buffers of their size, and its options. It gives the value of each row
and (a, Σ a, factor): factor · a = ∂value/∂log q, with log q taken as free and up to a multiple of
q. What is proportional to q drops out as the gradient is brought to the logits, g = a - q Σ a.
Only the spare buffers are written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attar.losses.divergence import jensen_shannon, reverse_kl, skewed_kl, total_variation
from attar.losses.response import kl_divergence

Options = Mapping[str, Any]


class Sides(NamedTuple):
    """Both sides' probabilities at one temperature, [b, C], and two buffers of that shape."""

    log_q: Tensor
    q: Tensor
    log_p: Tensor
    p: Tensor
    x: Tensor
    y: Tensor


class Free(NamedTuple):
    """factor · a = ∂value/∂log q; ``total`` [b] is Σ a."""

    a: Tensor
    total: Tensor
    factor: float


Kernel = Callable[[Sides, Options], tuple[Tensor, Free]]


def _forward(s: Sides, _: Options) -> tuple[Tensor, Free]:
    torch.sub(s.log_p, s.log_q, out=s.x)
    value = torch.linalg.vecdot(s.p, s.x)
    return value, Free(s.p, torch.ones_like(value), -1.0)


def _reverse(s: Sides, _: Options) -> tuple[Tensor, Free]:
    torch.sub(s.log_q, s.log_p, out=s.x).mul_(s.q)
    value = s.x.sum(-1)
    return value, Free(s.x, value, 1.0)


def _jensen_shannon(s: Sides, options: Options) -> tuple[Tensor, Free]:
    beta = options["beta"]
    log_m = _log_mixture(s.q, s.p, beta, s.x)
    forward = torch.linalg.vecdot(s.p, torch.sub(s.log_p, log_m, out=s.y))
    torch.sub(s.log_q, log_m, out=s.x).mul_(s.q)
    share = 1 / (beta * (1 - beta)) if options["normalized"] else 1.0
    reverse = s.x.sum(-1)
    value = (forward * beta).add_(reverse, alpha=1 - beta)
    return value * share, Free(s.x, reverse, (1 - beta) * share)


def _skewed(s: Sides, options: Options) -> tuple[Tensor, Free]:
    return (_skewed_reverse if options["reverse"] else _skewed_forward)(s, options["skew"])


def _skewed_forward(s: Sides, skew: float) -> tuple[Tensor, Free]:
    mixture = _mixture(s.q, s.p, skew, s.x)
    torch.div(s.q, mixture, out=s.y).mul_(s.p)
    torch.sub(s.log_p, mixture.log_(), out=s.x)
    return torch.linalg.vecdot(s.p, s.x), Free(s.y, s.y.sum(-1), skew - 1)


def _skewed_reverse(s: Sides, skew: float) -> tuple[Tensor, Free]:
    mixture = _mixture(s.p, s.q, skew, s.x)
    torch.div(s.q, mixture, out=s.y)
    torch.sub(s.log_q, mixture.log_(), out=s.x)
    value = torch.linalg.vecdot(s.q, s.x)
    free = s.x.sub_(s.y, alpha=skew).mul_(s.q)
    return value, Free(free, free.sum(-1), 1.0)


def _total_variation(s: Sides, _: Options) -> tuple[Tensor, Free]:
    gap = torch.sub(s.q, s.p, out=s.x)
    value = torch.abs(gap, out=s.y).sum(-1) / 2
    free = gap.sign_().mul_(s.q)
    return value, Free(free, free.sum(-1), 0.5)


def _mixture(a: Tensor, b: Tensor, share: float, out: Tensor) -> Tensor:
    """(1 - share) a + share b, never zero: where both are, so is what it is a part of."""
    return torch.lerp(a, b, share, out=out).clamp_(min=torch.finfo(out.dtype).tiny)


def _log_mixture(a: Tensor, b: Tensor, share: float, out: Tensor) -> Tensor:
    return _mixture(a, b, share, out).log_()


KERNELS: dict[Callable[..., Tensor], Kernel] = {
    kl_divergence: _forward,
    reverse_kl: _reverse,
    skewed_kl: _skewed,
    jensen_shannon: _jensen_shannon,
    total_variation: _total_variation,
}
