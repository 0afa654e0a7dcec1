"""The random generators a training may draw from: torch's, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUMPY_SEEDS = 2**32


@contextmanager
def generators_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every generator inside; outside each goes on where it stood, errors included."""
    devices = [device] if device.type == "cuda" else []
    kept, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % NUMPY_SEEDS)
            yield
    finally:
        random.setstate(kept)
        np.random.set_state(legacy)


def torch_generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators as bytes: the CPU's, and the device's own."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_torch_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what ``torch_generators`` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def other_generators() -> dict[str, Any]:
    """The states of Python's and numpy's global generators as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            np.asarray(keys).tolist(),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def set_other_generators(states: dict[str, Any]) -> None:
    """Put back what ``other_generators`` gave."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
