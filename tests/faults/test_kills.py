"""Whenever a training is killed or told to stop, it goes on to the same bits, and loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attar
from attar.runtime import Interrupted, Run, Snapshots
from attar.training import Home, fit

RECIPE = """\
task: image-classification
data: digits
teacher: {model: {name: mlp, widths: [16]}, train: {epochs: 1}}
student: {name: mlp, widths: [4]}
stages: [{do: distill, epochs: 1, terms: [{loss: kl_divergence}]}]
"""
SCRIPT = Path(__file__).with_name("_killed.py")
DEEP = 10 if os.environ.get("ATTAR_DEEP") else 1
Lives = Callable[..., dict[str, Any]]


@pytest.fixture
def lives(tmp_path: Path) -> Lives:
    """``lives(subject, count)`` ends that many lives; says what was seen, and prints the seed."""

    def ended(subject: str, count: int, fault: str = "") -> dict[str, Any]:
        seed = random.SystemRandom().randrange(2**32)
        words = [sys.executable, str(SCRIPT), subject, str(tmp_path), str(count), str(seed)]
        done = subprocess.run(
            [*words, *([fault] if fault else [])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600 * DEEP,
        )
        print(f"{subject}: seed {seed}\n{done.stdout}\n{done.stderr}")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    return ended


@pytest.mark.parametrize(("subject", "kills"), [("memory", 140 * DEEP), ("workers", 60 * DEEP)])
def test_a_killed_training_ends_with_the_same_bits(lives: Lives, subject: str, kills: int) -> None:
    """No life finds less than was saved, none finds a checkpoint it cannot read."""
    seen = lives(subject, kills)
    assert seen["fault"] is None
    assert seen["differing"] == []
    assert seen["leftovers"] == []
    assert seen["kills"] == kills
    assert seen["runs"] >= 5 * DEEP
    # Kills that all came at one place would show little.
    assert min(seen["phases"].get(phase, 0) for phase in ("start", "step", "save")) >= 3
    assert DEEP == 1 or seen["phases"].keys() >= {"last save", "validation"}


def test_a_killed_recipe_ends_with_the_same_verdict(lives: Lives) -> None:
    """Teacher, baseline, two stages, models, verdict and page; and nothing half-made is left."""
    seen = lives("recipe", 30 * DEEP)
    assert seen["fault"] is None
    assert seen["differing"] == []
    assert seen["leftovers"] == []
    assert seen["kills"] == 30 * DEEP


def test_a_command_told_to_stop_says_so_and_goes_on_to_the_same_verdict(lives: Lives) -> None:
    seen = lives("signals", 50 if DEEP > 1 else 12)
    assert seen["wrong"] == []
    assert seen["differing"] == []
    assert seen["leftovers"] == []
    assert len({where for _, where in seen["sent"]}) >= 3


@pytest.mark.skipif(DEEP == 1, reason="run by make test-deep")
def test_a_save_that_writes_over_the_old_one_would_be_seen(lives: Lives) -> None:
    assert "none of the 1 checkpoints is whole" in lives("memory", 100, "save")["fault"]


@pytest.mark.skipif(DEEP == 1, reason="run by make test-deep")
def test_generators_that_are_left_where_they_stand_would_be_seen(lives: Lives) -> None:
    assert lives("memory", 10, "generators")["differing"] != []


def test_a_run_killed_before_its_recipe_was_written_is_begun_by_resume(tmp_path: Path) -> None:
    """All that it left are the lock and a half-written file."""
    home = tmp_path / "run"
    home.mkdir()
    (home / ".lock").write_text("1\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    attar.recipes.run(recipe, folder=home, resume=True, progress=False)
    assert (home / "verdict.json").is_file()


def test_a_signal_in_the_last_save_of_a_stage_is_not_lost(
    blobs: Any, net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a command that was told to stop would go on with the next stage."""
    save = Snapshots.save

    def saving(self: Snapshots, step: int, parts: Any, facts: Any) -> Path:
        if facts["state"]["place"]["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, step, parts, facts)

    monkeypatch.setattr(Snapshots, "save", saving)
    task = attar.tasks.TabularClassification()
    with Run(tmp_path / "run") as run, pytest.raises(Interrupted) as stopped:
        fit(net(), None, blobs.train, task, label_weight=1.0, epochs=2, home=Home(run))
    assert stopped.value.exit_code == 143
