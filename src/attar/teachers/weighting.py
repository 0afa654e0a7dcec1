"""How the answers of several teachers become one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EM_STEPS = 1000
LOG_FLOOR = math.log(1e-30)
SETTLED = 1e-7  # a step that moves no weight by more is the last


def joined(logs: Tensor, weights: Tensor, known: Tensor | None = None) -> Tensor:
    """Logarithm of the weighted mean of probabilities, [N, C].

    ``p(c) = 1 / n_c * sum_k w_k p_k(c)``, made to sum to 1, with n_c how many members know c:
    a class that few know is not held against those who do.

    Args:
        logs: log-probabilities of K members, [K, N, C].
        weights: [K] or [K, N], sum 1 over the members.
        known: which classes each member knows, bool [K, C]; None for all.
    """
    weights = weights.to(logs).reshape(*weights.shape, *[1] * (logs.ndim - weights.ndim))
    mean = torch.logsumexp(logs + weights.log(), 0)
    if known is None:
        return mean
    # A class that nobody with a say knows gets next to nothing, and no loss an infinite logit.
    return torch.log_softmax(mean - known.sum(0).to(mean).log(), -1).clamp_min(LOG_FLOOR)


def joined_yes_no(logits: Tensor, weights: Tensor) -> Tensor:
    """Log-odds of the weighted mean of ``sigmoid(logits)`` over members [K, N, C], [N, C]."""
    yes, no = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return joined(yes, weights) - joined(no, weights)


def log_probabilities(logits: Tensor, temperature: float, known: Tensor | None) -> Tensor:
    """Log-probabilities of each member [K, N, C] among the classes that it knows."""
    if known is not None:
        known = known.reshape(len(known), *[1] * (logits.ndim - 2), -1)
        logits = logits.masked_fill(~known, -math.inf)
    return torch.log_softmax(logits / temperature, -1)


def entropy_weights(logs: Tensor, known: Tensor | None = None) -> Tensor:
    """The surer a member, the more it weighs: ``w_k = (1 - H_k / sum_j H_j) / (K - 1)``, [K, N].

    H_k is its entropy over the most it could be, log C_k, which makes members of few and of many
    classes comparable and changes nothing where all know as many. Members that are all certain
    weigh the same.

    Kwon et al., "Adaptive knowledge distillation based on entropy", ICASSP 2020. The code that is
    compared with in the literature (CA-MKD's) leaves out the division by K - 1 and divides by K.
    """
    # 0 log 0 = 0, also where the log is that of a class that is not known.
    entropy = -(logs.exp() * logs.clamp_min(-1e5)).sum(-1)
    if known is not None:
        sizes = known.sum(1).to(logs).log()
        entropy = entropy / sizes.reshape(-1, *[1] * (entropy.ndim - 1))
    total = entropy.sum(0).clamp_min(torch.finfo(entropy.dtype).tiny)
    return _shares(1 - entropy / total)


def confidence_weights(logs: Tensor, labels: Tensor, known: Tensor | None = None) -> Tensor:
    """The nearer to the label, the more: ``w_k = (1 - softmax_k(CE_k)) / (K - 1)``, [K, N].

    CE_k is the member's cross-entropy with the label, at temperature 1. A member that does not
    know an example's class has no say on it, and K is the number of those that do.

    Args:
        labels: int [N], or shares of the classes [N, C].

    Zhang et al., "Confidence-aware multi-teacher knowledge distillation" (CA-MKD), ICASSP 2022.
    The weights sum to 1, as in the paper; its code divides once more by K.
    """
    if labels.is_floating_point():
        shares = labels.to(logs)
    else:
        shares = torch.nn.functional.one_hot(labels.long(), logs.shape[-1]).to(logs)
    distance = -(shares * logs.clamp_min(-1e5)).sum(-1)
    if known is None:
        return _shares(1 - torch.softmax(distance, 0))
    says = torch.stack([shares[..., ~own].sum(-1) == 0 for own in known])
    # Labels that are mixed may be known to nobody as a whole; then all have a say.
    says = says | ~says.any(0)
    raw = 1 - torch.softmax(distance.masked_fill(~says, -math.inf), 0)
    alone = says.sum(0) == 1
    return _shares(torch.where(alone, 1.0, raw) * says)


def _shares(raw: Tensor) -> Tensor:
    return raw / raw.sum(0)


def most_likely_weights(chances: Tensor) -> Tensor:
    """Weights [K] under which the labels are most likely: max of ``sum_n log sum_k w_k p_nk``.

    By expectation maximisation, ``w_k <- mean_n w_k p_nk / sum_j w_j p_nj``, which never lowers
    the likelihood; it has one maximum.

    Args:
        chances: what each of K members gave the label of each example, [N, K].
    """
    chances = chances.double().clamp_min(torch.finfo(torch.float64).tiny)
    weights = chances.new_full((chances.shape[1],), 1 / chances.shape[1])
    for _ in range(EM_STEPS):
        shares = chances * weights
        new = (shares / shares.sum(1, keepdim=True)).mean(0)
        moved = float((new - weights).abs().max())
        weights = new
        if moved < SETTLED:
            break
    return weights
