"""What a run logs arrives at a tracker once, as the tracker's own reader sees it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attar.integrations import track
from attar.integrations.log import Log
from attar.runtime import DataError, Run, RunExistsError, UsageError
from attar.runtime.lock import Lock

MARK = {"arm": "distilled", "seed": 0}


def _train(step: int, **mark: Any) -> dict[str, Any]:
    terms = {"kl_divergence(output:logits)": 0.5 / step}
    record = {"split": "train", "epoch": step // 10, "step": step, "loss": 1 / step, "terms": terms}
    return {**MARK, **mark, **record}


def _validation(step: int, **mark: Any) -> dict[str, Any]:
    return {**MARK, **mark, "split": "validation", "epoch": 0, "step": step, "accuracy": 0.9}


def _write(folder: Path, *records: dict[str, Any]) -> Path:
    with Run(folder, resume=True) as run:
        for record in records:
            run.log(record)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages; in one a value that was not finite."""
    return _write(
        tmp_path / "shoes",
        _train(5, arm="teacher"),
        _train(5),
        _validation(5),
        {**_train(10), "loss": float("nan")},
        _train(15),
    )


# ---------------------------------------------------------------- the log


def test_a_line_is_read_once_and_only_when_it_is_whole(run: Path) -> None:
    log = Log(run / "metrics.jsonl")
    assert [p.step for p in log.read()] == [5, 5, 5, 10, 15]
    with (run / "metrics.jsonl").open("a") as file:
        line = json.dumps(_train(20))
        file.write(line[:30])
        file.flush()
        assert list(log.read()) == []
        file.write(line[30:] + "\n")
    (point,) = log.read()
    assert (point.stage, point.split, point.step) == ("distilled-0", "train", 20)
    assert point.values["terms/kl_divergence(output:logits)"] == 0.025
    assert "seed" not in point.values


def test_a_log_that_was_rewound_is_read_from_its_beginning(run: Path) -> None:
    log = Log(run / "metrics.jsonl")
    list(log.read())
    with Run(run, resume=True) as again:
        again.rewind(MARK, epoch=1, step=10)
        again.log(_train(12))
    assert [p.step for p in log.read()] == [5, 5, 5, 10, 12]


def test_a_file_that_was_cut_and_grew_again_is_read_from_its_beginning(run: Path) -> None:
    """In place, so that it keeps its number, and to the length that it had."""
    path = run / "metrics.jsonl"
    log, lines = Log(path), path.read_bytes().splitlines(keepends=True)
    list(log.read())
    path.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b"15", b"14")]))
    assert [p.step for p in log.read()] == [5, 5, 5, 10, 14]


