"""What a recipe can say of its teachers: several, one that follows, one after another."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import attar
from attar.cli.tables import print_plan
from attar.recipes import check, load_recipe, run
from attar.recipes.job import prepare
from attar.runtime import DataError, PreflightError

TEACHER = """\
teacher:
  model: {name: mlp, widths: [64]}
  train: {epochs: 4, batch_size: 32}
"""
MEMBER = "{model: {name: mlp, widths: [32]}, train: {epochs: 2, batch_size: 128}}"
TWO = f"""\
teacher:
  ensemble:
    - {MEMBER}
    - {MEMBER}
  temperature: 4.0
"""


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def environment(folder: Path) -> dict[str, str]:
    return json.loads((folder / "verdict.json").read_text())["environment"]


# ---------------------------------------------------------------- several teachers


def test_every_member_has_its_own_seed_and_folder_and_the_verdict_judges_the_whole(
    write: Callable[..., Path], tmp_path: Path, digits: attar.data.Splits
) -> None:
    verdict = run(write(TEACHER, TWO), folder=tmp_path / "run")
    saved = weights(tmp_path / "run")
    assert saved.keys() == {"teacher-0", "teacher-1", "baseline", "student"}
    assert saved["teacher-0"] != saved["teacher-1"]
    task = attar.tasks.ImageClassification().fitted(digits.train)
    members = [attar.models.load(tmp_path / "run" / f"teacher-{k}") for k in (0, 1)]
    whole = attar.Ensemble(members, task, temperature=4.0).model
    found = attar.evaluate(whole, digits.test, task)["accuracy"]
    assert verdict.models["teacher"].scores["accuracy"] == found
    assert verdict.models["teacher"].seconds is not None
    seeds = {r["seed"] for r in records(tmp_path / "run") if r["arm"] == "teacher"}
    assert seeds == {0, 1}


def test_a_stage_asks_the_combination_and_each_member_by_its_number(
    write: Callable[..., Path],
) -> None:
    term = "      - {loss: mse, student: output:logits, teacher: output:1, weight: 0.1}\n"
    path = write(TEACHER, TWO, "    label_weight", f"{term}    label_weight")
    terms = check(path)["stages"][0]["terms"]
    assert [each["teacher"] for each in terms] == ["output:logits", "output:1"]


def test_check_shows_the_members_and_their_sum(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = check(write(TEACHER, TWO))
    members = plan["teacher"]["members"]
    assert [each["model"] for each in members] == ["mlp", "mlp"]
    for key in ("parameters", "macs"):
        assert plan["teacher"][key] == sum(each[key] for each in members)
    print_plan(plan)
    told = capsys.readouterr().out
    assert "teacher     ensemble of 2: " in told
    assert "member 1  mlp: " in told


def test_learned_weights_are_found_on_validation_after_the_training(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(TEACHER, TWO + "  weighting: learned\n")
    said: list[str] = []
    verdict = run(path, folder=tmp_path / "run", say=said.append)
    job = prepare(load_recipe(path).recipe)
    members = [attar.models.load(tmp_path / "run" / f"teacher-{k}") for k in (0, 1)]
    expected = attar.teachers.learned_weights(members, job.validation, job.task)
    told = environment(tmp_path / "run")["teachers' weights"].split(", ")
    assert [float(text) for text in told] == pytest.approx(expected, abs=1e-6)
    assert any(line.startswith("weights ") for line in said)
    assert max(expected) != pytest.approx(0.5, abs=1e-3)
    whole = attar.Ensemble(members, job.task, weighting=expected, temperature=4.0).model
    found = attar.evaluate(whole, job.test, job.task)["cross_entropy"]
    assert verdict.models["teacher"].scores["cross_entropy"] == pytest.approx(found, rel=1e-6)


def test_a_killed_run_with_an_ensemble_is_the_run_that_was_not(
    write: Callable[..., Path], tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    text = TWO.replace("batch_size: 128", "batch_size: 128, checkpoint_every: 3")
    path = write(TEACHER, text + "  weighting: learned\n")
    run(path, folder=tmp_path / "whole")
    for lasts in (5, 14, 20):
        with dies_after(lasts):
            run(path, folder=tmp_path / "run", resume=True)
    run(path, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_member_may_be_loaded_of_other_inputs_and_of_some_classes(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    few = attar.models.build("mlp", shape=(1, 16, 16), outputs=2, widths=[8])
    attar.models.save(few, tmp_path / "few")
    loaded = f"{{load: {tmp_path / 'few'}, classes: ['9', null], size: 16}}"
    with pytest.raises(PreflightError, match=r"teacher.ensemble.1: classes: .*at least two"):
        check(write(TEACHER, TWO.replace(f"    - {MEMBER}\n", f"    - {loaded}\n").replace(
            loaded, MEMBER, 1)))  # fmt: skip
    loaded = loaded.replace("null", "4")
    text = TWO.replace(f"    - {MEMBER}\n", f"    - {loaded}\n").replace(loaded, MEMBER, 1)
    plan = check(write(TEACHER, text))
    assert [each["model"] for each in plan["teacher"]["members"]] == ["mlp", "mlp"]
    job = prepare(load_recipe(write(TEACHER, text)).recipe)
    known = job.members[1].model.known
    assert isinstance(known, torch.Tensor)
    assert known.nonzero().flatten().tolist() == [4, 9]
    assert job.members[1].model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_a_teacher_is_built_and_then_filled_from_a_file(
    write: Callable[..., Path], tmp_path: Path, digits: attar.data.Splits
) -> None:
    made = attar.models.build("mlp", data=digits.train, outputs=10, widths=[12])
    safetensors.torch.save_file(made.state_dict(), tmp_path / "made.safetensors")
    text = (
        f"teacher: {{model: {{name: mlp, widths: [12]}}, load: {tmp_path / 'made.safetensors'}}}\n"
    )
    job = prepare(load_recipe(write(TEACHER, text)).recipe)
    assert same(list(job.members[0].model.parameters()), list(made.parameters()))


def test_a_loaded_teacher_reads_images_of_the_size_that_is_said(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    made = attar.models.build("resnet", shape=(1, 8, 8), outputs=10, width=4)
    attar.models.save(made, tmp_path / "small")
    path = write(TEACHER, f"teacher: {{load: {tmp_path / 'small'}, size: 16}}\n")
    teacher = prepare(load_recipe(path).recipe).members[0].model
    with attar.Tap(teacher, ["input:model.stem"]) as tap:
        seen = tap(teacher, torch.rand(2, 1, 8, 8))[1]["input:model.stem"]
    assert seen.shape == (2, 1, 16, 16)


def test_to_build_the_teachers_leaves_torchs_random_numbers_as_they_are(
    write: Callable[..., Path],
) -> None:
    recipe = load_recipe(write(TEACHER, TWO)).recipe
    before = torch.get_rng_state()
    prepare(recipe)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_teachers_training_says_itself_goes_before_what_holds_for_all(
    clouds: attar.data.Splits,
) -> None:
    own = partial(attar.train, precision="bf16", seed=7)
    recipe = attar.recipes.Recipe(
        task=attar.tasks.Regression,
        data=clouds,
        teacher=attar.recipes.TeacherPlan(model=attar.models.mlp, train=own),
        student=attar.models.mlp,
        stages=[attar.train],
        precision="fp32",
    )
    job = prepare(recipe)
    training = job.members[0].training
    assert training is not None
    assert (job.common["precision"], training["precision"], training["seed"]) == ("fp32", "bf16", 7)


def test_numbers_in_other_units_are_not_averaged(clouds: attar.data.Splits, tmp_path: Path) -> None:
    task = attar.tasks.Regression().fitted(clouds.train)
    for name, std in (("a", task.std), ("b", (9.0,))):
        own = attar.tasks.Regression(task.targets, task.mean, std)
        made = attar.models.build("mlp", data=clouds.train, outputs=1)
        attar.models.save(made, tmp_path / name, extra={"task": own.describe()})
    members = [attar.recipes.TeacherPlan(load=str(tmp_path / name)) for name in "ab"]
    recipe = attar.recipes.Recipe(
        task=attar.tasks.Regression,
        data=clouds,
        teacher=attar.recipes.TeacherPlan(ensemble=members),
        student=attar.models.mlp,
        stages=[attar.train],
    )
    with pytest.raises(PreflightError, match=r"teacher.ensemble.1: .*b: gives numbers in other"):
        check(recipe)


@pytest.fixture
def clouds() -> attar.data.Splits:
    inputs = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    made = [attar.data.TensorSource(part, part[:, :1] * 2) for part in inputs.split(40)]
    return attar.data.Splits(*made)


WRONG = [
    (TWO.replace("    - " + MEMBER + "\n", "", 1), "needs at least two members, not 1"),
    (TWO + "  load: x\n", "beside ensemble stand weighting and temperature alone"),
    (TWO + "  weighting: [1.0]\n", "there are 1 weights for 2 members"),
    (TWO + "  weighting: means\n", "weighting is 'means': it must be 'mean', 'entropy'"),
    (TWO.replace("4.0", "0.0"), "temperature is 0.0: it must be greater than 0"),
    (TEACHER + "  weighting: entropy\n", "are of several teachers: add ensemble"),
    (TEACHER + "  size: 16\n", "only a teacher of load alone reads images of another size"),
    ("teacher: {load: x, size: 8, project: true}\n", "size stands with a list of classes or alone"),
    (f"teacher: {{ensemble: [{{ensemble: [{MEMBER}, {MEMBER}]}}, {MEMBER}]}}\n",
     "a member of an ensemble is a model that is loaded or trained"),
    (f"teacher: {{ensemble: [{MEMBER}, {{modle: mlp}}]}}\n", "did you mean 'model'?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_what_is_wrong_with_several_teachers_is_said_with_its_place(
    write: Callable[..., Path], text: str, says: str
) -> None:
    path = write(TEACHER, text)
    with pytest.raises(PreflightError) as told:
        load_recipe(path)
    message = str(told.value)
    assert says in message
    assert message.startswith(f"{path}:")
    assert "\n" not in message


def test_labels_are_needed_where_teachers_are_weighed_by_them(write: Callable[..., Path]) -> None:
    path = write(
        TEACHER, f"labels: 300\n{TWO}  weighting: confidence\n", "label_weight: 0.1",
        "label_weight: 0",
    )  # fmt: skip
    with pytest.raises(PreflightError, match="weighting: confidence weighs teachers by them"):
        check(path)


def test_weights_are_not_learned_of_what_has_no_probabilities(clouds: attar.data.Splits) -> None:
    plan = attar.recipes.TeacherPlan(model=attar.models.mlp, train=attar.train)
    stage = partial(attar.distill, terms=[attar.Term(attar.losses.mse)])
    recipe = attar.recipes.Recipe(
        task=attar.tasks.Regression,
        data=clouds,
        teacher=attar.recipes.TeacherPlan(ensemble=[plan, plan], weighting="learned"),
        student=attar.models.mlp,
        stages=[stage],
    )
    with pytest.raises(PreflightError, match=r"teacher.weighting is learned, from the prob"):
        check(recipe)


def test_a_folder_of_other_classes_is_refused_with_the_number_of_the_member(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    other = attar.tasks.ImageClassification(classes=("cat", "dog"))
    made = attar.models.build("mlp", shape=(1, 8, 8), outputs=2)
    attar.models.save(made, tmp_path / "pets", extra={"task": other.describe()})
    text = TWO.replace(MEMBER, f"{{load: {tmp_path / 'pets'}}}", 1)
    with pytest.raises(DataError, match=r"^teacher.ensemble.0: the teacher cannot teach"):
        check(write(TEACHER, text))


# ---------------------------------------------------------------- generations and assistants


STAGE = """\
  - do: distill
    epochs: 1
    batch_size: 128
    checkpoint_every: 3
    terms: [{loss: kl_divergence, weight: 0.9}]
