"""What the losses on probabilities share: temperatures, log-probabilities, sums with 0 · log 0."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import refuse_labels, wide

# A probability below exp(-1e5) is zero in every float; its logarithm may as well be finite.
LOG_ZERO = -1e5


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, in float32 or wider; a copy only where that changes them."""
    if logits.dtype is not torch.float32:
        logits = wide(logits)
    return logits if temperature == 1 else logits / temperature


def log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(log q of the student, log p of the teacher, detached), both at the temperature."""
    log_q = torch.log_softmax(tempered(student, temperature), -1)
    return log_q, torch.log_softmax(tempered(teacher.detach(), temperature), -1)


def divergence(log_q: Tensor, log_p: Tensor, scale: float = 1.0) -> Tensor:
    """scale · Σ p (log p - log q) over the last dimension, with 0 log 0 = 0 whatever q is."""
    return weighed(log_p.exp().mul_(scale), log_p - log_q)


def weighed(weight: Tensor, gap: Tensor) -> Tensor:
    """Σ weight · gap over the last dimension, with 0 · anything = 0; no gradient to the weight."""
    # Only 0 · inf gives a NaN here. Where there is none, a mask and its backward pass are saved.
    if can_be_asked(weight):
        value = (weight * gap).sum(-1)
        if not math.isnan(value.detach().sum().item()):
            return value
    return (weight * gap.masked_fill(weight == 0, 0.0)).sum(-1)


def can_be_asked(values: Tensor) -> bool:
    """Whether the numbers can be looked at without waiting: only a CPU answers at once."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def all_finite(values: Tensor) -> bool:
    """No NaN or infinity among the values of a few rows; squares that overflow count as such."""
    flat = values.detach().reshape(-1)
    return math.isfinite(flat.dot(flat).item())


def reverse_divergence(log_q: Tensor, log_p: Tensor, power: float = 1.0) -> Tensor:
    """Σ q^power (log q - log p); +inf, without gradient, where p excludes what q does not."""
    weight = (log_q if power == 1 else log_q * power).exp()
    gap = log_q - log_p
    if can_be_asked(gap):
        value = (weight * gap).sum(-1)
        if all_finite(value):
            return value
    excluded, left_out = log_p == -math.inf, log_q == -math.inf
    value = (weight * gap.masked_fill(excluded | left_out, 0.0)).sum(-1)
    # The gradient of an infinite value would be inf - inf.
    return value.masked_fill((excluded & ~left_out).any(-1), math.inf)


def floored(logs: Tensor) -> Tensor:
    """Logarithms with a finite one of zero, so that no inf - inf comes up; may be in place."""
    return logs.clamp(min=LOG_ZERO) if logs.requires_grad else logs.clamp_(min=LOG_ZERO)


def skewed_divergence(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """KL(a ‖ share a + (1 - share) b), at most -log(share) whatever a and b exclude."""
    # log(mixture / a) = log(share) + softplus(log b - log a - log(share / (1 - share)))
    log_a = floored(log_a)
    gap = (log_b - log_a).sub_(math.log(share / (1 - share)))
    return -(log_a.exp() * F.softplus(gap, threshold=40)).sum(-1) - math.log(share)


def label_column(labels: Tensor, logits: Tensor) -> Tensor:
    """The labelled class of each row, [N, 1]; the arg max of labels that are probabilities."""
    number = labels.argmax(-1) if labels.is_floating_point() else labels.long()
    column = number.unsqueeze(-1)
    try:
        logits.detach().gather(-1, column)  # the cheapest way to ask torch whether all are classes
    except RuntimeError:
        refuse_labels(labels, logits)
        raise
    return column


def decoupled(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (this column, any other) [N, 2], and among the others [N, C]."""
    others = without(logits, column)
    binary = torch.cat([logits.gather(-1, column), others.logsumexp(-1, keepdim=True)], dim=-1)
    return F.log_softmax(binary, dim=-1), F.log_softmax(others, dim=-1)


def without(logits: Tensor, column: Tensor) -> Tensor:
    """Logits in which one column of each row has no probability."""
    # So low that it is zero after a softmax; finite, so that two of them have a difference.
    return logits.scatter(-1, column, torch.finfo(logits.dtype).min / 2)
