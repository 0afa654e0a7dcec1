"""The state dict of a module: which tensors are one, whether they fit, and filling them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attar.models.record import printable
from attar.runtime import DataError, UsageError

_SHOWN = 4


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by name; a UsageError for one that cannot be stored as it is."""
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        kind = _unfit(tensor)
        if kind:
            raise UsageError(f"'{name}' of the module is {kind}; only plain tensors have a file")
    return dict(state)


def _unfit(tensor: object) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"extra state of type {type(tensor).__name__}"
    if is_lazy(tensor):
        return "not initialised yet (run the module once)"
    if tensor.is_meta:
        return "on the meta device, without values (use module.to_empty(device=...))"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return f"a {type(tensor).__name__} of layout {tensor.layout}"
    return None


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The shape of each tensor."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def shape_differences(own: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> str:
    """What is missing, unexpected or of another shape in *found*; empty when nothing is."""
    missing = [name for name in own if name not in found]
    unexpected = [name for name in found if name not in own]
    shapes = [
        f"{name} {list(found[name])} instead of {list(own[name])}"
        for name in own
        if name in found and list(own[name]) != list(found[name])
    ]
    parts = (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
    return "; ".join(f"{what}: {_listed(items)}" for what, items in parts if items)


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(printable(item[:120]) for item in items[:_SHOWN])
    more = len(items) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of a tensor to its first name: the same memory, seen in the same way."""
    first: dict[object, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            key: object = id(tensor)
        else:
            kind = isinstance(tensor, nn.Parameter), tensor.dtype, tensor.device
            key = tensor.data_ptr(), tensor.shape, tensor.stride(), kind
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def check_apart(stored: Mapping[str, Tensor]) -> None:
    """Refuse tensors that share memory without being the same: the tie would be lost."""
    spans = sorted((*_span(tensor), name) for name, tensor in stored.items() if tensor.numel())
    for (_, end, before), (start, _, name) in pairwise(spans):
        if start < end:
            raise UsageError(
                f"'{before}' and '{name}' share memory without being the same tensor; tie them by "
                "assigning the same Parameter, or give one a copy"
            )


def _span(tensor: Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, *, adopt: bool) -> None:
    """Copy *tensors*, which have the module's names and shapes; *adopt* takes their types too."""
    state = plain_state(module)
    for alias, name in aliases_of(state).items():
        if tensors[alias] is not tensors[name] and not _same(tensors[alias], tensors[name]):
            raise DataError(
                f"{source}: '{name}' and '{alias}' differ, but are one tensor in the module; "
                "untie them there first"
            )
    if adopt:
        for name, own in state.items():
            if own.dtype != tensors[name].dtype:
                own.data = own.data.to(tensors[name].dtype)
    module.load_state_dict(dict(tensors), strict=True)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def tie(module: nn.Module, aliases: Mapping[str, str]) -> None:
    """Make each alias the tensor it names."""
    state = module.state_dict(keep_vars=True)
    for alias, name in aliases.items():
        if state[alias] is not state[name]:
            owner, _, attribute = alias.rpartition(".")
            setattr(module.get_submodule(owner), attribute, state[name])
