"""Who learns in each stage of a recipe, and who teaches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from attar.recipes.changes import changes

KEYS = ("student", "teacher", "reuse_head")  # what a stage says of them

Stage = Callable[..., nn.Module]


@dataclass(frozen=True)
class Turn:
    """One stage that trains.

    Attributes:
        stage: what is called, without what is said here.
        assistant: the model that learns in the place of the recipe's student.
        previous: the model of the stage before teaches, not the recipe's teacher.
        later: where a student starts anew, how many start after it; None where one goes on.
        reuse_head: who learns ends in the teacher's classifier from here on.
        changes: the stages between this and the one before, which change who learns.
        unchanged: who learns is taught by itself as it was before them.
        place: the number of the stage in the recipe.
    """

    stage: Stage
    assistant: Callable[..., nn.Module] | None
    previous: bool
    later: int | None
    reuse_head: bool = False
    changes: tuple[Stage, ...] = ()
    unchanged: bool = False
    place: int = 0


def turns_of(stages: Sequence[Stage]) -> list[Turn]:
    """The turns of the stages that train, in order.

    Raises:
        ValueError: an order in which somebody learns for nothing, or from nobody.
    """
    places = [index for index, stage in enumerate(stages) if not changes(stage)]
    said = [_said(stages[place]) for place in places]
    between = [
        tuple(stages[before + 1 : place])
        for before, place in zip([-1, *places], places, strict=False)
    ]
    for index, (place, own) in enumerate(zip(places, said, strict=True)):
        _check(place, own, said[index + 1 :])
        _check_changes(place, own, bool(between[index]))
    first = next((i for i, own in enumerate(said) if "student" not in own), 0)
    starts = [
        index
        for index, own in enumerate(said)
        if "student" not in own and (index == first or own.get("teacher") == "previous")
    ]
    turns = [
        Turn(
            _without(stages[place]),
            own.get("student"),
            own.get("teacher") == "previous",
            sum(other > index for other in starts) if index in starts else None,
            "reuse_head" in own,
            between[index],
            own.get("teacher") == "unchanged",
            place,
        )
        for index, (place, own) in enumerate(zip(places, said, strict=True))
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


def _said(stage: Stage) -> dict[str, Any]:
    options = stage.keywords if isinstance(stage, partial) else {}
    return {key: options[key] for key in KEYS if options.get(key) not in (None, False)}


def _without(stage: Stage) -> Stage:
    if not isinstance(stage, partial):
        return stage
    return partial(stage.func, **{k: v for k, v in stage.keywords.items() if k not in KEYS})


def _check(place: int, own: dict[str, Any], later: Sequence[dict[str, Any]]) -> None:
    teacher = own.get("teacher", "previous")
    if teacher not in ("previous", "unchanged"):
        raise ValueError(
            f"stage {place}: the teacher of a stage is the recipe's, previous or unchanged"
        )
    if place == 0 and "teacher" in own:
        raise ValueError(f"stage 0 has teacher: {teacher}, and no stage is before it")
    if "student" in own and (not later or later[0].get("teacher") != "previous"):
        where = f"add it to stage {place + 1}" if later else "add such a stage"
        raise ValueError(
            f"stage {place} trains another student, and no stage with teacher: previous comes "
            f"next to learn from it; {where}"
        )


def _check_changes(place: int, own: dict[str, Any], changed: bool) -> None:
    if changed and ("student" in own or own.get("teacher") == "previous"):
        raise ValueError(
            f"stage {place - 1} changes a student that stage {place} does not go on with, as that "
            "one starts another; with teacher: unchanged it is taught by itself as it was before"
        )
    if own.get("teacher") == "unchanged" and not changed:
        raise ValueError(
            f"stage {place} has teacher: unchanged, and stage {place - 1} does not change the "
            "student; put a stage such as do: prune between them, or leave it out"
        )
