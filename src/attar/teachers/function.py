"""A teacher that is no PyTorch model: a function on numpy arrays, as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor, nn

from attar.runtime import AttarError, DataError, UsageError, first_line
from attar.tasks import Regression, Task
from attar.tasks.classes import ClassTask

Gives = Literal["logits", "probabilities", "labels", "values", "standardized"]
FLOOR = 1e-7  # what float32 can tell apart next to 1: less is not known of a probability
SUM = 1e-3  # how far the probabilities of an example may be from a sum of 1
OF_CLASSES = ("logits", "probabilities", "labels")
OF_NUMBERS = ("values", "standardized")


class Function(nn.Module):
    """A function on numpy arrays that stands wherever a module stands: as teacher, or judged.

    The function is given the inputs of a batch as a float32 array [n, ...] of its own, images
    channels first [n, C, H, W] in [0, 1] unless *channels_last*, and answers with an array (or a
    tensor) of n rows, in the order of the task's classes. Its answer is a batch's main output;
    features there are none. Every answer is checked.

    Args:
        function: is called on every batch, without gradient.
        task: the student's; its classes are known, as after ``task.fitted(train)``.
        gives: what the function returns.

            - ``logits`` [n, C]: taken as they are.
            - ``probabilities`` [n, C]: given as their logarithms, p raised to at least *floor* and
              normalised again, so that a softmax gives just that back; where classes do not
              compete, as log-odds of p between floor and 1 - floor.
            - ``labels``: class numbers [n], or 0 and 1 [n, C] where classes do not compete; taken
              as probabilities of 0 and 1. Learn from them by ``hard_distillation``, which sees
              the label alone. A ``kl_divergence`` of temperature 1 is the same to C times
              *floor*; a higher one smooths the label by what the floor happens to be.
            - ``values`` [n, targets] or [n] of a regression, in the target's own units.
            - ``standardized``: the same as attar's models give them, less mean, over deviation.
        channels_last: give it images as [n, H, W, C], as TensorFlow and Keras do.
        floor: the least probability. At a temperature T it counts as ``floor ** (1 / T)``
            beside 1: raise it to what the function can tell apart, such as half a vote of a forest.
        name: what messages call it; the function's own name when left out.
        version: a word that you change whenever the function changes. Kept answers are told apart
            by it, so without one they cannot be kept.

    Errors: *gives* that does not fit the task, a floor outside (0, 0.1] (UsageError); a function
    that fails, and an answer of another shape, not finite, or not what *gives* says (DataError).

    Example:
        >>> import numpy, torch, attar
        >>> task = attar.tasks.TabularClassification(classes=2)
        >>> def rule(rows):
        ...     return numpy.stack([rows[:, 0] < 0.5, rows[:, 0] >= 0.5], 1)
        >>> teacher = Function(rule, task, gives="probabilities", floor=0.01)
        >>> teacher(torch.tensor([[0.2], [0.7]])).softmax(1)
        tensor([[0.9901, 0.0099],
                [0.0099, 0.9901]])
    """

    def __init__(
        self,
        function: Callable[[NDArray[np.float32]], Any],
        task: Task,
        *,
        gives: Gives = "logits",
        channels_last: bool = False,
        floor: Annotated[float, Interval(gt=0, le=0.1)] = FLOOR,
        name: str | None = None,
        version: str | None = None,
    ) -> None:
        super().__init__()
        _check_gives(task, gives)
        if not 0 < floor <= 0.1:
            raise UsageError(f"floor is {floor}; it must be a probability in (0, 0.1]")
        self.gives = gives
        self.channels_last = channels_last
        self.floor = floor
        # Not public: a fingerprint takes in the public ones.
        self._task = task
        self._function = function
        own = getattr(function, "__name__", type(function).__name__)
        self._name = name or ("the function" if own == "<lambda>" else own)
        self._edition = version

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    def _get_name(self) -> str:
        return self._name  # what torch prints in the place of the class

    def get_submodule(self, target: str) -> nn.Module:
        """Itself; UsageError for a part, of which it has none."""
        if target:
            raise UsageError(
                f"{self.name} is a function and has no part '{target}'; what it can be asked for "
                f"is output:{self._task.outputs[0]}"
            )
        return self

    @property
    def lost(self) -> str | None:
        """What the function knows and does not tell, in a sentence; None where that is nothing."""
        if self.gives == "labels":
            return (
                f"{self.name} gives labels alone: how sure it is, and which classes it finds "
                "alike, is not known"
            )
        if self.gives == "probabilities":
            where = "below" if self._task.competing else "nearer to 0 or 1 than"
            return f"{self.name} gives probabilities: what is {where} {self.floor:g} is not known"
        return None

    @property
    def version(self) -> str | None:
        """The user's word for what the function is, of a file its SHA-256; None where not given."""
        return self._edition

    def forward(self, inputs: Tensor) -> Tensor:
        """What the function says of the inputs as the task's main output, float32 [n, width]."""
        told = torch.from_numpy(self._checked(self._asked(inputs), len(inputs)))
        return self._output(told).float().to(inputs.device)

    def _asked(self, inputs: Tensor) -> NDArray[Any]:
        # A copy: what the function does to it must not reach the student.
        given = inputs.detach().to("cpu", torch.float32, copy=True)
        if self.channels_last:
            given = given.movedim(1, -1)
        array = given.contiguous().numpy()
        try:
            answer = self._function(array)
            if isinstance(answer, Tensor):
                answer = answer.detach().cpu()
                answer = (answer.double() if answer.is_floating_point() else answer).numpy()
            return np.asarray(answer)
        except AttarError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name} failed on inputs {list(array.shape)}: {first_line(error):.300}"
            ) from error

    def _checked(self, answer: NDArray[Any], count: int) -> NDArray[np.float64]:
        """The answer in float64, [count, width], or [count] of class numbers."""
        task = self._task
        numbers = self.gives == "labels" and task.competing
        expected = (count,) if numbers else (count, task.width)
        if not numbers and task.width == 1 and answer.shape == (count,):
            answer = answer[:, None]
        if answer.shape != expected:
            raise DataError(
                f"{self.name} answers {list(answer.shape)} to {count} rows, and gives: "
                f"{self.gives} is {list(expected)}{self._hint(answer, count)}"
            )
        if answer.dtype.kind not in ("biu" if numbers else "biuf"):
            raise DataError(
                f"{self.name} answers numbers of type {answer.dtype}, and gives: {self.gives} is "
                f"{'whole class numbers, such as argmax(1)' if numbers else 'real numbers'}"
            )
        values = answer.astype(np.float64)
        self._refuse(~np.isfinite(values), values, "is not finite")
        if self.gives == "logits":
            self._check_logits(values)
        elif self.gives == "probabilities":
            self._check_probabilities(values)
        elif self.gives == "labels":
            self._check_labels(values)
        return values

    def _hint(self, answer: NDArray[Any], count: int) -> str:
        if self._task.competing and self._task.width == 2 and answer.size == count:
            return "; of p, the probability of class 1, make stack([1 - p, p], 1)"
        return "; give a row for each input, a column for each class in the task's order"

    def _check_logits(self, values: NDArray[np.float64]) -> None:
        sums = np.abs(values.sum(1) - 1) <= SUM
        if self._task.competing and bool((sums & (values >= 0).all(1)).all()):
            raise DataError(
                f"{self.name} answers rows of positive numbers that sum to 1, which are "
                "probabilities; say gives: probabilities"
            )

    def _check_probabilities(self, values: NDArray[np.float64]) -> None:
        outside = (values < -SUM) | (values > 1 + SUM)
        self._refuse(outside, values, "is no probability; for logits say gives: logits")
        if self._task.competing:
            sums = values.sum(1)
            what = "is the sum of the probabilities, not 1; are they of other classes too?"
            self._refuse(np.abs(sums - 1) > SUM, sums, what)

    def _check_labels(self, values: NDArray[np.float64]) -> None:
        if not self._task.competing:
            self._refuse((values != 0) & (values != 1), values, "is neither 0 nor 1")
            return
        width = self._task.width or 0
        wrong = (values < 0) | (values >= width)
        self._refuse(wrong, values, f"is no class: with {width} they go from 0 to {width - 1}")

    def _refuse(self, wrong: NDArray[np.bool_], values: NDArray[np.float64], why: str) -> None:
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            row, said = place[0], f"{values[place]:.6g}"
            raise DataError(f"{self.name}: its answer to row {row} of the batch, {said}, {why}")

    def _output(self, told: Tensor) -> Tensor:
        if self.gives == "values":
            return self._task.labels({"labels": told})
        if self.gives in ("logits", "standardized"):
            return told
        if not self._task.competing:
            return told.clamp(self.floor, 1 - self.floor).logit()
        if self.gives == "labels":
            told = nn.functional.one_hot(told.long(), self._task.width or 0).double()
        told = told.clamp_min(self.floor)
        return (told / told.sum(1, keepdim=True)).log()


