"""Losses with trained weights or a memory: built from example signals, trained with the student."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from attar.losses._maps import (
    check_maps,
    check_same_examples,
    flat_pair,
    map_pair,
    mean_square,
    resized_pair,
    unit,
)
from attar.losses._rows import check_logits, check_positive, check_same_shape, check_share
from attar.losses.types import Fraction, Positive, Share

# The smallest variance, and the variance at the start, of the official implementation.
VARIANCE_EPS = 1e-5
VARIANCE_START = 5.0
# The constant of the official implementation, beside the share of noise.
NOISE_EPS = 1e-7

Size = Annotated[int, Ge(1)]


def variational(student: Tensor, teacher: Tensor) -> nn.Module:
    """Variational information distillation (VID): mean of ½ ((μ(s) - t)² / σ_c² + log σ_c²).

    The teacher's values are taken as normal around a prediction μ from the student's, with a
    variance of each channel that is learned: what the student cannot predict weighs less. μ is
    three trained 1 x 1 convolutions with ReLU between and no bias; σ² = softplus(a) + 1e-5 starts
    at 5. Both are dropped after training.

    Shapes: built from one example of each signal: maps [N, C, H, W], tokens [N, L, D], or vectors
    [N, D]; channels may differ, and the larger map is average-pooled to the smaller. The module
    takes (student, teacher) like these. Returns [N], in nats less a constant; it can be negative,
    and is lowest, not zero, at a perfect prediction.

    Paper: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019.
    RepDistiller averages over all values, weight 1, the same here.

    Neighbours: `mse` through `projector: linear` is it with one linear map and one fixed variance.

    >>> import torch
    >>> make = variational(torch.zeros(1, 2), torch.zeros(1, 3))
    >>> make(torch.zeros(4, 2), torch.ones(4, 3)).detach()
    tensor([0.9047, 0.9047, 0.9047, 0.9047])
    """
    channels = [side.shape[1] for side in _channels_first(student, teacher)]
    return Variational(*channels).to(device=student.device, dtype=_width(student))


def _channels_first(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [N, C, P], of equal P; vectors are one position."""
    if student.ndim == teacher.ndim == 2:
        student, teacher = flat_pair(student, teacher)
        return student.unsqueeze(2), teacher.unsqueeze(2)
    return resized_pair(student, teacher)


def _width(signal: Tensor) -> torch.dtype:
    """The type of trained weights: autocast's narrow signals get float32 ones."""
    return torch.float64 if signal.dtype == torch.float64 else torch.float32


