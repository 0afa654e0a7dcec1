"""`attar search` as a shell sees it: words, streams, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from attar.cli import main

pytest.importorskip("optuna")

RECIPE = """\
task: image-classification
data: digits
teacher: {model: {name: mlp, widths: [32]}, train: {epochs: 3, batch_size: 32}}
student: {name: mlp, widths: [8]}
stages: [{do: distill, epochs: 1, batch_size: 32, terms: [{loss: kl_divergence}]}]
goal: {retain: 0.05}
search: {space: {student.widths: [[4], [16]]}}
"""


class Done(NamedTuple):
    """What a call of the command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def attar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Call the command in a folder of its own that holds recipe.yaml."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def called(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["attar", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return called


def test_a_search_tells_each_trial_in_a_line_and_the_winner_at_the_end(
    attar: Callable[..., Done],
) -> None:
    done = attar("search", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "space      student.widths: 2 students, each is tried once" in lines
    trials = [line for line in lines if line.startswith("trial ")]
    assert len(trials) == 2
    assert all(", meets the goal: widths [" in line for line in trials)
    heads = [line.split()[0] for line in lines if not line.startswith(("trial", "data", "teacher"))]
    assert heads[-5:] == ["search", "goal", "verdict", "winner", "report"]
    assert lines[-1] == "report     runs/recipe-search/report.html"
    assert Path("runs/recipe-search/winner/recipe.yaml").is_file()
    assert done.stderr == ""


def test_json_is_one_document_and_a_missed_goal_is_exit_code_1(
    attar: Callable[..., Done],
) -> None:
    done = attar("search", "recipe.yaml", "goal.macs=1", "--trials", "1", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["goal_line"].startswith("MISSED")
    assert told["met"] is False
    assert len(told["trials"]) == 1


def test_a_search_without_a_space_is_refused_in_a_sentence(attar: Callable[..., Done]) -> None:
    done = attar("search", "recipe.yaml", "search=null", "--run", "there")
    assert done.returncode == 78
    assert done.stderr.startswith("attar: recipe.yaml: says nothing of a search; add search:")
    assert done.stdout == ""
    assert not Path("there").exists()
