"""A run that was stopped goes on to the same bits, from any step, however often it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence, mse
from attar.runtime import DivergedError, Interrupted, PreflightError, Run
from attar.training import Fit, Home, Term, adamw, fit
from attar.training import state as states

TASK = attar.tasks.TabularClassification()
TERMS = [
    Term(partial(kl_divergence, temperature=2.0), weight=lambda progress: 1 - progress / 2),
    Term(mse, "feature:body", projector=attar.models.projectors.linear, weight=0.1),
]
PLAN: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "accumulate": 3,
    "optimizer": partial(adamw, lr=0.01),
    "average": 0.9,
    "clip": 1.0,
    "log_every": 3,
    "checkpoint_every": 1,
    "seed": 5,
}
BATCHES = 10  # an epoch of 160 rows
STEPS = 12  # 3 epochs of 4 windows: 3, 3, 3 and 1 batches


class Crash(Exception):
    """A process that dies."""


class Noise(nn.Module):
    """Draws from every generator a model may draw from."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        return inputs * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def student(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(Noise())
    model.add_module("body", nn.Linear(2, 8))
    model.add_module("norm", nn.BatchNorm1d(8))
    model.add_module("drop", nn.Dropout(0.2))
    model.add_module("head", nn.Linear(8, 3))
    return model


class Watched(attar.data.Subset):
    """Runs ``at(batches handed out)`` before each batch, over all epochs."""

    def __init__(self, source: Any, at: Callable[[int], None]) -> None:
        super().__init__(source, torch.arange(len(source)))
        self.at = at
        self.count = -1  # the preflight takes a batch too

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        for batch in super().epoch(number, **options):
            self.at(self.count)
            self.count += 1
            yield batch


def crash_at(batch: int) -> Callable[[int], None]:
    def at(count: int) -> None:
        if count == batch:
            raise Crash

    return at


def go(
    blobs: Any, net: Any, folder: Path, at: Callable[[int], None] = lambda _: None, **changes: Any
) -> Fit:
    """One process: everything is made anew, with another start and other random states."""
    torch.manual_seed(os.getpid())
    random.seed(None)
    np.random.seed(None)
    model = student(seed=1 if not folder.exists() else 99)
    home = {"resume": True, "allow": changes.pop("allow", ()), "tell": changes.pop("tell", print)}
    with Run(folder, resume=True) as run:
        return fit(
            model,
            net(seed=5, width=20),
            Watched(blobs.train, at),
            TASK,
            TERMS,
            validation=blobs.test,
            home=Home(run, **home),
            **PLAN | changes,
        )


def digest(done: Fit) -> str:
    """Everything that came out: the chosen and the last weights, and the history."""
    found = hashlib.sha256(json.dumps(done.history).encode())
    for state in (done.student.state_dict(), done.last):
        for name, tensor in state.items():
            found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture
