"""The recurrent classifier: padding is no part of it, and it is built again from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attar import models, tasks
from attar.models import text
from attar.runtime import UsageError

TASK = tasks.TextClassification(classes=3)
LENGTHS = torch.tensor([4, 1, 6])


def batch(left: int = 0, right: int = 0) -> dict[str, Tensor]:
    inputs = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(6) < LENGTHS[:, None]).long()
    both = {"inputs": inputs, "attention": attention}
    if left:  # the free places of each row come first
        for row, count in enumerate(LENGTHS.tolist()):
            for value in both.values():
                value[row] = value[row].roll(6 - count)
    return {name: nn.functional.pad(value, (left, right)) for name, value in both.items()}


def built(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return models.build("bilstm", shape=(6,), outputs=3, vocabulary=20, **options).eval()


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("sides", [(0, 0), (0, 5), (3, 2)], ids=str)
def test_padding_on_either_side_changes_no_number(pool: str, sides: tuple[int, int]) -> None:
    model = built(pool=pool, depth=2, width=8, hidden=6)
    rows = zip(batch()["inputs"], LENGTHS.tolist(), strict=True)
    alone = torch.cat([model(row[None, :count]) for row, count in rows])
    with torch.no_grad():
        model.words.weight[0] = torch.nan  # what stands in the padding
    found = TASK.output(TASK.forward(model, batch(*sides)), "logits")
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_gradient_reaches_the_words_that_are_real_alone(pool: str) -> None:
    model = built(pool=pool)
    asked = batch(0, 2)
    asked["inputs"] *= asked["attention"]
    TASK.forward(model, asked).square().sum().backward()
    gradient = model.words.weight.grad
    assert torch.isfinite(gradient).all()
    reached = gradient.abs().sum(1).nonzero()[:, 0].tolist()
    assert reached == sorted(set(asked["inputs"].flatten().tolist()) - {0})


def test_it_is_saved_and_built_again(tmp_path: Path) -> None:
    model = built(width=8, hidden=4)
    models.save(model, tmp_path / "kept")
    again = models.load(tmp_path / "kept").eval()
    both = [TASK.forward(each, batch()) for each in (model, again)]
    assert torch.equal(*both)
    count = 20 * 8 + 2 * (4 * 4 * (8 + 4) + 2 * 4 * 4) + (2 * 4 + 1) * 3
    assert sum(p.numel() for p in model.parameters()) == count


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"reads token ids of shape \[S\]"):
        models.build("bilstm", shape=(1, 8, 8), outputs=3, vocabulary=20)
    with pytest.raises(UsageError, match="do not tell how many token ids there are"):
        models.build("bilstm", shape=(6,), outputs=3)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_what_is_pooled_is_what_is_real_alone(pool: Any) -> None:
    states, real = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    found = text.Pool(pool)(states, real)
    kept = [row[mask.bool()] for row, mask in zip(states, real, strict=True)]
    expected = [row.mean(0) if pool == "mean" else row.amax(0) for row in kept]
    torch.testing.assert_close(found, torch.stack(expected))
