"""Run on each rank: whole trainings, which end as those of one process do."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from common import as_kind, distance
from torch import Tensor, nn

import attar
from attar.evaluation import collect
from attar.losses import kl_divergence, mse
from attar.runtime import DivergedError, Interrupted, Run, opened
from attar.runtime.ranks import Ranks
from attar.training import Fit, Home, Term, adamw, fit, sgd

# 101 rows in batches of 20: the last batch has one, of which all ranks but one have none.
ROWS, BATCH = 101, 20
TASK = attar.tasks.TabularClassification()
TERMS = [
    Term(partial(kl_divergence, temperature=2.0), weight=0.9),
    Term(mse, "feature:1", "feature:1", projector=attar.models.projectors.linear),
]
# The linear projector learns from the first step, when most of the student is asleep.
TUNED_TERMS = [
    Term(partial(kl_divergence, temperature=2.0), weight=0.9),
    Term(mse, "feature:3", "feature:1", projector=attar.models.projectors.linear),
]
PLAN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": BATCH,
    "accumulate": 4,
    "optimizer": partial(adamw, lr=0.01),
    "average": 0.9,
    "clip": 0.5,
    "augment": [attar.data.mixup],
    "log_every": 1,
    "checkpoint_every": 1,
}


class Crash(Exception):
    """All ranks die."""


class Watched(attar.data.TensorSource):
    """Runs ``at(count)`` before each batch of training."""

    at: Callable[[int], None] = staticmethod(lambda count: None)
    count = -1

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        for batch in super().epoch(number, **options):
            self.at(self.count)
            self.count += 1
            yield batch


def data(at: Callable[[int], None] | None = None) -> tuple[Watched, Watched]:
    draw = torch.Generator().manual_seed(1)
    points, labels = torch.randn(2 * ROWS, 6, generator=draw), torch.arange(2 * ROWS) % 3
    parts = [Watched(points[s], labels[s], classes=3) for s in (slice(ROWS), slice(ROWS, None))]
    if at is not None:
        parts[0].at = at
    return parts[0], parts[1]


def net(seed: int, width: int, drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, width), nn.Tanh(), nn.Dropout(drop), nn.Linear(width, 3)]
    return nn.Sequential(*layers)


@contextmanager
def alone() -> Iterator[None]:
    """As if this process had been started by itself."""
    kept = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE")}
    try:
        yield
    finally:
        os.environ.update(kept)


def train(
    ranks: Ranks,
    kind: str,
    folder: Path,
    at: Callable[[int], None] | None = None,
    drop: float = 0.0,
    **changes: Any,
) -> Fit:
    """Train, or go on, in *folder*; a fresh start is another one than the checkpoint's."""
    train_data, validation = data(at)
    student = net(1 if not folder.exists() else 9, 5, drop)
    ranks.barrier()
    with opened(ranks, folder, resume=True) as run:
        home = Home(run, resume=True)
        plan = {**PLAN, "parallel": kind, **changes}
        return fit(
            student, net(2, 8), train_data, TASK, TERMS, validation=validation, home=home, **plan
        )


def train_alone(folder: Path, **options: Any) -> Fit:
    with alone():
        return train(Ranks(), "auto", folder, **options)


@contextmanager
def shared_folder(ranks: Ranks) -> Iterator[Path]:
    """A folder that all ranks see."""
    folder = Path(ranks.first(tempfile.mkdtemp() if ranks.main else None))
    try:
        yield folder
    finally:
        ranks.barrier()
        if ranks.main:
            shutil.rmtree(folder)


def close(one: Fit, other: Fit) -> None:
    assert distance(one.student.state_dict(), other.student.state_dict()) < 1e-5
    assert distance(one.last, other.last) < 1e-5
    for ours, theirs in zip(one.history, other.history, strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-5)


def equal(one: Fit, other: Fit) -> None:
    states = zip(
        one.student.state_dict().values(), other.student.state_dict().values(), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in states)
    assert one.history == other.history


def crash_at(batch: int) -> Callable[[int], None]:
    def at(count: int) -> None:
        if count == batch:
            raise Crash

    return at


def training(kind: str, ranks: Ranks) -> None:
    """The same student, log and history as one process; the module is as it was."""
    ranks = as_kind(ranks, kind)
    with shared_folder(ranks) as folder, tempfile.TemporaryDirectory() as own:
        expected = train_alone(Path(own) / "run")
        found = train(ranks, kind, folder / "run")
        close(found, expected)
        assert type(found.student) is nn.Sequential
        assert not any(m._forward_hooks or m._backward_hooks for m in found.student.modules())
        assert all(type(p) is nn.Parameter for p in found.student.parameters())
        lines = [(f / "run/metrics.jsonl").read_text().splitlines() for f in (folder, Path(own))]
        assert len(lines[0]) == len(lines[1])


