"""Who learns in each stage of a recipe, and who teaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

KEYS = ("student", "teacher", "reuse_head")  # what a stage says of them


@dataclass(frozen=True)
class Turn:
    """One stage that trains.

    Attributes:
        stage: what is called, without what is said here.
        assistant: the model that learns in the place of the recipe's student.
        previous: the model of the stage before teaches, not the recipe's teacher.
        later: where a student starts anew, how many start after it; None where one goes on.
        reuse_head: who learns ends in the teacher's classifier from here on.
    """

    stage: Callable[..., nn.Module]
    assistant: Callable[..., nn.Module] | None
    previous: bool
    later: int | None
    reuse_head: bool = False


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
    turns = [
        Turn(
            _without(stage),
            own.get("student"),
            "teacher" in own,
            sum(other > index for other in starts) if index in starts else None,
            "reuse_head" in own,
        )
        for index, (stage, own) in enumerate(zip(stages, said, strict=True))
    ]
    reuses_head(turns)  # refuses a second classifier
    return turns


def reuses_head(turns: Sequence[Turn]) -> bool:
    """Whether the student of the last stage ends in its teacher's classifier.

    Raises:
        ValueError: a student that would be given a second one.
    """
    reused = False
    for index, turn in enumerate(turns):
        if turn.assistant is not None:
            continue
        goes_on = reused and turn.later is None
        if goes_on and turn.reuse_head:
            raise ValueError(
                f"stage {index} has reuse_head, and the student ends in a teacher's classifier "
                "already; leave it out there"
            )
        reused = goes_on or turn.reuse_head
    return reused


def _said(stage: Callable[..., nn.Module]) -> dict[str, Any]:
    options = stage.keywords if isinstance(stage, partial) else {}
    return {key: options[key] for key in KEYS if options.get(key) not in (None, False)}


def _without(stage: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if not isinstance(stage, partial):
        return stage
    return partial(stage.func, **{k: v for k, v in stage.keywords.items() if k not in KEYS})


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
