"""A student that ends in its teacher's classifier in a recipe, and who else a run saves."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.cli.tables import describe_rooms, print_plan, print_verdict
from attar.cli.write import Choices, evaluate_model, export_model
from attar.recipes import check, load_recipe, run
from attar.recipes.job import prepare
from attar.runtime import PreflightError

RECIPE = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [64]}
  train: {epochs: 2, batch_size: 64}
student: {name: mlp, widths: [8]}
stages:
  - do: distill
    reuse_head: true
    epochs: 2
    batch_size: 128
    checkpoint_every: 3
    label_weight: 0
    terms: [{loss: mse, student: "feature:projector", teacher: "input:head"}]
"""
STAGE = "  - {do: distill, epochs: 1, batch_size: 128, terms: [{loss: kl_divergence}]}\n"
PREVIOUS = STAGE.replace("epochs", "teacher: previous, epochs")
ASSISTANT = STAGE.replace("epochs", "student: {name: mlp, widths: [24]}, epochs")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


def with_stages(write: Callable[..., Path], stages: str) -> Path:
    head = RECIPE.partition("  - do")[0].replace("epochs: 2", "epochs: 1")
    return write(text=head + stages)


def digits_of(folder: Path) -> float:
    return evaluate_model(folder, "digits", Choices(None, (), None, False)).scores["accuracy"]


# ---------------------------------------------------------------- the teacher's classifier


