"""What a search may change: the paths of a recipe, and the values of each."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attar.recipes.document import Document
from attar.recipes.recipe import Loaded, Search, resolve
from attar.runtime import PreflightError, UsageError, suggest

ROOTS = ("student", "stages")
ONE = "all trials share"
# Why a path cannot be in the space, by its first word.
FIXED = {
    "teacher": f"{ONE} one teacher",
    "data": f"{ONE} the data and what the teacher says of them",
    "task": f"{ONE} the task",
    "examples": f"{ONE} the data and what the teacher says of them",
    "labels": f"{ONE} the data and what the teacher says of them",
    "validation": f"{ONE} the validation rows by which they are compared",
    "seed": "who searches among seeds finds the luckiest, not the best",
    "seeds": "a trial is of one seed; seeds is how often the winner is trained",
    "goal": f"{ONE} the goal",
    "search": "a search does not search itself",
    "device": f"{ONE} the machine on which they are timed",
    "precision": f"{ONE} the arithmetic in which they are compared",
    "parallel": f"{ONE} the machine on which they are timed",
}
KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True)
class Range:
    """Numbers from *low* to *high*; whole ones where both ends, and the step, are whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        told = (self.low, self.high, 1 if self.step is None else self.step)
        return all(isinstance(each, int) for each in told)

    @property
    def values(self) -> list[Any] | None:
        """All that it holds, where they can be counted."""
        step = self.step or (1 if self.whole else None)
        if step is None or self.log:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + index * step for index in range(count)]


@dataclass(frozen=True)
class Space:
    """What may change, by path: a list of values, or a range."""

    axes: Mapping[str, list[Any] | Range]

    @property
    def size(self) -> int | None:
        """How many students there are in it; None where they cannot be counted."""
        counts = []
        for axis in self.axes.values():
            values = axis.values if isinstance(axis, Range) else axis
            if values is None:
                return None
            counts.append(len(values))
        return math.prod(counts)

    def grid(self) -> dict[str, list[Any]]:
        """The values of each path as they are stored; ranges are counted."""
        return {
            path: [stored(value) for value in (axis.values or ())]
            if isinstance(axis, Range)
            else [stored(value) for value in axis]
            for path, axis in self.axes.items()
        }

    def suggested(self, trial: Any) -> dict[str, Any]:
        """The values that a trial of Optuna's has by path."""
        found = {}
        for path, axis in self.axes.items():
            if isinstance(axis, Range):
                more = {"log": axis.log, "step": axis.step}
                if axis.whole:
                    more["step"] = axis.step or 1
                ask = trial.suggest_int if axis.whole else trial.suggest_float
                found[path] = ask(path, axis.low, axis.high, **more)
            else:
                chosen = trial.suggest_categorical(path, [stored(value) for value in axis])
                found[path] = next(value for value in axis if _same(stored(value), chosen))
        return found

    def corners(self) -> list[tuple[str, Any]]:
        """Every value of the lists, and both ends of the ranges."""
        return [
            (path, value)
            for path, axis in self.axes.items()
            for value in ((axis.low, axis.high) if isinstance(axis, Range) else axis)
        ]


def stored(value: Any) -> Any:
    """A value as a database keeps it: a table or a list as text."""
    return json.dumps(value) if isinstance(value, dict | list) else value


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def space_of(document: Document, search: Search, *, cached: bool) -> Space:
    """The space that a recipe writes.

    Args:
        cached: the teacher is asked once for all trials, so all must see the same pixels.

    Raises:
        PreflightError: with the place, of a path that cannot be searched or a wrong range.
    """
    axes = {}
    for path, raw in search.space.items():
        place = ("search", "space", path)
        _check_path(path, document.at(place, key=True), cached)
        axes[path] = _axis(path, raw, document.at(place))
    return Space(axes)


