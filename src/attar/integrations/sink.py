"""What a tracker must be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from attar.integrations.log import Point


class Opening(NamedTuple):
    """What a tracker is told when it is opened.

    Attributes:
        run: the run folder.
        into: where to write; None for the tracker's own place.
        recipe: what was run; empty where there is no recipe.
        ids: the tracker's own name of each stage; kept from one opening to the next.
        sent: the last step of each stream that is known to have arrived.
    """

    run: Path
    into: str | None
    recipe: Mapping[str, Any]
    ids: dict[str, str]
    sent: Mapping[str, int]


class Sink(Protocol):
    """A tracker that is open."""

    def last(self, point: Point) -> int:
        """The last step of the point's stream that has arrived; -1 if none has."""

    def send(self, points: Sequence[Point]) -> None:
        """Have the points arrive, before this returns as far as the tracker can tell."""

    def close(self, *, finished: bool) -> None:
        """Let go; ``finished`` says that the run has come to its end."""

    @property
    def place(self) -> str:
        """Where a person looks, and with which command."""