def deep(seed: int, outputs: int = 3) -> nn.Sequential:
    """A stem with batch norm, three blocks and a head."""
    torch.manual_seed(seed)
    block = partial(nn.Linear, 5, 5, bias=False)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()),
        *(nn.Sequential(block(), nn.Tanh()) for _ in range(3)),
        nn.Linear(5, outputs),
    )


TUNED: dict[str, Any] = {
    "epochs": 4,
    "batch_size": BATCH,
    "optimizer": partial(sgd, lr=0.1),
    "clip": 0.5,
    "freeze": ["0", "2"],
    "unfreeze_every": 1,
    "layer_decay": 0.8,
    "l2_sp": 0.5,
    "average": 0.9,
    "checkpoint_every": 1,
    "log_every": 1,
}


def tune(
    ranks: Ranks, kind: str, folder: Path, at: Callable[[int], None] | None = None
) -> tuple[Fit, nn.Module]:
    """A student that starts from another model's body; also the student before it."""
    student, start = deep(1), deep(7, outputs=4)
    ranks.barrier()
    with opened(ranks, folder, resume=True) as run:
        told = {"validation": data()[1], "home": Home(run, resume=True), "init": start}
        made = fit(
            student, net(2, 8), data(at)[0], TASK, TUNED_TERMS, **told, **TUNED, parallel=kind
        )
    return made, start


def tuned(kind: str, ranks: Ranks) -> None:
    """What is frozen, asleep, slowed and pulled on several ranks is so as on one; so resumed."""
    ranks = as_kind(ranks, kind)
    with shared_folder(ranks) as folder, tempfile.TemporaryDirectory() as own:
        with alone():
            expected, start = tune(Ranks(), "auto", Path(own) / "run")
        found, _ = tune(ranks, kind, folder / "run")
        close(found, expected)
        assert found.student[2][0].weight.equal(start[2][0].weight)
        assert not found.student[1][0].weight.equal(start[1][0].weight)
        assert all(p.requires_grad for p in found.student.parameters())
        with pytest.raises(Crash):
            tune(ranks, kind, folder / "stopped", crash_at(8))
        ranks.barrier()
        equal(tune(ranks, kind, folder / "stopped")[0], found)


def world_changes(kind: str, ranks: Ranks) -> None:
    """Begun by several and ended by one, and the other way: no row is lost or seen twice."""
    ranks = as_kind(ranks, kind)
    with shared_folder(ranks) as folder, tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary)
        expected = train_alone(own / "whole")
        with pytest.raises(Crash):
            train(ranks, kind, folder / "run", crash_at(5))
        ranks.barrier()
        shutil.copytree(folder / "run", own / "run")
        close(train_alone(own / "run"), expected)
        if ranks.main:
            with pytest.raises(Crash):
                train_alone(folder / "other", at=crash_at(8))
        ranks.barrier()
        close(train(ranks, kind, folder / "other"), expected)


def exact_resume(kind: str, ranks: Ranks) -> None:
    """On as many ranks it is exact to the bit, each rank's dropout included."""
    ranks = as_kind(ranks, kind)
    with shared_folder(ranks) as folder:
        expected = train(ranks, kind, folder / "whole", drop=0.3)
        for batch in (3, 2, 4):
            with pytest.raises(Crash):
                train(ranks, kind, folder / "run", crash_at(batch), drop=0.3)
            ranks.barrier()
        equal(train(ranks, kind, folder / "run", drop=0.3), expected)
        logs = [(folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "run")]
        assert logs[0] == logs[1]


def one_signal_stops_all(kind: str, ranks: Ranks) -> None:
    """A signal that only the last rank hears stops all at one step, which is saved."""
    ranks = as_kind(ranks, kind)

    def at(count: int) -> None:
        if count == 5 and ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with shared_folder(ranks) as folder:
        expected = train(ranks, kind, folder / "whole", drop=0.3)
        with pytest.raises(Interrupted) as stopped:
            train(ranks, kind, folder / "run", at, drop=0.3, checkpoint_every=None)
        assert stopped.value.exit_code == 128 + signal.SIGTERM
        ranks.barrier()
        assert (folder / "run/checkpoints/stage/step-000000002").is_dir()
        equal(train(ranks, kind, folder / "run", drop=0.3), expected)


