"""What a name in a recipe can mean: the public names of each room, and of plugins."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_type_hints

import torch

from attar.models.types import Model
from attar.runtime import UsageError

Room = dict[str, Callable[..., Any]]

# What a stage supplies to a member of the room, which a recipe therefore cannot write.
SUPPLIED: dict[str, frozenset[str]] = {
    "augmentations": frozenset({"batch", "draw"}),
    "losses": frozenset(
        {"student", "teacher", "labels", "mask", "ids", "offsets", "progress", "rows", "self"}
    ),
    "models": frozenset(
        {"shape", "outputs", "mean", "std", "labels"}
        | {"teacher", "model", "data", "example", "task", "seed"}
    ),
    "optimizers": frozenset({"params"}),
    "projectors": frozenset({"student", "teacher", "model"}),
    "readers": frozenset(),
    "schedules": frozenset({"progress"}),
    "stages": frozenset(
        {
            "resume",
            "student",
            "teacher",
            "data",
            "task",
            "validation",
            "run",
            "progress",
            "seed",
            "device",
            "precision",
            "parallel",
            "module",
            "model",
            "folder",
            "example",
            "card",
            "calibration",
            "test",
        }
    ),
    "tasks": frozenset({"mean", "std"}),
}

# What a recipe may say of it all the same, by the member's name: words, or a model to be built.
SAID: dict[str, dict[str, Any]] = {
    "distill": {"teacher": Literal["previous", "unchanged"], "student": Model, "reuse_head": bool}
}


def rooms(plugins: Sequence[str] = ()) -> dict[str, Room]:
    """Every room by name; each plugin's ``__all__`` is added to all of them."""
    from attar import data, exporting, losses, models, tasks, training
    from attar.models import projectors
    from attar.recipes.changes import PLANS
    from attar.training import optimization

    changing: Room = {f.__name__: f for f in PLANS}
    found: dict[str, Room] = {
        "augmentations": _functions(data, returns=data.Batch),
        "losses": _functions(losses),
        "models": models.families() | changing,
        "optimizers": _torch_optimizers() | {f.__name__: f for f in (training.sgd, training.adamw)},
        "projectors": _functions(projectors),
        "readers": _functions(data, returns=data.Splits, keyword_only=True),
        "schedules": {
            f.__name__: f
            for f in (
                optimization.constant,
                optimization.cosine,
                optimization.linear,
                optimization.ramp,
            )
        },
        "stages": {f.__name__: f for f in (training.distill, training.train, exporting.export)}
        | changing,
        "tasks": {
            name: kind
            for name in tasks.__all__
            if inspect.isclass(kind := getattr(tasks, name)) and not inspect.isabstract(kind)
        },
    }
    for plugin in plugins:
        _add_plugin(found, plugin)
    return found


def _functions(module: ModuleType, *, returns: Any = None, keyword_only: bool = False) -> Room:
    chosen: Room = {}
    for name in module.__all__:
        value = getattr(module, name)
        if not inspect.isfunction(value):
            continue
        if returns is not None and get_type_hints(value).get("return") != returns:
            continue
        parameters = inspect.signature(value).parameters.values()
        if keyword_only and any(p.kind is not p.KEYWORD_ONLY for p in parameters):
            continue
        chosen[name] = value
    return chosen


def _torch_optimizers() -> Room:
    return {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam, torch.optim.LBFGS)
    }


def _add_plugin(found: dict[str, Room], plugin: str) -> None:
    module = _imported(plugin)
    names = getattr(module, "__all__", None)
    if not names:
        raise UsageError(f"plugin {plugin}: has no __all__; list there what recipes may name")
    for name in names:
        value = getattr(module, name, None)
        if not callable(value):
            raise UsageError(f"plugin {plugin}: its __all__ names '{name}', which is not callable")
        for room in found.values():
            if name in room:
                raise UsageError(
                    f"plugin {plugin}: '{name}' is already the name of something in attar; "
                    "choose another"
                )
        for room in found.values():
            room[name] = value


def _imported(plugin: str) -> ModuleType:
    """Import a file or a package; only ever what the command line named."""
    path = Path(plugin)
    try:
        if path.suffix != ".py":
            return importlib.import_module(plugin)
        if not path.is_file():
            raise UsageError(f"plugin {plugin}: there is no such file")
        name = f"attar_plugin_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"plugin {plugin}: cannot be imported: {type(error).__name__}: {error}"
        ) from error
