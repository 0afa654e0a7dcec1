"""Files are whole or absent, devices and errors are explained, modes come back."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from attar import runtime
from attar.runtime import (
    Bar,
    DataError,
    Run,
    RunExistsError,
    UsageError,
    eval_mode,
    read_json,
    resolve_device,
    resolve_precision,
    suggest,
    write_atomic,
    write_json,
)


@pytest.mark.parametrize("failing", ["fsync", "replace", "write"])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, broken)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_users_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_has_no_word_that_json_has_not(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), (1.5,)], 3: None})
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [None, [1.5]], "3": None}


@pytest.mark.parametrize(
    ("data", "says"), [(None, "no such file"), (b"{", "not a JSON"), (b"\xff", "not a JSON"),
                       (b"[" * 100_000, "not a JSON")]
)  # fmt: skip
def test_a_file_that_is_no_json_is_named(tmp_path: Path, data: bytes | None, says: str) -> None:
    if data is not None:
        (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.json.*{says}"):
        read_json(tmp_path / "x.json")


def test_a_log_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        for step in range(3):
            run.log({"step": step, "loss": float("nan")})
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
            assert json.loads(lines[-1])["loss"] is None


def test_a_run_folder_is_taken_only_when_it_is_empty(tmp_path: Path) -> None:
    Run(tmp_path)
    (tmp_path / "x").write_text("")
    with pytest.raises(RunExistsError, match="already holds"):
        Run(tmp_path)
    with pytest.raises(RunExistsError, match="is a file"):
        Run(tmp_path / "x")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="did you mean 'cuda'"):
        resolve_device("cudaa")
    with pytest.raises(UsageError, match="not on this machine"):
        resolve_device("cuda:99")


def test_precisions() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) is None
    assert resolve_precision("bf16", cpu) is torch.bfloat16
    with pytest.raises(UsageError, match="did you mean 'float32'"):
        resolve_precision("float", cpu)


def test_suggestions_fold_case_and_dashes() -> None:
    assert suggest("KL-Divergence", ["kl_divergence", "mse"]) == "did you mean 'kl_divergence'?"
    assert suggest("x", []) == "there is nothing to choose from"
    assert suggest("zz", map(str, range(99))).endswith(", ...")


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    with pytest.raises(RuntimeError), eval_mode(model):
        model(torch.ones(2, 5))
    assert seen == [False]
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_a_bar_draws_only_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for show, expected in ((False, False), (True, True)):
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        with Bar("distilled", 10, show=show) as bar:
            bar.note("accuracy", 0.9)
            for done in range(1, 11):
                bar.watch(done, 1 / done)
        assert ("distilled" in stream.getvalue()) is expected
        assert ("accuracy" in stream.getvalue()) is expected


def test_exit_codes_are_stable() -> None:
    codes = {
        name: getattr(runtime, name).exit_code
        for name in runtime.__all__
        if isinstance(getattr(runtime, name), type)
        and issubclass(getattr(runtime, name), ValueError)
    }
    assert codes == {
        "AttarError": 64, "DataError": 65, "DivergedError": 3, "PreflightError": 78,
        "RunExistsError": 73, "UsageError": 64,
    }  # fmt: skip
