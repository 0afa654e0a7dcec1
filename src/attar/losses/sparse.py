"""Losses on a teacher of which some logits are kept: its largest, and what is known of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from attar.losses._rows import TAKE_TOP_K, check_logits, check_positive, check_same_shape, wide
from attar.losses._softmax import divergence, log_probabilities, weighed
from attar.losses.types import Positive

# A pass over all columns takes rows in blocks of so many numbers, which stay in a cache; nothing
# of the size of the logits is made but their gradient.
BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's largest logits, with the exact mass of all the others; stands for [..., V].

    Args:
        ids: int64 [..., k], the columns that are kept; none twice in a row.
        logits: float [..., k], the teacher's logits there, as they came, over no temperature.
        log_tail: float [..., len(temperatures)], log Σ exp(logit / T) over the columns that are
            not kept, for each T of `temperatures`; -inf where there are none. Kept apart from the
            rest, a mass of 1e-12 has as many right digits as one of 0.5.
        temperatures: those at which probabilities are known, and exact.
        width: V, the number of columns.
        tail_ids: int64 [..., s], columns drawn with replacement from those not kept; for
            `sampled_kl`.
        tail_logits: float [..., s], the teacher's logits there.
        tail_temperature: one of `temperatures`, at whose probabilities they were drawn.

    The losses that take it: `kl_divergence`, `reverse_kl`, `skewed_kl`, `jensen_shannon`,
    `total_variation` and `alpha_beta_divergence` compare k + 1 outcomes, the last being "any other
    column", in which the student divides its mass as it likes; `sampled_kl` looks into it.

    >>> import torch
    >>> top = TopK.of(torch.tensor([[4.0, 1.0, 3.0, 0.0]]), k=2, temperatures=(1.0, 2.0))
    >>> top.ids, top.log_probabilities(1.0).exp(), top.tail_mass(1.0)
    (tensor([[0, 2]]), tensor([[0.6964, 0.2562]]), tensor([0.0474]))
    """

    ids: Tensor
    logits: Tensor
    log_tail: Tensor
    temperatures: tuple[float, ...]
    width: int
    tail_ids: Tensor | None = None
    tail_logits: Tensor | None = None
    tail_temperature: float = 1.0

    @classmethod
    def of(cls, logits: Tensor, *, k: int, temperatures: Sequence[float] = (1.0, 2.0, 4.0)) -> TopK:
        """What is kept of these logits [..., V]; in float32, or float64 if they are."""
        logits = wide(logits.detach())
        values, ids = logits.topk(k)
        rest = logits.scatter(-1, ids, -math.inf)
        tails = [(rest / temperature).logsumexp(-1) for temperature in temperatures]
        return cls(ids, values, torch.stack(tails, -1), tuple(temperatures), logits.shape[-1])

    def __post_init__(self) -> None:
        lead = self.ids.shape[:-1]
        grid = torch.Size([*lead, len(self.temperatures)])
        if self.logits.shape != self.ids.shape or self.log_tail.shape != grid:
            raise ValueError(
                f"a TopK has ids and logits [..., k] and log_tail [..., {len(self.temperatures)}], "
                f"one for each temperature, got {tuple(self.ids.shape)}, "
                f"{tuple(self.logits.shape)} and {tuple(self.log_tail.shape)}."
            )
        if (self.tail_ids is None) != (self.tail_logits is None):
            raise ValueError("a TopK has tail_ids and tail_logits, or neither; give both.")
        if self.tail_ids is not None and self.tail_logits is not None:
            drawn = self.tail_ids.shape
            if drawn != self.tail_logits.shape or drawn[:-1] != lead:
                raise ValueError(
                    f"tail_ids and tail_logits must have one shape [..., s] of the same rows as "
                    f"ids, got {tuple(drawn)}, {tuple(self.tail_logits.shape)} "
                    f"and {tuple(self.ids.shape)}."
                )

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits that this stands for."""
        return torch.Size([*self.ids.shape[:-1], self.width])

    def log_probabilities(self, temperature: float) -> Tensor:
        """log p of the columns that are kept, [..., k], at one of `temperatures`."""
        return self.lumped(temperature)[..., :-1].div(temperature) - self.log_partition(
            temperature
        ).unsqueeze(-1)

    def tail_mass(self, temperature: float) -> Tensor:
        """The probability of all columns that are not kept, [...], at one of `temperatures`."""
        return (self.tail(temperature) - self.log_partition(temperature)).exp()

    def log_partition(self, temperature: float) -> Tensor:
        """log Σ exp(logit / T) over all columns, [...], at one of `temperatures`."""
        return (self.lumped(temperature) / temperature).logsumexp(-1)

    def tail(self, temperature: float) -> Tensor:
        """`log_tail` at one of `temperatures`, [...]; at any other nothing is known."""
        try:
            return self.log_tail[..., self.temperatures.index(temperature)]
        except ValueError:
            raise ValueError(
                f"temperature must be one of those that were stored, "
                f"{', '.join(map(str, self.temperatures))}, got {temperature}; store it too."
            ) from None

    def lumped(self, temperature: float) -> Tensor:
        """Logits of k + 1 outcomes, the last being any other column; to be divided by T."""
        tail = self.tail(temperature).unsqueeze(-1) * temperature
        return torch.cat([self.logits, tail.to(self.logits.dtype)], dim=-1)

    def __getattr__(self, name: str) -> Any:
        """Whoever takes this for a tensor is told what it is."""
        raise AttributeError(
            f"a TopK has no '{name}': it holds some of a teacher's logits, not all; keep them all, "
            f"or use one of {', '.join(TAKE_TOP_K)}."
        )

    def __getitem__(self, rows: Any) -> TopK:
        """Some of the rows: an index, a slice or a mask of the dimensions before the last."""
        return self._each(lambda part: part[rows])

    def __len__(self) -> int:
        return len(self.ids)

    def detach(self) -> TopK:
        """The same, without a graph behind it."""
        return self._each(Tensor.detach)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopK:
        """The same on another device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TopK:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        new: dict[str, Any] = {n: change(p) for n, p in parts.items() if isinstance(p, Tensor)}
        return replace(self, **new)