def divergence(kind: str, ranks: Ranks) -> None:
    """All ranks stop before the weights change, and the student is whole."""
    ranks = as_kind(ranks, kind)
    student, source = net(1, 5), data()[0]
    source._inputs[50] = float("nan")  # a row that one rank alone reads
    with pytest.raises(DivergedError) as found:
        fit(student, None, source, TASK, label_weight=1.0, parallel=kind, batch_size=BATCH)
    named = ranks.everyone("'labels' is not finite (batch of rows" in str(found.value))
    assert sum(named) == 1
    assert all(type(p) is nn.Parameter and bool(p.isfinite().all()) for p in student.parameters())
    assert [p.shape for p in student.parameters()] == [p.shape for p in net(1, 5).parameters()]


def every_example_once(ranks: Ranks) -> None:
    """Evaluation gives each rank the rows that one process gets, whatever the batches."""
    source, model = data()[0], net(3, 7)
    expected = collect(model, source, TASK)
    for size in (1, 7, BATCH, ROWS, 256):
        found = collect(model, source, TASK, batch_size=size, ranks=ranks)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
_watched: list[tuple[str, list[str]]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, seen = _watched[-1]
    path = str(arguments[0]) if arguments else ""
    if path.startswith(folder) and (
        event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        or (event == "open" and arguments[2] is not None and arguments[2] & WRITING)
    ):
        seen.append(f"{event} {path}")


def one_writer(ranks: Ranks) -> None:
    """Rank 0 alone writes into the run folder."""
    sys.addaudithook(_hear)
    with shared_folder(ranks) as folder:
        _watched.append((str(folder), []))
        train(as_kind(ranks, "ddp"), "ddp", folder / "run")
        _, seen = _watched.pop()
        assert bool(seen) == ranks.main, seen[:3]


def door(ranks: Ranks) -> None:
    """The verbs themselves."""
    with shared_folder(ranks) as folder, tempfile.TemporaryDirectory() as own:
        options = {"epochs": 1, "batch_size": BATCH}
        student = attar.models.mlp((6,), 3, widths=(5,))
        torch.manual_seed(0)
        attar.train(student, data()[0], TASK, run=folder / "run", **options)
        assert (folder / "run/model/model.safetensors").is_file()
        with pytest.raises(attar.runtime.RunExistsError, match="already holds a run"):
            attar.train(student, data()[0], TASK, run=folder / "run", **options)
        with alone(), Run(Path(own) / "run") as run:
            assert not run.silent


def cache(ranks: Ranks) -> None:
    """Each rank asks about its share; together they have each row once, and a stage learns of it.

    Then a stage fills one itself, each rank with what it meets.
    """
    train, _ = data()
    train = attar.data.TensorSource(
        train.rows(torch.arange(ROWS))["inputs"], train.labels, classes=3
    )
    teacher = attar.Teacher(net(7, 12), TASK.fitted(train))
    options: dict[str, Any] = {"epochs": 2, "batch_size": BATCH}
    with shared_folder(ranks) as folder:
        made = attar.cache(
            teacher, train, TASK, into=folder / "c", views=2, augment=[attar.data.mixup]
        )
        with made.store as store:
            assert store.filled == 2 * ROWS
            assert sum(shard["rows"] for shard in store.shards()) == 2 * ROWS
            assert len({shard["file"] for shard in store.shards()}) == ranks.world
        found = {}
        for name, told in {
            "live": teacher,
            "filling": attar.teachers.Filling(
                teacher,
                train,
                root=folder,
                views=2,
                augment=[attar.data.mixup],
                writer=f"rank{ranks.rank}",
            ),
            "cached": attar.Cached(folder / "c"),
        }.items():
            student = net(3, 8)
            attar.distill(
                student,
                told,
                train,
                TASK,
                TERMS[:1],
                views=2,
                augment=[attar.data.mixup],
                **options,
            )
            found[name] = torch.cat([p.detach().flatten() for p in student.parameters()])
            ranks.barrier()
        for name in ("filling", "cached"):
            torch.testing.assert_close(found[name], found["live"], rtol=1e-4, atol=1e-5)


def make() -> dict[str, Callable[[Ranks], None]]:
    both = {
        "training": training,
        "tuned": tuned,
        "world-changes": world_changes,
        "exact-resume": exact_resume,
        "signal": one_signal_stops_all,
        "divergence": divergence,
    }
    cases = {f"{n}-{k}": partial(case, k) for n, case in both.items() for k in ("ddp", "fsdp")}
    return {
        **cases,
        "once": every_example_once,
        "one-writer": one_writer,
        "door": door,
        "cache": cache,
    }
