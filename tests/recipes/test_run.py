"""From a recipe to a verdict: fair arms, an honest judge, and what is left in the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.recipes import Goal, Recipe, TeacherPlan, check, load_recipe, run
from attar.runtime import AttarError, DataError, PreflightError, RunExistsError

SOFT = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0), weight=0.9)
TEACHES = partial(attar.distill, terms=[SOFT], epochs=1)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def small(splits: attar.data.Splits, **changes: Any) -> Recipe:
    """A Python recipe on the three clouds."""
    known: dict[str, Any] = {
        "task": attar.tasks.TabularClassification,
        "data": splits,
        "teacher": TeacherPlan(
            model=partial(attar.models.mlp, widths=(16,)),
            train=partial(attar.train, epochs=4, batch_size=16),
        ),
        "student": partial(attar.models.mlp, widths=(4,)),
        "stages": [partial(attar.distill, terms=[SOFT], epochs=2, batch_size=16)],
    }
    return Recipe(**known | changes)


def test_a_run_from_yaml_leaves_a_whole_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    said: list[str] = []
    verdict = run(write(), folder=tmp_path / "run", say=said.append)
    assert {p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"} == {
        "baseline", "checkpoints", "figures.json", "metrics.jsonl", "plan.json", "recipe.json",
        "report.html", "student", "teacher", "verdict.json",
    }  # fmt: skip
    written = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert written["headline"] == verdict.headline
    assert set(verdict.models) == {"teacher", "baseline", "distilled"}
    assert [line.split()[0] for line in said] == ["data", "teacher", "baseline", "distilled"]
    arms = {(r["arm"], r["split"]) for r in lines(tmp_path / "run")}
    assert arms == {(a, s) for a in ("teacher", "baseline", "distilled")
                    for s in ("train", "validation")}  # fmt: skip


def test_the_saved_student_is_the_one_that_was_judged(
    write: Callable[..., Path], tmp_path: Path, digits: attar.data.Splits
) -> None:
    verdict = run(write(), folder=tmp_path / "run")
    student = attar.models.load(tmp_path / "run" / "student")
    task = attar.tasks.ImageClassification().fitted(digits.train)
    found = attar.evaluate(student, digits.test, task)
    assert found["accuracy"] == verdict.models["distilled"].scores["accuracy"]


def test_what_a_run_resolved_is_a_recipe_that_gives_the_same_run(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    first = run(write(), folder=tmp_path / "a", overrides=["seed=3"])
    again = run(tmp_path / "a" / "recipe.json", folder=tmp_path / "b")
    assert again.models["distilled"].scores == first.models["distilled"].scores
    assert json.loads((tmp_path / "a" / "recipe.json").read_text()) == json.loads(
        (tmp_path / "b" / "recipe.json").read_text()
    )


def test_the_arms_differ_in_the_teacher_alone(blobs: attar.data.Splits, tmp_path: Path) -> None:
    """With a weight of 0 on the teacher and 1 on the labels, distilled is the baseline."""
    stage = partial(
        attar.distill,
        terms=[attar.Term(attar.losses.kl_divergence, weight=0.0)],
        label_weight=1.0,
        epochs=2,
        batch_size=16,
    )
    verdict = run(small(blobs, stages=[stage], seeds=2), folder=tmp_path / "run")
    assert verdict.models["baseline"].seeds == verdict.models["distilled"].seeds
    assert verdict.outcome == "no difference"
    losses = {
        arm: [r["loss"] for r in lines(tmp_path / "run") if r["arm"] == arm and "loss" in r]
        for arm in ("baseline", "distilled")
    }
    assert losses["baseline"] == pytest.approx(losses["distilled"], rel=1e-5)


def test_seeds_start_from_different_weights(blobs: attar.data.Splits, tmp_path: Path) -> None:
    verdict = run(small(blobs, seeds=3), folder=tmp_path / "run")
    assert verdict.seeds == 3
    first = {r["seed"]: r["loss"] for r in lines(tmp_path / "run")
             if r["arm"] == "baseline" and r["split"] == "train" and r["epoch"] == 0}  # fmt: skip
    assert len(set(first.values())) == 3


def test_the_test_split_chooses_nothing(blobs: attar.data.Splits, tmp_path: Path) -> None:
    """Other test labels change the verdict and not a bit of the student."""
    rows = blobs.test.rows(torch.arange(len(blobs.test)))
    shuffled = attar.data.TensorSource(
        rows["inputs"], rows["labels"].roll(1), classes=blobs.test.classes
    )
    run(small(blobs), folder=tmp_path / "a")
    run(small(attar.data.Splits(blobs.train, shuffled)), folder=tmp_path / "b")
    one, two = (attar.models.load(tmp_path / name / "student") for name in "ab")
    for mine, expected in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(mine, expected)


def test_unlabelled_training_data_have_no_baseline(
    blobs: attar.data.Splits, tmp_path: Path
) -> None:
    teacher = attar.train(
        attar.models.build("mlp", data=blobs.train),
        blobs.train,
        attar.tasks.TabularClassification().fitted(blobs.train),
        epochs=4,
        batch_size=16,
    )
    train = attar.data.TensorSource(
        blobs.train.rows(torch.arange(160))["inputs"], classes=blobs.train.classes
    )
    stage = partial(attar.distill, terms=[SOFT], label_weight=0.0, epochs=3, batch_size=16)
    recipe = small(attar.data.Splits(train, blobs.test), teacher=teacher, stages=[stage])
    verdict = run(recipe, folder=tmp_path / "run")
    assert verdict.against == "start"
    assert "baseline" not in verdict.models
    assert verdict.outcome == "better"


def test_a_regression_runs_to_its_verdict(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 3)
    labels = (100 + 20 * (inputs[:, :1] - inputs[:, 1:2] ** 2)).float()
    splits = attar.data.tensors(inputs[:200], labels[:200], inputs[200:], labels[200:])
    recipe = small(
        splits,
        task=attar.tasks.Regression,
        teacher=TeacherPlan(
            model=partial(attar.models.mlp, widths=(32, 32)),
            train=partial(
                attar.train,
                epochs=20,
                batch_size=16,
                optimizer=partial(attar.training.adamw, lr=0.02),
            ),
        ),
        stages=[partial(attar.distill, terms=[attar.Term(attar.losses.mse)], epochs=3)],
        goal=Goal(retain=0.5),
    )
    verdict = run(recipe, folder=tmp_path / "run")
    assert verdict.metric == "rmse"
    assert verdict.models["teacher"].scores["r2"] > 0.5
    assert verdict.goal is not None


class Uncopyable(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.stream = (n for n in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_student_that_cannot_be_copied_is_refused_with_the_way_out(
    blobs: attar.data.Splits, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=r"cannot be copied.*student=lambda"):
        run(small(blobs, student=Uncopyable()), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    verdict = run(small(blobs, student=lambda: nn.Linear(2, 3)), folder=tmp_path / "run")
    assert verdict.models["distilled"].scores["accuracy"] > 0.5


def test_a_module_as_student_is_not_changed(blobs: attar.data.Splits, tmp_path: Path) -> None:
    student = nn.Linear(2, 3)
    before = student.weight.detach().clone()
    run(small(blobs, student=student), folder=tmp_path / "run")
    assert torch.equal(student.weight, before)


def test_a_teacher_that_knows_nothing_is_refused(blobs: attar.data.Splits, tmp_path: Path) -> None:
    """Loaded: before anything is written. Trained: before any student is."""
    torch.manual_seed(0)
    blind = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    nn.init.zeros_(blind[1].weight)
    with pytest.raises(PreflightError, match="knows too little to teach: its accuracy"):
        run(small(blobs, teacher=blind), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    lazy = TeacherPlan(
        model=attar.models.mlp,
        train=partial(
            attar.train, epochs=1, batch_size=16, optimizer=partial(torch.optim.SGD, lr=1e-9)
        ),
    )
    with pytest.raises(PreflightError, match="knows too little"):
        run(small(blobs, teacher=lazy), folder=tmp_path / "run")
    assert {r["arm"] for r in lines(tmp_path / "run")} == {"teacher"}


def test_a_run_is_never_written_over(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "verdict.json").write_text("mine")
    with pytest.raises(RunExistsError, match="already holds a run"):
        run(write(), folder=tmp_path / "run")
    assert (tmp_path / "run" / "verdict.json").read_text() == "mine"


def test_wrong_data_are_refused_before_training(
    blobs: attar.data.Splits, write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"task has 3 classes but .* has 10"):
        check(write("task: image-classification", "task: {name: image-classification, classes: 3}"))
    with pytest.raises(DataError, match="empty"):
        attar.data.tensors(
            torch.zeros(0, 2), torch.zeros(0).long(), torch.zeros(1, 2), torch.zeros(1).long()
        )
    other = attar.data.TensorSource(torch.zeros(4, 2), torch.zeros(4).long(), classes=("x", "y"))
    with pytest.raises(DataError, match=r"task has 3 classes but .* has 2"):
        run(small(attar.data.Splits(blobs.train, other)), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weight: 0.9}", 'weight: 0.9, student: "feature:heda"}', "did you mean 'head'"),
        ("weight: 0.9}", 'weight: 0.9, teacher: "feature:body"}', "teacher has no module 'body'"),
        ("name: kl_divergence, temperature: 4.0", "name: mse", None),
        ("teacher:\n  model: {name: mlp, widths: [64]}\n  train: {epochs: 4, batch_size: 32}",
         "teacher: {load: absent}", "absent"),
        ("{name: mlp, widths: [8]}", "{name: resnet, depth: 9}", "the nearest is 8"),
        ("epochs: 2", "epochs: 2\n    device: cuda", "'device' is supplied"),
    ],
)  # fmt: skip
def test_what_the_dry_pass_finds(
    write: Callable[..., Path], old: str, new: str, says: str | None
) -> None:
    if says is None:
        assert check(write(old, new))["stages"][0]["terms"][0]["name"] == "mse"
        return
    with pytest.raises(AttarError, match=says):
        check(write(old, new))


def test_check_tells_the_plan_and_trains_nothing(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(
        "weight: 0.9}",
        'weight: 0.9}\n      - {loss: mse, student: "feature:blocks.0", projector: linear}',
    )
    plan = check(path)
    (stage,) = plan["stages"]
    assert plan["teacher"]["parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    assert plan["student"]["macs"] == 64 * 8 + 8 * 10
    assert stage["steps"] == 2 * -(-970 // 64)
    assert stage["projector_parameters"] == 8 * 64 + 64
    assert stage["terms"][1]["student_shape"] == [64, 8]
    assert stage["terms"][1]["teacher_shape"] == [64, 64]
    assert list(tmp_path.iterdir()) == [path]


def test_a_trained_teacher_can_be_loaded_by_another_run(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    run(write(), folder=tmp_path / "first")
    teacher = tmp_path / "first" / "teacher"
    path = write(
        "teacher:\n  model: {name: mlp, widths: [64]}\n  train: {epochs: 4, batch_size: 32}",
        f"teacher: {{load: {teacher}}}",
    )
    verdict = run(path, folder=tmp_path / "second")
    first = json.loads((tmp_path / "first" / "verdict.json").read_text())
    assert verdict.models["teacher"].scores == first["models"]["teacher"]["scores"]


def test_an_override_reaches_into_a_bare_name(write: Callable[..., Path]) -> None:
    loaded = load_recipe(write(), overrides=["task.label_smoothing=0.1", "seeds=4"])
    assert loaded.recipe.task.keywords == {"label_smoothing": 0.1}  # type: ignore[union-attr]
    assert loaded.recipe.seeds == 4


def test_defaults_are_written_out(write: Callable[..., Path]) -> None:
    full = load_recipe(write()).full
    assert full["seeds"] == 1
    assert full["task"] == {
        "name": "image-classification", "classes": None, "label_smoothing": 0.0,
    }  # fmt: skip
    assert full["stages"][0]["schedule"] == {
        "name": "cosine", "warmup": 0.05, "final": 0.0,
    }  # fmt: skip
    assert full["stages"][0]["optimizer"]["momentum"] == 0.9
    assert full["stages"][0]["terms"][0]["projector"] is None


def test_a_teacher_of_other_classes_is_refused(blobs: attar.data.Splits, tmp_path: Path) -> None:
    run(small(blobs), folder=tmp_path / "first")
    rows = blobs.train.rows(torch.arange(160))
    renamed = attar.data.TensorSource(rows["inputs"], rows["labels"], classes=("b", "a", "c"))
    other = small(
        attar.data.Splits(renamed, renamed),
        teacher=TeacherPlan(load=str(tmp_path / "first" / "teacher")),
    )
    with pytest.raises(DataError, match="equal numbers mean different things"):
        run(other, folder=tmp_path / "second")


def test_a_loaded_regression_teacher_keeps_its_units(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 3)
    labels = 100 + 20 * inputs[:, :1]
    splits = attar.data.tensors(inputs[:200], labels[:200], inputs[200:], labels[200:])
    recipe = small(
        splits,
        task=attar.tasks.Regression,
        stages=[partial(attar.distill, terms=[attar.Term(attar.losses.mse)], epochs=1)],
    )
    first = run(recipe, folder=tmp_path / "first")
    again = run(
        Recipe(**{**vars(recipe), "seed": 7, "validation": 0.4,
                  "teacher": TeacherPlan(load=str(tmp_path / "first" / "teacher"))}),
        folder=tmp_path / "second",
    )  # fmt: skip
    rmse = [verdict.models["teacher"].scores["rmse"] for verdict in (first, again)]
    assert rmse[0] == pytest.approx(rmse[1], rel=1e-6)


def test_a_loss_with_weights_starts_anew_in_every_seed(
    blobs: attar.data.Splits, tmp_path: Path
) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return attar.losses.mse(student * self.scale, teacher)

    loss = Scaled()
    stage = partial(attar.distill, terms=[attar.Term(loss)], epochs=1, batch_size=16)
    run(small(blobs, stages=[stage], seeds=2), folder=tmp_path / "run")
    assert torch.equal(loss.scale, torch.ones(3))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": [partial(attar.distill, epochs=1, terms=[])]}, "has no terms"),
        ({"stages": [partial(attar.distill, seed=3, terms=[SOFT])]}, "'seed' is the recipe's own"),
        (
            {"stages": [TEACHES, print]},
            "a stage is distill, train, export or one that changes the student, not print",
        ),
        ({"student": lambda: nn.Linear(9, 3)}, r"cannot read inputs \[2\]"),
        ({"student": lambda: nn.Linear(2, 7)}, "task has 3 classes"),
    ],
)
def test_what_a_python_recipe_gets_wrong_is_said_before_training(
    blobs: attar.data.Splits, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(AttarError, match=says):
        run(small(blobs, **change), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"seeds": 0}, {"seed": -1}, {"validation": 1.0}])
def test_a_python_recipe_has_the_ranges_of_a_file(
    blobs: attar.data.Splits, change: dict[str, Any]
) -> None:
    with pytest.raises(AttarError, match=r"give 1 or more|must be in"):
        small(blobs, **change)
    with pytest.raises(AttarError, match="retain 99"):
        Goal(retain=99)


def test_the_data_are_called_without_the_name_of_a_part(
    blobs: attar.data.Splits, tmp_path: Path
) -> None:
    """A reader calls its parts "photos train" and "photos test"."""

    def called(train: str, test: str) -> str:
        parts = [attar.data.Subset(source, torch.arange(len(source)), name=name)
                 for source, name in zip(blobs, (train, test), strict=True)]  # fmt: skip
        return check(small(attar.data.Splits(*parts)))["data"]["name"]

    assert called("my photos train", "my photos test") == "my photos"
    assert called("digits", "digits") == "digits"
    assert called("a.csv train", "b.csv test") == "a.csv train"


def test_the_last_epoch_is_told_where_validation_chose_another(
    blobs: attar.data.Splits, tmp_path: Path
) -> None:
    assert run(small(blobs), folder=tmp_path / "best").last is not None
    stage = partial(TEACHES, keep="last")
    verdict = run(small(blobs, stages=[stage]), folder=tmp_path / "last")
    assert verdict.last is None
    assert "best epoch" not in (tmp_path / "last" / "report.html").read_text()


def test_unlabelled_splits_that_judge_are_refused(blobs: attar.data.Splits, tmp_path: Path) -> None:
    bare = attar.data.TensorSource(torch.zeros(9, 2), classes=blobs.train.classes)
    with pytest.raises(PreflightError, match="no labels, which a verdict needs"):
        run(small(attar.data.Splits(blobs.train, bare)), folder=tmp_path / "run")
