"""A teacher that is an ONNX file, run by onnxruntime."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray

from attar.runtime import DataError, UsageError, first_line, suggest
from attar.tasks import Task
from attar.teachers.function import FLOOR, Function, Gives

READS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
PASSING = {"Identity", "Cast"}  # they leave what a number means as it is


def from_onnx(
    path: str | Path,
    task: Task,
    *,
    gives: Gives = "logits",
    input: str | None = None,
    output: str | None = None,
    channels_last: bool = False,
    floor: Annotated[float, Interval(gt=0, le=0.1)] = FLOOR,
) -> Function:
    """An ONNX file as a teacher, run by onnxruntime on the CPU; needs ``attar[onnx]``.

    The whole file is read at once, so that what teaches is what its SHA-256 says, which is also
    its version. It runs with as many threads as torch uses when it is opened here.

    Args:
        path: one file with its weights in it; data in other files are refused.
        task, gives, channels_last, floor: as in ``Function``.
        input: the name of what it reads, where it reads several things and the rest have defaults.
        output: the name of the answer, where it gives several.

    A file for a fixed number of rows, such as 1, is run on so many at a time.

    Errors: a library is missing, an input or output that is not there, ends in a softmax or a
    sigmoid and is said to give logits (UsageError); no such file, not a whole ONNX file, weights
    outside of it, inputs or outputs of another shape or type than the task's (DataError).

    Example:
        ``teacher = from_onnx("model.onnx", task, gives="probabilities")``
    """
    place = Path(path)
    onnx, onnxruntime = _libraries()
    if not place.is_file():
        raise DataError(f"{place}: there is no such file; give the path of an .onnx file")
    data = place.read_bytes()
    proto = _parsed(onnx, data, place)
    session = _session(onnxruntime, data, place)
    reads = _named(session.get_inputs(), input, "input", place)
    says = _named(session.get_outputs(), output, "output", place)
    _check_input(reads, place)
    _check_output(says, proto.graph, task, gives, place)
    return Function(
        _runner(session, reads, says.name, place),
        task,
        gives=gives,
        channels_last=channels_last,
        floor=floor,
        name=place.name,
        version=hashlib.sha256(data).hexdigest(),
    )


def _libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UsageError(
            f"an ONNX file as teacher needs {error.name or 'onnxruntime'}, which is missing; type: "
            'pip install "attar[onnx]"'
        ) from None


def _parsed(onnx: Any, data: bytes, path: Path) -> Any:
    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:
        raise DataError(f"{path}: not a whole ONNX file ({first_line(error):.200})") from error
    if (name := _outside(proto)) is not None:
        raise DataError(
            f"{path}: '{name}' lies in another file, and only a file that holds all of its weights "
            "is read; join them: onnx.save(onnx.load(PATH), ONE_FILE)"
        )
    return proto


def _outside(message: Any) -> str | None:
    """The first tensor, wherever it stands, whose values are in another file."""
    if message.DESCRIPTOR.name == "TensorProto":
        external = message.data_location == message.EXTERNAL or len(message.external_data) > 0
        return message.name or "a tensor" if external else None
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "DESCRIPTOR") else value:
            if (found := _outside(part)) is not None:
                return found
    return None


def _session(onnxruntime: Any, data: bytes, path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(f"{path}: onnxruntime cannot run it ({first_line(error):.300})") from error


def _named(there: Sequence[Any], name: str | None, what: str, path: Path) -> Any:
    """The input or output that is meant."""
    names = [each.name for each in there]
    if name is None and len(there) == 1:
        return there[0]
    if name is None:
        raise UsageError(
            f"{path}: has {len(there)} {what}s ({', '.join(names[:8])}); name one in Python: "
            f"attar.teachers.from_onnx(path, task, {what}={names[0]!r})"
            if names
            else f"{path}: has no {what}"
        )
    if name not in names:
        raise UsageError(f"{path}: has no {what} '{name}'; {suggest(name, names)}")
    return there[names.index(name)]


def _check_input(reads: Any, path: Path) -> None:
    if reads.type not in READS:
        raise DataError(
            f"{path}: its input '{reads.name}' is a {reads.type}, and inputs are real numbers; run "
            "it in a function of yours: attar.teachers.Function"
        )


def _check_output(says: Any, graph: Any, task: Task, gives: str, path: Path) -> None:
    if not says.type.startswith("tensor("):
        raise DataError(
            f"{path}: its output '{says.name}' is a {says.type}, and an answer is one tensor; "
            "export it without a ZipMap"
        )
    width, shape = task.width, says.shape
    if gives != "labels" and len(shape) == 2 and isinstance(shape[1], int) and shape[1] != width:
        raise DataError(
            f"{path}: its output '{says.name}' is {shape}, where the task has {width}: a teacher "
            "of other classes has classes: a list of what each output stands for"
        )
    last = _last(graph, says.name)
    if gives == "logits" and last in ("Softmax", "Sigmoid"):
        raise UsageError(
            f"{path}: ends in a {last.lower()}, so it gives probabilities; say gives: probabilities"
        )


def _last(graph: Any, name: str) -> str | None:
    """The kind of the node that makes an output."""
    made_by = {made: node for node in graph.node for made in node.output}
    node = made_by.get(name)
    while node is not None and node.op_type in PASSING:
        node = made_by.get(node.input[0])
    return None if node is None else str(node.op_type)


def _runner(session: Any, reads: Any, output: str, path: Path) -> Callable[[Any], NDArray[Any]]:
    """The file as a function on arrays."""
    dtype, shape = READS[reads.type], list(reads.shape)
    fixed = shape[0] if shape and isinstance(shape[0], int) else None

    def run(rows: NDArray[np.float32]) -> NDArray[Any]:
        _check_shape(rows, shape, path)
        rows = rows.astype(dtype, copy=False)
        if fixed is None:
            return session.run([output], {reads.name: rows})[0]
        parts = []
        for start in range(0, len(rows), fixed):
            part = rows[start : start + fixed]
            short = fixed - len(part)  # of the last part: its last row again, and not asked for
            whole = np.concatenate([part, part[-1:].repeat(short, 0)]) if short else part
            parts.append(session.run([output], {reads.name: whole})[0][: len(part)])
        return np.concatenate(parts)

    return run


def _check_shape(rows: NDArray[Any], shape: Sequence[Any], path: Path) -> None:
    """The inputs must be what the file says of all but the first, the number of rows."""
    theirs, ours = list(shape[1:]), list(rows.shape[1:])
    free = [own if not isinstance(side, int) else side for side, own in zip(theirs, ours)]  # noqa: B905
    if len(theirs) == len(ours) and free == ours:
        return
    hint = "make it read these, or wrap it: attar.teachers.adapted"
    if len(ours) == 3 == len(theirs):
        if free == [*ours[1:], ours[0]]:
            hint = "it reads channels last: attar.teachers.from_onnx(..., channels_last=True)"
        elif free[0] == ours[0]:
            hint = f"images of another size are resized by size: {free[1]}"
    raise DataError(f"{path}: reads inputs {theirs}, and the data have {ours}; {hint}")
