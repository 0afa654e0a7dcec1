"""What every family is made of: its own normalisation, named parts, initial weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.runtime import UsageError


class Normalize(nn.Module):
    """``(x - mean) / std`` along the first dimension of one input: channels, or columns."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        broadcast = (-1, *[1] * (len(shape) - 1))
        dtype = torch.get_default_dtype()
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).reshape(broadcast))
        self.register_buffer("std", torch.tensor(std, dtype=dtype).reshape(broadcast))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - self.mean) / self.std


def normalize(
    shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> nn.Module:
    """The first part of every family; the identity when neither *mean* nor *std* is given."""
    if mean is None and std is None:
        return nn.Identity()
    size = shape[0]
    mean = [0.0] * size if mean is None else mean
    std = [1.0] * size if std is None else std
    for name, values in (("mean", mean), ("std", std)):
        _check_statistics(name, values, shape)
    if min(std) <= 0:
        raise UsageError(f"std must be positive, but holds {min(std)}; use 1 for a constant column")
    return Normalize(shape, mean, std)


def _check_statistics(name: str, values: Sequence[float], shape: Sequence[int]) -> None:
    if len(values) != shape[0]:
        raise UsageError(
            f"{name} holds {len(values)} numbers, but an input of shape {list(shape)} needs "
            f"{shape[0]}, one for each index of its first dimension"
        )
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"{name} must be finite numbers, not {list(values)[:8]}")


def image_shape(shape: Sequence[int], family: str) -> tuple[int, int, int]:
    """Channels, height and width; an error that names *family* when *shape* is no image."""
    if len(shape) != 3:
        raise UsageError(
            f"{family} reads images of shape [C, H, W], but one input has shape {list(shape)}; "
            "use mlp, which reads any shape"
        )
    channels, height, width = shape
    return channels, height, width


def chain(**parts: nn.Module) -> nn.Sequential:
    """Parts run one after the other, each under its own name (which is its tap address)."""
    return nn.Sequential(OrderedDict(parts))


def convolution(
    inputs: int,
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: nn.Module | None = None,
) -> nn.Sequential:
    """Convolution and batch normalisation, then *activation* if there is one."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = {"conv": conv, "norm": nn.BatchNorm2d(outputs)}
    return chain(**parts) if activation is None else chain(**parts, activation=activation)


def global_pool() -> nn.Sequential:
    """Global average pooling: [N, C, H, W] to [N, C]."""
    return chain(mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten())


def kaiming(model: nn.Sequential) -> nn.Sequential:
    """He initialisation (arXiv:1502.01852) of *model*, whose last part is a linear head.

    By fan-in, which counts a depthwise convolution correctly; the head is followed by no ReLU,
    so its gain is 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            gain: Literal["linear", "relu"] = "linear" if module is model[-1] else "relu"
            nn.init.kaiming_normal_(module.weight, nonlinearity=gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
