"""What every test shares: small real data, small nets, and how deep properties are searched."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch
from hypothesis import settings
from torch import nn

import attar

# A suite that was started in the background ignores Ctrl-C, and so would every process it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile("deep" if os.environ.get("ATTAR_DEEP") else "quick")


@pytest.fixture(scope="session")
def digits() -> attar.data.Splits:
    """scikit-learn's digits: real images that train in a second."""
    return attar.data.digits()


@pytest.fixture
def blobs() -> attar.data.Splits:
    """Three well-separated clouds of points in the plane."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 3.0], [3.0, 0.0], [-3.0, -3.0]])
    labels = torch.arange(240) % 3
    points = centres[labels] + torch.randn(240, 2, generator=generator)
    return attar.data.tensors(
        points[:160], labels[:160], points[160:], labels[160:], classes=("a", "b", "c")
    )


@pytest.fixture
def net() -> partial[nn.Module]:
    """Makes a small net with named parts: ``net(outputs=3, width=8, seed=0)``."""
    return partial(_net)


def _net(outputs: int = 3, width: int = 8, seed: int = 0, inputs: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(inputs, width))
    model.add_module("act", nn.Tanh())
    model.add_module("head", nn.Linear(width, outputs))
    return model
