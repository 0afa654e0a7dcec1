"""Stages that change the student's structure, and those that train between them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.recipes import check, run
from attar.recipes.changes import PLANS
from attar.reporting import page
from attar.runtime import PreflightError, read_json

Write = Callable[..., Path]

DISTILL = """\
  - do: distill
    epochs: 1
    batch_size: 64
    checkpoint_every: 3
    terms: [{loss: {name: kl_divergence, temperature: 4.0}, weight: 0.9}]
"""
HEAD = """\
task: image-classification
data: digits
examples: 300
teacher:
  model: {name: mlp, widths: [32, 32]}
  train: {epochs: 3, batch_size: 32}
student: {name: mlp, widths: [24, 16]}
stages:
"""
PRUNE = "  - {do: prune, ratio: 0.5}\n"
TAUGHT_BY_ITSELF = DISTILL.replace("do: distill", "do: distill\n    teacher: unchanged")
CHAIN = HEAD + DISTILL + PRUNE + TAUGHT_BY_ITSELF + "  - {do: factorize, rank: 0.25}\n"


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "verdict.json")
    return found


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))]


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each training's arm, learner and teacher, as they were when it began."""
    arms = importlib.import_module("attar.recipes.arms")
    calls: list[dict[str, Any]] = []
    fit = arms.fit

    def spied(student: Any, teacher: Any, *rest: Any, **told: Any) -> Any:
        model = getattr(teacher, "model", None)
        state = {} if model is None else model.state_dict()
        before = {name: tensor.clone() for name, tensor in state.items()}
        done = fit(student, teacher, *rest, **told)
        after = {name: tensor.clone() for name, tensor in done.student.state_dict().items()}
        calls.append({"arm": told["home"].mark["arm"], "teacher": before, "after": after})
        return done

    monkeypatch.setattr(arms, "fit", spied)
    return calls


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_each_stage_is_told_with_its_score_and_its_cost(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    verdict = run(write(text=CHAIN), folder=folder)
    chain = kept(folder)["chain"]
    steps = chain["steps"]
    assert [step["do"] for step in steps] == ["distill", "prune", "distill", "factorize"]
    assert [step["cost"]["parameters"] for step in steps] == [2130, 974, 974, 378]
    assert steps[-1]["score"] == verdict.models["distilled"].primary.value
    assert steps[-1]["cost"] == verdict.models["distilled"].cost.to_json()
    assert chain["teacher"]["score"] == verdict.models["teacher"].primary.value
    sizes = [step["cost"]["bytes"] for step in steps]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3]
    assert sizes[3] == (folder / "student" / "model.safetensors").stat().st_size
    assert "told" in steps[1]
    assert steps[1]["plan"]["way"] == "prune"
    assert "told" not in steps[0]
    html = page(folder).read_text()
    assert "Stage by stage" in html
    assert html.count("3 distill") >= 2  # in the figures and in the table


def test_what_is_saved_is_what_the_last_stage_made(write: Write, tmp_path: Path) -> None:
    run(write(text=CHAIN), folder=tmp_path / "run")
    student = attar.models.load(tmp_path / "run" / "student")
    assert sum(p.numel() for p in student.parameters()) == 378
    _, test = attar.data.digits()
    found = attar.evaluate(student, test, attar.tasks.ImageClassification(classes=10))
    told = kept(tmp_path / "run")["models"]["distilled"]["scores"]["accuracy"]
    assert found["accuracy"] == pytest.approx(told, abs=1e-12)


def test_the_baseline_is_changed_by_its_own_weights_and_taught_by_nobody(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch)
    run(write(text=CHAIN), folder=tmp_path / "run")
    alone = [call for call in calls if call["arm"] == "baseline"]
    assert [bool(call["teacher"]) for call in alone] == [False, False]
    costs = {name: model["cost"] for name, model in kept(tmp_path / "run")["models"].items()}
    assert costs["baseline"]["parameters"] == costs["distilled"]["parameters"]


def test_unchanged_is_the_student_as_it_was_before_the_change(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch)
    run(write(text=CHAIN), folder=tmp_path / "run")
    first, second = [call for call in calls if call["arm"] == "distilled"]
    assert same(second["teacher"], first["after"])
    assert not same(first["teacher"], second["teacher"])


