"""From a module to a graph with a free batch dimension, and to the bytes of a ``.pt2`` file."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.exporting.artefact import Run
from attar.exporting.tokens import INPUTS, reads_tokens, zeros_like
from attar.runtime import UsageError, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Graph(NamedTuple):
    """A traced program: its inputs by name, and the names of the dimensions that are free."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    free: dict[int, str]


def traced(module: nn.Module, examples: tuple[Tensor, ...]) -> Graph:
    """The graph of *module* for any number of examples, and of tokens for any length.

    Zeros are what is traced, because a graph keeps its example inputs, and those would be rows
    of somebody's data.

    Raises:
        UsageError: torch cannot trace the module with a free batch dimension.
    """
    free = {0: "batch", 1: "length"} if reads_tokens(examples) else {0: "batch"}
    zeros = zeros_like(examples)
    try:
        program = _traced(module, zeros, free, strict=False)
    except Exception:
        # Plain tracing fixes the batch size where a module asks len(batch); strict tracing reads
        # the Python code and does not.
        try:
            program = _traced(module, zeros, free, strict=True)
        except Exception as error:
            said = first_line(error)
            name = type(getattr(module, "model", module)).__name__
            sizes = "batch size and length" if len(free) > 1 else "batch size"
            raise UsageError(
                f"torch cannot trace the {name} for any {sizes} ({said:.300}); take sizes from "
                "inputs.shape, or export safetensors alone"
            ) from error
    _forget_origin(program)
    return Graph(program, INPUTS[: len(examples)], free)


def _traced(
    module: nn.Module, inputs: tuple[Tensor, ...], free: dict[int, str], *, strict: bool
) -> ExportedProgram:
    dims: Any = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    each = tuple(dims for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=each, strict=strict)


def _forget_origin(program: ExportedProgram) -> None:
    """Drop source lines and the paths of this machine, which a graph keeps for debugging."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def pt2_bytes(graph: Graph) -> bytes:
    """The content of a ``.pt2`` file."""
    file = io.BytesIO()
    torch.export.save(graph.program, file)
    return file.getvalue()


def pt2_run(data: bytes) -> Run:
    """What a program that `pt2_bytes` made answers. For bytes of our own only: see the card."""
    run: Run = torch.export.load(io.BytesIO(data)).module()
    return run
