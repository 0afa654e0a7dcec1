"""What a recipe can say of a term: schedules, several signals, fixed maps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from attar.recipes import check, run
from attar.recipes.document import Document
from attar.recipes.resolve import Resolver
from attar.recipes.rooms import rooms
from attar.runtime import PreflightError
from attar.training import Term


def term(written: str, tmp_path: Path) -> Any:
    from attar.recipes.document import read

    file = tmp_path / "term.yaml"
    file.write_text(written)
    document: Document = read(file)
    return Resolver(document, rooms()).value(document.value, Term, ())


def test_a_weight_is_a_number_or_a_schedule(tmp_path: Path) -> None:
    assert term("{loss: mse, weight: 0.5}", tmp_path).weight == 0.5
    moving = term("{loss: mse, weight: {name: ramp, end: 0.9, until: 0.1}}", tmp_path).weight
    assert moving(0.05) == pytest.approx(0.45)
    assert moving(0.5) == 0.9
    assert term("{loss: mse, weight: cosine}", tmp_path).weight(1.0) == 0.0
    with pytest.raises(PreflightError, match=r"weight is -1"):
        term("{loss: mse, weight: -1.0}", tmp_path)
    with pytest.raises(PreflightError, match="no 'rampe' in schedules; did you mean 'ramp'"):
        term("{loss: mse, weight: rampe}", tmp_path)


def test_a_number_of_a_loss_may_be_a_schedule(tmp_path: Path) -> None:
    written = "{loss: {name: kl_divergence, temperature: {name: ramp, start: 8.0, end: 2.0}}}"
    loss = term(written, tmp_path).loss
    assert isinstance(loss, partial)
    assert loss.keywords["temperature"](0.5) == 5.0
    with pytest.raises(PreflightError, match="no 'begin' here"):
        term("{loss: {name: kl_divergence, temperature: {name: ramp, begin: 8.0}}}", tmp_path)


def test_several_addresses_are_a_list(tmp_path: Path) -> None:
    found = term("{loss: mse, student: [feature:a, feature:b], teacher: feature:c}", tmp_path)
    assert found.student == ("feature:a", "feature:b")
    assert found.teacher == "feature:c"


DROWNED = """
task: image-classification
data: digits
teacher: {model: {name: mlp, widths: [16]}, train: {epochs: 3}}
student: {name: mlp, widths: [8]}
stages:
  - do: distill
    epochs: 1
    terms:
      - {loss: kl_divergence, weight: 0.9}
      - {loss: relation_distance, student: "input:head", weight: 1.0e+5}
"""


def test_a_run_begins_with_what_drowns(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(DROWNED)
    plan = check(tmp_path / "recipe.yaml")["stages"][0]
    assert plan["lopsided"] is not None
    said: list[str] = []
    run(tmp_path / "recipe.yaml", folder=tmp_path / "run", say=said.append, progress=False)
    assert said[1].startswith("warning    'relation_distance(input:head)' pulls ")
