"""Keyed randomness: the reference generator, pinned values, and no visible pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.data import Draw, TensorSource
from attar.data.draw import hashed, key_of, permutation
from attar.runtime import DataError

ROWS = 50_000


def _source(rows: int = ROWS) -> TensorSource:
    return TensorSource(torch.arange(float(rows)))


def _uniform(*, seed: int = 0, view: int = 0, stream: int | str = "x", rows: int = ROWS):
    return Draw(_source(rows), torch.arange(rows), seed=seed, view=view).uniform(stream)


def test_hash_is_splitmix64() -> None:
    # The first outputs of the public-domain reference implementation for state 1234567.
    assert hashed(1234567, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_pinned_values() -> None:
    # A change of these changes everybody's data: it needs a new major version, not a new number.
    assert key_of(0, 0, 0, "x") == 8418626344165467473
    assert key_of("order", 0, 0) == 4310912310138245246
    assert key_of(-1) == 16490336266968443936
    assert permutation(10, seed=0, number=0).tolist() == [8, 1, 5, 2, 0, 6, 9, 3, 7, 4]
    assert permutation(10, seed=0, number=1).tolist() == [5, 0, 1, 3, 4, 9, 2, 7, 8, 6]
    draw = Draw(_source(8), torch.arange(3), seed=0, view=0)
    assert draw.uniform("x").tolist() == [
        0.002344346219928295,
        0.9543053587780043,
        0.1446082693986228,
    ]
    assert draw.partner()["ids"].tolist() == [5, 3, 4]


def test_uniform_has_the_moments_and_the_histogram_of_one() -> None:
    values = _uniform()
    assert values.dtype == torch.float64
    assert values.min() >= 0
    assert values.max() < 1
    # Five standard errors of the mean and of the variance of ROWS uniform numbers.
    assert abs(values.mean() - 1 / 2) < 5 * (1 / 12 / ROWS) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 * (1 / 180 / ROWS) ** 0.5
    cells = torch.histc(values.float(), bins=50, min=0, max=1)
    chi_squared = ((cells - ROWS / 50) ** 2 / (ROWS / 50)).sum()
    assert 49 - 5 * 98**0.5 < chi_squared < 49 + 5 * 98**0.5


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"view": 1}, {"stream": "y"}, {"stream": 1}, {"seed": -1}, {"view": 2**40}],
    ids=str,
)
def test_neighbouring_keys_are_not_correlated(other) -> None:
    pair = torch.stack([_uniform(), _uniform(**other)])
    assert abs(torch.corrcoef(pair)[0, 1]) < 5 / ROWS**0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbouring_ids_are_not_correlated(lag: int) -> None:
    values = _uniform()
    assert abs(torch.corrcoef(torch.stack([values[lag:], values[:-lag]]))[0, 1]) < 5 / ROWS**0.5


def test_seed_and_view_do_not_stand_for_each_other() -> None:
    assert not torch.equal(_uniform(seed=1, view=2, rows=9), _uniform(seed=2, view=1, rows=9))
    assert key_of(1, 2) != key_of(2, 1)
    assert key_of(3) != key_of(3, 0)


def test_place_among_the_augmentations_is_part_of_the_key() -> None:
    source, ids = _source(9), torch.arange(9)
    first = Draw(source, ids, seed=0, view=0).uniform("x")
    second = Draw(source, ids, seed=0, view=0, before=(lambda batch, draw: batch,)).uniform("x")
    assert not torch.equal(first, second)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(-5, 2**64), st.integers(0, 2**33))
def test_permutations_are_complete(count: int, seed: int, number: int) -> None:
    order = permutation(count, seed=seed, number=number)
    assert np.array_equal(np.sort(order), np.arange(count))


def test_permutations_reach_every_place() -> None:
    # Each of 5 rows stands in each of 5 places in a fifth of 5,000 epochs.
    orders = np.stack([permutation(5, seed=3, number=number) for number in range(5_000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=5) for place in range(5)])
    assert np.abs(counts - 1_000).max() < 5 * (5_000 * 0.2 * 0.8) ** 0.5


def test_a_partner_is_another_row_and_any_other_row() -> None:
    source = _source(5)
    partners = torch.stack(
        [Draw(source, torch.arange(5), seed=0, view=v).partner()["ids"] for v in range(2_000)]
    )
    assert not (partners == torch.arange(5)).any()
    counts = torch.stack([partners[:, row].bincount(minlength=5) for row in range(5)])
    others = counts[~torch.eye(5, dtype=torch.bool)]
    assert (others - 500).abs().max() < 5 * (2_000 * 0.25 * 0.75) ** 0.5


def test_a_lone_row_has_no_partner() -> None:
    with pytest.raises(DataError, match="second row"):
        Draw(_source(1), torch.arange(1), seed=0, view=0).partner()
