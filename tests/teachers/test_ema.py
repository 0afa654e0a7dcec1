"""A mean teacher follows the student by its formula, and goes on to the same bits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence
from attar.runtime import DataError, PreflightError, Run, UsageError
from attar.training import Fit, Home, Term, fit, sgd
from attar.training import state as states

TASK = attar.tasks.TabularClassification(classes=("a", "b", "c"))
TERMS = [Term(partial(kl_divergence, temperature=2.0))]
PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": partial(sgd, lr=0.1)}
STEPS = 20


def student(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


class Watched(attar.EMA):
    """Keeps what the student was at the start and after each step."""

    def begin(self, live: nn.Module) -> None:
        super().begin(live)
        self.seen = [copy.deepcopy(live.state_dict())]

    def follow(self, live: nn.Module) -> None:
        super().follow(live)
        self.seen.append(copy.deepcopy(live.state_dict()))


def test_it_is_the_papers_average_of_the_steps(blobs: Any) -> None:
    """Every step written out in float64; statistics are the student's own."""
    live = student()
    teacher = Watched(live, TASK, momentum=0.6)
    fit(live, teacher, blobs.train, TASK, TERMS, **PLAN)
    assert len(teacher.seen) == STEPS + 1
    mean = {name: tensor.double() for name, tensor in teacher.seen[0].items()}
    for step, state in enumerate(teacher.seen[1:]):
        momentum = min(0.6, (1 + step) / (10 + step))
        for name in mean:
            mean[name] = momentum * mean[name] + (1 - momentum) * state[name].double()
    parameters = dict(teacher.model.named_parameters())
    for name, tensor in teacher.model.state_dict().items():
        expected = mean[name] if name in parameters else teacher.seen[-1][name].double()
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)
    assert int(teacher.model[1].num_batches_tracked) == STEPS