def from_sklearn(
    model: Any,
    task: Task,
    *,
    floor: Annotated[float, Interval(gt=0, le=0.1)] = FLOOR,
    name: str | None = None,
    version: str | None = None,
) -> Function:
    """A fitted estimator of scikit-learn, or of a library with its interface, as a teacher.

    It is given flat rows [n, inputs]. A classifier's probabilities are asked for, its labels where
    it has none, a regression's values. Its ``classes_`` are put into the order of the task's:
    the whole numbers 0 to C - 1 are the task's numbers, anything else its names.

    Args:
        floor, name, version: as in ``Function``; a forest of n trees tells no probability below
            1 / n from 0.

    Errors: not fitted, or of other classes than the task's (UsageError).
    """
    told: dict[str, Any] = {"name": name or type(model).__name__, "version": version}
    if isinstance(task, Regression):
        return Function(lambda rows: model.predict(_flat(rows)), task, gives="values", **told)
    numbers = _numbers(model, task) if task.competing else None
    told["floor"] = floor
    if hasattr(model, "predict_proba"):
        columns = slice(None) if numbers is None else np.argsort(numbers)
        return Function(
            lambda rows: _chances(model.predict_proba(_flat(rows)))[:, columns],
            task,
            gives="probabilities",
            **told,
        )
    if numbers is None:
        return Function(lambda rows: model.predict(_flat(rows)), task, gives="labels", **told)
    known = dict(zip(np.asarray(model.classes_).tolist(), numbers, strict=True))
    return Function(
        lambda rows: np.array([known[name] for name in model.predict(_flat(rows)).tolist()]),
        task,
        gives="labels",
        **told,
    )


