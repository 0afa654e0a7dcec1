"""The export stage: files of the chosen student, known to work before training, made once more."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.cli.write import Choices, export_model
from attar.recipes import Recipe, TeacherPlan, check, load_recipe, run
from attar.runtime import DataError, PreflightError
from attar.training.loop import Loop

Write = Callable[..., Path]

LAST = "    label_weight: 0.1\n"
STAGE = "  - {do: export, formats: [safetensors, torch_export], licence: MIT}\n"
verb = importlib.import_module("attar.exporting.export")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("attar.evaluation.cost"), "FILL_SECONDS", 0.0)


@pytest.fixture
def recipe(write: Write) -> Path:
    return write(LAST, LAST + STAGE)


@pytest.fixture
def untaught(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of training may be taken."""

    def step(self: Loop, window: Any) -> float:
        raise AssertionError("something was trained")

    monkeypatch.setattr(Loop, "step", step)


def verdict_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verdict.json").read_text())


# ---------------------------------------------------------------- what is written


def test_the_saved_student_is_exported_and_told_everywhere(recipe: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    verdict = run(recipe, folder=folder, overrides=["seeds=2"], say=said.append)
    assert sorted(os.listdir(folder / "export")) == [
        "README.md", "model.json", "model.pt2", "model.safetensors"
    ]  # fmt: skip
    names = ("model.safetensors", "model.pt2")
    told = verdict_of(folder)["exports"]
    assert [each["path"] for each in told] == list(names)
    for each in told:
        data = (folder / "export" / each["path"]).read_bytes()
        assert each["bytes"] == len(data)
        assert each["difference"] < 1e-5
        assert (each["examples"], each["threads"]) == (256, torch.get_num_threads())
        assert set(each["latency"]) == {"1", "64"}
    student = attar.models.load(folder / "student")
    assert same_weights(student, attar.models.load(folder / "export"))
    card = (folder / "export" / "README.md").read_text()
    seed = attar.models.read_extra(folder / "student")["seed"]
    for line in (
        rf"# recipe student \(seed {seed}\)",
        r"- teacher: mlp, widths \\\[64\\\], 4,810 parameters",
        r"- data: digits\\: 970 train, 108 validation, 719 test",
        r"- licence: MIT",
        r"- licence of the data: not stated",
    ):
        assert re.search(rf"^{line}$", card, re.MULTILINE), line
    assert verdict.headline.split(":")[0] in card
    assert any(line.startswith("export     safetensors, torch_export: within ") for line in said)
    page = (folder / "report.html").read_text()
    assert "The exported files" in page
    assert all(name in page for name in names)


def test_the_student_of_a_run_is_exported_later_with_the_same_card(
    recipe: Path, tmp_path: Path
) -> None:
    """Name, teacher, data and verdict lie in the run folder."""
    folder = tmp_path / "run"
    run(recipe, folder=folder, overrides=["seeds=2", "goal={retain: 0.5}"])
    formats = ["safetensors", "torch_export"]
    export_model(
        folder / "student", "digits", Choices(), tmp_path / "later", formats, licence="MIT"
    )
    cards = [(at / "README.md").read_text() for at in (folder / "export", tmp_path / "later")]
    parts = [re.split(r"^## Files$", card, flags=re.MULTILINE)[0] for card in cards]
    assert parts[0] == parts[1]
    assert "retention" in parts[1]
    (folder / "verdict.json").write_text(json.dumps({"format": "attar-verdict/1", "table": {}}))
    with pytest.raises(DataError, match=r"verdict\.json: has no 'goal_line'"):
        export_model(folder / "student", "digits", Choices(), tmp_path / "no", ["safetensors"])
    (folder / "verdict.json").unlink()
    export_model(folder / "student", "digits", Choices(), tmp_path / "bare", ["safetensors"])
    assert "no verdict was given" in (tmp_path / "bare/README.md").read_text()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_recipe_without_the_stage_exports_nothing(write: Write, tmp_path: Path) -> None:
    run(write(), folder=tmp_path / "run")
    assert verdict_of(tmp_path / "run")["exports"] == []
    assert not (tmp_path / "run" / "export").exists()
    assert "The exported files" not in (tmp_path / "run" / "report.html").read_text()


def test_the_stage_in_python_is_the_verb_itself(digits: attar.data.Splits, tmp_path: Path) -> None:
    recipe = Recipe(
        task=attar.tasks.ImageClassification(),
        data=digits,
        teacher=TeacherPlan(
            model=partial(attar.models.mlp, widths=(32,)), train=partial(attar.train, epochs=4)
        ),
        student=partial(attar.models.mlp, widths=(4,)),
        stages=[
            partial(attar.distill, terms=[attar.Term(attar.losses.kl_divergence)], epochs=1),
            attar.export,
        ],
    )
    assert check(recipe)["export"]["formats"] == ["safetensors"]
    run(recipe, folder=tmp_path / "run")
    assert [each["format"] for each in verdict_of(tmp_path / "run")["exports"]] == ["safetensors"]


# ---------------------------------------------------------------- what is refused, and when


@pytest.mark.usefixtures("untaught")
@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("{do: export, formats: [onxx]}", r":14:27: formats is \['onxx'\]: .*'onnx'"),
        ("{do: export, formats: onnx}", r":14:27: formats is 'onnx': it must be a list: \[onnx\]"),
        ("{do: export, formats: []}", "give a list, each format once"),
        ("{do: export, folder: there}", "'folder' is supplied and cannot be written here"),
        ("{do: export, licens: MIT}", "there is no 'licens' here; did you mean 'licence'"),
        ("{do: exprt}", "there is no 'exprt' in stages; did you mean 'export'"),
        ("{do: export}\n  - {do: train}", "stage 1 exports, and other stages follow"),
        ("{do: export}\n  - {do: export}", "stage 1 exports, and other stages follow"),
    ],
)
def test_a_wrong_stage_is_refused_before_any_training(
    write: Write, tmp_path: Path, stage: str, says: str
) -> None:
    path = write(LAST, f"{LAST}  - {stage}\n")
    with pytest.raises(PreflightError, match=says):
        run(path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_only_exports_is_refused(write: Write) -> None:
    text = "task: image-classification\ndata: digits\nteacher: {load: x}\nstudent: mlp\nstages:\n"
    with pytest.raises(PreflightError, match="no stage trains; put one before"):
        load_recipe(write(text=text + STAGE))


@pytest.mark.usefixtures("untaught")
def test_a_missing_library_is_known_before_any_training(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = write(LAST, LAST + STAGE.replace("torch_export", "onnx"))
    with pytest.raises(PreflightError, match=r'pip install "attar\[onnx\]"$'):
        run(path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Branching(nn.Module):
    """Goes one way or the other by what it reads, which no graph can say."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.head(inputs.flatten(1))
        return out if out.sum() > 0 else -out


@pytest.mark.usefixtures("untaught")
def test_a_student_that_cannot_be_traced_is_known_before_any_training(
    digits: attar.data.Splits, tmp_path: Path
) -> None:
    recipe = Recipe(
        task=attar.tasks.ImageClassification(),
        data=digits,
        teacher=TeacherPlan(model=attar.models.mlp, train=attar.train),
        student=Branching,
        stages=[
            partial(attar.distill, terms=[attar.Term(attar.losses.kl_divergence)]),
            partial(attar.export, formats=["torch_export"]),
        ],
    )
    for job in (check, partial(run, folder=tmp_path / "run")):
        with pytest.raises(PreflightError, match="torch cannot trace the Branching"):
            job(recipe)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- stopped on the way


class Crash(Exception):
    """A process that dies."""


@pytest.mark.parametrize("place", ["_artefact", "card_text", "sync_folder"])
def test_an_export_that_was_stopped_is_made_again_without_training(
    place: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_more_steps: Callable[[], None],
) -> None:
    folder = tmp_path / "run"

    def dies(*args: Any) -> Any:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(verb, place, dies)
        with pytest.raises(Crash):
            run(recipe, folder=folder)
    assert not (folder / "verdict.json").exists()
    left = [name for name in os.listdir(folder) if "export" in name]
    assert left == []

    no_more_steps()
    run(recipe, folder=folder, resume=True)
    assert [each["format"] for each in verdict_of(folder)["exports"]] == [
        "safetensors", "torch_export"
    ]  # fmt: skip
    assert sorted(os.listdir(folder / "export"))[-1] == "model.safetensors"


def test_a_run_with_more_epochs_exports_the_new_student(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(recipe, folder=folder)
    before = verdict_of(folder)["exports"][0]["sha256"]
    run(recipe, folder=folder, resume=True, overrides=["stages.0.epochs=4"])
    assert verdict_of(folder)["exports"][0]["sha256"] != before
    student = attar.models.load(folder / "student")
    assert same_weights(student, attar.models.load(folder / "export"))


def test_a_signal_during_the_export_leaves_a_run_to_go_on_with(
    recipe: Path, tmp_path: Path
) -> None:
    """The command gets SIGTERM while a file is made; the same command with --resume ends it."""
    folder, flag = tmp_path / "run", tmp_path / "exporting"
    code = (
        "import importlib, pathlib, sys, time\n"
        "room = importlib.import_module('attar.exporting.export')\n"
        "def slow(*args):\n"
        f"    pathlib.Path({str(flag)!r}).touch()\n"
        "    time.sleep(60)\n"
        "room.card_text = slow\n"
        f"sys.argv = ['attar', 'run', {str(recipe)!r}, '--run', {str(folder)!r}, '-q']\n"
        "from attar.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143, said
    assert "go on with the same command and --resume" in said
    assert [name for name in os.listdir(folder) if "export" in name] == []
    run(recipe, folder=folder, resume=True)
    assert len(verdict_of(folder)["exports"]) == 2
