"""The objective: what a term means, and that a step does not depend on how it is cut."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import attar
from attar.losses import correlation, cross_entropy, kl_divergence, mse
from attar.models.projectors import linear
from attar.runtime import PreflightError
from attar.training import Counts, Objective, Term

TASK = attar.tasks.ImageClassification(classes=3)
SOFT = Term(partial(kl_divergence, temperature=4.0), weight=0.9)


def batch(n: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 2, generator=generator)
    return {"inputs": inputs, "labels": torch.arange(n) % 3, "ids": torch.arange(n)}


def part(whole: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: value[start:stop] for name, value in whole.items()}


def gradients(objective: Objective, pieces: list[tuple[dict, dict]], counts: Counts) -> Tensor:
    objective.zero_grad()
    for asked, told in pieces:
        objective(asked, told, counts).loss.backward()
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def test_the_loss_is_hintons(net: partial[nn.Module]) -> None:
    student, asked = net(seed=1), batch()
    goal = torch.randn(12, 3)
    loss = Objective(student, TASK, [SOFT], label_weight=0.1)(asked, {"output:logits": goal}).loss
    logits = student(asked["inputs"])
    soft = F.kl_div(
        F.log_softmax(logits / 4, 1), F.log_softmax(goal / 4, 1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    expected = 0.9 * 16 * soft + 0.1 * F.cross_entropy(logits, asked["labels"])
    torch.testing.assert_close(loss, expected)


@given(cuts=st.lists(st.integers(1, 39), max_size=6, unique=True))
def test_a_step_does_not_depend_on_how_it_is_cut(cuts: list[int]) -> None:
    """Terms of rows and of labels: any micro-batches give the gradient of the whole."""
    torch.manual_seed(0)
    student, asked, goal = nn.Linear(2, 3), batch(40), torch.randn(40, 3)
    objective = Objective(student, TASK, [SOFT, Term(mse, weight=0.3)], label_weight=0.1)
    edges = [0, *sorted(cuts), 40]
    pieces = [(part(asked, a, b), {"output:logits": goal[a:b]}) for a, b in pairwise(edges)]
    whole = gradients(objective, [(asked, {"output:logits": goal})], Counts(40, 40))
    split = gradients(objective, pieces, Counts.of(TASK, [p for p, _ in pieces]))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-7)


class Masked(attar.tasks.ImageClassification):
    """Counts the rows whose id is even."""

    def mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["ids"] % 2 == 0

    def loss(self, out: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(out[self.mask(batch)], batch["labels"][self.mask(batch)])


def test_rows_that_do_not_count_change_no_bit(net: partial[nn.Module]) -> None:
    student, asked, goal = net(seed=1), batch(), torch.randn(12, 3)
    objective = Objective(student, Masked(classes=3), [SOFT], label_weight=0.1)
    clean = gradients(objective, [(asked, {"output:logits": goal})], Counts(6, 12))
    goal[1::2] = float("nan")
    poisoned = gradients(objective, [(asked, {"output:logits": goal})], Counts(6, 12))
    assert torch.equal(clean, poisoned)
    assert Counts.of(Masked(classes=3), [asked]) == Counts(positions=6, examples=12)


def test_no_counted_row_gives_zero_with_the_graph_kept(net: partial[nn.Module]) -> None:
    asked = batch() | {"ids": torch.ones(12, dtype=torch.long)}
    objective = Objective(net(), Masked(classes=3), [SOFT], label_weight=0.1)
    loss = objective(asked, {"output:logits": torch.randn(12, 3)}).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_a_relation_is_weighted_by_its_share_of_the_examples(net: partial[nn.Module]) -> None:
    objective = Objective(net(), TASK, [Term(correlation)], label_weight=0)
    asked, told = batch(), {"output:logits": torch.randn(12, 3)}
    alone = objective(asked, told).loss
    torch.testing.assert_close(objective(asked, told, Counts(48, 48)).loss, alone / 4)


def test_a_loss_gets_exactly_what_it_names(net: partial[nn.Module]) -> None:
    seen: dict[str, object] = {}

    def curious(student: Tensor, ids: Tensor, progress: float) -> Tensor:
        seen.update(ids=ids, progress=progress)
        return student.square().mean(1)

    objective = Objective(net(), TASK, [Term(curious)], label_weight=0)
    objective(batch(), progress=0.25).loss.backward()
    assert torch.equal(seen["ids"], torch.arange(12))  # type: ignore[arg-type]
    assert seen["progress"] == 0.25


def test_a_weight_may_be_a_function_of_progress(net: partial[nn.Module]) -> None:
    term = Term(kl_divergence, weight=lambda progress: 2 * progress)
    objective = Objective(net(), TASK, [term], label_weight=0)
    told = {"output:logits": torch.randn(12, 3)}
    full = objective(batch(), told, progress=1.0).loss
    torch.testing.assert_close(objective(batch(), told, progress=0.5).loss, full / 2)


def test_terms_are_reported_by_name_without_their_weight(net: partial[nn.Module]) -> None:
    term = Term(mse, "feature:body", weight=7.0)
    objective = Objective(net(), TASK, [SOFT, term, term], label_weight=0.1)
    told = {"output:logits": torch.randn(12, 3), "feature:body": torch.randn(12, 8)}
    parts = objective(batch(), told)
    assert list(parts.terms) == [
        "kl_divergence", "mse(feature:body)", "mse(feature:body) #2", "labels",
    ]  # fmt: skip
    total = 0.9 * parts.terms["kl_divergence"] + 14 * parts.terms["mse(feature:body)"]
    torch.testing.assert_close(parts.loss.detach(), total + 0.1 * parts.terms["labels"])


def test_self_is_the_students_own_signal_without_gradient(net: partial[nn.Module]) -> None:
    student = net(width=3)
    term = Term(mse, "output:logits", "self:feature:body")
    Objective(student, TASK, [term], label_weight=0)(batch()).loss.backward()
    detached = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    hidden = student.body(batch()["inputs"])
    mse(student.head(student.act(hidden)), hidden.detach()).mean().backward()
    for ours, expected in zip(detached, student.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad)


def test_a_projector_is_sized_by_example_and_learns(net: partial[nn.Module]) -> None:
    told = {"feature:body": torch.randn(12, 20)}
    term = Term(mse, "feature:body", projector=linear)
    objective = Objective(net(), TASK, [term], label_weight=0, example=(batch(), told))
    objective(batch(), told).loss.backward()
    adapter = list(objective.adapters.parameters())
    assert [list(p.shape) for p in adapter] == [[20, 8], [20]]
    assert all(p.grad is not None and p.grad.any() for p in adapter)


def test_sizing_a_projector_moves_no_batch_statistics() -> None:
    student = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    told = {"feature:0": torch.randn(12, 9)}
    term = Term(mse, "feature:0", projector=linear)
    Objective(student, TASK, [term], label_weight=0, example=(batch(), told))
    assert student[1].num_batches_tracked == 0
    assert student[1].training


def test_a_projector_without_an_example_is_refused(net: partial[nn.Module]) -> None:
    with pytest.raises(PreflightError, match="example="):
        Objective(net(), TASK, [Term(mse, "feature:body", projector=linear)])


def test_nothing_to_learn_is_refused(net: partial[nn.Module]) -> None:
    with pytest.raises(PreflightError, match="nothing to learn"):
        Objective(net(), TASK, [], label_weight=0)


def test_losses_stay_in_float32_under_autocast(net: partial[nn.Module]) -> None:
    objective = Objective(net(), TASK, [SOFT], precision=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = objective(batch(), {"output:logits": torch.randn(12, 3)})
    assert parts.loss.dtype == torch.float32


def test_a_loop_of_ones_own(blobs: attar.data.Splits, net: partial[nn.Module]) -> None:
    """The few lines of the README learn, and leave no hook."""
    task = TASK.fitted(blobs.train)
    teacher = attar.Teacher(
        attar.train(net(seed=3), blobs.train, task, epochs=5, batch_size=16), task
    )
    student = net(seed=1, width=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with attar.Objective(student, task, [SOFT]) as objective:
        for epoch in range(3):
            for asked in blobs.train.epoch(epoch, batch_size=16, seed=0):
                objective(asked, teacher(asked)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert attar.evaluate(student, blobs.test, task)["accuracy"] > 0.9
    assert not any(m._forward_hooks for m in student.modules())
