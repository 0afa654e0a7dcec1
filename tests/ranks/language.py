"""Run on each rank: language models, whose logits are never made, train as in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import distance
from torch import nn
from whole import alone

import attar
from attar.losses import Projected, kl_divergence, mse
from attar.runtime.ranks import Ranks
from attar.training import Fit, Term, adamw, fit

TOKENS, LENGTH = 40, 16
TASK = attar.tasks.LanguageModelling(vocabulary=TOKENS)
TERMS = [
    Term(partial(kl_divergence, temperature=2.0), weight=0.7),
    Term(mse, "feature:model.layers.0", "feature:model.layers.1",
         projector=attar.models.projectors.linear, weight=0.1),
]  # fmt: skip


def data() -> attar.data.TextSource:
    """Windows of several documents, of which the ranks count unequal numbers of tokens."""
    documents = [[1 + (a * b) % 30 for b in range(1, 3 + a % 9)] for a in range(1, 70)]
    return attar.data.text(documents, length=LENGTH, eos=0, vocabulary=TOKENS)


def model(seed: int, width: int, *, tied: bool, columns: int) -> nn.Module:
    torch.manual_seed(seed)
    config = {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": width, "tie_word_embeddings": tied,
        "vocab_size": columns, "initializer_range": 0.3,
    }  # fmt: skip
    return attar.models.build(
        "language_model", shape=(LENGTH,), outputs=TOKENS, architecture="llama", config=config
    )


def train(kind: str, tied: bool) -> Fit:
    student = model(1, 16, tied=tied, columns=48)
    teacher = attar.Teacher(model(2, 24, tied=False, columns=64), TASK)
    how: dict[str, Any] = {"epochs": 2, "batch_size": 5, "accumulate": 2, "clip": 1.0}
    how["optimizer"] = partial(adamw, lr=0.01)
    return fit(
        student,
        teacher,
        data(),
        TASK,
        TERMS,
        label_weight=0.3,
        parallel=kind,
        validation=data(),
        **how,
    )


def as_one(kind: str, tied: bool, ranks: Ranks) -> None:
    seen: list[bool] = []
    output = attar.tasks.LanguageModelling.output

    def noted(self: Any, out: Any, name: str) -> Any:
        found = output(self, out, name)
        seen.append(isinstance(found, Projected))
        return found

    with alone():
        expected = train("auto", tied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attar.tasks.LanguageModelling, "output", noted)
        found = train(kind, tied)
    assert all(seen)
    apart = distance(found.student.state_dict(), expected.student.state_dict())
    assert apart < 1e-4, apart
    told = [[epoch["perplexity"] for epoch in each.history] for each in (found, expected)]
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    start = model(1, 16, tied=tied, columns=48).state_dict()
    assert distance(start, expected.student.state_dict()) > 0.05


def make() -> dict[str, Callable[[Ranks], None]]:
    return {
        f"language-{kind}{'-tied' * tied}": partial(as_one, kind, tied)
        for kind in ("ddp", "fsdp")
        for tied in (False, True)
    }