def _check_path(path: str, where: str, cached: bool) -> None:
    words = path.split(".")
    if words[0] in FIXED:
        raise PreflightError(
            f"{where}: {path} cannot be searched: {FIXED[words[0]]}; a path of the space begins "
            f"with {' or '.join(ROOTS)}"
        )
    if words[0] not in ROOTS:
        raise PreflightError(f"{where}: there is no '{words[0]}'; {suggest(words[0], ROOTS)}")
    views = words[0] == "stages" and words[2:3] == ["views"]
    if views or (cached and words[0] == "stages" and words[2:3] == ["augment"]):
        way = "" if views else ", or set teacher.cache: false"
        raise PreflightError(
            f"{where}: {path} cannot be searched: {ONE} what the teacher says of the same pixels; "
            f"leave it out of the space{way}"
        )


def _axis(path: str, raw: Any, where: str) -> list[Any] | Range:
    if isinstance(raw, list):
        return _list(path, raw, where)
    if not isinstance(raw, dict):
        raise PreflightError(
            f"{where}: {path} is {raw!r}; give a list of values, [8, 16], or a range, "
            "{low: 1.0, high: 8.0}"
        )
    for key in raw:
        if key not in KEYS:
            raise PreflightError(f"{where}: there is no '{key}' here; {suggest(key, KEYS)}")
    for key in ("low", "high"):
        if key not in raw:
            raise PreflightError(f"{where}: '{key}' is missing in the range of {path}")
    return _range(path, raw, where)


def _list(path: str, raw: list[Any], where: str) -> list[Any]:
    if not raw:
        raise PreflightError(f"{where}: the list of {path} is empty; give it one value or more")
    for index, value in enumerate(raw):
        if any(_same(stored(value), stored(other)) for other in raw[:index]):
            raise PreflightError(f"{where}: {value!r} stands twice in the list of {path}")
    return raw


def _range(path: str, raw: Mapping[str, Any], where: str) -> Range:
    for key in ("low", "high", "step"):
        value = raw.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PreflightError(f"{where}: {key} of {path} is {value!r}; it must be a number")
        if not math.isfinite(value):
            raise PreflightError(f"{where}: {key} of {path} is {value}; it must be finite")
    log, low, high, step = raw.get("log", False), raw["low"], raw["high"], raw.get("step")
    if not isinstance(log, bool):
        raise PreflightError(f"{where}: log of {path} is {log!r}; it must be true or false")
    if not low < high:
        raise PreflightError(f"{where}: {path} goes from {low} to {high}; low must be below high")
    if log and low <= 0:
        raise PreflightError(f"{where}: {path} is logarithmic from {low}; low must be above 0")
    if step is not None and (log or not 0 < step <= high - low):
        why = (
            "has a step and is logarithmic; leave one of them out"
            if log
            else (f"has the step {step}; it must be above 0 and at most {high - low:g}")
        )
        raise PreflightError(f"{where}: {path} {why}")
    if step is not None:
        high = low + math.floor((high - low) / step + 1e-9) * step  # the last that it holds
    return Range(low, high, log, step)


def override(path: str, value: Any) -> str:
    """A value of the space as the command line has it."""
    return f"{path}={json.dumps(value)}"


def changed(document: Document, chosen: Mapping[str, Any], plugins: Sequence[str] = ()) -> Loaded:
    """The recipe with each path at its chosen value, and without its search.

    Raises:
        PreflightError: a path that the recipe has no place for, or a value of another type.
    """
    value = copy.deepcopy({key: v for key, v in document.value.items() if key != "search"})
    fresh = Document(document.name, value, {**document.places}, {**document.keys})
    overrides = [override(path, value) for path, value in chosen.items()]
    return resolve(fresh, overrides=overrides, plugins=plugins)


def check_space(
    document: Document, space: Space, plugins: Sequence[str], tried: Callable[[Loaded], Any]
) -> None:
    """Resolve the recipe with every value of a list and both ends of a range, one at a time.

    Args:
        tried: tries the recipe that comes of it on one batch.

    Raises:
        PreflightError: with the place in the space, the value and what is wrong with it.
    """
    for path, value in space.corners():
        where = document.at(("search", "space", path), key=True)
        try:
            tried(changed(document, {path: value}, plugins))
        except (PreflightError, UsageError) as error:
            text = override(path, value)
            said = str(error).removeprefix(f"override '{text}': ")
            raise PreflightError(f"{where}: {text}: {said}") from error