def test_without_it_the_recipes_teacher_goes_on(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = calls_of(monkeypatch)
    run(write(text=HEAD + DISTILL + PRUNE + DISTILL), folder=tmp_path / "run")
    first, second = [call for call in calls if call["arm"] == "distilled"]
    assert same(second["teacher"], first["teacher"])


def test_a_chain_killed_again_and_again_is_the_chain_that_was_not(
    write: Write, tmp_path: Path, dies_after: Callable[..., Any]
) -> None:
    recipe = write(text=CHAIN + "seeds: 2\n")
    run(recipe, folder=tmp_path / "whole")
    for lasts in (25, 4, 7, 12, 5):
        with dies_after(lasts):
            run(recipe, folder=tmp_path / "run", resume=True)
    run(recipe, folder=tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    chains = [kept(tmp_path / name)["chain"] for name in ("run", "whole")]
    scores, plans = (
        [[step.get(key) for step in chain["steps"]] for chain in chains]
        for key in ("scores", "plan")
    )
    assert scores[0] == scores[1]
    assert plans[0] == plans[1]
    assert chains[0]["seeds"] == 2
    assert all(len(each) == 2 for each in scores[0])


@pytest.mark.parametrize("name", sorted(function.__name__ for function in PLANS))
def test_a_student_can_be_made_from_its_teacher_in_every_way(
    name: str, write: Write, tmp_path: Path
) -> None:
    options = {
        "shrink": "depth: 8, width: 0.5",
        "prune": "ratio: 0.5",
        "factorize": "rank: 0.2",
        "sparsify": 'pattern: "2:4"',
        "quantize": "mode: learn",
    }
    model = "{name: resnet, depth: 14, width: 8}"
    text = HEAD.replace("{name: mlp, widths: [32, 32]}", model)
    text = text.replace("{name: mlp, widths: [24, 16]}", f"{{name: {name}, {options[name]}}}")
    plan = check(write(text=text + DISTILL))
    assert plan["student"]["made"]["way"] == name
    smaller = plan["student"]["parameters"] < plan["teacher"]["parameters"]
    assert smaller == (name != "sparsify")


def test_the_preflight_tells_what_becomes_of_the_student(write: Write) -> None:
    plan = check(write(text=CHAIN))
    assert plan["student"]["parameters"] == 2130
    assert plan["result"]["parameters"] == 378
    (pruned,), (factorized,) = plan["stages"][1]["changes"], plan["changes"]
    assert (pruned["do"], pruned["parameters"]) == ("prune", 974)
    assert (factorized["do"], factorized["parameters"]) == ("factorize", 378)
    assert "changes" not in plan["stages"][0]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (DISTILL + TAUGHT_BY_ITSELF, "stage 0 does not change the student"),
        (TAUGHT_BY_ITSELF, "stage 0 has teacher: unchanged, and no stage is before it"),
        (
            DISTILL + PRUNE + DISTILL.replace("distill", "distill\n    teacher: previous"),
            "stage 1 changes a student that stage 2 does not go on with",
        ),
        (PRUNE, "no stage trains"),
        (DISTILL + "  - {do: prune, ratio: 0.5, example: 1}\n", "'example' is supplied"),
        (
            DISTILL + "  - {do: prune, ratio: 0.5, layers: [nix]}\n",
            r"^stage 1 \(prune\): the model has no 'nix'",
        ),
        (
            DISTILL + "  - {do: sparsify, amount: 0.5}\n" + PRUNE,
            r"^stage 2 \(prune\): the zeros .* put the sparsify stage after this one$",
        ),
        (
            DISTILL + PRUNE + DISTILL + "  - {do: factorize}\n" + DISTILL,
            r"^stage 3 \(factorize\): say how much is kept",
        ),
        (
            DISTILL + "  - {do: quantize, mode: learn}\n" + DISTILL + PRUNE,
            r"^stage 3 \(prune\): the model is quantised.* prune comes before quantize$",
        ),
        (
            DISTILL + "  - {do: factorize, rank: 1.5}\n",
            r"recipe.yaml:\d+:\d+: rank is 1.5: it must be a whole number from 1 on, or a share "
            "above 0 and up to 1$",
        ),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(stages: str, message: str, write: Write) -> None:
    with pytest.raises(PreflightError, match=message):
        check(write(text=HEAD + stages))


def test_a_student_that_cannot_be_made_is_told_with_its_verb(write: Write) -> None:
    text = HEAD.replace("{name: mlp, widths: [32, 32]}", "{name: resnet, depth: 8, width: 8}")
    told = "{name: shrink, layers: [0, 99]}"
    text = text.replace("{name: mlp, widths: [24, 16]}", told)
    said = (
        r"^student \(shrink\): there is no layer 99; this resnet has layer 0 alone in each stage$"
    )
    with pytest.raises(PreflightError, match=said):
        check(write(text=text + DISTILL))


def test_a_sparse_student_is_quantised_and_its_zeros_are_in_the_file(
    write: Write, tmp_path: Path
) -> None:
    sparse = "  - {do: sparsify, amount: 0.75, among: layer}\n"
    whole = "  - {do: quantize, mode: learn}\n" + DISTILL + "  - {do: quantize, mode: freeze}\n"
    run(write(text=HEAD + DISTILL + sparse + DISTILL + whole), folder=tmp_path / "run")
    student: Any = attar.models.load(tmp_path / "run" / "student")
    weights = [student.get_submodule(f"blocks.{n}.linear").weight for n in (0, 1)]
    assert {weight.dtype for weight in weights} == {torch.int8}
    assert all(float((weight == 0).float().mean()) >= 0.75 for weight in weights)
    steps = kept(tmp_path / "run")["chain"]["steps"]
    assert [step["cost"]["parameters"] for step in steps] == [2130] * 6
    assert "notes" not in check(write(text=HEAD + DISTILL + sparse + DISTILL + whole))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (PRUNE, ["prune (stage 1)"]),
        ("  - {do: quantize, mode: weights, bits: 4}\n", []),
        (PRUNE + DISTILL, []),
        (
            PRUNE + "  - {do: factorize, rank: 0.5}\n  - {do: quantize, mode: weights}\n",
            ["prune (stage 1) and factorize (stage 2)"],
        ),
        (PRUNE + "  - {do: export}\n", ["prune (stage 1)"]),
    ],
    ids=["prune", "quantize", "trained", "several", "export"],
)
def test_a_change_that_nothing_is_trained_after_is_noted(
    ending: str, said: list[str], write: Write
) -> None:
    notes = check(write(text=HEAD + DISTILL + ending)).get("notes", [])
    assert notes == [
        f"Nothing is trained after {each}: what it cost stays lost; put a distill stage after it."
        for each in said
    ]


