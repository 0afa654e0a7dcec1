"""A verb is its plan, applied: the same arguments, types, words and results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import pytest
import torch
from torch import nn

import attar
from attar import compression
from attar.compression.common import applied, spread
from attar.data import TensorSource
from attar.runtime import UsageError

VERBS = ["factorize", "prune", "shrink", "sparsify"]


class Half:
    """A plan that remembers what it was made of."""

    def __init__(self, **given: Any) -> None:
        self.given = given

    def apply(self, model: nn.Module) -> nn.Module:
        made = nn.Identity()
        made.given = self.given | {"applied": model}
        return made


def plan_halve(model: nn.Module, share: Annotated[float, "a share"], *, how: str = "x") -> Half:
    """Half of it."""
    return Half(model=model, share=share, how=how)


def test_a_verb_takes_what_its_plan_takes_by_place_and_by_name() -> None:
    halve, model = applied(plan_halve), nn.Linear(2, 2)
    for made in (halve(model, 0.5), halve(share=0.5, model=model)):
        assert made.given == {"model": model, "share": 0.5, "how": "x", "applied": model}
    with pytest.raises(UsageError, match=r"^halve: there is no hwo=; did you mean 'how'\?$"):
        halve(model, 0.5, hwo="y")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^halve: model is missing; call halve\(model, share\)$"):
        halve(share=0.5)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^halve: too many positional arguments$"):
        halve(model, 0.5, "y")  # type: ignore[call-arg]


def test_what_a_verb_needs_and_was_not_given_is_named_with_the_call_that_has_it() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"example is missing.*prune\(model, example, ratio=\.\."):
        attar.prune(model, ratio=0.5)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^prune: example and ratio are missing"):
        attar.prune(model)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^shrink: teacher is missing"):
        attar.shrink(width=0.5)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="factorize: there is no ranks=; did you mean 'rank'"):
        attar.factorize(model, ranks=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["prune", "factorize", "sparsify"])
@pytest.mark.parametrize("mode", ["learn", "weights"])
def test_what_was_quantised_is_not_changed_any_more(name: str, mode: Any) -> None:
    if name == "prune":
        pytest.importorskip("torch_pruning")
    inputs = torch.rand(4, 6)
    model = attar.models.build("mlp", shape=(6,), outputs=3, widths=[8, 8])
    model = attar.quantize(model, inputs, mode=mode)
    given: dict[str, Any] = {
        "prune": {"example": inputs, "ratio": 0.5}, "factorize": {"rank": 2},
        "sparsify": {"amount": 0.5},
    }[name]  # fmt: skip
    said = f"{name}: the model is quantised, .*; {name} comes before quantize"
    with pytest.raises(UsageError, match=said):
        getattr(attar, name)(model, **given)


def test_a_model_whose_layers_changed_is_not_built_narrower() -> None:
    model = attar.models.build("mlp", shape=(6,), outputs=3, widths=[8, 8])
    with pytest.raises(UsageError, match="shrink comes before prune, factorize and quantize"):
        attar.shrink(attar.factorize(model, rank=2), width=0.5)
    with pytest.raises(UsageError, match=r"shrink: the model has masks.*merged\(model\)"):
        attar.shrink(attar.sparsify(model, amount=0.5), width=0.5)


def test_types_are_objects_that_need_no_names_of_the_plans_module() -> None:
    halve: Any = applied(plan_halve)
    assert halve.__signature__.parameters["share"].annotation == Annotated[float, "a share"]
    assert get_type_hints(halve, include_extras=True) == {
        "model": nn.Module, "share": Annotated[float, "a share"], "how": str, "return": nn.Module
    }  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_the_signature_and_the_words_of_its_plan(name: str) -> None:
    verb: Callable[..., Any] = getattr(attar, name)
    plan: Callable[..., Any] = getattr(compression, f"plan_{name}")
    assert verb.__name__ == verb.__qualname__ == name
    assert verb.__module__ == plan.__module__
    assert inspect.getdoc(verb) == inspect.getdoc(plan)
    assert "Args:" in (inspect.getdoc(verb) or "")
    assert f"`{name}` makes it" in " ".join((inspect.getdoc(verb) or "").split())
    ours, theirs = inspect.signature(verb), inspect.signature(plan, eval_str=True)
    assert ours.parameters == theirs.parameters
    assert ours.return_annotation is nn.Module
    assert inspect.isfunction(verb)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("factorize", {"rank": 2}),
        ("shrink", {"width": 0.5, "seed": 3, "blend": 0.5}),
        ("sparsify", {"amount": 0.5}),
    ],
)
def test_a_verb_gives_the_bits_of_its_plan(name: str, options: dict[str, Any]) -> None:
    model = attar.models.build("mlp", shape=(6,), outputs=3, widths=[8, 8])
    plan = getattr(compression, f"plan_{name}")(model, **options)
    made, expected = getattr(attar, name)(model, **options), plan.apply(model)
    assert made is not model
    found = made.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("rows", "expected"), [(3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10))), (1, [0])]
)
def test_examples_are_drawn_from_all_over_the_data(rows: int, expected: list[int]) -> None:
    assert spread(rows, TensorSource(torch.zeros(10, 2))).tolist() == expected
