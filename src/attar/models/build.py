"""From a family's name and options to a module that knows how to be built again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from torch import nn

from attar.models.architectures import transformers
from attar.models.convolutional import mobilenet, resnet
from attar.models.dense import mlp
from attar.models.hub import pretrained
from attar.models.language import (
    language_model,
    pretrained_language_model,
    pretrained_text_classifier,
    pretrained_text_encoder,
    text_classifier,
    text_encoder,
)
from attar.models.text import bilstm
from attar.models.timm_models import timm
from attar.models.transformer import vit
from attar.models.types import DataLike, Shape, Size
from attar.runtime import UsageError, suggest

Family = Callable[..., nn.Module]


def families() -> dict[str, Family]:
    """The families of this room by name."""
    return {
        "bilstm": bilstm,
        "language_model": language_model,
        "mlp": mlp,
        "mobilenet": mobilenet,
        "pretrained": pretrained,
        "pretrained_language_model": pretrained_language_model,
        "pretrained_text_classifier": pretrained_text_classifier,
        "pretrained_text_encoder": pretrained_text_encoder,
        "resnet": resnet,
        "text_classifier": text_classifier,
        "text_encoder": text_encoder,
        "timm": timm,
        "transformers": transformers,
        "vit": vit,
    }


def build(
    family: str | Family,
    /,
    *,
    data: DataLike | None = None,
    shape: Sequence[int] | None = None,
    outputs: int | None = None,
    **options: Any,
) -> nn.Module:
    """A new model with random weights (from torch's global generator).

    Args:
        family: a name from `families`, or a function (or class) of your own,
            ``f(shape, outputs, *, options) -> nn.Module``; a ``functools.partial`` of either.
        data: a source; it supplies *shape*, *outputs* and, where the family names them, ``mean``,
            ``std``, ``labels`` (the names of the classes) and ``vocabulary`` (how many token ids
            there are). What is given explicitly wins.
        shape: shape of one input, e.g. ``(1, 28, 28)``.
        outputs: number of classes or targets.
        options: the family's own; they must be JSON values.

    The module carries ``attar_build = {"family": name, "options": {...}}``, which is all that
    `save` needs for `load` to build it again.

    Errors: an unknown family or option, a value outside its range, a missing *shape* or
    *outputs* (UsageError).

    >>> model = build("resnet", shape=(1, 8, 8), outputs=10, width=4)
    >>> model.attar_build["options"]["depth"]
    8
    """
    function, options = _unwrapped(family, options)
    name = _name(function)
    if data is not None:
        shape = data.shape if shape is None else shape
        outputs = data.outputs if outputs is None else outputs
        options = _with_statistics(function, data, options)
        options = _with_labels(function, data, outputs, options)
        options = _with_vocabulary(function, data, options)
    for needed, value in (("shape", shape), ("outputs", outputs)):
        if value is None:
            raise UsageError(f"{name}: {needed} is not known; pass {needed}= or labelled data=")
    return construct(function, name, {"shape": shape, "outputs": outputs, **options})


def construct(function: Family, name: str, options: Mapping[str, Any]) -> nn.Module:
    """Check *options* (with ``shape`` and ``outputs`` among them) and call *function*."""
    own = {key: value for key, value in options.items() if key not in ("shape", "outputs")}
    shape = _checked(name, "shape", options.get("shape"), Shape)
    outputs = _checked(name, "outputs", options.get("outputs"), Size)
    known, takes_any = _parameters(function, name)
    _check_names(name, own, known, takes_any)
    hints = _hints(function, name)
    values = {key: _checked(name, key, value, hints.get(key, Any)) for key, value in own.items()}
    module = function(shape, outputs, **values)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{name} must return an nn.Module, not {type(module).__name__}")
    if name in families() and (same := getattr(module, "built_as", None)) is not None:
        module.attar_build = same  # a family that read a file is built again without it
        return module
    recorded = {"shape": shape, "outputs": outputs, **_json_defaults(known), **own}
    built: Any = {"family": name, "options": json.loads(json.dumps(recorded))}
    module.attar_build = built
    return module


def known_families(more: Mapping[str, Family] | None) -> dict[str, Family]:
    """This room's families and *more*, whose names must be new."""
    known = families()
    for name, function in (more or {}).items():
        if known.setdefault(name, function) is not function:
            raise UsageError(f"family '{name}' exists in attar.models already; rename yours")
    return known


def _unwrapped(family: str | Family, options: dict[str, Any]) -> tuple[Family, dict[str, Any]]:
    if isinstance(family, str):
        known = families()
        if family not in known:
            raise UsageError(f"model family '{family}' is unknown; {suggest(family, known)}")
        return known[family], options
    function: Any = family
    while isinstance(function, partial):
        if function.args:
            raise UsageError("a partial model function may fix options only, by keyword")
        function, options = function.func, {**function.keywords, **options}
    return function, options


def _name(function: Family) -> str:
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise UsageError(
            f"a model is built by a function with a name, not by {function!r}; "
            f"write def my_model(shape, outputs): ..., or use one of {', '.join(families())}"
        )
    known_families({name: function})
    return name


def _with_statistics(function: Family, data: DataLike, options: dict[str, Any]) -> dict[str, Any]:
    known, _ = _parameters(function, _name(function))
    if not {"mean", "std"} <= known.keys() or {"mean", "std"} & options.keys():
        return options
    mean, std = data.statistics()
    return {**options, "mean": mean, "std": std}


def _with_labels(
    function: Family, data: DataLike, outputs: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    classes = getattr(data, "classes", None)
    known, _ = _parameters(function, _name(function))
    if "labels" not in known or "labels" in options or classes is None or len(classes) != outputs:
        return options
    return {**options, "labels": list(classes)}


def _with_vocabulary(function: Family, data: DataLike, options: dict[str, Any]) -> dict[str, Any]:
    tokens = getattr(data, "vocabulary", None)
    known, _ = _parameters(function, _name(function))
    if "vocabulary" not in known or "vocabulary" in options or tokens is None:
        return options
    return {**options, "vocabulary": tokens}


def _parameters(function: Family, name: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """The options *function* names, and whether it takes any other."""
    parameters = list(inspect.signature(function).parameters.values())
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    if len(parameters) < 2 or any(p.kind not in positional for p in parameters[:2]):
        raise UsageError(
            f"{name} must take the input's shape and the number of outputs first: "
            f"def {name}(shape, outputs, *, options)"
        )
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    options = {p.name: p for p in parameters[2:] if p.kind in named}
    return options, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _check_names(
    name: str, given: Mapping[str, Any], known: Mapping[str, inspect.Parameter], takes_any: bool
) -> None:
    for key in given:
        if key not in known and not takes_any:
            raise UsageError(f"{name} has no option '{key}'; {suggest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise UsageError(f"{name} needs the option '{key}'; pass {key}=")


def _hints(function: Family, name: str) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return get_type_hints(target, include_extras=True)
    except NameError as error:
        raise UsageError(
            f"{name}: an annotation of its signature cannot be resolved ({error}); "
            "import that name at the top of the module"
        ) from None


def _checked(name: str, key: str, value: Any, hint: Any) -> Any:
    """*value* as *hint* says, by way of JSON: what passes can be saved and loaded again."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise UsageError(
            f"{name}: {key} must be a JSON value (finite numbers, text, lists), not {value!r:.80}"
        ) from None
    try:
        return TypeAdapter(hint).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        rule = first["msg"].removeprefix("Input ")
        raise UsageError(f"{name}: {key}{place} {rule}, not {value!r:.80}") from None
    except PydanticSchemaGenerationError:
        raise UsageError(
            f"{name}: {key} is annotated {hint!r:.80}, which no JSON value can be; "
            "give it a JSON type, or choose inside the function"
        ) from None


def _json_defaults(known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Defaults are recorded, so that a later change of one cannot change a saved model."""
    kept = {}
    for key, parameter in known.items():
        try:
            kept[key] = json.loads(json.dumps(parameter.default, allow_nan=False))
        except (TypeError, ValueError):
            continue  # no JSON value: only the function itself can supply it
    return kept
