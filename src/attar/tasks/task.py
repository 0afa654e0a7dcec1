"""What a batch means. The only room that knows images, tables, text or sound."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from attar.runtime import AttarError, DataError, first_line, suggest

Batch = dict[str, Tensor]
Rows = dict[str, Tensor]


class Task(ABC):
    """The meaning of a batch, an output and a number.

    A task never holds a model. ``outputs`` names the signals it reads from one, the main one
    first; ``metric`` is the number a verdict is about. ``competing`` says that the outputs of an
    example are compared with one another, as by a softmax, which a constant added to all of them
    does not change; False where each is an answer of its own. ``criterion(output, labels)``,
    where there is one, is what ``loss`` is at the counted positions: a loss that shares a pass
    with the terms on outputs that are too wide to be made.
    """

    outputs: ClassVar[tuple[str, ...]]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    competing: ClassVar[bool] = True
    criterion: ClassVar[Callable[..., Tensor] | None] = None

    @property
    @abstractmethod
    def width(self) -> int | None:
        """How many numbers the main output has for an example; None before any data told."""

    @abstractmethod
    def fitted(self, source: Any) -> Task:
        """This task with what the data tell filled in; DataError where they contradict it."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run *model* on the batch; what it returns is this task's own affair."""
        return model(batch["inputs"])

    def try_forward(self, model: nn.Module, batch: Batch, whose: str) -> Any:
        """``forward`` for the first time: what torch says of a wrong input becomes a DataError."""
        try:
            return self.forward(model, batch)
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, AttarError):
                raise
            reads = getattr(model, "attar_build", {}).get("options", {}).get("shape")
            built = f", which was built for inputs {list(reads)}," if reads else ""
            said = first_line(error)
            raise DataError(
                f"the {whose}{built} cannot read inputs {list(batch['inputs'].shape[1:])}: {said}"
            ) from error

    def output(self, out: Any, name: str) -> Tensor:
        """The output *name* of what ``forward`` returned, shape [N, width].

        A bare tensor is the main output; a mapping or an object with attributes is asked for
        the name; of a tuple or list the first part is taken.
        """
        if isinstance(out, Tensor) and name == self.outputs[0]:
            return out
        if isinstance(out, Mapping) and name in out:
            return out[name]
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
        if isinstance(out, tuple | list) and name == self.outputs[0] and isinstance(out[0], Tensor):
            return out[0]
        raise DataError(
            f"the model's output has no '{name}': it is {_described(out)}; "
            f"return a tensor [N, {self.width or 'C'}], or a dict with the key '{name}'"
        )

    def body(self, model: nn.Module) -> nn.Module:
        """The part of *model* that ``forward`` calls, which is what a compiler is given."""
        return model

    def labels(self, batch: Batch) -> Tensor:
        """The labels in the units of the main output, as a loss that names them is given them."""
        return batch["labels"]

    def mask(self, batch: Batch) -> Tensor | None:
        """Which positions count; None when each example is one position and all count."""
        return None

    def tokens(self, batch: Batch) -> Tensor | None:
        """Which tokens of each example are real, bool [N, S], where features have one for each.

        For examples that count as one, such as texts: padding is then no part of a term on
        features [N, S, D]. None where ``mask`` says it, and where all are real.
        """
        return None

    def head(self, model: nn.Module) -> nn.Linear | None:
        """The last linear layer when the main output is its plain result, else None."""
        found = getattr(model, "head", None)
        return found if isinstance(found, nn.Linear) else None

    @abstractmethod
    def loss(self, out: Any, batch: Batch) -> Tensor:
        """How far the output is from the labels, one value a counted position."""

    @abstractmethod
    def rows(self, out: Any, batch: Batch) -> Rows:
        """What an evaluation keeps of each example."""

    @abstractmethod
    def score(self, rows: Rows) -> dict[str, float]:
        """Every metric of these examples; holds ``self.metric``."""

    @abstractmethod
    def primary(self, rows: Rows) -> float:
        """``self.metric`` alone, quick enough for a bootstrap."""

    def correct(self, rows: Rows) -> Tensor | None:
        """Which examples are right, bool [N], when the primary metric counts them."""
        return None

    def per_class(self, rows: Rows) -> dict[str, float] | None:
        """The primary metric of each class by name, where the task has classes."""
        return None

    @abstractmethod
    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """How much the answers are the teacher's, whatever the labels say."""

    @abstractmethod
    def floor(self, labels: Tensor) -> float:
        """The primary metric of the best answer that never looks at its input."""

    def describe(self) -> dict[str, Any]:
        """What a saved model needs to know about its task, as JSON."""
        return {"name": type(self).__name__}


def restore(described: Any) -> Task:
    """The task that ``describe`` wrote beside a saved model."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in _descendants(Task)}
    if not isinstance(described, dict) or described.get("name") not in kinds:
        raise DataError(
            "the model was saved without its task; evaluate it in Python, where you name the task"
        )
    options = {key: value for key, value in described.items() if key != "name"}
    try:
        return kinds[described["name"]](**options)
    except TypeError as error:
        raise DataError(f"the model's task cannot be read: {error}") from None


def _descendants(kind: type) -> list[type]:
    children: list[type] = kind.__subclasses__()
    return [kind, *(found for child in children for found in _descendants(child))]


def check_width(out: Tensor, width: int | None, what: str) -> Tensor:
    """Refuse an output of another width, which broadcasting would hide."""
    if width is not None and (out.ndim != 2 or out.shape[1] != width):
        raise DataError(
            f"the model gives an output of shape {list(out.shape)} where the task has {width} "
            f"{what}: expected [N, {width}]"
        )
    return out


def _described(out: Any) -> str:
    if isinstance(out, Mapping):
        return f"a {type(out).__name__} with {suggest('', map(str, out))}"
    return f"a {type(out).__name__}"
