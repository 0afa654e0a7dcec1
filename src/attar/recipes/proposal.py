"""Writes the terms that pairing: auto stands for, as a recipe would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from attar.recipes.resolve import shown
from attar.runtime import UsageError
from attar.signals import Pair
from attar.training import StagePlan, Term


def proposed(plan: StagePlan, terms: Sequence[Term]) -> list[dict[str, Any]]:
    """The plan's proposals as JSON, each with the ``lines`` that a recipe could have instead.

    A line is an item of a recipe's terms; its comment says the shapes and the alignment.
    """
    return [
        asdict(found) | {"lines": [_line(terms[found.term], pair) for pair in found.pairs]}
        for found in plan.proposals
    ]


def _line(term: Term, pair: Pair) -> str:
    written = {
        "loss": _written(term.loss),
        "student": pair.student,
        "teacher": pair.teacher,
        "weight": _written(term.weight),
        "projector": _written(term.projector) or pair.projector,
        "teacher_projector": _written(term.teacher_projector) or pair.teacher_projector,
    }
    parts = [f"{key}: {_flow(value)}" for key, value in written.items() if value is not None]
    shapes = f"{list(pair.student_shape)} to {list(pair.teacher_shape)}"
    return f"- {{{', '.join(parts)}}}  # {shapes}, CKA {pair.alignment:.2f}"


def _written(value: Any) -> Any:
    """A function as its name, or as a table of its name and the options that were bound."""
    if isinstance(value, partial):
        options = {name: _written(option) for name, option in value.keywords.items()}
        return {"name": _written(value.func), **options}
    if callable(value):
        if not hasattr(value, "__name__"):
            raise UsageError(f"{value!r} has no name that a recipe could say")
        return shown(value.__name__)
    return list(value) if isinstance(value, tuple) else value


def _flow(value: Any) -> str:
    """As a YAML flow: names bare, addresses quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and value.replace("_", "").isalnum():
        return value
    return json.dumps(value)
