"""The multilayer perceptron."""

from __future__ import annotations

import math

from torch import nn

from attar.models.layers import chain, kaiming, normalize
from attar.models.types import Numbers, Shape, Size, Widths


def mlp(
    shape: Shape,
    outputs: Size,
    *,
    widths: Widths = (32,),
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Sequential:
    """Multilayer perceptron with ReLU, on inputs of any shape (they are flattened).

    Args:
        shape: shape of one input.
        outputs: number of classes or targets.
        widths: width of each hidden layer; empty is a linear model.
        mean: subtracted from the input, a number for each index of its first dimension.
        std: divides the input after that.

    Tap addresses: ``blocks.0``, ``blocks.1``, ... ([N, width]) and ``head``.

    >>> sum(p.numel() for p in mlp((1, 8, 8), 10).parameters())
    2410
    """
    sizes = [math.prod(shape), *widths]
    blocks = (
        chain(linear=nn.Linear(narrow, wide), activation=nn.ReLU())
        for narrow, wide in zip(sizes, widths, strict=False)
    )
    return kaiming(
        chain(
            normalize=normalize(shape, mean, std),
            flatten=nn.Flatten(),
            blocks=nn.Sequential(*blocks),
            head=nn.Linear(sizes[-1], outputs),
        )
    )