def test_it_shares_nothing_with_the_student_and_has_no_gradient(blobs: Any) -> None:
    live = student()
    teacher = attar.EMA(live, TASK)
    fit(live, teacher, blobs.train, TASK, TERMS, **PLAN)
    pairs = zip(teacher.model.state_dict().values(), live.state_dict().values(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert all(p.requires_grad for p in live.parameters())


def test_it_answers_in_eval_mode_and_is_allowed_to_move() -> None:
    live = student().train()
    teacher = attar.EMA(live, TASK).open()
    batch = {"inputs": torch.randn(5, 2)}
    before = teacher(batch)["output:logits"]
    assert torch.equal(before, teacher(batch)["output:logits"])
    assert live.training
    with torch.no_grad():
        live[4].bias.add_(1.0)
    teacher.follow(live)
    teacher.check()
    torch.testing.assert_close(teacher(batch)["output:logits"], before + 0.9)
    teacher.model.train()
    with pytest.raises(PreflightError, match="training mode"):
        teacher.check()


def test_it_starts_as_the_student_that_the_stage_starts_from(blobs: Any) -> None:
    """Also where that is another than it was made from."""
    live, start = student(1), student(7)
    teacher = Watched(live, TASK)
    teacher.steps = 50
    fit(live, teacher, blobs.train, TASK, TERMS, init=start, **PLAN | {"epochs": 1})
    assert torch.equal(teacher.seen[0]["0.weight"], start[0].weight)
    assert teacher.steps == STEPS // 2


def test_a_step_that_is_left_out_is_not_followed(
    blobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 the first steps overflow and change nothing."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**22))
    live = student()
    teacher = Watched(live, TASK)
    fit(live, teacher, blobs.train, TASK, TERMS, **PLAN | {"precision": "fp16"})
    assert 0 < teacher.steps < STEPS
    for before, after in zip(teacher.seen, teacher.seen[1:], strict=False):
        assert not torch.equal(before["0.weight"], after["0.weight"])


def test_what_it_cannot_be_made_from_is_refused() -> None:
    with pytest.raises(UsageError, match=r"must be in \[0, 1\)"):
        attar.EMA(student(), TASK, momentum=1.0)
    stuck = student()
    stuck.lines = iter([1])  # type: ignore[assignment]
    stuck.lines = (line for line in [1])  # type: ignore[assignment]
    with pytest.raises(PreflightError, match="cannot be copied"):
        attar.EMA(stuck, TASK)


def test_the_state_of_another_model_is_refused() -> None:
    teacher = attar.EMA(student(), TASK)
    state = teacher.state_dict()
    for wrong in (
        {n: t for n, t in state.items() if n != "model.0.bias"},
        state | {"model.0.bias": torch.zeros(9)},
        state | {"model.more": torch.zeros(9)},
    ):
        with pytest.raises(DataError, match=r"differs in '(0\.bias|more)'"):
            teacher.load_state_dict(wrong)
    with pytest.raises(DataError, match="of another model"):
        attar.Ensemble([student(), teacher], TASK).load_state_dict({})
    with pytest.raises(DataError, match="differs in 'steps'"):
        teacher.load_state_dict({n: t for n, t in state.items() if n != "steps"})


# ---------------------------------------------------------------- resuming


class Crash(Exception):
    """A process that dies."""


class Dying(attar.data.Subset):
    """Gives so many batches and no more."""

    def __init__(self, source: Any, at: int | None) -> None:
        super().__init__(source, torch.arange(len(source)))
        self.at, self.given = at, -1  # the preflight takes a batch too

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        for batch in super().epoch(number, **options):
            if self.given == self.at:
                raise Crash
            self.given += 1
            yield batch


def ema(live: nn.Module) -> Any:
    return attar.EMA(live, TASK, momentum=0.9)


def joined(live: nn.Module) -> Any:
    return attar.Ensemble([student(5), ema(live)], TASK)


def go(make: Any, blobs: Any, folder: Path, at: int | None = None) -> tuple[str, Any]:
    """A process: the student starts elsewhere where it goes on with a run."""
    live = student(99 if folder.exists() else 1)
    teacher = make(live)
    with Run(folder, resume=True) as run:
        home, plan = Home(run, resume=True), PLAN | {"checkpoint_every": 1}
        done: Fit = fit(live, teacher, Dying(blobs.train, at), TASK, TERMS, home=home, **plan)
    found = hashlib.sha256()
    for name, tensor in {**done.last, **teacher.state_dict()}.items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest(), teacher


@pytest.mark.parametrize("make", [ema, joined])
@pytest.mark.parametrize("at", [1, 7, 10, 19])
def test_it_goes_on_to_the_same_bits(blobs: Any, tmp_path: Path, make: Any, at: int) -> None:
    expected, _ = go(make, blobs, tmp_path / "whole")
    with pytest.raises(Crash):
        go(make, blobs, tmp_path / "run", at)
    found, teacher = go(make, blobs, tmp_path / "run")
    assert found == expected
    assert (teacher if make is ema else teacher.members[1]).steps == STEPS


@pytest.mark.parametrize("make", [ema, joined])
def test_its_state_is_needed(
    blobs: Any, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = go(make, blobs, tmp_path / "whole")
    with pytest.raises(Crash):
        go(make, blobs, tmp_path / "run", 7)
    lost = states.ITEMS["teacher"]._replace(give=lambda session, tensors, facts: None)
    monkeypatch.setitem(states.ITEMS, "teacher", lost)
    assert go(make, blobs, tmp_path / "run")[0] != expected


def test_another_momentum_is_another_run(blobs: Any, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        go(ema, blobs, tmp_path / "run", 7)
    with pytest.raises(PreflightError, match="teacher was EMA of the student, momentum"):
        go(partial(attar.EMA, task=TASK, momentum=0.8), blobs, tmp_path / "run")


def test_of_many_members_each_gets_its_own_state_back() -> None:
    """Also where the number of one begins with the number of another."""
    made = [attar.EMA(student(seed), TASK) for seed in range(11)]
    kept = copy.deepcopy(attar.Ensemble(made, TASK).state_dict())
    for member in made:
        member.begin(student(99))
    attar.Ensemble(made, TASK).load_state_dict(kept)
    for seed, member in enumerate(made):
        assert torch.equal(member.model[0].weight, student(seed)[0].weight)


def test_a_student_of_buffers_alone_is_followed() -> None:
    live = nn.BatchNorm1d(3, affine=False)
    teacher = attar.EMA(live, TASK)
    live(torch.randn(5, 3))
    teacher.follow(live)
    assert torch.equal(teacher.model.running_mean, live.running_mean)


def test_a_member_that_moves_moves_with_the_student(blobs: Any) -> None:
    live = student()
    moving, still = attar.EMA(live, TASK), student(5)
    moving.steps = 50  # of an earlier stage
    before = copy.deepcopy(still.state_dict())
    teacher = attar.Ensemble([still, moving], TASK)
    fit(live, teacher, blobs.train, TASK, TERMS, **PLAN)
    assert moving.steps == STEPS
    assert all(torch.equal(before[name], t) for name, t in still.state_dict().items())
    assert sorted(name.partition(".")[0] for name in teacher.state_dict())[0] == "1"