def comparable(
    student: Tensor, teacher: Tensor | TopK, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Both sides as logits of the same outcomes, checked: all columns, or those of a TopK.

    Of a TopK the last outcome is right at this temperature only.
    """
    check_positive("temperature", temperature)
    if isinstance(teacher, Tensor):
        check_logits(student, teacher)
        return student, teacher
    _check_rows(student, teacher)
    if not teacher.ids.shape[-1]:
        raise ValueError(
            "the teacher is a TopK that keeps no logits, only draws, which sampled_kl is for."
        )
    kept, tail = _Outcomes.apply(student, teacher.ids, None, temperature)
    return _with_tail(kept, tail, temperature), teacher.lumped(temperature)


def _check_rows(student: Tensor, teacher: TopK) -> None:
    check_same_shape(student, teacher, sparse=True)
    if student.ndim != 2:
        raise ValueError(f"logits must have shape [N, V], got {tuple(student.shape)}.")


def _with_tail(kept: Tensor, tail: Tensor, temperature: float) -> Tensor:
    return torch.cat([kept, tail.unsqueeze(-1) * temperature], dim=-1)


class _Outcomes(torch.autograd.Function):
    """Logits of some columns, and the log-partition of the others at a temperature.

    (logits [N, V], ids [N, k], drawn [N, s] or None, T) to (kept [N, k], tail [N]), with the drawn
    behind the kept. log(1 - Σ q) would lose a small tail to rounding; here the others are summed
    by themselves. The backward pass makes the gradient and, block by block, nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, drawn: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        picked = ids if drawn is None else torch.cat([ids, drawn], dim=-1)
        kept = wide(logits.gather(-1, picked))
        tail = kept.new_empty(len(logits))
        for rows in _blocks(logits):
            block = wide(logits[rows]) / temperature
            tail[rows] = block.scatter_(-1, ids[rows], -math.inf).logsumexp(-1)
        ctx.save_for_backward(logits, ids, drawn, tail)
        ctx.temperature = temperature
        return kept, tail

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_kept: Tensor, to_tail: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, drawn, tail = ctx.saved_tensors
        # Where there are no others the finite floor keeps -inf - -inf from coming up.
        floor = tail.clamp(min=torch.finfo(tail.dtype).min).unsqueeze(-1)
        share = (to_tail / ctx.temperature).unsqueeze(-1)
        k = ids.shape[-1]
        gradient = torch.empty_like(logits)
        for rows in _blocks(logits):
            block = wide(logits[rows]) / ctx.temperature
            block.sub_(floor[rows]).exp_().mul_(share[rows])
            block.scatter_(-1, ids[rows], to_kept[rows, :k])
            if drawn is not None:  # with replacement: one column may have been drawn twice
                block.scatter_add_(-1, drawn[rows], to_kept[rows, k:])
            gradient[rows] = block
        return gradient, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    size = max(1, BLOCK // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def sampled_kl(student: Tensor, teacher: Tensor | TopK, *, temperature: Positive = 1.0) -> Tensor:
    """Random sampling distillation (RS-KD): T² KL(p ‖ q), its tail estimated from draws.

    p = softmax(teacher / T), q = softmax(student / T). Of a `TopK` with s draws from the columns it
    does not keep, this is the divergence of k + 1 outcomes, which is exact, plus what
    `kl_divergence` leaves out, the divergence within the tail:
    (1/s) Σ_i w_i (log p(i | tail) - log q(i | tail)), where w_i = p_i / (the probability with which
    i was drawn); at the temperature of the draws each w_i is the tail's mass. The weights are not
    normalised, so that over the draws value and gradient have the expectation of the dense loss.
    With k = 0 all that is kept are draws: random sampling alone.

    Shapes: student [N, V] logits; teacher a TopK of [N, V] with draws, or logits [N, V], of which
    it is `kl_divergence`, exact. Returns [N], in nats times T². A value of few draws may be below
    zero. Above the temperature of the draws a column that is hardly ever drawn would weigh
    thousands of times what another does, so that is refused; below it is allowed.

    Paper: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
    ACL 2025: k = 0 and 50 draws, T = 1; weights carry over. There the weights of another proposal
    are normalised, which is biased.

    The error of draws averages out over tokens, that of the bucket of `kl_divergence` stays. On a
    real pair (`benchmarks/topk.py`), at T = 1 and some 115 bytes a token, the gradient of 1,024
    tokens is off by 0.02 of itself with 24 logits and 8 draws, by 0.03 with 32 draws alone, and by
    0.22 with 32 logits in a bucket, for a student far from its teacher; for one near it, by 0.16,
    0.25 and 0.22, and the gradient of a single token by 0.31, 0.48 and 0.08. So use it to train
    from scratch, with large steps, and at T = 1: at T = 2 so few draws are too few (1.4 and 0.84,
    against 0.30 of the bucket).

    Neighbours: without the draws it is `kl_divergence` of the same TopK, which is at most the dense
    one; with all columns kept they are equal.

    >>> import torch
    >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
    >>> sampled_kl(student, teacher)
    tensor([1.1504])
    """
    check_positive("temperature", temperature)
    if isinstance(teacher, Tensor):
        check_logits(student, teacher)
        return divergence(*log_probabilities(student, teacher, temperature), temperature**2)
    _check_rows(student, teacher)
    if teacher.tail_ids is None or not teacher.tail_ids.shape[-1]:
        raise ValueError(
            "the teacher is a TopK without draws of its tail, which sampled_kl needs; store some, "
            "or use kl_divergence."
        )
    if temperature > teacher.tail_temperature:
        raise ValueError(
            f"temperature must be at most that of the teacher's draws, "
            f"{teacher.tail_temperature}, got {temperature}; draw at a higher one."
        )
    teacher = teacher.detach()
    k = teacher.ids.shape[-1]
    kept, tail = _Outcomes.apply(student, teacher.ids, teacher.tail_ids, temperature)
    lumped = _with_tail(kept[:, :k], tail, temperature)
    outside = divergence(*log_probabilities(lumped, teacher.lumped(temperature), temperature))
    drawn = kept[:, k:] / temperature - tail.unsqueeze(-1)
    return (outside + _within(drawn, teacher, temperature)) * temperature**2


def _within(log_q: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """The tail's mass times the divergence within it, estimated; log_q [N, s] is within it too."""
    assert teacher.tail_logits is not None
    logits, tail = wide(teacher.tail_logits), teacher.tail(temperature).unsqueeze(-1)
    log_p = logits / temperature
    at = teacher.tail_temperature
    proposed = logits / at - teacher.tail(at).unsqueeze(-1)
    log_weight = log_p - teacher.log_partition(temperature).unsqueeze(-1) - proposed
    # Of a tail without mass there is nothing to draw.
    weight = log_weight.masked_fill(tail == -math.inf, -math.inf).exp() / logits.shape[-1]
    return weighed(weight, log_p - tail - log_q)
