"""A model that is a family's, but for some of its parts: how a smaller copy is built again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from attar.models import quantized
from attar.models.build import Family, construct, families
from attar.models.language import TokensFace, record_of
from attar.models.reuse import FAMILY as REUSED
from attar.models.reuse import reused
from attar.models.state import shape_differences, shapes_of
from attar.models.types import Shape, Size
from attar.runtime import UsageError

FAMILY = "changed"
_NOT_ON_META = {"timm"}  # its constructors compute with values
_MOST_CHAINED = 8

Whole = Annotated[int, Ge(0), Le(2**24)]
Sides = tuple[Size, Size]
Limits = tuple[float | None, float | None]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Linear(_Part):
    """An ``nn.Linear``."""

    kind: Literal["linear"] = "linear"
    in_features: Size
    out_features: Size
    bias: bool


class Convolution(_Part):
    """An ``nn.Conv2d``."""

    kind: Literal["conv2d"] = "conv2d"
    in_channels: Size
    out_channels: Size
    kernel_size: Sides
    stride: Sides
    padding: tuple[Whole, Whole] | Literal["same", "valid"]
    dilation: Sides
    groups: Size = 1
    bias: bool
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]


Leaf = Annotated[Linear | Convolution, Field(discriminator="kind")]


class Nothing(_Part):
    """Where a part was that another has taken in, such as a batch norm."""

    kind: Literal["identity"] = "identity"


class OnGrid(_Part):
    """A layer of whole numbers, see `attar.models.quantized`."""

    kind: Literal["quantized"] = "quantized"
    mode: quantized.Mode
    bits: Annotated[int, Ge(2), Le(8)]
    layer: Leaf
    reads: Limits | None = None
    writes: Limits | None = None


Inner = Annotated[Linear | Convolution | OnGrid, Field(discriminator="kind")]


class Factors(_Part):
    """A `LowRank` of two layers."""

    kind: Literal["low_rank"] = "low_rank"
    first: Inner
    second: Inner


class Sizes(_Part):
    """The part that is there already, with other sizes of its own tensors and other numbers."""

    kind: Literal["sizes"] = "sizes"
    tensors: dict[str, Shape]
    numbers: dict[str, Whole | tuple[Whole, ...]]


Part = Annotated[
    Linear | Convolution | Factors | Nothing | OnGrid | Sizes, Field(discriminator="kind")
]


class LowRank(nn.Sequential):
    """A layer as two smaller ones, ``first`` and ``second``, with nothing between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def weight(self) -> Tensor:
        """The matrix of the layer that stood here; models of transformers ask for its type."""
        first, second = self.first.weight, self.second.weight
        if not isinstance(self.second, nn.Linear):
            raise AttributeError("a convolution in two layers has no weight of its own")
        return second @ first  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        """The second layer's."""
        return self.second.bias  # type: ignore[return-value]


def changed(
    shape: Shape, outputs: Size, *, start: dict[str, Any], parts: dict[str, Part]
) -> nn.Module:
    """A model that was made smaller, without its weights: how `load` builds it again.

    Args:
        shape: that of the start.
        outputs: that of the start.
        start: what the model was before, ``{"family": name, "options": {...}}``.
        parts: by path, a layer to put there, or other sizes of what is there.
    """
    made = rebuilt(start)
    for path, part in parts.items():
        try:
            owner = made.get_submodule(path)
        except AttributeError:
            raise UsageError(f"{FAMILY}: its start has no part '{path:.80}'") from None
        if isinstance(part, Sizes):
            _resize(owner, path, part)
        else:
            made = put(made, path, _layer(part))
    return made


def rebuilt(start: Mapping[str, Any], whose: str = "start") -> nn.Module:
    """What ``attar_build`` of a model says, built by a family of attar."""
    family, options = start.get("family"), start.get("options")
    known = builders()
    if not isinstance(family, str) or family not in known or not isinstance(options, dict):
        raise UsageError(f"the {whose}'s family {family!r:.80} is none of attar's")
    _check_chain(start)
    return construct(known[family], family, options)


