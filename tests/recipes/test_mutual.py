"""Students that teach each other in a recipe: who learns from whom, what is judged and saved."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.cli.tables import print_plan, print_verdict
from attar.losses import cross_entropy, kl_divergence, mse
from attar.recipes import Recipe, TeacherPlan, check, load_recipe, run
from attar.recipes.job import prepare, stage_of
from attar.runtime import PreflightError
from attar.training.peers import between, labels_of

RECIPE = """\
task: image-classification
data: digits
teacher: {mutual: 2}
student: {name: mlp, widths: [8]}
stages:
  - do: distill
    epochs: 2
    batch_size: 128
    checkpoint_every: 3
    label_weight: 1.0
    terms: [{loss: {name: kl_divergence, temperature: 1.0}}]
"""


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


def groups(monkeypatch: pytest.MonkeyPatch) -> list[attar.Group]:
    """The groups that are trained, as they go into training."""
    running = importlib.import_module("attar.recipes.arms")
    fit, found = running.fit, []

    def spied(student: Any, *rest: Any, **told: Any) -> Any:
        if isinstance(student, attar.Group):
            found.append([[p.detach().clone() for p in each.parameters()] for each in student])
        return fit(student, *rest, **told)

    monkeypatch.setattr(running, "fit", spied)
    return found


def same(one: Any, two: Any) -> bool:
    return all(map(torch.equal, one, two))


def first_stage(path: Path, number: int = 0) -> tuple[Any, Any, dict[str, Any]]:
    """The job, the group and the options of the first stage, taught."""
    job = prepare(load_recipe(path).recipe)
    turn, group, _ = next(job.learners(number, job.student(number), with_teacher=True))
    teacher, options = stage_of(job, turn, group, None, with_teacher=True)
    assert teacher is None
    return job, group, options


# ---------------------------------------------------------------- what they learn


@pytest.mark.parametrize("count", [2, 3])
def test_a_recipe_gives_each_student_the_gradient_of_the_paper(
    write: Callable[..., Path], count: int
) -> None:
    path = write("mutual: 2", f"mutual: {count}", text=RECIPE)
    job, group, options = first_stage(path)
    rows = job.train.rows(torch.arange(16))
    other = attar.Group(list(group), job.task)
    gradients = []
    for terms, weight in (
        (options["terms"], options["label_weight"]),
        (attar.mutual(other), 0),
    ):
        group.zero_grad()
        with attar.Objective(group, job.task, terms, label_weight=weight) as objective:
            objective(rows).loss.backward()
        gradients.append([p.grad.clone() for p in group.parameters()])
    assert len(group) == count
    for mine, papers in zip(*gradients, strict=True):
        assert float(mine.abs().sum()) > 0
        torch.testing.assert_close(mine, papers)


def test_the_first_starts_as_the_baseline_and_no_two_start_alike(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = groups(monkeypatch)
    path = write("mutual: 2", "mutual: 3", text=RECIPE + "seeds: 2\n")
    run(path, folder=tmp_path / "run")
    job = prepare(load_recipe(path).recipe)
    assert [len(group) for group in starts] == [3, 3]
    for number, group in enumerate(starts):
        assert same(group[0], job.student(number).parameters())
    every = [member for group in starts for member in group]
    assert not any(same(a, b) for i, a in enumerate(every) for b in every[:i])


def test_without_the_terms_the_first_would_come_out_as_another(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """They teach each other: with a weight of 0 the student is the baseline, else it is not."""
    run(write(text=RECIPE), folder=tmp_path / "taught")
    run(write("1.0}}", "1.0}, weight: 0.0}", text=RECIPE), folder=tmp_path / "alone")
    taught, alone = weights(tmp_path / "taught"), weights(tmp_path / "alone")
    assert alone["student"] == alone["baseline"] == taught["baseline"]
    assert taught["student"] != taught["baseline"]
    assert taught["peer-1"] != alone["peer-1"]


def test_a_train_stage_teaches_every_student_by_the_labels(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = groups(monkeypatch)
    text = RECIPE.replace("stages:\n", "stages:\n  - {do: train, epochs: 2}\n")
    run(write(text=text), folder=tmp_path / "run")
    before, after = starts
    assert not any(same(a, b) for a, b in zip(before, after, strict=True))


def test_terms_go_between_members_and_what_is_a_members_own_stays() -> None:
    terms = [
        attar.Term(kl_divergence, weight=0.6),
        attar.Term(mse, "feature:body.0@1", "input:head[0]"),
        attar.Term(mse, "feature:exit", "self:output:logits", weight=0.1),
        attar.Term(cross_entropy, "feature:exit", weight=0.5),
        attar.Term(mse, "param:body.*"),
        attar.Term(mse, ["feature:a", "feature:b"]),
    ]
    found = between(terms, 3, "logits")
    firsts = [(t.student, t.teacher, t.weight) for t in found if "0" in str(t.student)]
    assert ("output:0", "self:output:2", 0.3) in firsts
    assert ("feature:0.body.0@1", "self:input:1.head[0]", 0.5) in firsts
    assert ("feature:0.exit", "self:output:0", 0.1) in firsts
    assert ("feature:0.exit", None, 0.5) in firsts
    assert ("param:0.body.*", "self:param:2.body.*", 0.5) in firsts
    pairs = ("feature:0.a", "feature:0.b"), ("self:feature:1.a", "self:feature:1.b"), 0.5
    assert pairs in firsts
    assert len(found) == 6 + 6 + 3 + 3 + 6 + 6


def test_a_scheduled_weight_is_shared_too() -> None:
    (term, *_) = between([attar.Term(mse, weight=lambda progress: 4 * progress)], 5, "logits")
    assert callable(term.weight)
    assert term.weight(0.5) == 0.5


def test_every_students_loss_on_labels_is_the_tasks(write: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    outputs, numbers = torch.randn(6, 2), torch.rand(6, 2) * 9 + 30
    task = attar.tasks.Regression(2, (33.0, 34.0), (2.0, 3.0))
    (term,) = labels_of(task, 2, 0.7)
    expected = task.loss(outputs, {"labels": numbers})
    found = term.loss(outputs, labels=task.labels({"labels": numbers}))
    assert torch.equal(found, expected)
    assert (term.student, term.weight) == ("output:1", 0.7)
    smooth = attar.tasks.ImageClassification(classes=2, label_smoothing=0.1)
    classes = torch.arange(6) % 2
    (term,) = labels_of(smooth, 2, 1.0)
    assert torch.equal(
        term.loss(outputs, labels=classes), smooth.loss(outputs, {"labels": classes})
    )


# ---------------------------------------------------------------- what comes of it


def test_the_first_is_judged_and_all_are_saved_of_the_seed_that_is(
    write: Callable[..., Path], tmp_path: Path, digits: attar.data.Splits
) -> None:
    said: list[str] = []
    verdict = run(write(text=RECIPE), folder=tmp_path / "run", say=said.append)
    assert weights(tmp_path / "run").keys() == {"baseline", "student", "peer-1"}
    task = attar.tasks.ImageClassification().fitted(digits.train)
    student, peer = (attar.models.load(tmp_path / "run" / n) for n in ("student", "peer-1"))
    assert not same(student.parameters(), peer.parameters())
    found = attar.evaluate(student, digits.test, task)["accuracy"]
    assert verdict.models["distilled"].scores["accuracy"] == found
    assert attar.evaluate(peer, digits.test, task)["accuracy"] > 0.2
    assert set(verdict.models) == {"baseline", "distilled"}
    sizes = [verdict.models[name].cost for name in ("baseline", "distilled")]
    assert all(size is not None and size.parameters == 610 for size in sizes)
    assert attar.models.read_extra(tmp_path / "run" / "peer-1")["seed"] == 0
    assert any("another student like it" in line for line in said)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("mutual: 2", "Taught by another student like it, which learns beside it"),
        ("mutual: 3", "Taught by 2 other students like it, which learn beside it"),
        ("ema: 0.9", "Taught by the student's own moving average, momentum 0.9"),
    ],
)
def test_page_and_terminal_say_that_the_teacher_moved(
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    teacher: str,
    says: str,
) -> None:
    verdict = run(write("mutual: 2", teacher, text=RECIPE), folder=tmp_path / "run")
    print_verdict(verdict, whole=True)
    note = f"{says}{'' if 'ema' in teacher else ' from '}"
    assert note in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "run" / "report.html").read_text().replace("&#39;", "'")
    assert "no fixed model, so the student is compared with the baseline alone" in page
    assert page.count(says) >= 2
    assert "% in teacher" not in page or "ema" in teacher
    assert json.loads((tmp_path / "run" / "verdict.json").read_text())["taught_by"] in page


def test_check_says_what_teaches_and_lists_every_members_terms(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = check(write(text=RECIPE))
    assert [(t["student"], t["teacher"]) for t in plan["stages"][0]["terms"]] == [
        ("output:0", "self:output:1"),
        ("output:1", "self:output:0"),
        ("output:1", None),
    ]
    assert plan["student"]["parameters"] == 610
    assert plan["stages"][0]["trained_parameters"] == 2 * 610
    print_plan(plan)
    assert "teacher     another student like it" in capsys.readouterr().out


def test_a_killed_run_of_students_that_teach_each_other_is_the_run_that_was_not(
    write: Callable[..., Path], tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    path = write(text=RECIPE + "seeds: 2\n")
    run(path, folder=tmp_path / "whole")
    for lasts in (20, 6, 23):
        with dies_after(lasts):
            run(path, folder=tmp_path / "run", resume=True)
    run(path, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert "peer-1" in weights(tmp_path / "run")


# ---------------------------------------------------------------- what is refused


PREVIOUS = "  - {do: distill, teacher: previous, terms: [{loss: mse}]}\n"
WRONG = [
    ("mutual: 2", "mutual: 1", "mutual is 1: it must be greater than or equal to 2"),
    ("mutual: 2", "mutual: 2, load: x", "beside mutual stands nothing"),
    ("mutual: 2", "mutual: 2, ema: 0.9", "beside ema stands nothing"),
    ("stages:", "goal: {retain: 0.9}\nstages:", "moves with the student has none of its own"),
    ("stages:", "labels: 300\nstages:", "without any can agree on anything"),
    ("    label_weight", "    reuse_head: true\n    label_weight", "reuse_head takes over"),
    ("    label_weight", "    freeze: [blocks]\n    label_weight", "'freeze' is of one student"),
    ("1.0}}]", "1.0}, student: 'grad:top/inputs'}]", "'grad:top/inputs': students that teach"),
    ("1.0}}]", "1.0}, student: 'output:hidden'}]", "'output:hidden': students that teach"),
    ("1.0}}]", "1.0}, pairing: auto}]", "pairing: auto is for a student and a teacher of other"),
    ("1.0}}]\n", "1.0}}]\n" + PREVIOUS, "have no generations and no assistants"),
]


@pytest.mark.parametrize(("old", "new", "says"), WRONG, ids=[says[:28] for *_, says in WRONG])
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    write: Callable[..., Path], tmp_path: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(PreflightError) as told:
        run(write(old, new, text=RECIPE), folder=tmp_path / "run")
    assert says in str(told.value)
    assert not (tmp_path / "run").exists()


def test_copies_of_one_module_do_not_teach_each_other(digits: attar.data.Splits) -> None:
    """They would start alike, and stay so."""
    options: dict[str, Any] = {
        "task": attar.tasks.ImageClassification,
        "data": digits,
        "teacher": TeacherPlan(mutual=2),
        "stages": [partial(attar.distill, terms=[attar.Term(kl_divergence)], label_weight=1.0)],
    }
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(PreflightError, match="give a function that makes it"):
        check(Recipe(student=net, **options))
    made = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # noqa: E731
    assert check(Recipe(student=made, **options))["student"]["parameters"] == 650
