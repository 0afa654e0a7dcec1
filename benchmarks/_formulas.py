"""The losses that are compared, as their papers write them: float64, with no care for speed.

Each is ``formula(student, teacher) -> scalar`` of float64 tensors; autograd gives its gradient.
Where a paper divides nothing by nothing (the direction of a zero vector, the correlation of a
constant) the quotient is 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PROBABILITY_EPS = 1e-7  # of the published code of probabilistic transfer, in its logarithms


def unit(x: Tensor, dim: int = -1) -> Tensor:
    norm = x.square().sum(dim, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1).sqrt(), 0)


def forward_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    q, p = (F.log_softmax(z / temperature, 1) for z in (s, t))
    return temperature**2 * (p.exp() * (p - q)).sum(1).mean()


def reverse_kl(s: Tensor, t: Tensor) -> Tensor:
    return forward_kl(t, s, 1.0)


def jensen_shannon(s: Tensor, t: Tensor) -> Tensor:
    q, p = (F.log_softmax(z, 1) for z in (s, t))
    m = torch.logaddexp(q, p) - math.log(2)
    return ((p.exp() * (p - m)).sum(1) / 2 + (q.exp() * (q - m)).sum(1) / 2).mean()


def standardized(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    s, t = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (s, t))
    return forward_kl(s, t, temperature)


def decoupled(s: Tensor, t: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """The label is the first class."""
    binary, others = [], []
    for z in (s / temperature, t / temperature):
        total, rest = z.logsumexp(1), z[:, 1:].logsumexp(1)
        binary.append(torch.stack([z[:, 0] - total, rest - total], 1))
        others.append(F.log_softmax(z[:, 1:], 1))
    parts = [(p.exp() * (p - q)).sum(1).mean() for q, p in (binary, others)]
    return temperature**2 * (alpha * parts[0] + beta * parts[1])


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """1 - correlation of each row; 0 where b is constant to float32."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    varies = b.norm(dim=1) > 1e-37
    return torch.where(varies, 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8), 0)


def correlation(s: Tensor, t: Tensor) -> Tensor:
    q, p = F.softmax(s, 1), F.softmax(t, 1)
    return _pearson(q, p).mean() + _pearson(q.T, p.T).mean()


def mean_square(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().mean()


def attention(s: Tensor, t: Tensor) -> Tensor:
    a, b = (unit(x.square().sum(1).flatten(1)) for x in (s, t))
    return (a - b).square().mean()


def context(s: Tensor, t: Tensor) -> Tensor:
    value, total, weight = mean_square(s, t), 1.0, 1.0
    for size in (4, 2, 1):
        if size < s.shape[2]:
            weight /= 2
            total += weight
            value = value + weight * mean_square(
                F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)
            )
    return value / total


def channels(s: Tensor, t: Tensor) -> Tensor:
    a, b = (unit(x.flatten(2) @ x.flatten(2).transpose(1, 2)) for x in (s, t))
    return (a - b).square().sum((1, 2)).mean() / s.shape[1]


def products(s: Tensor, t: Tensor) -> Tensor:
    a, b = (unit(x @ x.T) for x in (s, t))
    return (a - b).square().mean()


def distances(s: Tensor, t: Tensor) -> Tensor:
    relative = []
    for x in (s, t):
        squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(2)
        d = torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
        relative.append(d / (d.sum() / (d > 0).sum()) if d.sum() > 0 else d)
    return F.smooth_l1_loss(*relative)


def angles(s: Tensor, t: Tensor) -> Tensor:
    cosines = []
    for x in (s, t):
        edges = unit(x.unsqueeze(0) - x.unsqueeze(1))
        cosines.append(edges @ edges.transpose(1, 2))
    return F.smooth_l1_loss(*cosines)


def neighbours(s: Tensor, t: Tensor) -> Tensor:
    tables = []
    for x in (s, t):
        similar = (unit(x) @ unit(x).T + 1) / 2
        tables.append(similar / similar.sum(1, keepdim=True))
    q, p = tables
    return (p * ((p + PROBABILITY_EPS) / (q + PROBABILITY_EPS)).log()).sum(1).mean()


def congruence(s: Tensor, t: Tensor) -> Tensor:
    kernels = []
    for x in (s, t):
        c = 0.8 * unit(x) @ unit(x).T
        kernels.append(math.exp(-0.8) * (1 + c + c.square() / 2))
    return (kernels[0] - kernels[1]).square().mean()
