"""One exported file: what was seen when it was run against the module it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.data import Source
from attar.evaluation import cost, evaluate
from attar.exporting.tokens import reads_tokens
from attar.runtime import DataError, UsageError, first_line
from attar.tasks import Task

TOLERANCE = 1e-4

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Lost:
    """What a file of whole numbers answers worse than the module it came from.

    Attributes:
        metric: the task's.
        module, file: its value for each, on the same examples.
        drop: how much worse the file is; negative where it is better.
        budget: how much worse it may be; None where nobody said.
        missed: whether it is worse than that.
    """

    metric: str
    module: float
    file: float
    drop: float
    budget: float | None
    missed: bool


@dataclass(frozen=True)
class Artefact:
    """A file that `export` wrote.

    Attributes:
        format: "safetensors", "onnx", "onnx_int8" or "torch_export".
        path: the file itself.
        bytes, sha256: its size and content.
        difference: the largest absolute difference between what it and the module answer.
        examples: how many examples that was seen on.
        latency: milliseconds of a pass on the CPU by batch size, {"1": {"p50_ms", "p95_ms"}, ...}.
        threads: CPU threads that were used for it.
        agreement: of a file of whole numbers, the share of the examples on which its largest
            output is the module's; None where that is no answer, and for all other files, where
            it must be 1.
        lost: of such a file, what it lost on a test, where one was given.
    """

    format: str
    path: Path
    bytes: int
    sha256: str
    difference: float
    examples: int
    latency: dict[str, dict[str, float]]
    threads: int
    agreement: float | None = None
    lost: Lost | None = None

    def to_json(self) -> dict[str, Any]:
        """This artefact as JSON values; the path is the file's name alone."""
        return asdict(self) | {"path": self.path.name}


class Runner(nn.Module):
    """A function with the face of a module, so that all formats are timed in the same way.

    Where it takes several tensors they come as one, [n, how many, ...].
    """

    def __init__(self, run: Run, several: bool = False) -> None:
        super().__init__()
        self.several = several
        # Held in a tuple: an exported program is a module, and cannot be told eval().
        self.held = (run,)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = inputs.unbind(1) if self.several else (inputs,)
        return self.held[0](*(part.contiguous() for part in parts))


def largest_difference(
    name: str, run: Run, module: nn.Module, examples: tuple[Tensor, ...], *, ordered: bool
) -> float:
    """The largest absolute difference between *run* and *module*, both on the CPU.

    Asked with one example, with all, and with one more than all, since a file may have kept the
    batch size it was traced with; of tokens with half of each text too, as it may have kept the
    length.

    Args:
        ordered: whether the place of the largest output is an answer, so must be the same.

    Raises:
        DataError: it is above 1e-4 (where a module answers at every token, above 1e-4 of the
            largest answer, if that is more than 1), or the largest output stands elsewhere for
            some example.
    """
    largest, elsewhere, allowed = 0.0, 0, TOLERANCE
    for expected, found in _answers(name, run, module, examples):
        if reads_tokens(examples) and expected.ndim == 3:
            allowed = max(allowed, TOLERANCE * float(expected.abs().max()))
        gap = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
        largest = max(largest, float(gap.max()))
        if ordered:
            elsewhere = max(elsewhere, int((_top(found) != _top(expected)).sum()))
    if largest > allowed or elsewhere:
        raise DataError(
            f"{name}: differs from the module by up to {largest:.3g} where {allowed:.3g} is "
            f"allowed, and its largest output is another one on {elsewhere} of {len(examples[0])} "
            "examples, so nothing was written; export another format"
        )
    return largest


def likeness(
    name: str, run: Run, module: nn.Module, examples: tuple[Tensor, ...], *, ordered: bool
) -> tuple[float, float | None]:
    """How near *run*, of whole numbers, is to *module*: the largest difference, and the share of
    the examples on which the largest output is the same (None where it is not *ordered*).

    Raises:
        DataError: an answer of another shape, or one that is not finite.
    """
    largest, same, asked = 0.0, 0, 0
    for expected, found in _answers(name, run, module, examples):
        if not bool(found.isfinite().all()):
            raise DataError(
                f"{name}: answers NaN or infinity, so nothing was written; calibrate it with other "
                "examples, or export another format"
            )
        largest = max(largest, float((found.double() - expected.double()).abs().max()))
        same += int((_top(found) == _top(expected)).sum())
        asked += len(expected)
    return largest, same / asked if ordered else None


def lost(run: Run, module: nn.Module, test: Source, task: Task, budget: float | None) -> Lost:
    """By how much *run* is worse than *module* on *test*.

    Raises:
        UsageError: the task's models read more than one tensor.
    """
    if "attention" in test.rows(torch.arange(1)):
        raise UsageError("drop and test are for models that read one tensor; leave them out")
    before, after = (
        evaluate(each, test, task, device="cpu").scores[task.metric]
        for each in (module, Runner(run))
    )
    drop = before - after if task.higher_is_better else after - before
    missed = budget is not None and not drop <= budget
    return Lost(task.metric, before, after, drop, budget, missed)


def _answers(
    name: str, run: Run, module: nn.Module, examples: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What *module* and *run* answer to batches of several sizes."""
    for batch in _batches(examples):
        expected, found = module(*batch), _answer(name, run, batch)
        if found.shape != expected.shape:
            raise DataError(
                f"{name}: gives {list(found.shape)} where the module gives "
                f"{list(expected.shape)}, so nothing was written; export another format"
            )
        yield expected, found


def _batches(examples: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    yield tuple(each[:1] for each in examples)
    yield examples
    yield tuple(torch.cat([each, each[:1]]) for each in examples)
    if reads_tokens(examples):
        yield tuple(each[:, : -(-each.shape[1] // 2)] for each in examples)


def _top(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1).argmax(1)


def _answer(name: str, run: Run, batch: tuple[Tensor, ...]) -> Tensor:
    try:
        return run(*batch)
    except Exception as error:
        said = first_line(error)
        raise DataError(
            f"{name}: cannot read a batch of {list(batch[0].shape)} ({said:.300}), so nothing was "
            "written; export another format"
        ) from error


def latency(run: Run, examples: tuple[Tensor, ...]) -> tuple[dict[str, dict[str, float]], int]:
    """Milliseconds by batch size, measured as ``attar.evaluation.cost`` does, and the threads."""
    several = len(examples) > 1
    given = torch.stack(examples, 1) if several else examples[0]
    measured = cost(Runner(run, several), given, device="cpu", one_thread=False)
    return measured.latency, measured.threads
