"""One exported file: what was seen when it was run against the module it came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.evaluation import cost
from attar.runtime import DataError, first_line

TOLERANCE = 1e-4

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Artefact:
    """A file that `export` wrote.

    Attributes:
        format: "safetensors", "onnx" or "torch_export".
        path: the file itself.
        bytes, sha256: its size and content.
        difference: the largest absolute difference between what it and the module answer.
        examples: how many examples that was seen on.
        latency: milliseconds of a pass on the CPU by batch size, {"1": {"p50_ms", "p95_ms"}, ...}.
        threads: CPU threads that were used for it.
    """

    format: str
    path: Path
    bytes: int
    sha256: str
    difference: float
    examples: int
    latency: dict[str, dict[str, float]]
    threads: int

    def to_json(self) -> dict[str, Any]:
        """This artefact as JSON values; the path is the file's name alone."""
        return asdict(self) | {"path": self.path.name}


class Runner(nn.Module):
    """A function with the face of a module, so that all formats are timed in the same way."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        # Held in a tuple: an exported program is a module, and cannot be told eval().
        self.held = (run,)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.held[0](inputs)


def largest_difference(
    name: str, run: Run, module: nn.Module, examples: Tensor, *, ordered: bool
) -> float:
    """The largest absolute difference between *run* and *module*, both on the CPU.

    Asked with one example, with all, and with one more than all, since a file may have kept the
    batch size it was traced with.

    Args:
        ordered: whether the place of the largest output is an answer, so must be the same.

    Raises:
        DataError: it is above 1e-4, or the largest output stands elsewhere for some example.
    """
    largest, elsewhere = 0.0, 0
    for batch in (examples[:1], examples, torch.cat([examples, examples[:1]])):
        expected, found = module(batch), _answer(name, run, batch)
        if found.shape != expected.shape:
            raise DataError(
                f"{name}: gives {list(found.shape)} where the module gives "
                f"{list(expected.shape)}, so nothing was written; export another format"
            )
        gap = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
        largest = max(largest, float(gap.max()))
        if ordered:
            elsewhere = max(elsewhere, int((_top(found) != _top(expected)).sum()))
    if largest > TOLERANCE or elsewhere:
        raise DataError(
            f"{name}: differs from the module by up to {largest:.3g} where {TOLERANCE:g} is "
            f"allowed, and its largest output is another one on {elsewhere} of {len(examples)} "
            "examples, so nothing was written; export another format"
        )
    return largest


def _top(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1).argmax(1)


def _answer(name: str, run: Run, batch: Tensor) -> Tensor:
    try:
        return run(batch)
    except Exception as error:
        said = first_line(error)
        raise DataError(
            f"{name}: cannot read a batch of {len(batch)} ({said:.300}), so nothing was written; "
            "export another format"
        ) from error


def latency(run: Run, examples: Tensor) -> tuple[dict[str, dict[str, float]], int]:
    """Milliseconds by batch size, measured as ``attar.evaluation.cost`` does, and the threads."""
    measured = cost(Runner(run), examples, device="cpu")
    return measured.latency, measured.threads
