"""What arrays must be before they are anybody's data, and how they become tensors.

Each function takes ``name`` for its errors and, where rows were picked out of a source, ``ids``
to say which row of the source a fault is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.runtime import DataError

Array = NDArray[Any]
_NUMBERS = "biuf"  # numpy's kinds: bool, signed, unsigned, floating


def numbers(values: object, name: str) -> Array:
    """A torch tensor or numpy array of numbers as a numpy array, without copying if possible."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if not isinstance(values, np.ndarray):
        raise DataError(
            f"{name} must be a torch tensor or a numpy array, not {type(values).__name__}; "
            "convert with torch.as_tensor"
        )
    if values.dtype.kind not in _NUMBERS:
        raise DataError(f"{name} must hold numbers, not {values.dtype}; encode them as numbers")
    return values


def input_array(values: object, name: str, ids: Array | None = None) -> Array:
    """Inputs as they are kept: uint8 for images of bytes, float32 and finite for the rest.

    [N] becomes [N, 1] and [N, H, W] becomes [N, 1, H, W].
    """
    array = numbers(values, f"{name}: inputs")
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"{name} is an empty data set (inputs of shape {list(array.shape)})")
    if array.ndim in (1, 3):
        array = array[:, None]
    if array.dtype == np.uint8 and array.ndim == 4:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the next line refuses
        array = np.ascontiguousarray(array, dtype=np.float32)
    _check_finite(array, f"{name}: inputs", ids)
    return array


def as_floats(array: Array) -> Tensor:
    """What a model reads: float32; bytes of images are divided by 255 in one pass."""
    tensor = torch.from_numpy(array)
    return torch.div(tensor, 255) if array.dtype == np.uint8 else tensor


def label_array(
    values: object,
    count: int,
    classes: Sequence[str] | None,
    name: str,
    ids: Array | None = None,
) -> Array:
    """Labels as int64 [N] in [0, classes), or float32 [N, K], finite.

    With ``classes``, [N, classes] are multi-label: each 1 where the class holds and 0 elsewhere.
    """
    array = numbers(values, f"{name}: labels")
    if array.ndim == 0 or len(array) != count:
        rows = len(array) if array.ndim else 1
        raise DataError(
            f"{name}: {count} inputs but {rows} labels; give one label for each input, in order"
        )
    if array.ndim == 2 and classes is not None:
        return _multi_hot(array, classes, name, ids)
    if array.dtype.kind == "f":
        return _values(array, classes, name, ids)
    return _class_numbers(array, classes, name, ids)


def class_names(classes: Sequence[str] | int | None, name: str) -> tuple[str, ...] | None:
    """The names of the classes; a number C stands for "0" to "C-1"."""
    if classes is None:
        return None
    names = map(str, range(classes)) if isinstance(classes, int) else classes
    found = tuple(names)
    if isinstance(classes, str) or not all(isinstance(item, str) for item in found) or not found:
        raise DataError(f"{name}: classes must be a list of names or their number, not {classes!r}")
    if len(set(found)) < len(found):
        twice = next(item for item in found if found.count(item) > 1)
        raise DataError(f"{name}: class name '{twice}' stands twice; every class needs its own")
    return found


def _multi_hot(array: Array, classes: Sequence[str], name: str, ids: Array | None) -> Array:
    if array.shape[1] != len(classes):
        raise DataError(
            f"{name}: {len(classes)} classes but {array.shape[1]} labels a row; multi-label rows "
            "have a 0 or 1 for each class, in order"
        )
    wrong = (array != 0) & (array != 1)  # a NaN is neither
    if wrong.any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        raise DataError(
            f"{name}: the label '{classes[column]}' of row {_row(row, ids)} is "
            f"{array[row, column]:g}; a multi-label row has a 0 or 1 for each class"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _values(array: Array, classes: Sequence[str] | None, name: str, ids: Array | None) -> Array:
    if classes is not None:
        raise DataError(
            f"{name}: {len(classes)} classes but labels of {array.dtype}; class numbers are "
            "integers: convert with labels.long(), or leave out classes for regression"
        )
    if array.ndim > 2 or array.size == 0:
        raise DataError(
            f"{name}: regression labels must be [N] or [N, K], not {list(array.shape)}; "
            "reshape them"
        )
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array.reshape(len(array), -1), dtype=np.float32)
    _check_finite(array, f"{name}: labels", ids)
    return array


def _class_numbers(
    array: Array, classes: Sequence[str] | None, name: str, ids: Array | None
) -> Array:
    if array.ndim != 1:
        raise DataError(
            f"{name}: class numbers must be [N], not {list(array.shape)}; use labels.argmax(1) "
            "for one-hot rows, labels.float() for values, or name the classes for multi-label rows"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    limit = len(classes) if classes is not None else np.iinfo(np.int64).max
    # Seen as unsigned, a negative number is larger than any limit: one pass finds both faults.
    unsigned = array.view(np.uint64)
    if unsigned.size and unsigned.max() >= limit:
        row = int((unsigned >= limit).argmax())
        known = f"0 to {limit - 1}" if classes is not None else "0 and up"
        raise DataError(
            f"{name}: label {array[row]} of row {_row(row, ids)} is not a class number; classes "
            f"are numbered {known}: map the labels, or name more classes"
        )
    return array


def _check_finite(array: Array, what: str, ids: Array | None) -> None:
    if np.isfinite(array).all():
        return
    row = int((~np.isfinite(array.reshape(len(array), -1)).all(axis=1)).argmax())
    raise DataError(
        f"{what} of row {_row(row, ids)} are not all finite float32 numbers (NaN or infinity); "
        "repair or remove the row"
    )


def _row(row: int, ids: Array | None) -> int:
    return row if ids is None else int(ids[row])
