"""Recipes that start from what another model knows, or learn from a teacher of other classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.recipes import check, run
from attar.runtime import AttarError, PreflightError

RECIPE = """
task: image-classification
data: digits
teacher: {{load: {source}, {how}}}
student: {{name: resnet, depth: 8, width: 4}}
examples: 120
stages:
{stages}
"""
PROBE = "  - {{do: train, init: {source}, freeze: ['*', '!head'], epochs: 1}}\n"
TUNE = "  - {{do: train, layer_decay: 0.8, l2_sp: 0.01, epochs: 1}}\n"
TEACH = "  - {{do: distill, epochs: 1, terms: [{{loss: kl_divergence}}]}}\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, digits: attar.data.Splits) -> Path:
    """A model of another task: is the digit 0 to 2, 3 to 5, or above?"""
    rows = digits.train.rows(torch.arange(len(digits.train)))
    labels = (rows["labels"] // 3).clamp(max=2)
    data = attar.data.TensorSource(rows["inputs"], labels, classes=("low", "middle", "high"))
    task = attar.tasks.ImageClassification().fitted(data)
    torch.manual_seed(0)
    model = attar.models.build("resnet", data=data, depth=8, width=4)
    attar.train(model, data, task, epochs=3, batch_size=64)
    folder = tmp_path_factory.mktemp("source") / "model"
    attar.models.save(model, folder, extra={"task": task.describe()})
    return folder


@pytest.fixture
def write(source: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(*stages: str, how: str = "project: true", more: str = "") -> Path:
        body = "".join(stages).format(source=source)
        text = RECIPE.format(source=source, how=how, stages=body) + more
        (tmp_path / "recipe.yaml").write_text(text)
        return tmp_path / "recipe.yaml"

    return write


def test_a_transferred_student_is_judged_against_a_random_start(
    write: Callable[..., Path], tmp_path: Path, source: Path
) -> None:
    said: list[str] = []
    verdict = run(write(PROBE, TUNE), folder=tmp_path / "run", say=said.append)
    assert verdict.called == "transferred"
    assert set(verdict.models) == {"source", "baseline", "distilled"}
    assert verdict.models["distilled"].retention is None
    assert [line.split()[0] for line in said] == ["data", "source", "baseline", "transferred"]
    told = json.loads((tmp_path / "run/verdict.json").read_text())
    titles = [column["title"] for column in told["table"]["columns"]]
    assert titles == ["baseline", "transferred", "source"]
    assert "transferred" in (tmp_path / "run/report.html").read_text()


def test_the_baseline_of_a_transfer_has_nothing_of_the_source(
    write: Callable[..., Path], tmp_path: Path, source: Path
) -> None:
    """After a probe alone the body is the source's; the baseline's is not, and has learned."""
    run(write(PROBE), folder=tmp_path / "run")
    model = attar.models.load(source)
    arms = {n: attar.models.load(tmp_path / "run" / n) for n in ("student", "baseline")}
    weights = {n: m.stage1[0].conv1.conv.weight for n, m in arms.items()}
    assert torch.equal(weights["student"], model.stage1[0].conv1.conv.weight)
    torch.manual_seed(0)
    start = attar.models.build("resnet", shape=(1, 8, 8), outputs=10, depth=8, width=4)
    assert not torch.equal(weights["baseline"], model.stage1[0].conv1.conv.weight)
    assert not torch.equal(weights["baseline"], start.stage1[0].conv1.conv.weight)


def test_where_a_teacher_is_asked_both_start_alike(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """The gain is then the teacher's alone: the baseline inherits too."""
    recipe = write(PROBE, TEACH)
    verdict = run(recipe, folder=tmp_path / "run", overrides=["examples=600"])
    assert verdict.called == "distilled"
    assert verdict.models["distilled"].retention is not None
    plan = json.loads((tmp_path / "run/recipe.json").read_text())
    assert plan["stages"][0]["init"]
    assert plan["teacher"]["project"] is True


def test_classes_can_be_named(write: Callable[..., Path], source: Path, tmp_path: Path) -> None:
    digits = [str(number) for number in range(10)]
    named = {"0": ["low"], **{d: [] for d in digits[1:]}}
    with pytest.raises(PreflightError, match="'1' has no class of the teacher"):
        check(write(TEACH, how=f"classes: {json.dumps(named)}"))


def test_fewer_examples_are_shared_among_the_classes(write: Callable[..., Path]) -> None:
    plan = check(write(PROBE))
    assert (plan["data"]["train"], plan["data"]["validation"]) == (120, 108)
    with pytest.raises(
        PreflightError, match=r"examples is 5,000, but digits has 970 training rows"
    ):
        check(write(PROBE), overrides=["examples=5000"])


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        (("  - {{do: train, epochs: 1}}\n",), {}, "no stage is distill and none has init"),
        ((PROBE,), {"more": "goal: {retain: 0.9}\n"}, "no stage asks the teacher"),
        ((TEACH,), {"how": "classes: {}, project: true"}, "leave one of them out"),
        (("  - {{do: train, epochs: 1, init: /no/such}}\n",), {}, "/no/such"),
        (
            ("  - {{do: train, epochs: 1, init: {source}, freeze: [boddy]}}\n",),
            {},
            "the student has no 'boddy'",
        ),
        ((TEACH,), {"how": "classes: {'0': [lo]}"}, "no class 'lo'; did you mean 'low'"),
    ],
)
def test_what_cannot_be_is_said_before_training(
    write: Callable[..., Path], stages: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(AttarError, match=said):
        check(write(*stages, **options))


def test_a_teacher_of_other_classes_needs_its_projection(write: Callable[..., Path]) -> None:
    with pytest.raises(AttarError, match="add project: true to the teacher"):
        check(write(TEACH, how="project: false"))


def test_a_transfer_resumes(write: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write(PROBE, TUNE)
    whole = run(recipe, folder=tmp_path / "whole")
    (tmp_path / "part").mkdir()
    once = run(recipe, folder=tmp_path / "part", overrides=[], resume=True)
    again = run(recipe, folder=tmp_path / "part", resume=True)
    values = [v.models["distilled"].primary.value for v in (whole, once, again)]
    assert values[0] == values[1] == values[2]
