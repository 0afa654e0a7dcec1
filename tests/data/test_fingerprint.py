"""Fingerprints: read once, equal for equal content, however it is read."""

from __future__ import annotations

import torch

from attar.data import DatasetSource, TensorSource


class _Counted(TensorSource):
    asked = 0

    def rows(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.asked += len(ids)
        return super().rows(ids)


def test_a_source_is_read_once_for_all_its_fingerprints() -> None:
    source = _Counted(torch.rand(300, 2))
    first = source.fingerprint()
    assert source.asked == 300
    assert source.fingerprint() == first
    assert source.asked == 300


def test_each_source_has_its_own() -> None:
    one, other = (TensorSource(torch.full((3, 2), value)) for value in (1.0, 2.0))
    assert len({one.fingerprint(), other.fingerprint(), one.fingerprint()}) == 2


def test_workers_change_neither_the_fingerprint_nor_the_statistics() -> None:
    rows = list(torch.rand(600, 3, generator=torch.Generator().manual_seed(0)))
    alone, helped = (DatasetSource(rows, workers=n) for n in (0, 2))
    assert alone.fingerprint() == helped.fingerprint()
    assert alone.statistics() == helped.statistics()
