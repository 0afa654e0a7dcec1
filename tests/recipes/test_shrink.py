"""A student that a recipe makes from its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.runtime import PreflightError, read_json

RECIPE = """
task: image-classification
data: digits
teacher:
  model: {{name: resnet, depth: 14, width: 4}}
  train: {{epochs: 1, batch_size: 64, optimizer: {{name: sgd, lr: 0.05}}}}
student: {{name: shrink, depth: 8, width: 0.5{more}}}
examples: 200
stages:
  - do: distill
    epochs: 1
    batch_size: 64
    optimizer: {{name: sgd, lr: 1.0e-9}}
    terms: [{{loss: kl_divergence, weight: 0.9}}]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("more", ["", ", select: importance, rows: 32"])
def test_the_student_starts_from_the_teacher_that_was_trained(more: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    attar.run(written(tmp_path, RECIPE.format(more=more)), folder=run, progress=False)
    teacher, student = (attar.models.load(run / name) for name in ("teacher", "student"))
    assert student.attar_build["options"]["width"] == 2
    made = read_json(run / "plan.json")["student"]["made"]
    assert made["way"] == "shrink"
    assert made["layers"] == {f"stage{number}": [0] for number in (1, 2, 3)}
    weights, whole = student.state_dict(), teacher.state_dict()
    stem = "stem.conv.weight"
    rows = [int((whole[stem] - row).abs().sum((1, 2, 3)).argmin()) for row in weights[stem]]
    torch.testing.assert_close(weights[stem], whole[stem][rows], atol=1e-5, rtol=0)
    if not more:
        assert rows == [0, 2]
    head = weights["head.weight"]
    assert (head[:, :, None] - whole["head.weight"][:, None]).abs().amin(2).max() < 1e-5


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"mutual": 2}, "here there are several or none"),
        ({"model": {"name": "shrink", "depth": 8}, "train": {"epochs": 1}}, "names? a family"),
    ],
)
def test_without_one_teacher_there_is_nothing_to_shrink(
    teacher: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = written(tmp_path, RECIPE.format(more=""))
    overrides = [f"teacher={teacher}".replace("'", '"')]
    with pytest.raises(PreflightError, match=message):
        attar.check(recipe, overrides=overrides)