def _flat(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows.reshape(len(rows), -1)


def _chances(told: Any) -> NDArray[Any]:
    """Probabilities [n, C]; of several labels scikit-learn gives a list of [n, 2] for each."""
    return np.stack([each[:, 1] for each in told], 1) if isinstance(told, list) else told


def _numbers(model: Any, task: Task) -> NDArray[np.int64]:
    """The task's number of each class of the model."""
    assert isinstance(task, ClassTask)
    if not hasattr(model, "classes_"):
        raise UsageError(f"{type(model).__name__} does not say its classes_; fit it first")
    theirs, ours = np.asarray(model.classes_), task.names()
    if theirs.dtype.kind in "iu" and theirs.tolist() == list(range(len(ours))):
        return np.arange(len(ours))
    names = [str(name) for name in theirs.tolist()]
    if sorted(names) != sorted(ours):
        odd = min({*names} ^ {*ours}, default=names[0])
        whose = "the task's alone" if odd in ours else "the model's alone"
        raise UsageError(
            f"{type(model).__name__} knows {len(names)} classes and the task {len(ours)}: '{odd}' "
            f"is {whose}; fit it on rows of the same classes"
        )
    return np.array([ours.index(name) for name in names])


def _check_gives(task: Task, gives: str) -> None:
    if isinstance(task, Regression):
        if gives not in OF_NUMBERS:
            raise UsageError(
                f"gives is '{gives}', but the task is a regression; say values (in the target's "
                "own units) or standardized (as attar's models give them)"
            )
        known = task.targets is not None and task.mean is not None
    elif isinstance(task, ClassTask):
        if gives not in OF_CLASSES:
            raise UsageError(f"gives is '{gives}'; of classes it is one of {', '.join(OF_CLASSES)}")
        known = task.width is not None
    else:
        raise UsageError(
            f"a function teaches classes or numbers, and {type(task).__name__} is neither; write a "
            "teacher with open(addresses, device), (batch) and close()"
        )
    if not known:
        raise UsageError("the task does not know its classes or units yet: take task.fitted(train)")
