"""What a teacher's answers depend on, in words that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime import UsageError
from attar.tasks import Task
from attar.teachers.function import Function

# They change with how a module is used or where it was read, not with what it answers.
PASSING = {"training", "gradient_checkpointing", "name_or_path"}
# Their code changes with a release, what it computes does not.
LIBRARIES = {"torch", "transformers", "timm", "attar"}


def fingerprint_of(
    model: nn.Module, task: Task, precision: torch.dtype | None = None
) -> dict[str, str]:
    """What a module's answers depend on, beside the batch.

    Returns:
        ``model``: its class and the SHA-256 of its structure, which is every part's path, class,
        options and, outside of the large libraries, the names its ``forward`` uses; ``weights``:
        SHA-256 over sorted names, types, shapes and bytes of parameters and buffers, and the
        version of a function; ``precision``; ``task``, as JSON. None depends on device, mode,
        ``requires_grad`` or memory layout.

    What ``forward`` computes by other code, or by values that are no tensor, number or name, is not
    seen.

    Errors: a function without a version (UsageError).
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    return {
        "model": f"{type(model).__name__} {sha256(_structure(model))}",
        "weights": _weights(model),
        "precision": "the model's own" if precision is None else str(precision),
        "task": json.dumps(task.describe(), sort_keys=True),
    }


def joined(prints: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The fingerprints of several teachers as one: by key, all of theirs in order."""
    told = list(prints)
    keys = sorted({key for each in told for key in each})
    return {key: sha256(json.dumps([each.get(key) for each in told])) for key in keys}


def fingerprint_or_refuse(teacher: Any, called: str) -> dict[str, str]:
    """A teacher's own fingerprint; UsageError where it is a teacher of yours without one."""
    if not hasattr(teacher, "fingerprint"):
        raise UsageError(
            f"{called}, a {type(teacher).__name__}, does not say what its answers depend on; give "
            "it fingerprint() -> {name: value}, of texts"
        )
    found: dict[str, str] = teacher.fingerprint()
    return found


def sha256(text: str) -> str:
    """Of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _structure(model: nn.Module) -> str:
    """A line for each part of a model."""
    lines = []
    for path, part in model.named_modules(remove_duplicate=False):
        options = {k: s for k, v in sorted(vars(part).items()) if (s := _said(k, v)) is not None}
        told = [path, type(part).__name__, part.extra_repr(), options, _used(part)]
        lines.append(json.dumps(told))
    return "\n".join(lines)


def _said(name: str, value: Any) -> Any:
    """An option of a part as JSON; None for what says nothing of its answers."""
    if name.startswith("_") or name in PASSING:
        return None
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value.__qualname__
    if isinstance(value, list | tuple):
        return [_said("", each) for each in value]
    return None


def _used(part: nn.Module) -> Any:
    """What the code of a part's ``forward`` is, where a change of it would be the user's."""
    if isinstance(text := getattr(part, "code", None), str):  # a script, or a traced program
        return text
    code = getattr(type(part).forward, "__code__", None)
    if code is None or type(part).__module__.partition(".")[0] in LIBRARIES:
        return None
    return [list(code.co_names), [c for c in code.co_consts if isinstance(c, float)]]


@torch.no_grad()
def _weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    named: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    for path, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, Function):
            digest.update(f"{path} version {_version(part)}\n".encode())
    return digest.hexdigest()


def _version(function: Function) -> str:
    if function.version is None:
        raise UsageError(
            f"{function.name} has no version, so answers of it that are kept could not be told "
            "from those of another function; give version='1', and change it with the function"
        )
    return function.version


def _bytes(tensor: Tensor) -> memoryview:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    flat = whole.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
