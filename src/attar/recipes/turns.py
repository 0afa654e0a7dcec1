"""Who learns in each stage of a recipe, and who teaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Turn:
    """One stage that trains.

    Attributes:
        stage: what is called, without what is said here.
        assistant: the model that learns in the place of the recipe's student.
        previous: the model of the stage before teaches, not the recipe's teacher.
        later: where a student starts anew, how many start after it; None where one goes on.
    """

    stage: Callable[..., nn.Module]
    assistant: Callable[..., nn.Module] | None
    previous: bool
    later: int | None


def turns_of(stages: Sequence[Callable[..., nn.Module]]) -> list[Turn]:
    """The turns of the stages that train, in order.

    Raises:
        ValueError: an order in which somebody learns for nothing, or from nobody.
    """
    said = [_said(stage) for stage in stages]
    for index, own in enumerate(said):
        _check(index, own, said[index + 1 :])
    first = next((i for i, own in enumerate(said) if "student" not in own), 0)
    starts = [
        index
        for index, own in enumerate(said)
        if "student" not in own and (index == first or "teacher" in own)
    ]
    return [
        Turn(
            _without(stage, own),
            own.get("student"),
            "teacher" in own,
            sum(other > index for other in starts) if index in starts else None,
        )
        for index, (stage, own) in enumerate(zip(stages, said, strict=True))
    ]


def _said(stage: Callable[..., nn.Module]) -> dict[str, Any]:
    options = stage.keywords if isinstance(stage, partial) else {}
    said = {key: options.get(key) for key in ("student", "teacher")}
    return {key: value for key, value in said.items() if value is not None}


def _without(stage: Callable[..., nn.Module], said: dict[str, Any]) -> Callable[..., nn.Module]:
    if not isinstance(stage, partial):
        return stage
    return partial(stage.func, **{k: v for k, v in stage.keywords.items() if k not in said})


def _check(index: int, own: dict[str, Any], later: Sequence[dict[str, Any]]) -> None:
    if own.get("teacher", "previous") != "previous":
        raise ValueError(f"stage {index}: the teacher of a stage is the recipe's, or previous")
    if index == 0 and "teacher" in own:
        raise ValueError("stage 0 has teacher: previous, and no stage is before it")
    if "student" in own and (not later or "teacher" not in later[0]):
        place = f"add it to stage {index + 1}" if later else "add such a stage"
        raise ValueError(
            f"stage {index} trains another student, and no stage with teacher: previous comes "
            f"next to learn from it; {place}"
        )