def whole(blobs: Any, net: Any, tmp_path: Path) -> tuple[str, bytes]:
    """The uninterrupted run: its result and its log."""
    done = go(blobs, net, tmp_path / "whole")
    return digest(done), (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def crashed(blobs: Any, net: Any, folder: Path, batch: int, **changes: Any) -> None:
    with pytest.raises(Crash):
        go(blobs, net, folder, crash_at(batch), **changes)


@pytest.mark.parametrize("batch", range(3 * BATCHES))
def test_it_resumes_from_every_step_to_the_same_bits(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes], batch: int
) -> None:
    crashed(blobs, net, tmp_path / "run", batch)
    assert digest(go(blobs, net, tmp_path / "run")) == whole[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole[1]


@pytest.mark.parametrize("every", [1, 2, 5, None])
def test_it_resumes_several_times_within_an_epoch(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes], every: int | None
) -> None:
    for batch in (1, 4, 4, 4, 7, 12):
        crashed(blobs, net, tmp_path / "run", batch, checkpoint_every=every)
    assert digest(go(blobs, net, tmp_path / "run", checkpoint_every=every)) == whole[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole[1]


@pytest.mark.parametrize(
    "name", [n for n in states.ITEMS if n not in ("scaler", "teacher", "source")]
)
def test_each_item_of_the_state_is_needed(
    blobs: Any,
    net: Any,
    tmp_path: Path,
    whole: tuple[str, bytes],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without this item alone, the resumed run is another run."""
    crashed(blobs, net, tmp_path / "run", 17)
    lost = states.ITEMS[name]._replace(give=lambda session, tensors, facts: None)
    monkeypatch.setitem(states.ITEMS, name, lost)
    result = digest(go(blobs, net, tmp_path / "run"))
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert (result, log) != whole


class Steps:
    """A teacher that moves: each answer depends on how often it was asked."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.asked = torch.zeros(())

    def open(self, addresses: Any, device: Any) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.asked += 1
        with torch.no_grad():
            return {"output:logits": self.model(batch["inputs"]) * self.asked.sin()}

    def state_dict(self) -> dict[str, Tensor]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.asked = state["asked"].clone()


class Counting(attar.data.Subset):
    """A source that remembers: labels shift with the batches it has given."""

    given = 0
    crash = -1

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        for batch in super().epoch(number, **options):
            if self.given == self.crash:
                raise Crash
            self.given += 1
            yield {**batch, "labels": (batch["labels"] + self.given) % 3}

    def state(self) -> dict[str, Any]:
        return {"given": self.given}

    def load(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


@pytest.mark.parametrize("lost", [None, "teacher", "source", "scaler"])
def test_a_teacher_a_source_and_a_scaler_with_a_state_go_on(
    blobs: Any, net: Any, tmp_path: Path, lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16, whose scaler grows every few steps here; and each state is needed."""
    grown = partial(torch.amp.GradScaler, init_scale=2.0**20, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", grown)

    def part(folder: str, crash: int = -1) -> str:
        data = Counting(blobs.train, torch.arange(160))
        data.crash = crash
        teacher, plan = Steps(net(seed=5)), PLAN | {"precision": "fp16", "accumulate": 1}
        with Run(tmp_path / folder, resume=True) as run:
            home = Home(run, resume=True)
            return digest(fit(student(), teacher, data, TASK, TERMS[:1], home=home, **plan))

    expected = part("whole")
    with pytest.raises(Crash):
        part("run", crash=17)
    if lost is not None:
        gone = states.ITEMS[lost]._replace(give=lambda session, tensors, facts: None)
        monkeypatch.setitem(states.ITEMS, lost, gone)
    assert (part("run") == expected) == (lost is None)


def test_a_finished_run_is_not_trained_again(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes]
) -> None:
    def never(count: int) -> None:
        raise AssertionError

    again = go(
        blobs, net, tmp_path / "whole", at=lambda count: never(count) if count >= 0 else None
    )
    assert digest(again) == whole[0]


def test_a_finished_run_goes_on_with_more_epochs(blobs: Any, net: Any, tmp_path: Path) -> None:
    """With a constant rate, three epochs and two more are five."""
    constant = {"schedule": attar.training.constant}
    go(blobs, net, tmp_path / "run", **constant)
    more = go(blobs, net, tmp_path / "run", **constant, epochs=5)
    assert [record["epoch"] for record in more.history] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"clip": 2.0}, "clip"),
        ({"average": 0.8}, "average"),
        ({"optimizer": partial(adamw, lr=0.02)}, "optimizer"),
    ],
)
def test_a_difference_is_refused_unless_it_is_allowed_by_name(
    blobs: Any, net: Any, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    crashed(blobs, net, tmp_path / "run", 17)
    with pytest.raises(PreflightError, match=f"{name} was .* --allow-drift {name}"):
        go(blobs, net, tmp_path / "run", **change)
    told: list[str] = []
    go(blobs, net, tmp_path / "run", **change, allow=(name,), tell=told.append)
    assert any(line.startswith(f"{name} was") and line.endswith("allowed") for line in told)


def test_a_difference_that_has_no_place_in_the_run_cannot_be_allowed(
    blobs: Any, net: Any, tmp_path: Path
) -> None:
    crashed(blobs, net, tmp_path / "run", 17)
    with pytest.raises(PreflightError, match=r"batch_size was 16 .* cannot change"):
        go(blobs, net, tmp_path / "run", batch_size=8, allow=("batch_size",))


def test_other_data_teachers_threads_and_versions_are_seen(
    blobs: Any, net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed(blobs, net, tmp_path / "run", 17)
    with pytest.raises(PreflightError, match="teacher was"):
        go(blobs, lambda **_: net(seed=6, width=20), tmp_path / "run")
    other = attar.data.tensors(
        blobs.train.rows(torch.arange(160))["inputs"] + 1e-6,
        blobs.train.labels,
        blobs.test.rows(torch.arange(80))["inputs"],
        blobs.test.labels,
        classes=("a", "b", "c"),
    )
    with pytest.raises(PreflightError, match="data was"):
        go(other, net, tmp_path / "run")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(PreflightError, match=r"torch was 2.* is 2.99.0 now"):
        go(blobs, net, tmp_path / "run")
    monkeypatch.undo()
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    with pytest.raises(PreflightError, match="threads was"):
        go(blobs, net, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("batch", [0, 5, 9, 10, 29])
def test_a_signal_stops_at_the_next_step_and_loses_nothing(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes], number: int, batch: int
) -> None:
    """With checkpoints by the clock, none is due: it is the signal that saves."""

    def at(count: int) -> None:
        if count == batch:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        go(blobs, net, tmp_path / "run", at, checkpoint_every=None)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    steps = (batch // BATCHES) * 4 + batch % BATCHES // 3 + 1
    names = sorted(path.name for path in (tmp_path / "run/checkpoints/stage").glob("step-*"))
    assert names[-1] == f"step-{steps:09d}"
    assert digest(go(blobs, net, tmp_path / "run", checkpoint_every=None)) == whole[0]


def test_a_signal_in_validation_loses_nothing(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The averaged weights stand in the student just then."""
    score, calls = attar.tasks.TabularClassification.rows, []

    def rows(self: Any, out: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, out, batch)

    monkeypatch.setattr(attar.tasks.TabularClassification, "rows", rows)
    with pytest.raises(Interrupted):
        go(blobs, net, tmp_path / "run", checkpoint_every=None)
    assert digest(go(blobs, net, tmp_path / "run", checkpoint_every=None)) == whole[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole[1]


def test_a_second_signal_stops_at_once_and_saves_nothing(
    blobs: Any, net: Any, tmp_path: Path
) -> None:
    def at(count: int) -> None:
        if count == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError

    with pytest.raises(Interrupted):
        go(blobs, net, tmp_path / "run", at, checkpoint_every=None)
    names = [path.name for path in (tmp_path / "run/checkpoints/stage").glob("step-*")]
    assert names == ["step-000000000"]


def test_a_divergence_is_not_saved(blobs: Any, net: Any, tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        go(blobs, net, tmp_path / "run", optimizer=partial(adamw, lr=1e30), clip=None)
    found = attar.runtime.Snapshots(tmp_path / "run/checkpoints/stage").latest()
    assert found is not None
    assert all(bool(t.isfinite().all()) for t in found.parts["objective"].values())


def test_what_cannot_be_saved_is_not_begun(
    blobs: Any, net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(count: int) -> None:
        if count >= 0:
            raise AssertionError

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(attar.runtime.Snapshots, "save", denied)
    with pytest.raises(PreflightError, match=r"run: a checkpoint cannot be written \(Permission"):
        go(blobs, net, tmp_path / "run", never)
    monkeypatch.undo()
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(PreflightError, match="do not fit into the 10 bytes that are free"):
        go(blobs, net, tmp_path / "run", never)


def test_the_verbs_resume_and_want_a_run_for_it(blobs: Any, net: Any, tmp_path: Path) -> None:
    plan = {"epochs": 2, "batch_size": 16, "checkpoint_every": 1, "run": tmp_path / "run"}
    with pytest.raises(Crash):
        attar.train(net(seed=1), Watched(blobs.train, crash_at(15)), TASK, **plan)
    resumed = attar.train(net(seed=9), blobs.train, TASK, resume=True, **plan)
    whole = attar.train(net(seed=1), blobs.train, TASK, epochs=2, batch_size=16)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(attar.runtime.UsageError, match="name it with run="):
        attar.train(net(), blobs.train, TASK, resume=True)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 4), (4, 0)])
def test_the_number_of_workers_changes_no_bit_of_a_resumed_run(
    blobs: Any, net: Any, tmp_path: Path, before: int, after: int
) -> None:
    rows = [(blobs.train.rows(torch.tensor([i]))["inputs"][0], int(i % 3)) for i in range(60)]
    augment = [attar.data.mixup]

    def part(folder: str, workers: int, crash: int = 10**9) -> str:
        source = attar.data.DatasetSource(rows, classes=3, workers=workers)
        plan = PLAN | {"augment": augment, "epochs": 2, "batch_size": 8}
        data = Watched(source, crash_at(crash))
        with Run(tmp_path / folder, resume=True) as run:
            home = Home(run, resume=True)
            return digest(
                fit(student(), net(seed=5, width=20), data, TASK, TERMS, home=home, **plan)
            )

    expected = part("whole", 0)
    with pytest.raises(Crash):
        part("run", before, crash=5)
    with pytest.raises(Crash):
        part("run", before, crash=6)
    assert part("run", after) == expected


def test_a_disk_that_fills_up_stops_the_run_and_harms_nothing(
    blobs: Any, net: Any, tmp_path: Path, whole: tuple[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = attar.runtime.Snapshots.save, iter(range(100))

    def full(self: Any, *args: Any) -> Any:
        if next(calls) == 4:
            raise OSError(28, "No space left on device", str(tmp_path / "run"))
        return save(self, *args)

    monkeypatch.setattr(attar.runtime.Snapshots, "save", full)
    with pytest.raises(OSError, match="No space left"):
        go(blobs, net, tmp_path / "run")
    assert digest(go(blobs, net, tmp_path / "run")) == whole[0]


BUILT = [
    Term(partial(attar.losses.memory_contrast, negatives=24, dimensions=4), "feature:body"),
    Term(attar.losses.variational, "feature:norm", "feature:body", weight=0.1),
    Term(attar.losses.mse, "feature:body", projector=attar.models.projectors.linear,
         teacher_projector=partial(attar.models.projectors.whiten, batches=20)),
]  # fmt: skip


def test_losses_with_a_memory_and_moving_maps_resume_to_the_same_bits(
    blobs: Any, net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memories and their unit, trained scales, running statistics, random probes."""
    probes = Term(attar.losses.sobolev, "grad:probe/inputs", weight=0.1)
    monkeypatch.setitem(globals(), "TERMS", [*BUILT, probes])
    known = digest(go(blobs, net, tmp_path / "whole"))
    for batch in (4, 17):
        crashed(blobs, net, tmp_path / "run", batch)
    assert digest(go(blobs, net, tmp_path / "run")) == known
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