def builders() -> dict[str, Family]:
    """Everything by which `load` builds a model: the families, and what is made from models."""
    return families() | {REUSED: reused, FAMILY: changed}


def on_meta(family: str, options: Mapping[str, Any]) -> bool:
    """Whether a model can be built without memory for its weights."""
    for inner in (options.get("start"), options.get("student")):
        if family in (FAMILY, REUSED) and isinstance(inner, dict):
            return on_meta(str(inner.get("family")), inner.get("options") or {})
    return family not in _NOT_ON_META


def skeleton(start: Mapping[str, Any]) -> nn.Module:
    """`rebuilt`, on the meta device where that is possible; draws nothing from a generator."""
    light = on_meta(str(start.get("family")), start.get("options") or {})
    with torch.random.fork_rng(devices=[]), torch.device("meta") if light else nullcontext():
        return rebuilt(start)


def put(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """*model* with *part* at *path*, in place; *part* itself where the path is empty."""
    if not path:
        return part
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, part)
    return model


def noted(made: Any, source: nn.Module) -> nn.Module:
    """*made*, a changed copy of *source*, with what `load` builds it from, where that can be said.

    It can where *source* is of attar's families, or of transformers and the same as a family
    builds, and where the change is one of sizes or of layers that `changed` knows. Else *made*
    has no ``attar_build``, and is loaded with ``load(folder, into=module)``.
    """
    vars(made).pop("attar_build", None)
    start = origin(source)
    if start is None:
        return made
    if start["family"] == FAMILY:  # the same start, and all changes since
        start = start["options"]["start"]
    parts = differences(skeleton(start), made)
    if parts is None:
        return made
    options = {name: start["options"][name] for name in ("shape", "outputs")}
    told = json.loads(json.dumps({**options, "start": start, "parts": parts}))
    again = skeleton({"family": FAMILY, "options": told})
    if not shape_differences(shapes_of(again.state_dict()), shapes_of(made.state_dict())):
        made.attar_build = {"family": FAMILY, "options": told}
    return made


def origin(model: nn.Module) -> dict[str, Any] | None:
    """How *model* is built again by attar; None where that is not known."""
    built = getattr(model, "attar_build", None)
    if built is not None:
        return copy.deepcopy(built) if built["family"] in builders() else None
    return foreign(model)


def foreign(model: nn.Module) -> dict[str, Any] | None:
    """How a model that transformers made is built, where one built so would be the same."""
    told = record_of(model)
    if told is None:
        return None
    try:
        again: Any = skeleton(told)
    except UsageError:
        return None
    own, other = (_told(each.config) for each in (model, again))
    same = not shape_differences(shapes_of(again.state_dict()), shapes_of(model.state_dict()))
    return again.attar_build if same and own == other else None


def differences(before: nn.Module, after: nn.Module) -> dict[str, Any] | None:
    """The parts of *after* that are not as in *before*, as `changed` reads them, by path.

    None where there is a difference that no such part says.
    """
    found: dict[str, Any] = {}
    return found if _compare(before, after, "", found) else None


# ---------------------------------------------------------------- reading a change


def _compare(before: nn.Module, after: nn.Module, path: str, found: dict[str, Any]) -> bool:
    if _class(before) is not _class(after):
        told = _described(after)
        if told is not None:
            found[path] = told
        return told is not None
    ours, theirs = dict(before.named_children()), dict(after.named_children())
    sizes = _sizes(before, after)
    if sizes is None or ours.keys() != theirs.keys():
        return False
    if sizes["tensors"] or sizes["numbers"]:
        found[path] = sizes
    prefix = f"{path}." if path else ""
    return all(_compare(ours[name], theirs[name], prefix + name, found) for name in ours)


def _class(part: nn.Module) -> type:
    """The class that says what a part computes; a face over tokens says only how it is kept."""
    return type(part).__mro__[2] if isinstance(part, TokensFace) else type(part)