class Variational(nn.Module):
    """The module of `variational`."""

    def __init__(self, channels: int, wanted: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(
            nn.Conv1d(channels, wanted, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(wanted, wanted, 1, bias=False),
            nn.ReLU(),
            nn.Conv1d(wanted, wanted, 1, bias=False),
        )
        start = math.log(math.expm1(VARIANCE_START - VARIANCE_EPS))
        self.variance = nn.Parameter(torch.full((wanted,), start))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [N] of signals like those it was built from."""
        dtype = self.variance.dtype
        mine, theirs = (side.to(dtype) for side in _channels_first(student, teacher))
        _check_channels("variational", self.variance, theirs)
        variance = (F.softplus(self.variance) + VARIANCE_EPS).unsqueeze(1)
        cost = (self.predict(mine) - theirs).square() / variance + variance.log()
        rows = cost.flatten(1)
        return rows.sum(1) / (2 * rows.shape[1])


def _check_channels(name: str, weight: Tensor, signal: Tensor) -> None:
    if signal.shape[1] != len(weight):
        raise ValueError(
            f"{name} was built for {len(weight)} channels of the teacher, got {signal.shape[1]}."
        )


def masked_generative(
    student: Tensor,
    teacher: Tensor,
    *,
    masked: Share = 0.65,
    over: Literal["positions", "channels"] = "positions",
) -> nn.Module:
    """Masked generative distillation (MGD): mean of (G(m ⊙ s) - t)².

    A random mask m takes positions (or channels) of the student's map away, each with probability
    `masked` and anew at every step, and a trained generator G, two 3 x 3 convolutions with a ReLU
    between, has to make the teacher's whole map of the rest. Channels that differ in number are
    mapped by a trained 1 x 1 convolution first. All are dropped after training.

    Shapes: built from one example of each signal, maps [N, C, H, W] of equal height and width;
    channels may differ. The module takes (student, teacher) like these. Returns [N], in squared
    units. It is not zero at equality. The mask comes from torch's random numbers, as dropout's.

    Paper: Yang et al., "Masked Generative Distillation", ECCV 2022: detection masks 0.65 and
    segmentation 0.75 of the positions; classification masks 0.15 of the channels. The official code
    sums over the values: weight_ours = weight_theirs · (values an example); theirs is 2e-5, and
    7e-5 in classification.

    Neighbours: `mse` through `projector: linear` sees the whole map.

    >>> import torch
    >>> make = masked_generative(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4))
    >>> make(torch.zeros(5, 2, 4, 4), torch.ones(5, 3, 4, 4)).shape
    torch.Size([5])
    """
    check_share("masked", masked)
    if over not in ("positions", "channels"):
        raise ValueError(f"over must be 'positions' or 'channels', got {over!r}.")
    _check_grids(student, teacher)
    module = MaskedGenerative(student.shape[1], teacher.shape[1], masked, over)
    return module.to(device=student.device, dtype=_width(student))


def _check_grids(student: Tensor, teacher: Tensor) -> None:
    check_maps(student, teacher)
    if student.ndim != 4 or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"masked_generative needs maps [N, C, H, W] of equal height and width, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )


class MaskedGenerative(nn.Module):
    """The module of `masked_generative`."""

    def __init__(self, channels: int, wanted: int, masked: float, over: str) -> None:
        super().__init__()
        self.masked, self.over = masked, over
        self.align = nn.Conv2d(channels, wanted, 1) if channels != wanted else nn.Identity()
        self.generate = nn.Sequential(
            nn.Conv2d(wanted, wanted, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(wanted, wanted, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [N] of signals like those it was built from, under a new mask."""
        _check_grids(student, teacher)
        weight = next(self.generate.parameters())
        _check_channels("masked_generative", weight, teacher)
        maps = self.align(student.to(weight.dtype))
        rows, channels, height, width = maps.shape
        grid = (1, height, width) if self.over == "positions" else (channels, 1, 1)
        kept = torch.rand(rows, *grid, device=maps.device) <= 1 - self.masked
        return mean_square(self.generate(maps * kept) - teacher.detach().to(weight.dtype))


def global_context(student: Tensor, teacher: Tensor) -> nn.Module:
    """Global distillation of features (FGD, its global part): mean of (s + g(s) - t - h(t))².

    g and h are trained context blocks, one a side: a position's weight is a softmax over positions
    of a 1 x 1 convolution, the weighted mean of the values goes through linear, layer norm, ReLU
    and linear, and what comes out is added to each position. The last linear starts at zero, so
    the loss starts as `mse`. Both are dropped after training.

    Shapes: built from one example of each signal, of equal shape: maps [N, C, H, W] or tokens
    [N, L, D]. The module takes (student, teacher) like these. Returns [N], in squared units. Once
    trained it is not zero at equality, as each side has a block of its own.

    Paper: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, for each
    level of the pyramid; a block is that of Cao et al., "GCNet", 2019. The official code sums over
    the values: weight_ours = weight_theirs · (values an example); theirs is 5e-6. There a student
    of other channels has one trained 1 x 1 convolution for both parts; here each of the two terms
    has its `projector`.

    Neighbours: `focal_features` is the other part, which needs the positions of the objects; this
    one does without them.

    >>> import torch
    >>> make = global_context(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    >>> make(torch.zeros(3, 4, 2, 2), 2 * torch.ones(3, 4, 2, 2)).detach()
    tensor([4., 4., 4.])
    """
    maps, _ = _same_maps(student, teacher)
    return GlobalContext(maps.shape[1]).to(device=student.device, dtype=_width(student))


def _same_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [N, C, P], of equal C and P; the teacher detached."""
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    return map_pair(student, teacher)


class GlobalContext(nn.Module):
    """The module of `global_context`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student, self.teacher = ContextBlock(channels), ContextBlock(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [N] of signals like those it was built from."""
        weight = self.student.look.weight
        mine, theirs = (side.to(weight.dtype) for side in _same_maps(student, teacher))
        _check_channels("global_context", weight[0], theirs)
        added = self.student(mine) - self.teacher(theirs)
        return mean_square(mine - theirs + added)


class ContextBlock(nn.Module):
    """What is added to each position of maps [N, C, P], as [N, C, 1]: zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # No bias: it would be the same at every position, and a softmax does not see it.
        self.look = nn.Conv1d(channels, 1, 1, bias=False)
        inner = max(1, channels // 2)
        last = nn.Linear(inner, channels)
        self.transform = nn.Sequential(
            nn.Linear(channels, inner), nn.LayerNorm(inner), nn.ReLU(), last
        )
        nn.init.kaiming_normal_(self.look.weight)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """The transformed mean over positions, weighted by attention."""
        where = self.look(maps).softmax(2)
        return self.transform((maps * where).sum(2)).unsqueeze(2)


def memory_contrast(
    student: Tensor,
    teacher: Tensor,
    rows: int,
    *,
    temperature: Positive = 0.07,
    negatives: Size = 16384,
    dimensions: Size = 128,
    momentum: Share = 0.5,
) -> nn.Module:
    """Contrastive representation distillation (CRD) with a memory of past features.

    Trained linear heads map both sides to unit vectors u (student) and v (teacher) of `dimensions`
    values. An example's u is to tell its own remembered v from K = `negatives` others, drawn from
    those of all training rows with repetition, and its v the other way round:
    -log P / (P + K/n) - Σ_k log (K/n) / (P_k + K/n), with P = exp(u · v / T) / Z, of n rows. Z is
    set by the first batch, to n times its mean exp(u · v / T), and stays. After each batch its
    rows of the memories become the direction of momentum · old + (1 - momentum) · new.

    Shapes: built from one example of each signal, [N, D] or [N, ...], flattened; D may differ.
    `rows` is the number of training rows. The module takes (student, teacher, ids), with the rows'
    numbers [N] in [0, rows), and returns [N], in nats, both directions added. It is not zero at
    equality. The value depends on the memories, so on the past of the training; in eval mode they
    stay as they are. They hold 2 · rows · dimensions values, and a step makes 2 · N · rows products
    (the official code holds N · K · dimensions values instead). Negatives come from torch's random
    numbers, as dropout's. With several devices each remembers the rows it saw.

    Paper: Tian et al., "Contrastive Representation Distillation", ICLR 2020: weight 0.8 next to
    soft targets, T = 0.07, K = 16384, momentum 0.5, 128 dimensions, on the last features before
    the classifier. The official code adds up both directions, as here. Since the first batch sets
    Z, begin with a full one.

    Neighbours: `contrast` takes its negatives from the batch, and has no memory or weights.

    >>> import torch
    >>> make = memory_contrast(torch.zeros(1, 2), torch.zeros(1, 3), 50, negatives=8)
    >>> make(torch.ones(4, 2), torch.ones(4, 3), torch.tensor([3, 1, 4, 2])).shape
    torch.Size([4])
    """
    check_positive("temperature", temperature)
    check_share("momentum", momentum)
    for name, value in (("negatives", negatives), ("dimensions", dimensions), ("rows", rows)):
        if not value >= 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}.")
    mine, theirs = flat_pair(student, teacher)
    module = MemoryContrast(
        mine.shape[1], theirs.shape[1], rows, temperature, negatives, dimensions, momentum
    )
    return module.to(device=student.device, dtype=_width(student))


class MemoryContrast(nn.Module):
    """The module of `memory_contrast`."""

    memory_student: Tensor
    memory_teacher: Tensor
    log_z: Tensor

    def __init__(
        self,
        mine: int,
        theirs: int,
        rows: int,
        temperature: float,
        negatives: int,
        dimensions: int,
        momentum: float,
    ) -> None:
        super().__init__()
        self.rows, self.temperature = rows, temperature
        self.negatives, self.momentum = negatives, momentum
        self.embed_student = nn.Linear(mine, dimensions)
        self.embed_teacher = nn.Linear(theirs, dimensions)
        bound = math.sqrt(3 / dimensions)
        for side in ("student", "teacher"):
            memory = torch.empty(rows, dimensions).uniform_(-bound, bound)
            self.register_buffer(f"memory_{side}", memory)
        # Of the student's and of the teacher's queries; NaN until the first batch sets them.
        self.register_buffer("log_z", torch.full((2,), math.nan))

    def forward(self, student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
        """The loss [N] of the training rows `ids`; in training their memories are renewed."""
        mine, theirs = self._embed(student, teacher)
        self._check_ids(ids, len(mine))
        columns = torch.cat([ids.unsqueeze(1), self._draw(len(mine))], dim=1)
        scores = torch.stack(
            [
                (query / self.temperature @ memory.T).gather(1, columns)
                # A copy, since the memory is renewed before the backward pass reads it.
                for query, memory in (
                    (mine, self.memory_teacher.clone()),
                    (theirs, self.memory_student.clone()),
                )
            ]
        )
        log_z = self._normalizers(scores)
        if self.training and len(ids):
            self._remember(mine, theirs, ids, log_z)
        return self._estimate(scores - log_z.view(2, 1, 1))

    def _embed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        check_same_examples(student, teacher)
        dtype = self.log_z.dtype
        heads = (self.embed_student, self.embed_teacher)
        flat = (side.flatten(1).to(dtype) for side in (student, teacher.detach()))
        mine, theirs = (unit(head(rows)) for head, rows in zip(heads, flat, strict=True))
        return mine, theirs

    def _check_ids(self, ids: Tensor, count: int) -> None:
        if ids.shape != (count,) or ids.is_floating_point():
            raise ValueError(
                f"ids must be the numbers [N] of the training rows, "
                f"got {ids.dtype} {tuple(ids.shape)} for {count} rows."
            )
        if ids.device.type == "cpu" and ((ids < 0) | (ids >= self.rows)).any():
            wrong = int(ids[(ids < 0) | (ids >= self.rows)][0])
            raise ValueError(f"ids must lie in [0, {self.rows}), got {wrong}.")

    def _draw(self, count: int) -> Tensor:
        shape = (count, self.negatives)
        return torch.randint(self.rows, shape, device=self.memory_student.device)

    def _normalizers(self, scores: Tensor) -> Tensor:
        """log Z of both directions: as the first batch set it, or this batch's where none did."""
        flat = scores.detach().flatten(1)
        if not flat.shape[1]:
            return self.log_z
        now = flat.logsumexp(1) + math.log(self.rows / flat.shape[1])
        return torch.where(self.log_z.isnan(), now, self.log_z)

    @torch.no_grad()
    def _remember(self, mine: Tensor, theirs: Tensor, ids: Tensor, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        for memory, new in ((self.memory_student, mine), (self.memory_teacher, theirs)):
            mixed = self.momentum * memory[ids] + (1 - self.momentum) * new
            memory[ids] = unit(mixed)

    def _estimate(self, log_p: Tensor) -> Tensor:
        """Noise-contrastive estimation of [2, N, 1 + K], the own one first, to [N]."""
        noise = self.negatives / self.rows
        floor = math.log(noise + NOISE_EPS)
        own = F.softplus(floor - log_p[..., 0])
        others = F.softplus(log_p[..., 1:] - floor).sum(-1)
        constant = self.negatives * (floor - math.log(noise))
        return (own + others + constant).sum(0)


def curriculum_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    lowest: Positive = 1.0,
    highest: Positive = 21.0,
    warmup: Fraction = 0.04,
) -> nn.Module:
    """Curriculum temperature (CTKD): T² KL(p ‖ q), with a T that is trained against the student.

    p = softmax(teacher / T), q = softmax(student / T) and T = lowest + (highest - lowest)
    sigmoid(θ). θ is one trained number that starts at 1, and its gradient is turned round: while
    the student makes the loss smaller, θ makes it larger, by a share of (1 - cos(π min(1,
    progress / `warmup`))) / 2, so that the task begins easy. T² is differentiated as well.

    Shapes: built from one example of each signal, [N, C] logits. The module takes (student,
    teacher, progress) and returns [N], in nats times T². Excluded classes (-inf) as in
    `kl_divergence`. Its `temperature` is the present one, 15.6 at the start.

    Paper: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, of which this
    is the global form: T from 1 to 21, θ in the optimizer of the student, a warm-up of 10 epochs of
    240; weight 0.9 with 0.1 of cross-entropy. The official sign of the gradient lies in a factor
    that goes from 0 to -1.

    Neighbours: `kl_divergence` has one temperature, and a schedule of it needs no training:
    `temperature` as a function of progress.

    >>> import torch
    >>> make = curriculum_kl(torch.zeros(1, 3), torch.zeros(1, 3))
    >>> make(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]]), 0.5).detach()
    tensor([1.3324])
    """
    check_logits(student, teacher)
    check_positive("lowest", lowest)
    if not lowest < highest < math.inf:
        raise ValueError(f"highest must be a number above lowest, {lowest}, got {highest}.")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must lie in [0, 1), got {warmup}.")
    module = CurriculumKL(lowest, highest, warmup)
    return module.to(device=student.device, dtype=_width(student))


class CurriculumKL(nn.Module):
    """The module of `curriculum_kl`."""

    def __init__(self, lowest: float, highest: float, warmup: float) -> None:
        super().__init__()
        self.lowest, self.highest, self.warmup = lowest, highest, warmup
        self.theta = nn.Parameter(torch.ones(()))

    @property
    def temperature(self) -> Tensor:
        """The temperature now, a number; its gradient is not turned round."""
        return self._temperature(self.theta)

    def _temperature(self, theta: Tensor) -> Tensor:
        return self.lowest + (self.highest - self.lowest) * theta.sigmoid()

    def forward(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """The loss [N] at this share of the training."""
        check_logits(student, teacher)
        share = min(1.0, progress / self.warmup) if self.warmup else 1.0
        strength = (1 - math.cos(math.pi * share)) / 2
        held = self.theta.detach()
        temperature = self._temperature(held - strength * (self.theta - held))
        dtype = self.theta.dtype
        log_q, log_p = (
            F.log_softmax(_softened(side.to(dtype), temperature), dim=-1)
            for side in (student, teacher.detach())
        )
        p = log_p.exp()  # with its gradient, which `divergence` holds back: p moves with T
        return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1) * temperature.square()


def _softened(logits: Tensor, temperature: Tensor) -> Tensor:
    # Through -inf / T the gradient of T would be NaN.
    gone = logits == -math.inf
    return (logits.masked_fill(gone, 0.0) / temperature).masked_fill(gone, -math.inf)
