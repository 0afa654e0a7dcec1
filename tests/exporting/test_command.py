"""`attar export`: a model saved earlier, and errors as one sentence."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

import attar

cli = importlib.import_module("attar.cli.main")


@pytest.fixture
def saved(tmp_path: Path, digits: attar.data.Splits) -> Path:
    task = attar.tasks.ImageClassification().fitted(digits.train)
    student = attar.models.build("mlp", data=digits.train, widths=[8])
    attar.models.save(student, tmp_path / "model", extra={"task": task.describe()})
    return tmp_path / "model"


def called(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["attar", *map(str, words)])
    return cli._guarded(cli._command)


def test_a_saved_model_is_exported_with_its_licences(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    into = tmp_path / "out"
    words = ["--formats", "safetensors, torch_export", "--into", into, "--data-licence", "CC0"]
    assert called("export", saved, "--data", "digits", *words, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "model.safetensors" in said
    assert "on 256 test examples" in said
    assert sorted(os.listdir(into)) == [
        "README.md", "model.json", "model.pt2", "model.safetensors"
    ]  # fmt: skip
    card = (into / "README.md").read_text()
    assert card.startswith("# model\n")
    assert "\n- licence of the data: CC0\n" in card
    assert "\n- task: ImageClassification\n" in card


def test_json_is_one_document(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("export", saved, "--data", "digits", "--into", tmp_path / "out", "--json")
    assert called(*words, monkeypatch=monkeypatch) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert (made["format"], made["path"], made["examples"]) == (
        "safetensors", "model.safetensors", 256
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"--formats": "safetensors,onxx"}, 64, "there is no format 'onxx'; did you mean 'onnx'?"),
        ({"--data": "digts"}, 64, "did you mean 'digits'"),
        ({"model": "nowhere"}, 65, "there is no such folder"),
        ({"--into": "full"}, 64, "holds 'thesis.tex', which no export wrote"),
    ],
)
def test_an_error_is_one_sentence_and_nothing_is_written(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    code: int,
    says: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    monkeypatch.chdir(tmp_path)
    given = {"model": str(saved), "--data": "digits", "--into": "out"} | changes
    model = given.pop("model")
    words = [word for pair in given.items() for word in pair]
    assert called("export", model, *words, monkeypatch=monkeypatch) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attar: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(os.listdir(tmp_path)) == ["full", "model"]
