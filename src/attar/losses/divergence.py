"""Divergences between the answers of student and teacher other than the forward KL: [N, C] in."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.losses._rows import (
    absent,
    check_logits,
    check_not_negative,
    check_positive,
    check_share,
    wide,
)
from attar.losses._softmax import (
    all_finite,
    can_be_asked,
    divergence,
    floored,
    log_probabilities,
    reverse_divergence,
    skewed_divergence,
    tempered,
    weighed,
)
from attar.losses.sparse import TopK, comparable
from attar.losses.types import NotNegative, Positive, Share


def reverse_kl(student: Tensor, teacher: Tensor | TopK, *, temperature: Positive = 1.0) -> Tensor:
    """Reverse KL (RKL), mode seeking: T² Σ_c q_c (log q_c - log p_c).

    p = softmax(teacher / T) and q = softmax(student / T). The student is asked not to expect what
    the teacher does not: it settles on some of the teacher's modes, where `kl_divergence` spreads
    over all of them.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N], in
    nats times T²; +inf, with no gradient from that row, where the teacher excludes (logit -inf)
    what the student does not. A class that the student excludes contributes nothing.

    Papers: Gu et al., "MiniLLM", ICLR 2024, as a policy gradient; Ko et al., "DistiLLM", ICML 2024,
    as here. Their T is 1; codes without T²: weight_ours = weight_theirs / T². The official code
    has a NaN gradient where both sides exclude a class.

    Neighbours: `kl_divergence` with the sides exchanged. With one distribution near the other both
    have the same size, ½ Σ (q - p)² / p. `skewed_kl` with reverse=True is never infinite. A sum of
    the two directions (symmetric or Jeffreys) is two terms.

    >>> import torch
    >>> reverse_kl(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]]))
    tensor([1.8226])
    """
    log_q, log_p = log_probabilities(*comparable(student, teacher, temperature), temperature)
    return reverse_divergence(log_q, log_p) * temperature**2


def skewed_kl(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    skew: Share = 0.1,
    reverse: bool = False,
    temperature: Positive = 1.0,
) -> Tensor:
    """Skewed KL (SKL, SRKL): T² KL(p ‖ α p + (1 - α) q), or T² KL(q ‖ α q + (1 - α) p) in reverse.

    p = softmax(teacher / T) and q = softmax(student / T); α is `skew`. What is compared with is
    mixed with a little of what is compared, so the value is never above -T² log α and the gradient
    stays small where plain KL's explodes: far from the teacher, early in training.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N], in
    nats times T², finite whatever either side excludes (logit -inf).

    Papers: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML
    2024, α = 0.1 and T = 1; DistiLLM-2, ICML 2025. The official forward value leaves out the
    teacher's entropy (the same gradient). DistiLLM-2 detaches the student inside the mixture of
    the reverse form (the same value, another gradient); here, as in DistiLLM, nothing is detached.
    Codes without T²: weight_ours = weight_theirs / T².

    Neighbours: as α → 0 it is `kl_divergence`, or `reverse_kl`; as α → 1 it is zero.
    `jensen_shannon` is the weighted sum of both directions.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    >>> skewed_kl(student, teacher), skewed_kl(student, teacher, reverse=True)
    (tensor([1.1823]), tensor([1.1994]))
    """
    check_share("skew", skew)
    log_q, log_p = log_probabilities(*comparable(student, teacher, temperature), temperature)
    pair = (log_q, log_p) if reverse else (log_p, log_q)
    return skewed_divergence(*pair, skew) * temperature**2


def jensen_shannon(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    beta: Share = 0.5,
    normalized: bool = False,
    temperature: Positive = 1.0,
) -> Tensor:
    """Jensen-Shannon divergence (JSD), generalised: T² (β KL(p ‖ m) + (1 - β) KL(q ‖ m)).

    p = softmax(teacher / T), q = softmax(student / T) and m = β p + (1 - β) q. A small β behaves
    like the forward KL (spread over the teacher's modes), a large one like the reverse (settle on
    some). `normalized` divides it by β (1 - β), so that its size stays the same for every β.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N], in
    nats times T², at most the entropy of (β, 1 - β) times T² (log 2 for β = 0.5), before it is
    normalised, whatever either side excludes (logit -inf).

    Paper: Agarwal et al., "On-Policy Distillation of Language Models" (GKD), ICLR 2024; β = 0.5.
    TRL has T = 0.9 and no T²: weight_ours = weight_theirs / T². At β = 0 and 1 the divergence
    itself vanishes, and TRL puts the two KLs there; here these are `kl_divergence` and
    `reverse_kl`. DistiLLM's `js_distance` with lam is β = 1 - lam.

    Neighbours: JSD / β → `kl_divergence` as β → 0, JSD / (1 - β) → `reverse_kl` as β → 1: the
    weight must grow as β leaves the middle; `normalized` does that, and then it runs from
    `kl_divergence` to `reverse_kl`. `skewed_kl` is one of its two parts.

    >>> import torch
    >>> jensen_shannon(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]]))
    tensor([0.3532])
    """
    check_share("beta", beta)
    log_q, log_p = log_probabilities(*comparable(student, teacher, temperature), temperature)
    log_q, log_p = floored(log_q), floored(log_p)
    # With u = log(β p / (1 - β) q), -log(β p / m) = softplus(-u) and -log((1 - β) q / m) =
    # softplus(u) = u + softplus(-u).
    u = (log_p - log_q).add_(math.log(beta / (1 - beta)))
    above = F.softplus(u, threshold=40)
    spent = (log_p.exp().mul_(beta) * (above - u)).sum(-1)
    spent = spent + (log_q.exp() * above).sum(-1) * (1 - beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    share = beta * (1 - beta) if normalized else 1.0
    return (bound - spent) * (temperature**2 / share)


def total_variation(student: Tensor, teacher: Tensor | TopK) -> Tensor:
    """Total variation distance (TVD): ½ Σ_c |p_c - q_c|.

    p = softmax(teacher) and q = softmax(student): the largest difference in probability that the
    two can have about any set of classes. Its gradient is bounded and ignores how wrong a
    probability is, so rare classes and noise in the teacher's tail count little.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N], in
    [0, 1], whatever either side excludes (logit -inf). At equality it has a kink; the gradient
    there is zero.

    Paper: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL
    2023; the value is that of DistiLLM's code. No temperature: divide the logits, should one be
    wanted.

    Neighbours: its square is at most half of `kl_divergence` at temperature 1 (Pinsker), and it is
    at most 1 where KL is infinite.

    >>> import torch
    >>> total_variation(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]]))
    tensor([0.7538])
    """
    said, told = comparable(student, teacher)
    q, p = F.softmax(wide(said), dim=-1), F.softmax(wide(told.detach()), dim=-1)
    return (q - p).abs().sum(-1) / 2


def alpha_beta_divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    alpha: NotNegative = 0.2,
    beta: NotNegative = 0.7,
    temperature: Positive = 1.0,
) -> Tensor:
    """Alpha-beta divergence (ABKD): forward and reverse KL, and what lies between and beyond.

    -T² / (αβ) Σ_c (p_c^α q_c^β - α/(α+β) p_c^(α+β) - β/(α+β) q_c^(α+β)), with p = softmax(teacher /
    T) and q = softmax(student / T); where α or β is 0, its limit. A larger α looks more at what the
    teacher expects, a larger β more at what the student does.

    Shapes: student and teacher [N, C] logits; the teacher may be a `TopK` of them. Returns [N],
    times T². With α and β above 0 it is finite whatever either side excludes (logit -inf); with β =
    0 the student, with α = 0 the teacher, must not exclude what the other expects, or the row is
    +inf (for α = 0 and for α = β = 0 with no gradient). Negative powers are refused: they are
    infinite on confident answers. The sum is of differences, so values below about 1e-6 / (αβ) are
    rounding in float32.

    Paper: Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
    Distillation via α-β-Divergence", ICML 2025: 0.2 and 0.7 on language models with T = 1, 0.8 and
    0.3 on CIFAR-100 with T = 4. Official code has no T²: weight_ours = weight_theirs / T².

    Neighbours: (1, 0) is `kl_divergence`, (0, 1) `reverse_kl`, α + β = 1 the alpha divergences with
    (½, ½) = 2 Σ (√p - √q)² (four times the squared Hellinger distance), α = 1 the beta divergences
    with (1, 1) = ½ Σ (p - q)², and (0, 0) is ½ Σ (log p - log q)².

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    >>> alpha_beta_divergence(student, teacher)
    tensor([1.8737])
    """
    check_not_negative("alpha", alpha)
    check_not_negative("beta", beta)
    log_q, log_p = log_probabilities(*comparable(student, teacher, temperature), temperature)
    return _alpha_beta(log_q, log_p, alpha, beta) * temperature**2


def _alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float, beta: float) -> Tensor:
    if not alpha and not beta:
        return _half_squares(log_q, log_p)
    total = alpha + beta
    mass_p, mass_q = (log_p * total).exp(), (log_q * total).exp()
    if not beta:
        return weighed(mass_p / alpha, log_p - log_q) + (mass_q - mass_p).sum(-1) / alpha**2
    if not alpha:
        both = reverse_divergence(log_q, log_p, beta)
        return both / beta + (mass_p - mass_q).sum(-1) / beta**2
    both = torch.add(log_p * alpha, log_q, alpha=beta).exp()
    apart = torch.add(mass_p.mul_(alpha / total), mass_q, alpha=beta / total)
    return (apart - both).sum(-1) / (alpha * beta)


def _half_squares(log_q: Tensor, log_p: Tensor) -> Tensor:
    """½ Σ (log q - log p)² over what both allow; +inf where only one excludes."""
    gap = log_q - log_p
    if can_be_asked(gap):
        value = gap.square().sum(-1) / 2
        if all_finite(value):
            return value
    without_q, without_p = log_q == -math.inf, log_p == -math.inf
    value = gap.masked_fill(without_q | without_p, 0.0).square().sum(-1) / 2
    return value.masked_fill((without_q ^ without_p).any(-1), math.inf)


def adaptive_kl(
    student: Tensor, teacher: Tensor, *, head: Share = 0.5, temperature: Positive = 1.0
) -> Tensor:
    """Adaptive KL (AKL): T² (w KL(p ‖ q) + (1 - w) KL(q ‖ p)), w by where the two differ.

    p = softmax(teacher / T) and q = softmax(student / T). The teacher's head is its most probable
    classes up to a sum of `head`, its first always among them. w is the head's part of
    Σ_c |p_c - q_c|, held: no gradient flows through it. The forward KL, which learns the head
    first, has the weight of what is still wrong there; the reverse KL that of the tail.

    Shapes: student and teacher [N, C] logits. Returns [N], in nats times T²; +inf where
    `kl_divergence` or `reverse_kl` is and has weight.

    Paper: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large
    Language Models", COLING 2025; head 0.5, T = 1. DSKD's version lets the sum pass `head` by
    one class. Codes without T²: weight_ours = weight_theirs / T². It sorts the classes: with a wide
    vocabulary several times the cost of the others.

    Neighbours: between `kl_divergence` (w = 1) and `reverse_kl` (w = 0).

    >>> import torch
    >>> adaptive_kl(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]]))
    tensor([1.7539])
    """
    check_logits(student, teacher)
    check_share("head", head)
    check_positive("temperature", temperature)
    log_q, log_p = log_probabilities(student, teacher, temperature)
    weight = _head_part(log_q.detach(), log_p, head)
    forward, backward = divergence(log_q, log_p), reverse_divergence(log_q, log_p)
    # A weight of exactly zero silences an infinite value.
    parts = torch.stack([forward, backward], dim=-1)
    return weighed(torch.stack([weight, 1 - weight], dim=-1), parts) * temperature**2


def _head_part(log_q: Tensor, log_p: Tensor, head: float) -> Tensor:
    p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    gap = (p - log_q.exp().gather(-1, order)).abs()
    in_head = p.cumsum(-1) <= head
    in_head[..., 0] = True
    return (gap * in_head).sum(-1) / gap.sum(-1).clamp(min=torch.finfo(gap.dtype).tiny)


def earth_mover(student: Tensor, teacher: Tensor, *, temperature: Positive = 1.0) -> Tensor:
    """Squared earth mover's distance (EMD²) for ordered classes: T² Σ_k (P_k - Q_k)².

    P and Q are the cumulative sums of p = softmax(teacher / T) and q = softmax(student / T) over
    the classes in their order: probability that is wrong by two grades costs more than by one.

    Shapes: student and teacher [N, C] logits of classes in order (grades, ages, bins). Returns [N],
    in [0, T² (C - 1)], whatever either side excludes (logit -inf). Classes absent on both sides are
    as if cut off: their neighbours become neighbours.

    Papers: Hou, Yu, Samaras, "Squared Earth Mover's Distance-based Loss for Training Deep Neural
    Networks", 2016; with the label in the teacher's place it is the ranked probability score
    (Epstein, 1969). Codes that take the mean over classes: weight_ours = weight_theirs / C.

    Neighbours: `kl_divergence` does not know the order; permuting the classes changes this.

    >>> import torch
    >>> student, near, far = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]]).split(1)
    >>> earth_mover(student, near), earth_mover(student, far)
    (tensor([0.9605]), tensor([1.9210]))
    """
    check_logits(student, teacher)
    check_positive("temperature", temperature)
    q = F.softmax(tempered(student, temperature), dim=-1)
    p = F.softmax(tempered(teacher.detach(), temperature), dim=-1)
    ahead, gone = (q - p).cumsum(-1), absent(student, teacher)
    if not can_be_asked(gone) or gone.any():
        ahead = ahead.masked_fill(gone, 0.0)
    return ahead.square().sum(-1) * temperature**2
