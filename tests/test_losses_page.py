"""The page of losses is what their docstrings and tests say."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from attar import losses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make() -> Any:
    """The command that makes the page, as a module."""
    spec = importlib.util.spec_from_file_location("make_losses", ROOT / "docs" / "make_losses.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_docstrings_give(make: Any) -> None:
    page = make.PAGE.read_text(encoding="utf-8")
    assert page == make.page(page), "run: python docs/make_losses.py"


def test_a_changed_docstring_changes_the_page(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(losses.mse, "__doc__", (losses.mse.__doc__ or "") + "\n\nAnd more.")
    assert "And more." in make.page(page)


def test_every_loss_says_what_it_returns_or_that_it_has_a_state(make: Any) -> None:
    for name in make.NAMES:
        loss = getattr(losses, name)
        assert make.has_state(loss) or make.returns(loss) in ("`[N]`", "scalar"), name


def test_a_golden_case_belongs_to_the_loss_of_its_row_or_its_test(make: Any) -> None:
    tests = """
MORE = [mse]

def helper(case):
    return cosine_distance(case)

@pytest.mark.parametrize(("loss", "name"), [(gram, "one"), (contrast, "two")])
def test_rows(loss, name, oracle):
    oracle(name)

class TestMore:
    @pytest.mark.parametrize("loss", MORE)
    def test_body(self, loss, oracle):
        oracle("three")

def test_helped(oracle):
    helper(oracle("four"))

def test_without():
    gram(1)
"""
    found = set(make.pairs(ast.parse(tests), {"one", "two", "three", "four", "five"}))
    wanted = {("gram", "one"), ("contrast", "two"), ("mse", "three"), ("cosine_distance", "four")}
    assert found == wanted


def test_a_law_names_the_losses_that_it_leaves_out(make: Any) -> None:
    laws = make.laws_by_loss()
    assert "kl_divergence" in laws["zero at equality"]
    assert "contrast" not in laws["zero at equality"]
    assert "mse" in laws["rows do not depend on order or split"]
    assert "mse" not in laws["relations do not depend on the order"]


def test_formulas_in_prose_are_no_markdown(make: Any) -> None:
    assert make.escape("a_i * b of `c_i` in [N, C] < 2") == r"a\_i \* b of `c_i` in `[N, C]` &lt; 2"