def test_the_student_that_is_judged_saved_and_sized_is_the_whole(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    verdict = run(write(text=RECIPE), folder=tmp_path / "run")
    saved = attar.models.load(tmp_path / "run" / "student")
    teacher = attar.models.load(tmp_path / "run" / "teacher")
    assert [name for name, _ in saved.named_children()] == ["backbone", "projector", "pool", "head"]
    assert torch.equal(saved.head.weight, teacher.head.weight)
    assert torch.equal(saved.head.bias, teacher.head.bias)
    assert verdict.models["distilled"].scores["accuracy"] == digits_of(tmp_path / "run" / "student")
    whole = sum(p.numel() for p in saved.parameters())
    plain = 64 * 8 + 8 + 8 * 10 + 10
    costs = {name: verdict.models[name].cost for name in ("distilled", "baseline")}
    assert {name: cost.parameters for name, cost in costs.items() if cost} == {
        "distilled": whole,
        "baseline": plain,
    }
    assert whole > plain + 64 * 10
    size = (tmp_path / "run" / "student" / "model.safetensors").stat().st_size
    assert costs["distilled"] is not None
    assert costs["distilled"].bytes == size
    kept = attar.models.load(tmp_path / "run" / "baseline")
    assert sum(p.numel() for p in kept.parameters()) == plain


def test_page_terminal_and_plan_say_that_the_sizes_are_of_the_whole(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(text=RECIPE)
    plan = check(path)
    assert plan["student"]["parameters"] > plan["baseline"]["parameters"] == 610
    print_plan(plan)
    said = " ".join(capsys.readouterr().out.split())
    assert "student mlp, a projector and the teacher's classifier: " in said
    assert "baseline mlp: 610 parameters" in said
    verdict = run(path, folder=tmp_path / "run")
    print_verdict(verdict, whole=True)
    note = "its size, its time and its file are those of the whole"
    assert note in " ".join(capsys.readouterr().out.split())
    assert note in (tmp_path / "run" / "report.html").read_text()


def test_it_is_taught_the_feature_and_comes_near_the_teacher(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    faster = "epochs: 15\n    optimizer: {name: adamw, lr: 0.01}\n    b"
    path = write("epochs: 2\n    b", faster, text=RECIPE)
    verdict = run(path, folder=tmp_path / "run")
    agreement = verdict.models["distilled"].agreement
    assert agreement is not None
    assert agreement["agreement"] > 0.75


def test_every_seed_has_a_projector_of_its_own_start(write: Callable[..., Path]) -> None:
    job = prepare(load_recipe(write(text=RECIPE + "seeds: 2\n")).recipe)

    def projector(number: int) -> torch.Tensor:
        learners = job.learners(number, job.student(number), with_teacher=True)
        return next(next(learners)[1].get_submodule("projector").parameters())

    assert torch.equal(projector(0), projector(0))
    assert not torch.equal(projector(0), projector(1))


def test_it_is_evaluated_and_exported_as_any_model(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    run(write(text=RECIPE + "  - do: export\n"), folder=tmp_path / "run")
    assert (tmp_path / "run" / "export" / "README.md").is_file()
    said = Choices(None, (), None, False)
    made = export_model(
        tmp_path / "run" / "student", "digits", said, tmp_path / "e", ["safetensors"]
    )
    assert made[0].difference == 0


def test_a_later_stage_goes_on_with_it(write: Callable[..., Path], tmp_path: Path) -> None:
    run(write(text=RECIPE + STAGE), folder=tmp_path / "run")
    saved = attar.models.load(tmp_path / "run" / "student")
    assert [name for name, _ in saved.named_children()] == ["backbone", "projector", "pool", "head"]
    assert weights(tmp_path / "run").keys() == {"teacher", "baseline", "student"}


def test_a_killed_run_of_a_reused_classifier_is_the_run_that_was_not(
    write: Callable[..., Path], tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    path = write(text=RECIPE)
    run(path, folder=tmp_path / "whole")
    with dies_after(32 + 16 + 10):
        run(path, folder=tmp_path / "run", resume=True)
    run(path, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


MEMBER = "{model: mlp, train: {epochs: 1}}"
WRONG = [
    ("  model: {name: mlp, widths: [64]}\n  train: {epochs: 2, batch_size: 64}\n",
     f"  ensemble: [{MEMBER}, {MEMBER}]\n", "reuse_head takes over the classifier of one model"),
    ("  model: {name: mlp, widths: [64]}\n  train: {epochs: 2, batch_size: 64}\n",
     "  ema: 0.9\n", "reuse_head takes over the classifier of one model"),
    ("reuse_head: true", "reuse_head: yes", "reuse_head is 'yes': it must be a valid boolean"),
    ("input:head", "input:haed", "did you mean 'head'?"),
    ("stages:\n", f"stages:\n{STAGE.replace('epochs', 'reuse_head: true, epochs')}",
     "stage 1 has reuse_head, and the student ends in a teacher's classifier already"),
    ("do: distill\n", "do: train\n", "there is no 'reuse_head' here"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), WRONG, ids=[says[:30] for *_, says in WRONG])
def test_what_has_no_classifier_to_give_is_refused_before_anything_is_written(
    write: Callable[..., Path], tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(PreflightError) as told:
        run(write(old, new, text=RECIPE), folder=tmp_path / "run")
    assert says in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_recipe_as_it_was_run_is_a_recipe(write: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_recipe(write(text=RECIPE))
    again = tmp_path / "again.json"
    again.write_text(json.dumps(loaded.full))
    assert load_recipe(again).full == loaded.full
    assert load_recipe(again).recipe.turns[0].reuse_head


# ---------------------------------------------------------------- who is left behind


def test_assistants_and_generations_are_saved_of_the_seed_whose_student_is(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = importlib.import_module("attar.recipes.run")
    monkeypatch.setattr(running, "best_of", lambda desk, arm: len(arm.finals) - 1)
    stages = ASSISTANT + PREVIOUS + STAGE + PREVIOUS + PREVIOUS
    path = with_stages(write, stages + "seeds: 2\n")
    said: list[str] = []
    run(path, folder=tmp_path / "run", say=said.append)
    kept = {"assistant-0", "generation-0", "generation-1"}
    assert weights(tmp_path / "run").keys() == kept | {"teacher", "baseline", "student"}
    extra = {n: attar.models.read_extra(tmp_path / "run" / n) for n in (*kept, "student")}
    assert {each["seed"] for each in extra.values()} == {1}
    folder = tmp_path / "run"
    assistant = attar.models.load(folder / "assistant-0")
    assert sum(p.numel() for p in assistant.parameters()) == 64 * 24 + 24 + 24 * 10 + 10
    assert len({weights(folder)[name] for name in (*kept, "student")}) == 4
    assert 0 <= digits_of(folder / "generation-1") <= 1
    line = next(text for text in said if text.startswith("assistant 2/2"))
    job = prepare(load_recipe(path).recipe)
    score = attar.evaluate(assistant, job.validation, job.task)["accuracy"]
    assert f"{100 * score:.2f} %" in line


def test_a_stage_lists_the_keys_that_only_a_recipe_has() -> None:
    stages = describe_rooms("stages", ())["stages"]
    own = {"teacher": "null", "student": "null", "reuse_head": "false"}
    assert own.items() <= stages["distill"]["options"].items()
    assert not own.keys() & stages["train"]["options"].keys()
