"""The linear projector and the perceptron of two layers."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from attar.models.projectors._forms import meeting
from attar.models.projectors._parts import channels, channelwise, row
from attar.models.types import Size

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}


def linear(student: Tensor, teacher: Tensor) -> nn.Module:
    """A trained linear map from the student's signal to the teacher's size, with bias.

    As in FitNets (arXiv:1412.6550). Built from one example of each signal:

    - [N, C, H, W] to [N, D, H, W]: a 1x1 convolution from C to D channels;
    - [N, C] to [N, D] or [N, T, C] to [N, T, D]: ``nn.Linear(C, D)``.

    A larger map of the student is first averaged to the teacher's size, and a map or tokens to
    one vector where the teacher's signal is [N, D].

    Its weights are on the student's device, in float64 for a float64 signal and in float32 for
    every other (a bf16 or fp16 signal comes from autocast, which casts the weights as well).

    Errors: signals that are no floating tensors, or that averaging the student's does not bring
    together (UsageError, with both shapes and the projector that does).
    """
    front = meeting("linear", student, teacher)
    return row(front, channelwise(student, teacher.ndim, channels(teacher)))


def mlp(
    student: Tensor,
    teacher: Tensor,
    *,
    hidden: Size | None = None,
    activation: Activation = "gelu",
) -> nn.Module:
    """Two trained linear layers with an activation between them, at each position.

    As in SimReg (arXiv:2201.05131), without its normalisation. Shapes, weights and errors are
    those of `linear`.

    Args:
        hidden: width between the layers; the teacher's channels when left out.
        activation: ``gelu`` or ``relu``.
    """
    front = meeting("mlp", student, teacher)
    outputs = channels(teacher)
    inner = hidden or outputs
    first = channelwise(student, teacher.ndim, inner)
    second = channelwise(student, teacher.ndim, outputs, inputs=inner)
    return row(front, first, ACTIVATIONS[activation](), second)
