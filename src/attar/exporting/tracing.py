"""From a module to a graph with a free batch dimension, and to the bytes of a ``.pt2`` file."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attar.exporting.artefact import Run
from attar.runtime import UsageError, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def traced(module: nn.Module, examples: Tensor) -> ExportedProgram:
    """The graph of *module* for any number of examples.

    Zeros are what is traced, because a graph keeps its example inputs, and those would be rows
    of somebody's data.

    Raises:
        UsageError: torch cannot trace the module with a free batch dimension.
    """
    zeros = torch.zeros(2, *examples.shape[1:], dtype=examples.dtype)
    try:
        program = _traced(module, zeros, strict=False)
    except Exception:
        # Plain tracing fixes the batch size where a module asks len(batch); strict tracing reads
        # the Python code and does not.
        try:
            program = _traced(module, zeros, strict=True)
        except Exception as error:
            said = first_line(error)
            raise UsageError(
                f"torch cannot trace the {type(module).__name__} for any batch size "
                f"({said:.300}); take sizes from inputs.shape, or export safetensors alone"
            ) from error
    _forget_origin(program)
    return program


def _traced(module: nn.Module, inputs: Tensor, *, strict: bool) -> ExportedProgram:
    free = {0: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (inputs,), dynamic_shapes=(free,), strict=strict)


def _forget_origin(program: ExportedProgram) -> None:
    """Drop source lines and the paths of this machine, which a graph keeps for debugging."""
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def pt2_bytes(program: ExportedProgram) -> bytes:
    """The content of a ``.pt2`` file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def pt2_run(data: bytes) -> Run:
    """What a program that `pt2_bytes` made answers. For bytes of our own only: see the card."""
    run: Run = torch.export.load(io.BytesIO(data)).module()
    return run
