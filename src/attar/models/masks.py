"""Masks that keep weights at zero, whatever an optimiser does, and weights without them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# The masked weight takes over the mask's strides. Those of channels_last, which a 1 x 1 kernel can
# have and still be contiguous, make torch 2.13's convolutions on a CPU write past a gradient.
PLAIN = torch.contiguous_format


class Mask(nn.Module):
    """Where a weight may be other than zero; its values elsewhere are zero and learn nothing."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.clone(memory_format=PLAIN))

    def forward(self, weight: Tensor) -> Tensor:
        # No product: that would keep a NaN, and the sign of a zero.
        return torch.where(self.kept, weight, 0.0)


def put_mask(part: nn.Module, name: str, kept: Tensor) -> None:
    """Keep the parameter *name* of *part* at zero where *kept*, bool of its shape, is False."""
    learns = part.get_parameter(name).requires_grad
    parametrize.register_parametrization(part, name, Mask(kept))
    part.parametrizations[name].original.requires_grad_(learns)  # type: ignore


def masked(model: nn.Module) -> list[nn.Module]:
    """Every part of *model* that holds nothing but masks on its tensors."""
    return [part for part in model.modules() if parametrize.is_parametrized(part) and _only(part)]


def _only(part: Any) -> bool:
    return all(
        len(held) == 1 and isinstance(held[0], Mask) for held in part.parametrizations.values()
    )


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Where each masked tensor of *model* may be other than zero, by the name it had before."""
    return {
        f"{path}.{name}".lstrip("."): held[0].kept
        for path, part in model.named_modules()
        if parametrize.is_parametrized(part) and _only(part)
        for name, held in part.parametrizations.items()
    }


def put_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put *masks*, of `masks_of`, on those of these tensors that are floats."""
    for name, kept in masks.items():
        path, _, own = name.rpartition(".")
        part = model.get_submodule(path)
        if part.get_parameter(own).is_floating_point():
            put_mask(part, own, kept)


def baked(model: nn.Module) -> nn.Module:
    """A copy of *model* with its masks in its weights, as zeros; *model* where it has none.

    Its tensors have the names they had before there was a mask.
    """
    if not masked(model):
        return model
    made = copy.deepcopy(model)
    for part in masked(made):
        _bake(part)
    return made


def _bake(part: Any) -> None:
    # Not by remove_parametrizations: copies share a class, and it takes the class apart.
    held = {
        name: nn.Parameter(
            getattr(part, name).detach().clone(), requires_grad=each.original.requires_grad
        )
        for name, each in part.parametrizations.items()
    }
    del part.parametrizations
    part.__class__ = type(part).__mro__[1]
    part._parameters = {**held, **part._parameters}  # a weight comes before its bias
