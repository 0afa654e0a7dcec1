"""A small data set in the files of Fashion-MNIST."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of four idx files: noise with a bright column that tells the class."""
    folder = tmp_path_factory.mktemp("idx")
    draws = np.random.default_rng(0)
    for prefix, count in (("train", 640), ("t10k", 200)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = draws.integers(0, 120, (count, 28, 28), np.uint8)
        pixels[np.arange(count), :, labels] = 255
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())
    return str(folder)