def test_the_page_says_that_nothing_is_trained_after_the_last_change(
    write: Write, tmp_path: Path
) -> None:
    run(write(text=HEAD + DISTILL + PRUNE), folder=tmp_path / "run")
    assert kept(tmp_path / "run")["notes"][0].startswith("Nothing is trained after prune (stage 1)")
    assert "Nothing is trained after prune (stage 1)" in page(tmp_path / "run").read_text()


def test_students_that_teach_each_other_are_not_changed(write: Write) -> None:
    with pytest.raises(PreflightError, match=r"^stage 1: prune changes one student"):
        check(write(text=HEAD + DISTILL + PRUNE + DISTILL), overrides=["teacher={mutual: 2}"])


def test_the_seed_is_chosen_by_the_changed_student(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    running = importlib.import_module("attar.recipes.run")
    best_of = running.best_of

    def spied(desk: Any, arm: Any) -> int:
        seen.append((desk, arm))
        return int(best_of(desk, arm))

    monkeypatch.setattr(running, "best_of", spied)
    run(write(text=CHAIN + "seeds: 2\n"), folder=tmp_path / "run")
    desk, arm = seen[-1]
    metric, validation = desk.job.task.metric, desk.job.validation
    told = [final.history[final.kept_epoch][metric] for final in arm.finals]
    own = [desk.job.task.primary(desk.rows(f.student, validation)) for f in arm.finals]
    assert told == own


def test_a_file_that_runs_by_itself_is_the_last_step(write: Write, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    learn = "  - {do: quantize, mode: learn}\n" + DISTILL + "  - {do: quantize, mode: freeze}\n"
    last = "  - {do: export, formats: [safetensors, onnx_int8]}\n"
    run(write(text=HEAD + DISTILL + learn + last), folder=tmp_path / "run")
    told = kept(tmp_path / "run")
    steps, (_, file) = told["chain"]["steps"], told["exports"]
    names = ["distill", "quantize", "distill", "quantize", "export onnx_int8"]
    assert [step["do"] for step in steps] == names
    assert steps[-1]["score"] == file["lost"]["file"]
    assert steps[-1]["cost"]["bytes"] == file["bytes"]
    assert steps[-1]["cost"]["latency"] == file["latency"]
    assert steps[-2]["score"] == file["lost"]["module"]
    assert file["lost"]["budget"] is None
    assert not file["lost"]["missed"]
    assert steps[3]["cost"]["bytes"] < 0.5 * steps[2]["cost"]["bytes"]