def _described(layer: nn.Module) -> dict[str, Any] | None:
    """*layer* as JSON; None where it is no layer of a known kind."""
    if type(layer) is nn.Identity:
        return {"kind": "identity"}
    if isinstance(layer, quantized.Layer):
        return quantized.told(layer)
    if type(layer) is LowRank:
        first, second = _described(layer.first), _described(layer.second)
        parts = {"kind": "low_rank", "first": first, "second": second}
        return None if first is None or second is None else parts
    if type(layer) is nn.Linear:
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        return {"kind": "linear", **sizes, "bias": layer.bias is not None}
    if type(layer) is nn.Conv2d:
        names = [name for name in Convolution.model_fields if name not in ("kind", "bias")]
        values = {name: getattr(layer, name) for name in names}
        return {"kind": "conv2d", **values, "bias": layer.bias is not None}
    return None


def _sizes(before: nn.Module, after: nn.Module) -> dict[str, Any] | None:
    """Tensors of other shapes, and other whole numbers, in two parts of one class."""
    own, other = _tensors(before), _tensors(after)
    if own.keys() != other.keys():
        return None
    tensors = {
        name: list(tensor.shape)
        for name, tensor in other.items()
        if tensor.shape != own[name].shape
    }
    unsaved = after._non_persistent_buffers_set
    numbers, old = _numbers(after), _numbers(before)
    if unsaved & tensors.keys() or numbers.keys() != old.keys():
        return None
    found = {name: value for name, value in numbers.items() if value != old[name]}
    return {"kind": "sizes", "tensors": tensors, "numbers": found}


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    held = {**part._parameters, **part._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _numbers(part: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """What a part knows of its own sizes."""
    return {
        name: value
        for name, value in vars(part).items()
        if not name.startswith("_") and _is_size(value)
    }


def _is_size(value: object) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int


def _told(config: Any) -> dict[str, Any]:
    """What a config says of the network, and not of where it came from or how it is stored."""
    noise = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    return {name: value for name, value in config.to_dict().items() if name not in noise}


# ---------------------------------------------------------------- making one


def _layer(part: Linear | Convolution | Factors | Nothing | OnGrid) -> nn.Module:
    if isinstance(part, Factors):
        return LowRank(_layer(part.first), _layer(part.second))
    if isinstance(part, Nothing):
        return nn.Identity()
    if isinstance(part, OnGrid):
        return _on_grid(part)
    options = part.model_dump(exclude={"kind"})
    return nn.Linear(**options) if isinstance(part, Linear) else nn.Conv2d(**options)


def _on_grid(part: OnGrid) -> nn.Module:
    layer = _layer(part.layer)
    if part.mode in ("dynamic", "weights") and not isinstance(layer, nn.Linear):
        raise UsageError(f"{FAMILY}: a convolution has no mode {part.mode!r}")
    return quantized.layer(layer, part.mode, part.bits, reads=part.reads, writes=part.writes)


def _resize(part: nn.Module, path: str, sizes: Sizes) -> None:
    for name, shape in sizes.tensors.items():
        old = _tensors(part).get(name)
        if old is None:
            raise UsageError(f"{FAMILY}: its start has no tensor '{path:.80}.{name:.80}'")
        replace(part, name, old.new_zeros(shape))
    known = _numbers(part)
    for name, value in sizes.numbers.items():
        if name not in known or isinstance(value, tuple) != isinstance(known[name], tuple):
            raise UsageError(f"{FAMILY}: '{path:.80}' of its start has no number '{name:.80}'")
        setattr(part, name, value)


def replace(part: nn.Module, name: str, values: Tensor) -> None:
    """Give the tensor *name* of *part* other *values*, of any shape."""
    old = part._parameters.get(name)
    if old is None:
        part._buffers[name] = values
    else:
        part._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)


def _check_chain(start: Mapping[str, Any]) -> None:
    depth, inner = 0, start
    while isinstance(inner, Mapping):
        depth, options = depth + 1, inner.get("options")
        held = options if isinstance(options, Mapping) else {}
        inner = held.get("start") or held.get("student")  # type: ignore[assignment]
    if depth > _MOST_CHAINED:
        raise UsageError(f"the start is a chain of {depth} models, and {_MOST_CHAINED} are read")
