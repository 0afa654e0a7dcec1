"""Intervals cover the truth as often as they say, and tests are as strict as they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from attar.evaluation import Resampled, bootstrap, mcnemar, over_seeds
from attar.evaluation.intervals import bootstrap_p, percentile, resample
from attar.runtime import DataError
from attar.tasks import Regression, TabularClassification


def rows_of(right: np.ndarray) -> dict[str, torch.Tensor]:
    wrong = torch.from_numpy(~right).long()
    return {
        "logits": torch.nn.functional.one_hot(wrong, 2).float(),
        "labels": torch.zeros(len(right), dtype=torch.long),
    }


@pytest.mark.parametrize(("one", "two"), [(0, 0), (6, 0), (3, 9), (5, 5), (40, 21), (1, 0)])
def test_mcnemar_is_the_binomial_test(one: int, two: int) -> None:
    first = [True] * one + [False] * two + [True] * 20 + [False] * 3
    second = [False] * one + [True] * two + [True] * 20 + [False] * 3
    expected = stats.binomtest(one, one + two).pvalue if one + two else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-12)
    assert mcnemar(torch.tensor(second), torch.tensor(first)) == mcnemar(first, second)


def test_percentile_and_p_by_hand() -> None:
    draws = np.arange(1, 1002, dtype=float)
    found = percentile(500.0, draws)
    assert (found.value, found.low, found.high) == (500.0, 26.0, 976.0)
    assert bootstrap_p(draws) == pytest.approx(2 / 1002)
    assert bootstrap_p(draws - 3.5) == pytest.approx(2 * (3 + 1) / 1002)
    assert bootstrap_p(np.zeros(9)) == 1.0


def test_shares_drawn_by_pattern_have_the_moments_of_a_bootstrap() -> None:
    draw = np.random.default_rng(0)
    right = draw.random((300, 3)) < [0.9, 0.7, 0.8]
    right[:, 2] = right[:, 0] & right[:, 1]
    task = TabularClassification(classes=2)
    found = resample(task, [rows_of(r) for r in right.T], resamples=20_000, seed=1)
    np.testing.assert_allclose(found.mean(0), right.mean(0), atol=1e-3)
    expected = np.cov(right.T.astype(float), ddof=0) / 300
    np.testing.assert_allclose(np.cov(found.T), expected, rtol=0.05, atol=1.2e-5)


def test_any_metric_is_computed_anew_on_the_same_resample(house: Any) -> None:
    labels = torch.zeros(101, 1)
    values = torch.randn(101, 1, generator=torch.Generator().manual_seed(0))
    rows = {"values": values, "labels": labels}
    shifted = {"values": values.abs() + 1, "labels": labels}
    found = resample(house.median, [rows, shifted], resamples=200)
    np.testing.assert_allclose(found[:, 1], found[:, 0] + 1, rtol=1e-5)
    assert np.unique(found[:, 0]).size > 5
    assert np.array_equal(found, resample(house.median, [rows, shifted], resamples=200))
    assert not np.array_equal(found, resample(house.median, [rows, shifted], resamples=200, seed=1))


def test_a_percentile_interval_covers_the_truth(house: Any) -> None:
    draw = np.random.default_rng(7)
    covered = 0
    for seed in range(400):
        found = bootstrap(house.task, rows_of(draw.random(250) < 0.8), resamples=400, seed=seed)
        covered += found.low <= 0.8 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_an_interval_of_an_error_covers_the_truth() -> None:
    draw = torch.Generator().manual_seed(3)
    covered, labels = 0, torch.zeros(120, 1)
    for seed in range(200):
        rows = {"values": torch.randn(120, 1, generator=draw), "labels": labels}
        found = bootstrap(Regression(targets=1), rows, resamples=200, seed=seed)
        covered += found.low <= 1.0 <= found.high
    assert 0.89 <= covered / 200 <= 0.98


def test_a_perfect_score_is_not_certain(house: Any) -> None:
    found = bootstrap(house.task, house.said("1" * 20))
    assert found.high == 1.0
    assert found.low == pytest.approx(stats.binomtest(20, 20).proportion_ci().low)
    nothing = bootstrap(house.task, house.said("0" * 20))
    assert (nothing.low, nothing.high) == (0.0, pytest.approx(1 - found.low))


def test_the_seeds_formula_by_hand() -> None:
    values = np.array([0.02, 0.05, 0.08])
    draws = np.array([[0.0, 0.1, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.1], [0.1, 0.0, 0.0]])
    found = over_seeds(values, draws, examples=50)
    by_seed, by_example = 0.0009 / 3, draws.mean(1).var(ddof=1)
    t_seed, t_example = stats.t.ppf(0.975, 2), stats.t.ppf(0.975, 49)
    reach = (t_seed**2 * by_seed + t_example**2 * by_example) ** 0.5
    assert found.value == pytest.approx(0.05)
    assert (found.low, found.high) == (pytest.approx(0.05 - reach), pytest.approx(0.05 + reach))
    t_seed, t_example = stats.t.isf(found.p / 2, 2), stats.t.isf(found.p / 2, 49)
    assert t_seed**2 * by_seed + t_example**2 * by_example == pytest.approx(0.05**2)


def test_the_seeds_formula_without_any_variance() -> None:
    same = over_seeds(np.zeros(3), np.zeros((10, 3)), examples=8)
    assert (same.low, same.high, same.p) == (0, 0, 1.0)
    apart = over_seeds(np.ones(3), np.ones((10, 3)), examples=8)
    assert apart.p == pytest.approx(stats.binomtest(0, 8).pvalue)


def _difference(house: Any, draw: np.random.Generator, seeds: int, gain: float) -> Any:
    """Two arms on 400 examples of unequal difficulty; each seed has its own luck."""
    ease = draw.normal(1.8, 1.5, size=(400, 1))

    def arm(extra: float) -> list[dict[str, torch.Tensor]]:
        luck = draw.normal(0, 0.25, size=(1, seeds))
        chance = 1 / (1 + np.exp(-(ease + luck + extra)))
        return [rows_of(right) for right in (draw.random((400, seeds)) < chance).T]

    models = {"new": arm(gain), "old": arm(0.0)}
    return Resampled(house.task, models, resamples=200).difference("new", "old")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_rarely_find_a_difference_where_there_is_none(house: Any, seeds: int) -> None:
    draw = np.random.default_rng(seeds)
    found = [_difference(house, draw, seeds, 0.0) for _ in range(400)]
    wrong = np.mean([each.p < 0.05 for each in found])
    assert wrong <= 0.06
    assert wrong == np.mean([each.low > 0 or each.high < 0 for each in found])


def test_seeds_find_a_real_difference(house: Any) -> None:
    draw = np.random.default_rng(11)
    found = [_difference(house, draw, 5, 1.0) for _ in range(100)]
    assert np.mean([each.p < 0.05 and each.value > 0 for each in found]) > 0.8


def test_one_seed_pairs_the_examples(house: Any) -> None:
    models = {"new": [house.said("1111111100")], "old": [house.said("1110011100")]}
    found = Resampled(house.task, models)
    difference = found.difference("new", "old")
    assert difference.value == pytest.approx(0.2)
    assert (difference.p, difference.test) == (0.5, "mcnemar")
    assert difference.low == 0.0, "paired, the new one is never below the old one"
    ratio = found.ratio("new", "old")
    assert ratio is not None
    assert ratio.value == pytest.approx(8 / 6)
    assert ratio.low >= 1.0


def test_one_seed_of_another_metric_takes_the_paired_bootstrap(house: Any) -> None:
    noise = torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(200, 1)
    models = {
        "new": [{"values": noise, "labels": labels}],
        "old": [{"values": noise * 1.1, "labels": labels}],
    }
    found = Resampled(house.median, models, resamples=500).difference("new", "old")
    assert found.test == "bootstrap"
    assert found.p == pytest.approx(2 / 501)
    assert found.high < 0


def test_a_ratio_to_nothing_is_none(house: Any) -> None:
    found = Resampled(house.task, {"new": [house.said("11")], "old": [house.said("00")]})
    assert found.ratio("new", "old") is None


def test_shares_of_several_seeds_stay_in_their_range(house: Any) -> None:
    rows = [house.said(f"{'1' * (20 - wrong)}{'0' * wrong}") for wrong in (0, 1, 3)]
    assert Resampled(house.task, {"new": rows}).mean("new").high == 1.0


def test_rows_of_other_examples_are_refused(house: Any) -> None:
    other = house.said("11", torch.tensor([0, 1]))
    with pytest.raises(DataError, match="same test examples"):
        Resampled(house.task, {"a": [house.said("11")], "b": [other]})
    with pytest.raises(DataError, match="at least 2"):
        bootstrap(house.task, house.said("1"))
    with pytest.raises(DataError, match="no labels"):
        Resampled(house.task, {"a": [{"logits": torch.zeros(2, 2)}]})
