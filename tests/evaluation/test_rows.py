"""Rows come in order, each once, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.evaluation import bootstrap, collect, evaluate
from attar.runtime import DataError

X = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 4.0], [1.0, 3.0], [9.0, 8.0]])
Y = torch.tensor([0, 1, 1, 1, 0])  # rows 0, 1, 3 and 4 are right


@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("order", [None, [4, 2, 0, 1, 3]])
def test_each_id_once_and_in_order(house: Any, size: int, order: list[int] | None) -> None:
    source = house.listed(X, Y, order)
    done = []
    rows = collect(
        nn.Identity(), source, house.task, batch_size=size, device="cpu",
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert torch.equal(rows["logits"], X)
    assert torch.equal(rows["labels"], Y)
    assert done[-1] == (5, 5)
    assert len(done) == -(-5 // size)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4, 4]])
def test_a_missing_or_repeated_id_is_refused(house: Any, order: list[int]) -> None:
    with pytest.raises(DataError, match="0 to 4 must come exactly once"):
        collect(nn.Identity(), house.listed(X, Y, order), house.task, device="cpu")


def test_an_empty_source_is_refused(house: Any) -> None:
    with pytest.raises(DataError, match="no examples"):
        collect(nn.Identity(), house.listed(X[:0], Y[:0]), house.task, device="cpu")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_diverged_model_is_refused_with_its_row(house: Any, wrong: float) -> None:
    broken = X.clone()
    broken[3, 1] = wrong
    with pytest.raises(DataError, match="logits of row 3 are not finite"):
        collect(nn.Identity(), house.listed(broken, Y), house.task, device="cpu")


def test_the_model_runs_in_eval_without_gradient_and_gets_its_modes_back(house: Any) -> None:
    model = house.modes()
    rows = collect(model, house.listed(X, Y), house.task, device="cpu")
    assert torch.equal(rows["logits"], X), "dropout was on"
    assert model.seen == [(False, False, False)]
    assert (model.training, model.free.training, model.frozen.training) == (True, True, False)


def test_the_modes_come_back_after_an_error(house: Any) -> None:
    model = house.modes()
    with pytest.raises(DataError, match="thirteen"):
        collect(model, house.listed(X + 11, Y), house.task, device="cpu")
    assert (model.training, model.free.training, model.frozen.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_an_evaluation_can_be_read_and_indexed(house: Any) -> None:
    found = evaluate(nn.Identity(), house.listed(X, Y), house.task, device="cpu")
    assert found["accuracy"] == 0.8
    assert found.scores == house.task.score(found.rows)
    interval = bootstrap(house.task, found.rows)
    assert found.interval == (interval.low, interval.high)
    text = f"accuracy 80.00 % [{100 * interval.low:.1f}, {100 * interval.high:.1f}], cross_entropy "
    assert str(found).startswith(text)
    assert str(found).endswith("(5 examples)")
    assert str(found) in repr(found)


def test_an_unlabelled_source_cannot_be_scored(house: Any) -> None:
    with pytest.raises(DataError, match="no labels"):
        evaluate(nn.Identity(), house.listed(X, None), house.task, device="cpu")


def test_real_digits(digits: attar.data.Splits) -> None:
    task = attar.tasks.ImageClassification().fitted(digits.train)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole, ones = (
        collect(model, digits.test, task, batch_size=size, device="cpu") for size in (1000, 7)
    )
    assert torch.equal(whole["labels"], digits.test.labels)
    torch.testing.assert_close(whole["logits"], ones["logits"])
    assert evaluate(model, digits.test, task, device="cpu")["accuracy"] == task.primary(whole)
