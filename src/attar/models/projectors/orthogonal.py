"""The orthogonal projector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from attar.models.projectors._forms import meeting, told
from attar.models.projectors._parts import channels, place, row
from attar.runtime import UsageError


def orthogonal(student: Tensor, teacher: Tensor) -> nn.Module:
    """A trained linear map with orthonormal columns and no bias: it only turns what it is given.

    ``P x`` with ``P`` [D, C] and ``PᵀP = 1``, so lengths and angles between the student's
    features are kept, and what the student learns cannot hide in the projector (VkD,
    arXiv:2403.06213, which puts `layer_norm` on the teacher's side). ``P`` stays orthonormal
    whatever the optimiser does: what is trained is a parametrisation of it
    (``torch.nn.utils.parametrizations.orthogonal``, Cayley's), in float32 or wider, under
    autocast too. Each step solves a system of D x D.

    Shapes and weights are those of `linear`; so are the errors, and one more: the student has
    more channels than the teacher, for which no such map is there (UsageError).
    """
    front = meeting("orthogonal", student, teacher)
    inputs, outputs = channels(student), channels(teacher)
    if inputs > outputs:
        raise UsageError(
            "projector orthogonal: the student must not have more channels than the teacher; "
            f"{told(student, teacher)}; use projector: linear"
        )
    return row(front, Orthogonal(nn.Linear(inputs, outputs, bias=False, **place(student))))


class Orthogonal(nn.Module):
    """Channels by a matrix with orthonormal columns, at each position."""

    def __init__(self, turn: nn.Linear) -> None:
        super().__init__()
        # Not torch's own choice, "householder": weight decay moves the signs that one keeps among
        # its weights off 1, and then whole columns are zero.
        parametrizations.orthogonal(turn, orthogonal_map="cayley")
        self.turn = turn

    def forward(self, signal: Tensor) -> Tensor:
        # In half precision its columns would be orthonormal to two digits only.
        with torch.autocast(signal.device.type, enabled=False):
            matrix = self.turn.weight
        signal = signal.to(matrix.dtype)
        if signal.ndim == 4:
            return F.conv2d(signal, matrix[:, :, None, None])
        return F.linear(signal, matrix)

    def __repr__(self) -> str:
        return f"Orthogonal({self.turn.in_features}, {self.turn.out_features})"