"""
STAGES = "stages:\n"
BORN_AGAIN = STAGES + STAGE + 2 * (STAGE + "    teacher: previous\n")
ASSISTED = STAGES + STAGE + "    student: {name: mlp, widths: [24]}\n" + STAGE
ASSISTED += "    teacher: previous\n"


def staged(write: Callable[..., Path], stages: str, teacher: str = TEACHER) -> Path:
    head = (
        "task: image-classification\ndata: digits\n"
        + teacher.replace("epochs: 4, batch_size: 32", "epochs: 2, batch_size: 128")
        + "student: {name: mlp, widths: [8]}\n"
    )
    return write(text=head + stages)


def told_of_stages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each training was called with: its name, the learner, the teacher, their weights."""
    running = importlib.import_module("attar.recipes.arms")  # the name is the function's

    calls: list[dict[str, Any]] = []

    def spied(student: Any, teacher: Any, data: Any, *rest: Any, **told: Any) -> Any:
        model = getattr(teacher, "model", None)
        call = {
            "arm": told["home"].mark["arm"],
            "learner": student,
            "before": [p.detach().clone() for p in student.parameters()],
            "teacher": None if model is None else [p.detach().clone() for p in model.parameters()],
        }
        calls.append(call)
        done = fit(student, teacher, data, *rest, **told)
        call["steps"] = done.plan.steps
        call["after"] = [p.detach().clone() for p in student.parameters()]
        return done

    fit = running.fit
    monkeypatch.setattr(running, "fit", spied)
    return calls


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def test_generations_start_anew_and_learn_from_the_one_before(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_of_stages(monkeypatch)
    run(staged(write, BORN_AGAIN), folder=tmp_path / "run")
    teacher, *rest = calls
    alone, taught = rest[:3], rest[3:]
    assert [call["arm"] for call in rest] == ["baseline"] * 3 + ["distilled"] * 3
    assert same(taught[0]["teacher"], teacher["after"])
    assert same(taught[1]["teacher"], taught[0]["after"])
    assert same(taught[2]["teacher"], taught[1]["after"])
    assert same(taught[2]["before"], alone[0]["before"])  # the judged one starts as the baseline
    assert not same(taught[0]["before"], taught[1]["before"])
    assert not same(taught[1]["before"], taught[2]["before"])
    assert same(alone[1]["before"], alone[0]["after"])  # the baseline goes on: as many steps
    assert sum(call["steps"] for call in alone) == sum(call["steps"] for call in taught)
    saved = attar.models.load(tmp_path / "run" / "student")
    assert same([p.detach() for p in saved.parameters()], taught[2]["after"])


def test_an_assistant_learns_from_the_teacher_and_teaches_the_student(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_of_stages(monkeypatch)
    said: list[str] = []
    run(staged(write, ASSISTED), folder=tmp_path / "run", say=said.append)
    teacher, alone, _, assistant, student = calls
    assert len(assistant["before"][0]) == 24
    assert same(assistant["teacher"], teacher["after"])
    assert same(student["teacher"], assistant["after"])
    assert same(student["before"], alone["before"])
    assert any(line.startswith("assistant ") for line in said)


def test_stages_without_a_word_on_it_go_on_with_the_one_student(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = told_of_stages(monkeypatch)
    run(staged(write, ASSISTED + STAGE), folder=tmp_path / "run")
    *_, student, again = calls
    assert again["learner"] is student["learner"]
    assert same(again["before"], student["after"])
    assert same(again["teacher"], calls[0]["after"])  # the recipe's


def test_check_shows_the_assistant(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = check(staged(write, ASSISTED))
    assert plan["stages"][0]["assistant"]["parameters"] == 64 * 24 + 24 + 24 * 10 + 10
    assert plan["stages"][1]["teacher_parameters"] == plan["stages"][0]["assistant"]["parameters"]
    print_plan(plan)
    assert "assistant mlp: 1,810 parameters" in capsys.readouterr().out


def test_a_killed_run_of_generations_is_the_run_that_was_not(
    write: Callable[..., Path], tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    path = staged(write, ASSISTED + STAGE + "    teacher: previous\n")
    run(path, folder=tmp_path / "whole")
    for lasts in (44, 5, 11):
        with dies_after(lasts):
            run(path, folder=tmp_path / "run", resume=True)
    run(path, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


DISORDER = [
    (STAGE + "    teacher: previous\n", "stage 0 has teacher: previous, and no stage is before"),
    (STAGE + "    student: mlp\n" + STAGE, "learn from it; add it to stage 1"),
    (STAGE + "    student: mlp\n", "learn from it; add such a stage"),
    (
        STAGE + "    student: mlp\n" + STAGE + STAGE + "    teacher: previous\n",
        "stage 0 trains another student, and no stage with teacher: previous comes next",
    ),
    (STAGE + STAGE + "    teacher: before\n", "teacher is 'before': it must be 'previous'"),
    (STAGE + "    student: mpl\n", "did you mean 'mlp'?"),
    ("  - {do: train, student: mlp}\n" + STAGE, "'student' is supplied and cannot be written"),
]


@pytest.mark.parametrize(("stages", "says"), DISORDER, ids=[says[-30:] for _, says in DISORDER])
def test_an_order_of_stages_without_sense_is_refused(
    write: Callable[..., Path], stages: str, says: str
) -> None:
    path = staged(write, STAGES + stages)
    with pytest.raises(PreflightError) as told:
        load_recipe(path)
    assert says in str(told.value)
    assert str(told.value).startswith(f"{path}:")


# ---------------------------------------------------------------- a teacher that follows


FOLLOWS = "teacher: {ema: 0.9}\n"


def test_a_teacher_that_follows_is_each_students_own_and_is_not_compared_with(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, Any]] = []
    follow = attar.EMA.follow

    def spied(self: attar.EMA, student: Any) -> None:
        made.append((self, student))
        follow(self, student)

    monkeypatch.setattr(attar.EMA, "follow", spied)
    said: list[str] = []
    path = staged(write, STAGES + STAGE + "    label_weight: 1.0\nseeds: 2\n", FOLLOWS)
    verdict = run(path, folder=tmp_path / "run", say=said.append)
    assert set(verdict.models) == {"baseline", "distilled"}
    assert verdict.against == "baseline"
    assert len(made) == 2 * 8
    assert len({id(average) for average, _ in made}) == 2
    assert all(average.momentum == 0.9 for average, _ in made)
    assert "the student's own moving average, momentum 0.9" in said[1]
    assert (tmp_path / "run" / "report.html").is_file()
    assert not (tmp_path / "run" / "teacher").exists()


def test_check_shows_a_teacher_that_follows(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(check(staged(write, STAGES + STAGE, FOLLOWS)))
    told = capsys.readouterr().out
    assert "teacher     the student's own moving average, momentum 0.9" in told
    assert "ratio" not in told


def test_a_killed_run_with_a_teacher_that_follows_is_the_run_that_was_not(
    write: Callable[..., Path], tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    path = staged(write, STAGES + STAGE.replace("epochs: 1", "epochs: 2"), FOLLOWS)
    run(path, folder=tmp_path / "whole")
    with dies_after(26):
        run(path, folder=tmp_path / "run", resume=True)
    run(path, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("teacher: {ema: 1.0}\n", "ema is 1.0: it must be less than 1"),
        ("teacher: {ema: 0.9, load: x}\n", "beside ema stands nothing"),
        (FOLLOWS + "goal: {retain: 0.9}\n", "moves with the student has none of its own"),
        (FOLLOWS + "labels: 300\n", "begin with a stage do: train"),
    ],
)
def test_what_makes_no_sense_with_a_teacher_that_follows_is_refused(
    write: Callable[..., Path], teacher: str, says: str
) -> None:
    with pytest.raises(PreflightError, match=says):
        check(staged(write, STAGES + STAGE, teacher))
