"""From a traced program to the bytes of an ONNX file, and back to answers in onnxruntime."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from attar.exporting.artefact import Run
from attar.exporting.tokens import INPUTS
from attar.exporting.tracing import Graph
from attar.runtime import UsageError, first_line, quiet

OPSET = 20  # read by onnxruntime 1.17 (2024) and later
LIMIT = 2**31 - 1  # bytes of a protocol buffer
OUTPUT = "outputs"
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_onnx(module: nn.Module) -> None:
    """Refuse what cannot work, before anything is traced.

    Raises:
        UsageError: a library is missing, or the weights do not fit one file.
    """
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"the format onnx needs {', '.join(NEEDED)}, and {error.name or 'one'} is missing; "
            'type: pip install "attar[onnx]"'
        ) from None
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size >= LIMIT:
        raise UsageError(
            f"the weights have {size} bytes, but one ONNX file holds less than {LIMIT}; "
            "export safetensors or torch_export"
        )


def onnx_bytes(graph: Graph) -> bytes:
    """The content of one ONNX file, weights included: input ``inputs``, output ``outputs``.

    Texts have a second input, ``attention``.

    Raises:
        UsageError: ONNX has no word for something in the program.
    """
    proto = onnx_proto(graph)
    forget_origin(proto)
    return proto.SerializeToString()


def onnx_proto(graph: Graph) -> Any:
    """`onnx_bytes` as an object, which still tells from which part of the module a node is."""
    onnx: Any = importlib.import_module("onnx")
    try:
        with quiet():
            made = torch.onnx.export(
                graph.program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.inputs),
                output_names=[OUTPUT],
                dynamic_shapes=tuple(graph.free for _ in graph.inputs),
                verbose=False,
            )
            assert made is not None
            proto = made.model_proto  # made anew each time it is asked for
            onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        said = first_line(error).partition("\x1b")[0].strip()  # what follows is in colour
        raise UsageError(
            f"torch cannot say this module in ONNX ({said:.300}); export safetensors or "
            "torch_export"
        ) from error
    return proto


def forget_origin(proto: Any) -> None:
    """Drop what the exporter noted for debugging: names of code, and half of a small file."""
    proto.ClearField("metadata_props")
    for holder in (proto.graph, *proto.functions):
        holder.ClearField("metadata_props")
        for item in (*holder.node, *holder.value_info):
            item.ClearField("metadata_props")
            item.ClearField("doc_string")
    for item in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.ClearField("metadata_props")


def onnx_run(data: bytes) -> Run:
    """What onnxruntime answers on the CPU, with as many threads as torch uses."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        given = {name: each.numpy() for name, each in zip(INPUTS, inputs, strict=False)}
        return torch.from_numpy(session.run(None, given)[0])

    return run
