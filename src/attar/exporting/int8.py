"""ONNX files whose layers multiply whole numbers: calibrated by onnxruntime, or as learned.

Weights in these files never make two products of which a sum passes 16 bits, because that is what
x86 processors without VNNI add up in: calibrated ones have 7 bits (``reduce_range``), and learned
ones that need 8 are written without a sign, which onnxruntime multiplies in a way of its own.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from attar.exporting.onnx import forget_origin, onnx_proto
from attar.exporting.tokens import INPUTS, asked
from attar.exporting.tracing import traced
from attar.models.matching import matching
from attar.models.quantized import as_constants, modes
from attar.runtime import UsageError, first_line, quiet
from attar.tasks import Task

FORMAT = "onnx_int8"
_ROWS = 64  # of a batch that is calibrated on
_SAFE = 64  # twice its product with 255 is within 16 bits
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_FLOAT = {"GRU", "LSTM", "RNN"}  # of which onnxruntime has no static int8
_SCOPES = "pkg.torch.onnx.name_scopes"
_SHOWN = 4


def check_int8(formats: Collection[str], module: nn.Module, calibrated: bool) -> None:
    """Refuse formats in which *module*'s whole numbers would be floats, or nothing is known.

    Raises:
        UsageError: as above.
    """
    found = set(modes(module).values())
    if FORMAT in formats and found & {"dynamic", "weights"}:
        how = min(found & {"dynamic", "weights"})
        raise UsageError(
            f"{FORMAT} is for float models and for those of quantize(mode='learn'), and this one "
            f"has mode '{how}'; export safetensors"
        )
    if "onnx" in formats and found:
        instead = "safetensors" if found & {"dynamic", "weights"} else f"{FORMAT} or safetensors"
        raise UsageError(
            f"the module is quantised, and the format onnx is for floats; export {instead}"
        )
    if FORMAT in formats and not found and not calibrated:
        raise UsageError(
            f"{FORMAT} needs examples that its ranges are taken from; pass some hundred training "
            "inputs as calibration=, or export a model of quantize(mode='learn')"
        )


def int8_bytes(
    module: nn.Module,
    task: Task | None,
    examples: tuple[Tensor, ...],
    calibration: tuple[Tensor, ...] | None,
    skip: Sequence[str],
) -> bytes:
    """The content of one ONNX file with ``QuantizeLinear`` and ``DequantizeLinear`` (QDQ).

    Raises:
        UsageError: a layer that would stay float and is not in *skip*; ONNX has no word for
            something in the module.
    """
    if modes(module):
        proto = _learned(module, task, examples)
    else:
        assert calibration is not None
        float_one = onnx_proto(traced(asked(module, examples, task), examples))
        proto = _calibrated(float_one, module, calibration, skip)
    forget_origin(proto)
    return proto.SerializeToString()


# ---------------------------------------------------------------- as learned


def _learned(module: nn.Module, task: Task | None, examples: tuple[Tensor, ...]) -> Any:
    """The file of a model on grids: its own scales and zeros, and no other rounding."""
    # Names the operator that is written as DequantizeLinear; torch loads it on demand only.
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    whole = asked(as_constants(module), examples, task)
    proto = onnx_proto(traced(whole, examples))
    _drop_ramps(proto.graph)
    _without_sign(proto.graph)
    return proto


def _drop_ramps(graph: Any) -> None:
    """Take away each ReLU of what is on a grid without negative numbers: it does nothing.

    It would stand between two layers that onnxruntime computes in whole numbers.
    """
    made = {output: node for node in graph.node for output in node.output}
    values = _values(graph)
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        before = made.get(node.input[0]) if node.input else None
        if before is None or before.op_type != "DequantizeLinear":
            continue
        scale, zero = (values.get(name) for name in before.input[1:3])
        if scale is None or zero is None or zero.size != 1 or zero.dtype != "uint8" or zero.any():
            continue
        limits = [values.get(name) for name in node.input[1:]]
        beyond = _beyond(node.op_type, limits, float(scale) * 255)
        if not beyond and node.output[0] not in {output.name for output in graph.output}:
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)


def _beyond(kind: str, limits: Sequence[Any], largest: float) -> bool:
    """Whether a step changes any number from 0 to *largest*."""
    if kind == "Relu":
        return False
    if kind != "Clip" or len(limits) != 2 or any(each is None for each in limits):
        return True
    low, high = (float(each) for each in limits)
    return low > 0 or high * (1 + 1e-6) < largest


def _without_sign(graph: Any) -> None:
    """Write weights that need 8 bits as numbers from 0 to 255, where 128 is zero."""
    onnx: Any = importlib.import_module("onnx")
    held = {each.name: each for each in graph.initializer}
    for node in graph.node:
        weight = held.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type != onnx.TensorProto.INT8:
            continue
        numbers = onnx.numpy_helper.to_array(weight).astype("int16")
        if abs(numbers).max(initial=0) <= _SAFE:
            continue
        name = node.input[0]
        zero = onnx.numpy_helper.to_array(held[node.input[2]]).astype("int16")
        for values, called in ((numbers, name), (zero, f"{name}.zero")):
            made = onnx.numpy_helper.from_array((values + 128).astype("uint8"), called)
            if called == name:
                weight.CopyFrom(made)
            else:
                graph.initializer.append(made)
        node.input[2] = f"{name}.zero"


def _values(graph: Any) -> dict[str, Any]:
    """The small constants of a graph, by name."""
    onnx: Any = importlib.import_module("onnx")
    held = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in graph.initializer
        if len(each.dims) == 0
    }
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            held[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return held


# ---------------------------------------------------------------- calibrated


def _calibrated(
    proto: Any, module: nn.Module, calibration: tuple[Tensor, ...], skip: Sequence[str]
) -> Any:
    """The file as onnxruntime makes it, after it has seen *calibration*."""
    onnx: Any = importlib.import_module("onnx")
    tools: Any = importlib.import_module("onnxruntime.quantization")
    prepare: Any = importlib.import_module("onnxruntime.quantization.shape_inference")
    paths = _paths(proto.graph, module)
    spared = _spared(module, paths.values(), skip)
    for number, node in enumerate(proto.graph.node):
        node.name = f"{number}:{paths.get(number, '')}"
    excluded = [proto.graph.node[number].name for number in paths if paths[number] in spared]
    _check_kinds(proto.graph, paths, spared)
    with tempfile.TemporaryDirectory() as folder, quiet():
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        onnx.save(proto, given)
        try:
            prepare.quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            tools.quantize_static(
                str(prepared),
                str(made),
                _reader(tools, calibration),
                quant_format=tools.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                nodes_to_exclude=excluded,
            )
        except Exception as error:  # it has errors of many kinds
            said = first_line(error)
            raise UsageError(
                f"onnxruntime cannot make int8 of this module ({said:.300}); export onnx"
            ) from error
        found = onnx.load(made)
    _check_rounded(found.graph, spared)
    return found


def _reader(tools: Any, calibration: tuple[Tensor, ...]) -> Any:
    batches = iter(zip(*(each.split(_ROWS) for each in calibration), strict=True))

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            if batch is None:
                return None
            return {name: each.numpy() for name, each in zip(INPUTS, batch, strict=False)}

    return Reader()


def _paths(graph: Any, module: nn.Module) -> dict[int, str]:
    """By number of a node that multiplies with weights, the path of its layer."""
    known = {path for path, _ in module.named_modules()}
    held = {each.name for each in graph.initializer}
    found: dict[int, str] = {}
    for number, node in enumerate(graph.node):
        if node.op_type not in _PRODUCTS | _FLOAT or not held.intersection(node.input[1:]):
            continue
        owners = (name.rpartition(".")[0] for name in node.input[1:] if name in held)
        scopes = {each.key: each.value for each in node.metadata_props}.get(_SCOPES, "")
        named = [*owners, *reversed(scopes.strip("[]").replace("'", "").split(", "))]
        places = (name.removeprefix("model.") if name not in known else name for name in named)
        found[number] = next((place for place in places if place and place in known), node.name)
    return found


def _spared(module: nn.Module, paths: Collection[str], skip: Sequence[str]) -> set[str]:
    if not skip:
        return set()
    tensors = matching(module, skip, "skip: the module")
    return {path for path in paths if any(name.startswith(f"{path}.") for name in tensors)}


def _check_kinds(graph: Any, paths: Mapping[int, str], spared: set[str]) -> None:
    kinds = {
        path: graph.node[number].op_type
        for number, path in paths.items()
        if graph.node[number].op_type in _FLOAT and path not in spared
    }
    _refuse_float({path: f"is a {kind}" for path, kind in kinds.items()})


def _check_rounded(graph: Any, spared: set[str]) -> None:
    """Every product with weights reads whole numbers and multiplies with whole numbers."""
    made = {output: node for node in graph.node for output in node.output}
    held = {each.name for each in graph.initializer}
    left: dict[str, str] = {}
    for node in graph.node:
        path = node.name.partition(":")[2]
        if node.op_type not in _PRODUCTS or not path or path in spared:
            continue
        for name, what in zip(node.input, ("reads", "weighs with"), strict=False):
            source = made.get(name)
            if name in held or source is None or source.op_type != "DequantizeLinear":
                left[path] = f"{what} floats"
    _refuse_float(left)


def _refuse_float(why: Mapping[str, str]) -> None:
    if not why:
        return
    shown = ", ".join(f"'{path}' ({reason})" for path, reason in list(why.items())[:_SHOWN])
    more = f" and {len(why) - _SHOWN} more" if len(why) > _SHOWN else ""
    raise UsageError(
        f"{FORMAT}: {shown}{more} would stay float; name what may in skip=[...], or export onnx"
    )
