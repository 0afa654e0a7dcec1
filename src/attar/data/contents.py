"""What a row holds, as a number: to find a row that is not what it was."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attar.data.draw import hashed, key_of
from attar.data.types import Batch

NOT_CONTENT = {"ids", "labels", "view", "idle"}
_MASKS = {"inputs": "attention", "other": "other_attention"}  # 0 where a text is padded
_PIECE = 1 << 12  # words of a row that are hashed at a time: the products stay in the cache


def contents(batch: Batch) -> NDArray[np.int64]:
    """64 bits for each row, int64 [n], a function of all that a model reads of it.

    The sum, modulo 2^64, of the row's 32-bit words times random keys of their places (Carter and
    Wegman, "Universal classes of hash functions", 1979): a row that differs has another number but
    with a probability of 2^-32. It finds changes, and is no defence against who plans them.
    How far a text is padded on the right is no part of it: the other rows of its batch decide it.
    """
    total: NDArray[np.uint64] | None = None
    padded = {name for pair in _MASKS.items() if pair[1] in batch for name in pair}
    for name in sorted(batch.keys() - NOT_CONTENT):
        values = batch[name]
        if name in padded & _MASKS.keys():
            values = values * batch[_MASKS[name]].ne(0)  # a zero adds nothing to the sum
        own = _hashed(values, name, ragged=name in padded)
        total = own if total is None else total + own
    assert total is not None, "a batch has inputs"
    return total.view(np.int64)


def _hashed(values: Tensor, name: str, *, ragged: bool) -> NDArray[np.uint64]:
    rows = values.detach().cpu().contiguous().reshape(len(values), -1).numpy()
    size = rows.shape[1] * rows.itemsize
    if size % 4:
        rows = np.pad(rows.view(np.uint8), ((0, 0), (0, -size % 4)))
    words = rows.view(np.uint32)
    form = "ragged" if ragged else str(list(values.shape[1:]))
    kind = key_of("content", name, f"{values.dtype} {form}")
    total = np.full(len(words), kind, dtype=np.uint64)
    for start in range(0, words.shape[1], _PIECE):
        piece = words[:, start : start + _PIECE].astype(np.uint64)
        total += np.einsum("ij,j->i", piece, _keys(kind, start, piece.shape[1]))
    return total


@lru_cache(maxsize=64)
def _keys(kind: int, start: int, count: int) -> NDArray[np.uint64]:
    return hashed(kind, np.arange(start, start + count, dtype=np.int64))
