"""Logits that are not made: the same losses and gradients, in one pass over them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import (
    Projected,
    alpha_beta_divergence,
    attention_relation,
    correlation,
    kl_divergence,
    mse,
    reverse_kl,
    wide,
)
from attar.models import build
from attar.models.projectors import linear
from attar.runtime import PreflightError
from attar.training import Counts, Objective, Term
from attar.training.preflight import dry_pass

pytest.importorskip("transformers")

TOKENS, LENGTH = 40, 8
TASK = attar.tasks.LanguageModelling(vocabulary=TOKENS)
SOFT = Term(partial(kl_divergence, temperature=2.0), weight=0.7)
BACK = Term(partial(reverse_kl, temperature=1.0), weight=0.3)
ANY = Term(partial(alpha_beta_divergence, alpha=0.5, beta=0.5), weight=0.2)


def model(seed: int, *, tied: bool = False, columns: int = TOKENS) -> nn.Module:
    torch.manual_seed(seed)
    config = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "tie_word_embeddings": tied,
        "vocab_size": columns, "initializer_range": 0.4,
    }  # fmt: skip
    return build(
        "language_model", shape=(LENGTH,), outputs=TOKENS, architecture="llama", config=config
    )


class Dense(nn.Module):
    """The same model, whose logits are made."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        return self.inner(input_ids=tokens, position_ids=position_ids).logits


