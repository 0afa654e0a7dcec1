"""Randomness that depends on what it is for, never on when it is asked for.

Every number here is a hash of (seed, view, row id, stream): the SplitMix64 generator of Steele,
Lea and Flood (2014), entered at a key for (seed, view, stream) and read at position id. So the
pixels of a row do not depend on its batch, on the batch size, or on what was drawn before; a
resumed run draws what the uninterrupted one would have drawn. No library's generator is used,
so a new release of one does not change anybody's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.types import Augmentation, Batch
from attar.runtime import DataError

if TYPE_CHECKING:
    from attar.data.source import Source

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WINDOW = 16  # blocks


def hashed(key: int, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each id: output number ``id`` of SplitMix64 started at ``key``.

    For one key the map from id to bits is a bijection: two ids never share their bits.
    """
    bits = ids.view(np.uint64) * np.uint64(_GAMMA)
    bits += np.uint64((key + _GAMMA) & _MASK)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_FIRST)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_SECOND)
    bits ^= bits >> np.uint64(31)
    return bits


@lru_cache(maxsize=1024)
def key_of(*parts: int | str) -> int:
    """One 64-bit key for a tuple of numbers and names; order matters."""
    state = 0
    for part in parts:
        state = _mixed((state + _GAMMA + _number(part)) & _MASK)
    return state


def permutation(
    count: int, *, seed: int, number: int, block: int | None = None
) -> NDArray[np.int64]:
    """The order of epoch ``number``: the ids sorted by their hash under (seed, number).

    With ``block``, runs of so many ids stay near one another: the blocks are shuffled, and then
    the rows of each 16 blocks that follow one another. What is read of the disk at a time is then
    16 blocks and not the whole.
    """
    order = _sorted_by_hash("order", np.arange(count, dtype=np.int64), seed, number)
    if block is None or block >= count:
        return order
    # Its place in the order of the rows tells where a row stands in its window.
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    blocks = np.arange(-(-count // block), dtype=np.int64)
    window = np.empty(len(blocks), dtype=np.int64)
    window[_sorted_by_hash("blocks", blocks, seed, number)] = blocks // _WINDOW
    return np.lexsort((place, window[np.arange(count) // block]))


def _sorted_by_hash(stream: str, ids: NDArray[np.int64], seed: int, number: int) -> Any:
    return np.argsort(hashed(key_of(stream, seed, number), ids))


def augmented(
    source: Source, ids: Tensor, augment: Sequence[Augmentation], *, seed: int, view: int
) -> Batch:
    """The rows ``ids`` of ``source``, passed through ``augment`` in order."""
    batch = source.rows(ids)
    for position, change in enumerate(augment):
        draw = Draw(source, ids, seed=seed, view=view, before=augment[:position])
        batch = change(batch, draw)
    return batch


class Draw:
    """What an augmentation may draw for the rows of one batch.

    Parameters
    ----------
    source:
        The source the rows come from; an augmentation reads its ``classes``.
    ids:
        int64 [n], the rows of the batch.
    seed, view:
        The run's seed and the epoch's number.
    before:
        The augmentations that stand before the one that draws. Their number is a part of the
        key, so the same augmentation named twice draws twice.
    """

    def __init__(
        self,
        source: Source,
        ids: Tensor,
        *,
        seed: int,
        view: int,
        before: Sequence[Augmentation] = (),
    ) -> None:
        self.source = source
        self.ids = ids
        self._seed = seed
        self._view = view
        self._before = before

    def uniform(self, stream: int | str) -> Tensor:
        """float64 [n], uniform on [0, 1) with 53 random bits, a function of
        (seed, view, id, place among the augmentations, stream)."""
        key = key_of(self._seed, self._view, len(self._before), stream)
        return torch.from_numpy((hashed(key, self.ids.numpy()) >> np.uint64(11)) * 2.0**-53)

    def partner(self) -> Batch:
        """For each row another row of the whole source, as it is at this place.

        The partner is uniform over the other rows and comes through the augmentations before
        this one with the keys of its own id: just what it looks like in its own batch.
        """
        others = len(self.source) - 1
        if others < 1:
            raise DataError(
                f"{self.source.name}: mixing needs a second row to mix with, and there is one "
                "row; leave mixup and cutmix out"
            )
        ids = (self.uniform("partner") * others).to(torch.int64)
        ids += ids >= self.ids
        return augmented(self.source, ids, self._before, seed=self._seed, view=self._view)


def _mixed(state: int) -> int:
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


def _number(part: int | str) -> int:
    if isinstance(part, int):
        return part
    return int.from_bytes(blake2b(part.encode(), digest_size=8).digest(), "little")
