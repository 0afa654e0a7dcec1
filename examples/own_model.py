# A model of one's own for recipes: a function of the shape of one input and of the outputs, with
# options of its own. What __all__ lists can be named in a recipe, as examples/own_model.yaml does.
# attar run examples/own_model.yaml --plugin examples/own_model.py
"""Depthwise separable convolutions: three filters of few weights each."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["separable"]


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(shape: tuple[int, ...], outputs: int, *, width: int = 16) -> nn.Module:
    """Images ``[C, H, W]`` to ``outputs`` logits; the names are the addresses of its features."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["stem"] = nn.Conv2d(shape[0], width, 3, padding=1)
    parts["body1"] = _block(width, width)
    parts["body2"] = _block(width, width)
    parts["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts["head"] = nn.Linear(width, outputs)
    return nn.Sequential(parts)
