"""What all tasks with classes share: how many there are, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from torch import Tensor

from attar.runtime import DataError
from attar.tasks.task import Task, check_width


@dataclass(frozen=True)
class ClassTask(Task):
    """The model gives a logit for each of ``width`` classes, [N, width].

    Args:
        classes: how many, or their names; taken from the data when left out.
    """

    classes: Annotated[int, Ge(1)] | Sequence[str] | None = None

    outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def __post_init__(self) -> None:
        if self.classes is not None and not isinstance(self.classes, int):
            object.__setattr__(self, "classes", tuple(self.classes))

    @cached_property
    def width(self) -> int | None:
        """How many classes there are; None before any data told."""
        if self.classes is None or isinstance(self.classes, int):
            return self.classes
        return len(self.classes)

    def fitted(self, source: Any) -> Self:
        """Take the class names from the data, or check that their number is right."""
        known = source.classes
        if known is None and self.width is None:
            raise DataError(f"{source.name}: says nothing of its classes; give the task classes: N")
        if known is not None and self.width not in (None, len(known)):
            raise DataError(
                f"the task has {self.width} classes but {source.name} has {len(known)}; "
                "make them agree, or leave the task's classes out"
            )
        own = None if isinstance(self.classes, int) else self.classes
        if known is not None and own is not None and tuple(known) != own:
            raise DataError(
                f"the task's classes are {', '.join(own[:6])} but {source.name} has "
                f"{', '.join(known[:6])}, so equal numbers mean different things"
            )
        settled = replace(self, classes=self.classes if known is None else known)
        if source.labels is not None:
            settled.check_labels(source.labels, source)
        return settled

    def check_labels(self, labels: Tensor, source: Any) -> None:
        """Refuse labels of another kind than this task's."""

    def names(self) -> list[str]:
        """The class names, numbers where none were given."""
        if self.classes is None or isinstance(self.classes, int):
            return [str(index) for index in range(self.width or 0)]
        return list(self.classes)

    def output(self, out: Any, name: str) -> Tensor:
        """The logits [N, width]."""
        if isinstance(out, Tensor) and name == "logits" and out.shape[1:] == (self.width,):
            return out
        return check_width(super().output(out, name), self.width, "classes")

    def describe(self) -> dict[str, Any]:
        """The class names in order of their numbers, or how many there are."""
        named = self.classes is None or isinstance(self.classes, int)
        return super().describe() | {"classes": self.classes if named else self.names()}
