"""The vision transformer."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.models.layers import chain, image_shape, normalize
from attar.models.types import Count, Numbers, Shape, Size
from attar.runtime import UsageError

Ratio = Annotated[int, Ge(1), Le(64)]


class PatchEmbedding(nn.Module):
    """[N, C, H, W] to [N, 1 + patches, width]: class token first, learned positions added."""

    def __init__(self, shape: tuple[int, int, int], patch: int, width: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.padding = (0, -breadth % patch, 0, -height % patch)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        count = math.ceil(height / patch) * math.ceil(breadth / patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + count, width))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(F.pad(images, self.padding)).flatten(2).transpose(1, 2)
        token = self.token.expand(len(images), -1, -1)
        return torch.cat([token, patches], dim=1) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a perceptron, each on a normalised copy and added to its input."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ClassToken(nn.Module):
    """[N, tokens, width] to [N, width]: the first token."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def vit(
    shape: Shape,
    outputs: Size,
    *,
    patch: Size = 4,
    width: Size = 64,
    depth: Count = 4,
    heads: Count = 4,
    mlp_ratio: Ratio = 4,
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Sequential:
    """Vision transformer (arXiv:2010.11929): class token, learned positions, pre-norm blocks.

    Height and width that are no multiple of *patch* are padded with zeros, right and below.

    Args:
        shape: [C, H, W] of one image.
        outputs: number of classes or targets.
        patch: edge of the square patches, in pixels.
        width: size of a token.
        depth: number of blocks.
        heads: attention heads; they divide *width*.
        mlp_ratio: how many times wider the perceptron is inside.
        mean: subtracted from each channel.
        std: divides each channel after that.

    Tap addresses: ``stem``, ``blocks.0``, ``blocks.1``, ..., ``norm`` ([N, 1 + patches, width]),
    ``pool`` ([N, width]) and ``head``.
    """
    image = image_shape(shape, "vit")
    if patch > min(image[1:]):
        raise UsageError(
            f"vit: patch must not exceed the image, which is {image[1]}x{image[2]}, not {patch}"
        )
    if width % heads:
        raise UsageError(f"vit: heads must divide width, and {heads} does not divide {width}")
    return _initialize(
        chain(
            normalize=normalize(shape, mean, std),
            stem=PatchEmbedding(image, patch, width),
            blocks=nn.Sequential(*(Block(width, heads, mlp_ratio) for _ in range(depth))),
            norm=nn.LayerNorm(width, eps=1e-6),
            pool=ClassToken(),
            head=nn.Linear(width, outputs),
        )
    )


def _initialize(model: nn.Sequential) -> nn.Sequential:
    """Truncated normals: 0.02 as in the paper's code, patches by their fan-in."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedding):
            fan = module.patches.weight[0].numel()
            nn.init.trunc_normal_(module.patches.weight, std=fan**-0.5)
            nn.init.zeros_(module.patches.get_parameter("bias"))
            nn.init.trunc_normal_(module.token, std=0.02)
            nn.init.trunc_normal_(module.positions, std=0.02)
    return model
