"""A recipe's run goes on where it was stopped, through teacher, seeds, arms and stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attar
from attar.recipes import load_recipe, run
from attar.runtime import PreflightError, RunExistsError

TWO_STAGES = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [32]}
  train: {epochs: 2, batch_size: 128, checkpoint_every: 3}
student: {name: mlp, widths: [8]}
stages:
  - do: train
    epochs: 1
    batch_size: 128
    checkpoint_every: 3
  - do: distill
    epochs: 1
    batch_size: 128
    average: 0.9
    checkpoint_every: 3
    terms:
      - {loss: {name: kl_divergence, temperature: 4.0}, weight: 0.9}
      - {loss: mse, student: "feature:blocks.0", projector: linear, weight: 0.1}
    label_weight: 0.1
seeds: 2
"""
STEPS = 16 + 2 * 2 * 2 * 8  # the teacher's, then seeds x arms x stages


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))]


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Path:
    return write(text=TWO_STAGES)


def test_a_run_killed_again_and_again_is_the_run_that_was_not(
    recipe: Path, tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    whole = run(recipe, folder=tmp_path / "whole")
    crashes = 0
    for lasts in (0, 5, 14, 9, 20, 3, 11):
        with dies_after(lasts):
            run(recipe, folder=tmp_path / "run", resume=True)
        crashes += 1
    resumed = run(recipe, folder=tmp_path / "run", resume=True)
    assert crashes == 7
    assert {n: m.scores for n, m in resumed.models.items()} == {
        n: m.scores for n, m in whole.models.items()
    }
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "whole")]
    assert logs[0] == logs[1]


def test_a_finished_run_takes_no_step_when_it_is_resumed(
    recipe: Path, tmp_path: Path, no_more_steps: Callable[[], None]
) -> None:
    whole = run(recipe, folder=tmp_path / "run")
    no_more_steps()
    again = run(recipe, folder=tmp_path / "run", resume=True)
    assert again.headline == whole.headline


def test_a_finished_run_takes_more_epochs_and_more_seeds(recipe: Path, tmp_path: Path) -> None:
    run(recipe, folder=tmp_path / "run")
    more = ["stages.1.epochs=2", "seeds=3"]
    verdict = run(recipe, folder=tmp_path / "run", resume=True, overrides=more)
    assert verdict.seeds == 3
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    epochs = [
        (r["arm"], r["seed"], r["stage"], r["epoch"])
        for r in lines
        if r["split"] == "validation" and r["arm"] != "teacher"
    ]
    wanted = [
        (arm, seed, stage, epoch)
        for seed in range(3)
        for arm in ("baseline", "distilled")
        for stage, epoch in ((0, 0), (1, 0), (1, 1))
    ]
    assert sorted(epochs) == sorted(wanted)


def test_another_recipe_is_refused_by_the_path_of_the_difference(
    recipe: Path, tmp_path: Path
) -> None:
    run(recipe, folder=tmp_path / "run")
    other = ["student.widths=[9]"]
    with pytest.raises(
        PreflightError, match=r"student.widths.0 was 8 in .* is 9 now; .*--allow-drift student"
    ):
        run(recipe, folder=tmp_path / "run", resume=True, overrides=other)
    weight = ["stages.1.terms.0.weight=0.5"]
    with pytest.raises(PreflightError, match=r"stages.1.terms.0.weight was 0.9 .* is 0.5 now"):
        run(recipe, folder=tmp_path / "run", resume=True, overrides=weight)
    told: list[str] = []
    allow = ("stages.1.terms.0.weight", "terms")
    run(
        recipe,
        folder=tmp_path / "run",
        resume=True,
        overrides=[*weight, "stages.1.epochs=2"],
        allow=allow,
        say=told.append,
    )
    assert any("terms was" in line and line.endswith("allowed") for line in told)


def test_a_plugin_that_changed_is_seen(write: Callable[..., Path], tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    code = "import attar\n__all__ = ['soft']\ndef soft(student, teacher):\n    return {}\n"
    half = "attar.losses.kl_divergence(student, teacher) / 2"
    plugin.write_text(code.format(half))
    recipe = write("{name: kl_divergence, temperature: 4.0}", "soft")
    run(recipe, folder=tmp_path / "run", plugins=[str(plugin)])
    plugin.write_text(code.format(half.replace("2", "3")))
    with pytest.raises(PreflightError, match=r"plugin.mine.py was"):
        run(recipe, folder=tmp_path / "run", plugins=[str(plugin)], resume=True)


def test_resume_starts_a_run_where_there_is_none_and_refuses_other_folders(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    run(write(), folder=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "verdict.json").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match="holds no run to resume"):
        run(write(), folder=tmp_path / "other", resume=True)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    recipe: Path, tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    whole = run(recipe, folder=tmp_path / "whole")
    with dies_after(13):
        run(recipe, folder=tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "teacher-0" / "step-000000012"
    file = folder / "objective.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    told: list[str] = []
    resumed = run(recipe, folder=tmp_path / "run", resume=True, say=told.append)
    assert any("objective.safetensors" in line and str(folder) in line for line in told)
    assert resumed.models["distilled"].scores == whole.models["distilled"].scores


def test_two_processes_do_not_write_one_run(recipe: Path, tmp_path: Path) -> None:
    with attar.runtime.Run(tmp_path / "run") as held:
        held.write("recipe.json", load_recipe(recipe).full)
        with pytest.raises(RunExistsError, match="is at work in this folder"):
            run(recipe, folder=tmp_path / "run", resume=True)
