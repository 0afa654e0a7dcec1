"""Convolutional families: residual networks and mobile networks for small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.models.layers import (
    chain,
    convolution,
    global_pool,
    image_shape,
    kaiming,
    normalize,
)
from attar.models.types import Count, Numbers, Shape, Size
from attar.runtime import UsageError

# A larger stride than the 3x3 kernel would leave pixels that nothing reads.
Stride = Annotated[int, Ge(1), Le(3)]
Depth = Annotated[int, Ge(8), Le(1202)]
Expansion = Annotated[int, Ge(1), Le(64)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, stride=stride, activation=nn.ReLU())
        self.conv2 = convolution(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = convolution(inputs, outputs, kernel=1, stride=stride)
        self.activation = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        # Never in place here: a tap may hold the shortcut's or the convolution's output.
        return self.activation(self.conv2(self.conv1(inputs)) + self.shortcut(inputs))


class InvertedResidual(nn.Module):
    """Widen (1x1), filter each channel (3x3), narrow (1x1, no activation)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = convolution(inputs, inner, kernel=1, activation=nn.ReLU6())
        self.depthwise = convolution(
            inner, inner, stride=stride, groups=inner, activation=nn.ReLU6()
        )
        self.project = convolution(inner, outputs, kernel=1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        narrow = self.project(self.depthwise(self.expand(inputs)))
        return inputs + narrow if self.residual else narrow


def _stage(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: int, count: int, stride: int
) -> nn.Sequential:
    rest = (block(outputs, outputs, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, outputs, stride), *rest)


def resnet(
    shape: Shape,
    outputs: Size,
    *,
    depth: Depth = 8,
    width: Size = 16,
    stem_stride: Stride = 1,
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Sequential:
    """Residual network for small images (arXiv:1512.03385, section 4.2).

    A 3x3 stem and three stages of (depth - 2) / 6 basic blocks with *width*, 2 x *width* and
    4 x *width* channels; the second and third stage halve height and width. Shortcuts that
    change shape are 1x1 convolutions. No scale starts at zero: these nets are shallow and their
    schedules short, and starting each block as its shortcut was seen to slow them.

    Args:
        shape: [C, H, W] of one image.
        outputs: number of classes or targets.
        depth: 8, 14, 20, ...: 6 n + 2 layers.
        width: channels of the first stage.
        stem_stride: stride of the stem; 2 costs about a quarter.
        mean: subtracted from each channel.
        std: divides each channel after that.

    Tap addresses: ``stem``, ``stage1``, ``stage2``, ``stage3`` ([N, C, H, W], after the ReLU),
    ``pool`` ([N, 4 x width]) and ``head``.

    >>> sum(p.numel() for p in resnet((1, 8, 8), 10).parameters())
    77754
    """
    channels, _, _ = image_shape(shape, "resnet")
    blocks, over = divmod(depth - 2, 6)
    if over or blocks < 1:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise UsageError(
            f"resnet: depth must be 6 n + 2 (8, 14, 20, ...), not {depth}; the nearest is {nearest}"
        )
    return kaiming(
        chain(
            normalize=normalize(shape, mean, std),
            stem=convolution(channels, width, stride=stem_stride, activation=nn.ReLU()),
            stage1=_stage(BasicBlock, width, width, blocks, 1),
            stage2=_stage(BasicBlock, width, 2 * width, blocks, 2),
            stage3=_stage(BasicBlock, 2 * width, 4 * width, blocks, 2),
            pool=global_pool(),
            head=nn.Linear(4 * width, outputs),
        )
    )


def mobilenet(
    shape: Shape,
    outputs: Size,
    *,
    depth: Count = 2,
    width: Size = 16,
    expansion: Expansion = 4,
    stem_stride: Stride = 1,
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Sequential:
    """Inverted residuals with depthwise convolutions, as in MobileNetV2 (arXiv:1801.04381).

    Scaled down for small images: a 3x3 stem, three stages of *depth* blocks with *width*,
    2 x *width* and 4 x *width* channels (the second and third halve height and width, so an
    8x8 image ends as 2x2), and a 1x1 convolution to 8 x *width* channels.

    Args:
        shape: [C, H, W] of one image.
        outputs: number of classes or targets.
        depth: blocks in each stage.
        width: channels of the first stage.
        expansion: how many times wider a block is inside.
        stem_stride: stride of the stem; 2 costs about a quarter.
        mean: subtracted from each channel.
        std: divides each channel after that.

    Tap addresses: ``stem``, ``stage1``, ``stage2``, ``stage3``, ``neck`` ([N, C, H, W]),
    ``pool`` ([N, 8 x width]) and ``head``.
    """
    channels, _, _ = image_shape(shape, "mobilenet")
    block = partial(InvertedResidual, expansion=expansion)
    return kaiming(
        chain(
            normalize=normalize(shape, mean, std),
            stem=convolution(channels, width, stride=stem_stride, activation=nn.ReLU6()),
            stage1=_stage(block, width, width, depth, 1),
            stage2=_stage(block, width, 2 * width, depth, 2),
            stage3=_stage(block, 2 * width, 4 * width, depth, 2),
            neck=convolution(4 * width, 8 * width, kernel=1, activation=nn.ReLU6()),
            pool=global_pool(),
            head=nn.Linear(8 * width, outputs),
        )
    )
