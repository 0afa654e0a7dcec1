"""What a change leaves behind has the strides of a plain tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.models import build

INPUTS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "shrink": lambda model: attar.shrink(model, width=0.5),
    "prune": lambda model: attar.prune(model, INPUTS, ratio=0.5),
    "factorize by channel": lambda model: attar.factorize(model, rank=0.3, example=INPUTS),
    "factorize": lambda model: attar.factorize(model, rank=0.3),
    "2:4": lambda model: attar.sparsify(model, pattern="2:4"),
    "zeros": lambda model: attar.sparsify(model, amount=0.5),
}


def plain(tensor: Tensor) -> bool:
    # A kernel of 1 x 1 can be contiguous and have the strides of channels_last, by which a
    # convolution chooses its way all the same.
    return tensor.stride() == torch.empty(tensor.shape).stride()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_weight_has_the_strides_of_a_new_tensor(change):
    torch.manual_seed(0)
    model = build("resnet", shape=(1, 8, 8), outputs=10, depth=14, width=8).eval()
    made = change(model)
    layers = [part for part in made.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    odd = [tuple(layer.weight.shape) for layer in layers if not plain(layer.weight)]
    assert layers
    assert not odd