def test_a_line_that_is_no_record_is_named(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{]\n")
    with pytest.raises(DataError, match="line 6: is no record"):
        list(Log(run / "metrics.jsonl").read())


# ---------------------------------------------------------------- TensorBoard


def _events(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    if tag not in found.Tags()["scalars"]:
        return []
    return [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]


def test_tensorboard_reads_what_was_logged(run: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    assert track(run, "tensorboard", say=said.append) == 5
    folder = run / "tensorboard"
    assert said == [f"TensorBoard: look with tensorboard --logdir {folder}"]
    train = folder / "distilled-0" / "train"
    assert _events(train, "loss") == [(5, 0.2), (15, 0.0667)]
    assert _events(train, "terms/kl_divergence(output:logits)") == [
        (5, 0.1),
        (10, 0.05),
        (15, 0.0333),
    ]
    assert _events(folder / "distilled-0" / "validation", "accuracy") == [(5, 0.9)]
    assert _events(folder / "teacher-0" / "train", "loss") == [(5, 0.2)]


def test_what_a_resumed_run_writes_again_is_sent_once(run: Path) -> None:
    pytest.importorskip("tensorboard")
    assert track(run, "tensorboard") == 5
    with Run(run, resume=True) as again:
        again.rewind(MARK, epoch=0, step=5)
        for step in (10, 15, 20):
            again.log(_train(step))
        again.log(_validation(5))
    assert track(run, "tensorboard") == 1
    assert track(run, "tensorboard") == 0
    steps = [step for step, _ in _events(run / "tensorboard" / "distilled-0" / "train", "epoch")]
    assert steps == [5, 10, 15, 20]


def test_events_that_a_killed_process_did_not_note_are_not_there_twice(run: Path) -> None:
    pytest.importorskip("tensorboard")
    track(run, "tensorboard")
    (state,) = (run / ".track").glob("*.json")
    noted = json.loads(state.read_text())
    noted["sent"]["distilled-0/train"] = 5
    state.write_text(json.dumps(noted))
    assert track(run, "tensorboard") == 2
    train = run / "tensorboard" / "distilled-0" / "train"
    assert [step for step, _ in _events(train, "epoch")] == [5, 10, 15]


def test_a_folder_that_was_removed_is_filled_again(run: Path) -> None:
    pytest.importorskip("tensorboard")
    import shutil

    track(run, "tensorboard")
    shutil.rmtree(run / "tensorboard")
    assert track(run, "tensorboard") == 5


# ---------------------------------------------------------------- MLflow


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with no message to anyone."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("alembic")
    return pytest.importorskip("mlflow.tracking")


def test_mlflow_reads_what_was_logged_and_each_point_once(
    run: Path, tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"student": {"name": "mlp", "widths": [4, 8]}, "seeds": None}
    (run / "recipe.json").write_text(json.dumps(recipe))
    assert track(run, "mlflow", into="here") == 5
    with Run(run, resume=True) as again:
        again.rewind(MARK, epoch=0, step=5)
        for step in (10, 15, 20):
            again.log(_train(step))
    (state,) = (run / ".track").glob("*.json")
    noted = json.loads(state.read_text())
    state.write_text(json.dumps({**noted, "sent": {}}))  # as if killed before it was written
    (run / "verdict.json").write_text("{}")
    assert track(run, "mlflow", into="here") == 1

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'here' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shoes")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"teacher-0", "distilled-0"}
    one = runs["distilled-0"]
    history = client.get_metric_history(one.info.run_id, "train/loss")
    assert [(m.step, round(m.value, 4)) for m in history] == [(5, 0.2), (15, 0.0667), (20, 0.05)]
    term = client.get_metric_history(one.info.run_id, "train/terms/kl_divergence_output:logits_")
    assert [m.step for m in term] == [5, 10, 15, 20]
    assert one.data.params == {
        "student.name": "mlp",
        "student.widths.0": "4",
        "student.widths.1": "8",
    }
    assert one.info.status == "FINISHED"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "shoes"]


# ---------------------------------------------------------------- Weights & Biases


class _Recorded:
    """One run of the library: what it was made with, and what it was given."""

    def __init__(self, **made: Any) -> None:
        self.made, self.logged, self.axes, self.done = made, [], {}, False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.done = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[_Recorded]:
    """A stand-in of the library that keeps what it is told."""
    runs: list[_Recorded] = []
    fake: Any = ModuleType("wandb")
    fake.init = lambda **made: runs.append(_Recorded(**made)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delitem(sys.modules, "attar.integrations.wandb", raising=False)
    yield runs
    sys.modules.pop("attar.integrations.wandb", None)


def test_wandb_gets_one_run_a_stage_under_the_same_name_again(
    run: Path, recorded: list[_Recorded]
) -> None:
    assert track(run, "wandb", into=run.parent / "w") == 5
    _write(run, _train(20))
    assert track(run, "wandb", into=run.parent / "w") == 1
    teacher, distilled, again = recorded
    assert (teacher.made["name"], distilled.made["name"]) == ("teacher-0", "distilled-0")
    assert distilled.made["group"] == "shoes"
    assert distilled.made["id"] == again.made["id"] != teacher.made["id"]
    assert distilled.axes == {"step": None, "*": "step"}
    assert [v["step"] for v in distilled.logged] == [5, 5, 10, 15]
    assert "train/loss" not in distilled.logged[2]
    assert distilled.logged[1]["validation/accuracy"] == 0.9
    assert [v["step"] for v in again.logged] == [20]
    assert all(one.done for one in recorded)


def test_the_library_itself_takes_it_offline(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("ERROR_REPORTING", "false")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    pytest.importorskip("wandb")
    assert track(run, "wandb", into=tmp_path / "w") == 5
    assert len(list((tmp_path / "w").glob("wandb/offline-run-*/run-*.wandb"))) == 2


# ---------------------------------------------------------------- following, and refusals


def test_following_sends_what_comes_and_ends_with_the_verdict(
    run: Path, recorded: list[_Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["attar.integrations.track"]

    def pause(seconds: float) -> None:
        if len(recorded[1].logged) == 4:
            _write(run, _train(20))
        else:
            (run / "verdict.json").write_text("{}")

    monkeypatch.setattr(module.time, "sleep", pause)
    assert track(run, "wandb", follow=True) == 6
    assert recorded[1].logged[-1]["step"] == 20


def test_a_verdict_older_than_the_log_is_not_the_end(run: Path) -> None:
    module = sys.modules["attar.integrations.track"]
    (run / "verdict.json").write_text("{}")
    assert module._finished(run)
    os.utime(run / "verdict.json", (1, 1))
    assert not module._finished(run)


def test_what_cannot_be_tracked_is_refused_in_a_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="did you mean 'wandb'"):
        track(run, "wadb")
    with pytest.raises(DataError, match="there is no such file; name the folder of a run"):
        track(tmp_path, "tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "attar.integrations.wandb", raising=False)
    with pytest.raises(UsageError, match=r'pip install "attar\[wandb\]"'):
        track(run, "wandb")


def test_two_processes_do_not_send_the_same_run_to_one_place(
    run: Path, recorded: list[_Recorded]
) -> None:
    track(run, "wandb")
    (lock,) = (run / ".track").glob("*.lock")
    with Lock(lock), pytest.raises(RunExistsError, match="another process sends this run to wandb"):
        track(run, "wandb")
    assert track(run, "wandb", into=run.parent / "w") == 5


def test_a_name_in_the_log_leads_to_no_other_folder(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"split": "../../v", "step": 1, "arm": "../../../elsewhere", "loss": 1.0}\n')
    (point,) = Log(path).read()
    assert (point.stage, point.split) == ("_.._.._elsewhere", "_.._v")
