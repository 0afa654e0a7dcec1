"""Several students of one teacher: trained once, asked once, judged as each would be alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import attar
from attar.evaluation import Verdicts
from attar.recipes import Recipe, TeacherPlan, check, run
from attar.reporting import page
from attar.runtime import PreflightError, read_json
from attar.training.loop import Loop

Write = Callable[..., Path]

SINGLE = "student: {name: mlp, widths: [8]}\n"
SEVERAL = """\
student:
  - {name: mlp, widths: [8]}
  - {name: mlp, widths: [16]}
  - {name: resnet, depth: 8, width: 2}
"""
TWO = "student: [{name: mlp, widths: [8]}, {name: mlp, widths: [16]}]\n"
CACHED = "batch_size: 32}\n", "batch_size: 32}\n  cache: true\n"
GOAL = "stages:\n", "goal: {retain: 0.5}\nstages:\n"
ONE = ["stages.0.epochs=1", "teacher.train.epochs=3"]


def several(recipe: Any, folder: Path, **more: Any) -> Verdicts:
    found = run(recipe, folder=folder, **more)
    assert isinstance(found, Verdicts)
    return found


def scores(verdict: Any) -> dict[str, Any]:
    return {name: model.scores for name, model in verdict.models.items()}


def numbers(verdict: Any) -> tuple[Any, ...]:
    """All that a seed determines."""
    return scores(verdict), verdict.difference, verdict.goal, verdict.saw, verdict.floor


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("**/student/model.safetensors"))]


def test_each_student_is_the_one_of_a_run_by_itself(write: Write, tmp_path: Path) -> None:
    overrides = [*ONE, "seeds=2"]
    found = several(write(SINGLE, SEVERAL), tmp_path / "all", overrides=overrides)
    assert found.names == ("mlp widths [8]", "mlp widths [16]", "resnet")
    for index, line in enumerate(SEVERAL.splitlines()[1:]):
        path = write(SINGLE, f"student: {line.removeprefix('  - ')}\n")
        alone = run(path, folder=tmp_path / f"alone-{index}", overrides=overrides)
        assert numbers(alone) == numbers(found[index])
        assert weights(tmp_path / f"alone-{index}") == weights(
            tmp_path / "all" / f"student-{index}"
        )
        recipe = [tmp_path / name / "recipe.json" for name in (f"alone-{index}", "all")]
        recipe[1] = tmp_path / "all" / f"student-{index}" / "recipe.json"
        assert read_json(recipe[0]) == read_json(recipe[1])


def test_the_teacher_is_trained_once_and_asked_once_about_each_row(
    write: Write, tmp_path: Path
) -> None:
    said: list[str] = []
    found = several(
        write(SINGLE, SEVERAL, *CACHED), tmp_path / "runs" / "all", overrides=ONE, say=said.append
    )
    assert sum(line.startswith("teacher ") for line in said) == 1
    rows = found[0].saw["distilled"].rows
    told = [line for line in said if line.startswith("cache ")]
    assert [int(line.split()[-2].replace(",", "")) for line in told] == [rows, 0, 0]
    assert len(list((tmp_path / "runs" / "cache").iterdir())) == 1
    teachers = tmp_path.glob("**/teacher/model.safetensors")
    assert list(teachers) == [tmp_path / "runs" / "all" / "teacher" / "model.safetensors"]
    trained = [
        json.loads(line)
        for log in tmp_path.glob("**/metrics.jsonl")
        for line in log.read_text().splitlines()
    ]
    epochs = [r["epoch"] for r in trained if (r["arm"], r["split"]) == ("teacher", "validation")]
    assert epochs == [0, 1, 2]


def test_a_crash_in_the_second_student_costs_neither_the_teacher_nor_the_first(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: Callable[..., Any]
) -> None:
    path = write(SINGLE, TWO, "    label_weight", "    checkpoint_every: 3\n    label_weight")
    whole = several(path, tmp_path / "whole", overrides=ONE)
    teacher, arm = 3 * 31, 16
    with dies_after(teacher + 3 * arm + 5):
        run(path, folder=tmp_path / "run", overrides=ONE)
    assert (tmp_path / "run" / "student-0" / "verdict.json").is_file()
    assert (tmp_path / "run" / "student-1" / "metrics.jsonl").is_file()
    assert not (tmp_path / "run" / "student-1" / "verdict.json").is_file()
    steps: list[int] = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda self, window: steps.append(1) or step(self, window))
    resumed = several(path, tmp_path / "run", overrides=ONE, resume=True)
    assert len(steps) == arm - 3  # from the last checkpoint of the arm that was cut
    assert [numbers(v) for v in resumed] == [numbers(v) for v in whole]
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_members_of_an_ensemble_teach_all(write: Write, tmp_path: Path) -> None:
    teacher = "  model: {name: mlp, widths: [64]}\n  train: {epochs: 4, batch_size: 32}\n"
    each = "{model: {name: mlp, widths: [32]}, train: {epochs: 3, batch_size: 32}}"
    path = write(SINGLE, TWO, teacher, f"  ensemble: [{each}, {each}]\n  weighting: learned\n")
    found = several(path, tmp_path / "all", overrides=ONE[:1])
    assert len(list(tmp_path.glob("**/teacher-?/model.safetensors"))) == 2
    alone = run(
        path, folder=tmp_path / "one", overrides=[*ONE[:1], "student={name: mlp, widths: [16]}"]
    )
    assert numbers(alone) == numbers(found[1])


@pytest.mark.parametrize("teacher", ["{ema: 0.9}", "{mutual: 2}"])
def test_students_may_each_have_a_teacher_that_moves_with_it(
    write: Write, tmp_path: Path, teacher: str
) -> None:
    old = "teacher:\n  model: {name: mlp, widths: [64]}\n  train: {epochs: 4, batch_size: 32}\n"
    path = write(old, f"teacher: {teacher}\n", SINGLE, TWO)
    found = several(path, tmp_path / "all", overrides=ONE[:1])
    alone = run(
        path, folder=tmp_path / "one", overrides=[*ONE[:1], "student={name: mlp, widths: [16]}"]
    )
    assert numbers(alone) == numbers(found[1])
    assert found.teacher is None
    assert 'class="fill teacher"' not in (tmp_path / "all" / "report.html").read_text()
    with pytest.raises(PreflightError, match="has none of its own; leave goal out"):
        check(write(old, f"teacher: {teacher}\n", SINGLE, TWO, *GOAL))


@pytest.mark.parametrize(
    ("students", "said"),
    [
        ("[]", "student is an empty list; give it one student or more"),
        ("[{name: mlp}, {name: mlp, widths: [32]}]", r"student\.1 is the same as student\.0"),
        ("[mlp, {name: mpl}]", r"recipe.yaml:\d+:\d+: there is no 'mpl' in models"),
        ("[mlp, {name: mlp, width: 3}]", r"there is no 'width' here"),
        ("[mlp, 3]", "expected a name of models"),
    ],
)
def test_a_list_that_says_nothing_is_refused_with_its_place(
    write: Write, students: str, said: str
) -> None:
    with pytest.raises(PreflightError, match=said):
        check(write(SINGLE, f"student: {students}\n"))


def test_all_students_are_tried_before_anything_is_trained(
    write: Write, tmp_path: Path, no_more_steps: Callable[[], None]
) -> None:
    no_more_steps()
    term = '      - {loss: mse, student: "feature:blocks.1", teacher: "output:logits"}\n'
    path = write(SINGLE, "student: [{name: mlp, widths: [8, 10]}, {name: mlp, widths: [8]}]\n")
    path.write_text(path.read_text().replace("    label_weight", term + "    label_weight"))
    with pytest.raises(PreflightError, match=r"^student\.1: .*blocks\.1"):
        run(path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_smallest_is_chosen_by_validation_and_told_by_the_test_split(
    write: Write, tmp_path: Path
) -> None:
    found = several(
        write(SINGLE, SEVERAL, *GOAL), tmp_path / "run", overrides=["stages.0.epochs=4"]
    )
    meeting = [i for i, kept in enumerate(found.kept) if kept is not None and kept >= 0.5]
    assert meeting
    assert found.smallest == min(meeting, key=lambda i: found.costs[i].bytes)
    assert found.met is found[found.smallest].goal.met
    assert found.names[found.smallest] in found.goal_line
    assert str(found[found.smallest].goal_line) in found.goal_line
    told = read_json(tmp_path / "run" / "verdict.json")
    assert told["goal"] == {"retain": 0.5, "smallest": found.smallest, "met": found.met}
    assert [each["name"] for each in told["students"]] == list(found.names)
    hard = several(
        write(SINGLE, SEVERAL, *GOAL),
        tmp_path / "run",
        overrides=["stages.0.epochs=4", "goal.retain=1.0"],
        resume=True,
    )
    assert (hard.smallest, hard.met) == (None, False)
    assert hard.goal_line.startswith("MISSED, no student keeps 100 %")


def test_the_page_and_the_command_show_every_student(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from attar.cli.main import main

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["attar", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    path, folder = str(write(SINGLE, SEVERAL, *GOAL)), tmp_path / "run"
    code, out = command("check", path)
    assert code == 0
    assert [out.count(f"student {i}: ") for i in range(4)] == [1, 1, 1, 0]
    assert out.count("Nothing was trained.") == 1
    code, out = command("run", path, "goal.retain=1.0", "--run", str(folder), "--json", *ONE)
    assert code == 1
    told = json.loads(out)
    assert told["format"] == "attar-verdicts/1"
    code, out = command("run", path, "goal.retain=0.01", "--run", str(folder), "--resume", *ONE)
    assert code == 0
    text = (folder / "report.html").read_text()
    for index, name in enumerate(["mlp widths [8]", "mlp widths [16]", "resnet"]):
        assert f'<a href="student-{index}/report.html">{name}</a>' in text
        assert f"student {index}  {name}" in out
        assert (folder / f"student-{index}" / "report.html").is_file()
    assert text.count('class="dot fill distilled"') == 2 * 3
    assert text.count('class="ring stroke baseline"') == 2 * 3
    assert text.count('class="fill teacher"') == 2
    assert "has chosen on the test split" in " ".join(out.split())
    assert "<script" not in text
    again = page(folder)
    assert again.read_text() == text


def test_python_gives_a_list_of_modules_and_functions(tmp_path: Path) -> None:
    def net(width: int = 6) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    terms = [attar.Term(attar.losses.kl_divergence)]
    given: dict[str, Any] = {
        "task": attar.tasks.ImageClassification(),
        "data": attar.data.digits(),
        "teacher": TeacherPlan(
            model=partial(attar.models.mlp, widths=(64,)),
            train=partial(attar.train, epochs=3, batch_size=32),
        ),
        "stages": [partial(attar.distill, terms=terms, epochs=1, batch_size=64)],
    }
    with pytest.raises(ValueError, match=r"student\.1 is the same as student\.0"):
        Recipe(student=[net, net], **given)
    own = net()
    with pytest.raises(ValueError, match=r"student\.2 is the same as student\.0"):
        Recipe(student=[own, net, own], **given)
    students = [own, lambda: net(), partial(attar.models.mlp, widths=(8,))]
    before = {name: value.clone() for name, value in own.state_dict().items()}
    found = several(Recipe(student=students, **given), tmp_path / "run")
    assert found.names == ("Sequential 0", "Sequential 1", "mlp")
    assert (len(found), list(found), found[-1]) == (3, list(found.verdicts), found.verdicts[2])
    assert (found.smallest, found.met, found.goal_line) == (None, None, None)
    assert all(value.equal(before[name]) for name, value in own.state_dict().items())
    assert several(Recipe(student=[own], **given), tmp_path / "one").names == ("Sequential",)


def test_the_smallest_is_one_that_costs_no_more_than_the_goal_allows(
    write: Write, tmp_path: Path
) -> None:
    goal = "stages:\n", "goal: {retain: 0.01, macs: 600}\nstages:\n"
    found = several(write(SINGLE, TWO, *goal), tmp_path / "some", overrides=ONE)
    assert [cost.macs for cost in found.costs] == [592, 1184]
    assert found.smallest == 0
    assert [verdict.goal is not None and verdict.goal.met for verdict in found] == [True, False]
    none = several(write(SINGLE, TWO, *goal), tmp_path / "none", overrides=[*ONE, "goal.macs=9"])
    assert none.smallest is None
    assert none.goal_line is not None
    assert none.goal_line.startswith(
        "MISSED, no student keeps 1 % on the validation examples at the cost that the goal allows; "
    )