def batch(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TOKENS, (rows, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(rows, LENGTH, generator=generator) < 0.3] = -100
    positions = torch.arange(LENGTH).expand(rows, LENGTH)
    return {
        "inputs": tokens[:, :-1],
        "labels": labels,
        "positions": positions,
        "ids": torch.arange(rows),
    }


def told(asked: dict[str, Tensor], *, dense: bool) -> dict[str, Any]:
    teacher = model(9, columns=64)
    return attar.Teacher(Dense(teacher) if dense else teacher, TASK)(asked)


def gradients(objective: Objective) -> Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense_teacher", [False, True])
def test_wide_is_dense(tied: bool, dense_teacher: bool) -> None:
    asked, student = batch(), model(1, tied=tied)
    answers = told(asked, dense=dense_teacher)
    wide_one = Objective(student, TASK, [SOFT, BACK, ANY], label_weight=0.2)
    dense_one = Objective(Dense(copy.deepcopy(student)), TASK, [SOFT, BACK, ANY], label_weight=0.2)
    found, expected = wide_one(asked, answers), dense_one(asked, answers)
    assert isinstance(wide_one.signals(asked)["output:logits"], Projected)
    assert isinstance(dense_one.signals(asked)["output:logits"], Tensor)
    torch.testing.assert_close(found.loss, expected.loss)
    for one, other in zip(found.values, expected.values, strict=True):
        torch.testing.assert_close(one, other)
    assert found.scales == expected.scales
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(gradients(wide_one), gradients(dense_one), rtol=1e-4, atol=1e-6)


def test_all_terms_and_the_labels_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    combined = wide.combined
    monkeypatch.setattr(
        wide, "combined", lambda s, items: (passes.append(len(items)), combined(s, items))[1]
    )
    asked = batch()
    with Objective(model(1), TASK, [SOFT, BACK, ANY], label_weight=0.2) as objective:
        objective(asked, told(asked, dense=False))
    assert passes == [4]


def test_a_step_does_not_depend_on_how_it_is_cut() -> None:
    asked = batch(rows=6)
    answers = told(asked, dense=False)["output:logits"]
    pieces = [
        ({name: value[a:b] for name, value in asked.items()}, {"output:logits": answers[a:b]})
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    objective = Objective(model(1), TASK, [SOFT, BACK], label_weight=0.2)
    objective(asked, {"output:logits": answers}).loss.backward()
    whole = gradients(objective)
    objective.zero_grad()
    counts = Counts.of(TASK, [piece for piece, _ in pieces])
    for piece, answer in pieces:
        objective(piece, answer, counts).loss.backward()
    torch.testing.assert_close(gradients(objective), whole, rtol=1e-5, atol=1e-7)


def test_rows_that_do_not_count_change_no_bit() -> None:
    asked = batch()
    answers = told(asked, dense=False)["output:logits"]
    objective = Objective(model(1), TASK, [SOFT], label_weight=0.2)
    objective(asked, {"output:logits": answers}).loss.backward()
    clean = gradients(objective)
    objective.zero_grad()
    hidden = answers.hidden.clone()
    hidden[asked["labels"] == -100] = torch.nan
    poisoned = Projected(hidden, answers.weight, answers.bias)
    objective(asked, {"output:logits": poisoned}).loss.backward()
    assert torch.equal(gradients(objective), clean)


def test_a_batch_in_which_nothing_counts_gives_zero() -> None:
    asked = batch()
    asked["labels"] = torch.full_like(asked["labels"], -100)
    objective = Objective(model(1), TASK, [SOFT], label_weight=0.2)
    loss = objective(asked, told(asked, dense=False)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert not gradients(objective).any()


def test_norms_of_each_terms_gradient_are_those_of_dense_logits() -> None:
    asked, student = batch(), model(1)
    answers = told(asked, dense=True)
    found = []
    for net in (student, Dense(copy.deepcopy(student))):
        objective = Objective(net, TASK, [SOFT, BACK], label_weight=0.2)
        objective.watching = True
        parts = objective(asked, answers)
        assert parts.gradients is not None
        found.append(torch.tensor(list(parts.gradients.values())))
    assert (found[0] > 0).all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (Term(correlation), "correlation"),
        (Term(attention_relation), r"needs all logits \[4, 8, 40\].* 0\.0 MiB.* made block by"),
        (Term(mse, projector=linear), r"needs all logits \[4, 8, 40\]"),
    ],
)
def test_what_needs_all_logits_at_once_is_refused(term: Term, said: str) -> None:
    asked = batch()
    answers = told(asked, dense=False)
    with pytest.raises(PreflightError, match=said):  # noqa: SIM117
        with Objective(model(1), TASK, [term], example=(asked, answers)) as objective:
            dry_pass(objective, asked, answers)


@pytest.mark.parametrize("keep", [{"top": TOKENS // 2, "logits": "float32"}, {"head": True}])
def test_a_cached_teacher_of_wide_logits(keep: dict[str, Any], tmp_path: Path) -> None:
    """Kept whole by its last layer it is the live one; of half its logits, within the bucket."""
    tokens = torch.randint(0, TOKENS, (16, LENGTH), generator=torch.Generator().manual_seed(3))
    data = attar.data.text(tokens.tolist(), length=LENGTH, eos=0, vocabulary=TOKENS)
    teacher = attar.Teacher(model(9, columns=64), TASK)
    cached = attar.cache(
        teacher,
        data,
        TASK,
        into=tmp_path / "cache",
        progress=False,
        keep=attar.teachers.Keep(**keep),
    )
    asked = data.rows(torch.arange(5))
    objective = Objective(model(1), TASK, [SOFT], label_weight=0.2)
    live, kept = (objective(asked, one(asked)) for one in (teacher, cached.open(["output:logits"])))
    torch.testing.assert_close(kept.values[1], live.values[1])
    if "head" in keep:
        torch.testing.assert_close(kept.values[0], live.values[0], rtol=1e-4, atol=1e-5)
    else:
        assert (kept.values[0] <= live.values[0] + 1e-5).all()
        assert (kept.values[0] < live.values[0] - 1e-3).any()


def test_wide_logits_are_not_kept_whole(tmp_path: Path) -> None:
    data = attar.data.text([[1, 2, 3]] * 8, length=LENGTH, eos=0, vocabulary=TOKENS)
    with pytest.raises(PreflightError, match=r"40 logits a position are not kept whole.*top"):
        attar.cache(attar.Teacher(model(9), TASK), data, TASK, into=tmp_path / "c", progress=False)


def test_a_language_model_is_distilled() -> None:
    """Teacher and student of one family, other vocabularies; one row of several documents."""
    documents = [[1 + (a * b) % 30 for b in range(1, 4 + a % 9)] for a in range(1, 60)]
    data = attar.data.text(documents, length=16, eos=0, vocabulary=TOKENS)
    teacher = attar.Teacher(model(9, columns=64), TASK)
    student = model(1)
    term = Term(partial(kl_divergence, temperature=1.0), weight=1.0)
    with torch.no_grad(), Objective(student, TASK, [term], label_weight=0) as objective:
        asked = next(iter(data.batches(len(data))))
        before = float(objective(asked, teacher(asked)).loss)
    attar.distill(
        student, teacher, data, TASK, [term], label_weight=0, epochs=6, batch_size=4,
        optimizer=partial(attar.training.adamw, lr=1e-2), run=None,
    )  # fmt: skip
    with torch.no_grad(), Objective(student, TASK, [term], label_weight=0) as objective:
        after = float(objective(asked, teacher(asked)).loss)
    assert after < 0.6 * before
