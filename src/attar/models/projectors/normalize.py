"""What makes a teacher's signal easy to match: layer normalisation and whitening."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.models.projectors._forms import average, check_pair
from attar.models.projectors._parts import channels, place, row
from attar.models.types import Size

EPSILON = 1e-5  # of the mean variance: a channel that is always zero stays zero


def layer_norm(teacher: Tensor, student: Tensor) -> nn.Module:
    """For the teacher's side: each position gets mean 0 and variance 1 over its channels.

    ``(x - mean) / sqrt(var + 1e-5)`` without weights, in float32 or wider, over C of [N, C],
    [N, T, C] or [N, C, H, W]. A teacher's map that is larger is averaged to the student's size
    first, and to a vector where the student's signal is [N, C], as `pool` does; so VkD
    (arXiv:2403.06213) is ``projector: orthogonal, teacher_projector: layer_norm``.

    Errors: signals that are no floating tensors (UsageError).
    """
    check_pair("layer_norm", teacher, student, ("teacher", "student"))
    return row(average(teacher, student), LayerNorm())


def whiten(
    teacher: Tensor, student: Tensor, *, full: bool = False, batches: Size = 100
) -> nn.Module:
    """For the teacher's side: channels get mean 0 and variance 1 over the data.

    ``W (x - mean)``. By default ``W`` is diagonal, ``1 / std`` of each channel: the
    standardisation of AM-RADIO's successors (arXiv:2410.01680, section 2), which keeps loud
    channels from drowning out the others. With *full* it is ``cov^(-1/2)`` (ZCA): channels are
    uncorrelated as well, as VkD asks for in generation (arXiv:2403.06213), so that a mean
    squared error weighs all directions of the teacher's space alike.

    Statistics are those of all positions of the first *batches* batches in training, this one
    included; after these the map is fixed. Before the first, the signal is left as it is. They
    are buffers in float64, so part of a checkpoint; on several ranks each looks at its own rows.
    To variances 1e-5 of their mean is added. A larger map is averaged first, as in `layer_norm`.

    Args:
        full: remove correlations between channels too; needs many more positions than channels.
        batches: how many batches are looked at.

    Errors: signals that are no floating tensors (UsageError).
    """
    check_pair("whiten", teacher, student, ("teacher", "student"))
    whitening = Whiten(channels(teacher), teacher.device, full=full, batches=batches)
    return row(average(teacher, student), whitening.to(teacher.device))


class LayerNorm(nn.Module):
    """Mean 0 and variance 1 over the channels of each position; no weights."""

    def forward(self, signal: Tensor) -> Tensor:
        last = signal.movedim(1, -1) if signal.ndim == 4 else signal
        normal = F.layer_norm(last.to(place(signal)["dtype"]), last.shape[-1:])
        return normal.movedim(-1, 1) if signal.ndim == 4 else normal


class Whiten(nn.Module):
    """Channels minus their mean, times a matrix learned from the first batches in training."""

    mean: Tensor
    scatter: Tensor
    matrix: Tensor
    positions: Tensor
    seen: Tensor

    def __init__(self, channels: int, device: torch.device, *, full: bool, batches: int) -> None:
        super().__init__()
        self.full = full
        self.batches = batches
        shape = (channels, channels) if full else (channels,)
        wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's lacks
        self.register_buffer("mean", torch.zeros(channels, dtype=wide))
        self.register_buffer("scatter", torch.zeros(shape, dtype=wide))
        one = torch.eye(channels, dtype=wide) if full else torch.ones(channels, dtype=wide)
        self.register_buffer("matrix", one)
        self.register_buffer("positions", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, signal: Tensor) -> Tensor:
        last = signal.movedim(1, -1) if signal.ndim == 4 else signal
        if self.training and self.seen < self.batches:
            self._look(last.reshape(-1, last.shape[-1]).to(self.mean.dtype))
        centred = last.to(self.mean.dtype) - self.mean
        white = centred @ self.matrix if self.full else centred * self.matrix
        white = white.to(place(signal)["dtype"])
        return white.movedim(-1, 1) if signal.ndim == 4 else white

    def _look(self, rows: Tensor) -> None:
        """Pool the statistics of *rows* with those so far (Chan, Golub, LeVeque 1979)."""
        before = self.positions.item()
        total = before + len(rows)
        mean = rows.mean(0)
        shift, centred = mean - self.mean, rows - mean
        share = before * len(rows) / total
        if self.full:
            self.scatter += centred.T @ centred + share * torch.outer(shift, shift)
        else:
            self.scatter += centred.square().sum(0) + share * shift.square()
        self.mean += shift * (len(rows) / total)
        self.positions += len(rows)
        self.seen += 1
        if total > 1:
            self.matrix.copy_(self._root(self.scatter / total))

    def _root(self, covariance: Tensor) -> Tensor:
        """The inverse square root; of zero variance everywhere, 1."""
        variance = covariance.diagonal() if self.full else covariance
        floor = EPSILON * variance.mean()
        if floor == 0:
            return self.matrix
        if not self.full:
            return (covariance + floor).rsqrt()
        values, vectors = torch.linalg.eigh(covariance)
        return (vectors * (values.clamp_min(0) + floor).rsqrt()) @ vectors.T

    def __repr__(self) -> str:
        return f"Whiten({len(self.mean)}{', full' if self.full else ''})"
