"""The library torch-pruning at work on a copy of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.compression.axes import APART
from attar.runtime import UsageError, first_line, quiet

INSTALL = 'pip install "attar[prune]"'

# What attention calls its parts, and how many heads it has.
_READS = (("qkv",), *APART)
_HEADS = ("heads", "num_attention_heads", "num_heads", "n_heads")
_INNER = ("gate_proj", "up_proj", "wi", "wi_0", "wi_1")
_WIDTHS = ("all_head_size",)  # heads times the width of one


class Attention(NamedTuple):
    """A part that reads with several heads, and the layers that make what it reads."""

    part: nn.Module
    layers: list[nn.Linear]
    heads: int


def check_known(model: nn.Module, chosen: Collection[str]) -> None:
    """Refuse what torch-pruning cannot prune: it would hang, or leave a model that does not run.

    The inner features of perceptrons are free to go in every model.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int) and groups != heads:
        why = f"its {heads} heads share {groups} keys and values"
    elif "t5" in kind:
        why = "all its layers share the positions of the first one's heads"
    else:
        return
    inner = {path for path in chosen if path.rpartition(".")[2] in _INNER}
    if inner != set(chosen):
        raise UsageError(
            f"prune: channels and heads of a {kind} cannot be pruned, because {why}; attar.shrink "
            "makes it narrower and shorter, or name only what is inside of its perceptrons "
            f'(layers=["*.{_INNER[0]}", ...]; of these: {", ".join(_INNER)})'
        )


def attentions(model: nn.Module) -> list[Attention]:
    """Every part of *model* with several heads."""
    found = []
    for part in model.modules():
        for names in _READS:
            layers = [getattr(part, name, None) for name in names]
            heads = _heads_of(part)
            if heads and all(isinstance(layer, nn.Linear) for layer in layers):
                found.append(Attention(part, layers, heads))  # type: ignore[arg-type]
                break
    return found


def _heads_of(part: nn.Module) -> int | None:
    owners = (part, getattr(part, "config", None))
    named = (getattr(owner, name, None) for owner in owners for name in _HEADS)
    return next((value for value in named if type(value) is int), None)


def pruned(
    model: nn.Module,
    example: Any,
    forward: Callable[[nn.Module, Any], Tensor],
    *,
    loss: Callable[[Any], Tensor] | None,
    chosen: Collection[str],
    ratio: float,
    importance: str,
    together: bool,
    round_to: int | None,
) -> nn.Module:
    """*model*, a copy, with fewer channels; its tensors hold where each of their numbers was.

    Args:
        forward: runs a model on *example*.
        loss: of what *forward* returned, for importances by gradient.
        chosen: paths of the layers whose outputs may become fewer.
    """
    library = _library()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # keys that are kept are no part of the graph
    model.requires_grad_(True)  # the graph is that of the gradients
    several = attentions(model)
    heads = {layer: each.heads for each in several for layer in each.layers}
    seen: dict[Any, Tensor] = {}
    measure = _importance(library, importance)

    def remembered(group: Any) -> Any:
        found = measure(group)
        if found is not None:
            seen[_root(group)] = found.detach().cpu()
        return found

    spared = [
        part
        for path, part in model.named_modules()
        if not any(True for _ in part.children()) and path not in chosen
    ]
    with quiet(), torch.enable_grad():
        if loss is not None:
            loss(forward(model, example)).backward()
        try:
            pruner = library.pruner.BasePruner(
                model,
                example_inputs=example,
                forward_fn=forward,
                importance=remembered,
                pruning_ratio=ratio,
                global_pruning=together,
                round_to=round_to,
                ignored_layers=_without(spared),
                num_heads=dict(heads),
                prune_num_heads=True,
                prune_head_dims=False,
                head_pruning_ratio=ratio if together else 0.0,
                head_pruning_ratio_dict={
                    layer: _whole(ratio, each.heads) for each in several for layer in each.layers
                },
                # Its defaults are tables that all its calls would share.
                in_channel_groups={},
                out_channel_groups={},
                root_module_types=[nn.Linear, nn.Conv2d],
            )
            rules = _Rules(ratio, together, round_to or 1, heads)
            # It would leave out what loses all of its channels, and so prune less at a high ratio.
            pruner.DG.check_pruning_group = lambda group: True
            for number, group in enumerate(pruner.step(interactive=True)):
                if number == 0:  # all importances are known by now, and the values have served
                    _mark(model)
                if (left := _left_alive(pruner, group, seen[_root(group)], rules)) is not None:
                    left.prune()
        except UsageError:
            raise
        except Exception as error:  # it has errors of many kinds
            said = first_line(error)
            raise UsageError(
                f"prune: torch-pruning cannot prune this {type(model).__name__} ({said:.300}); "
                "name fewer layers, or use attar.shrink"
            ) from error
    for each in several:
        _set_heads(each, pruner.num_heads[each.layers[0]])
    return model


class _Rules(NamedTuple):
    """How many channels may go: the share, among what, in which multiples, in heads of which."""

    ratio: float
    together: bool
    round_to: int
    heads: dict[nn.Linear, int]


def _root(group: Any) -> tuple[Any, Any]:
    """The layer whose channels a group counts by, and which of its sides they are on."""
    dep = group[0].dep
    return dep.target.module, dep.handler


def _left_alive(pruner: Any, group: Any, importance: Tensor, rules: _Rules) -> Any:
    """*group*, or fewer of its channels where a layer would lose all; None where none can go.

    Args:
        importance: of each channel of the group's root.
    """
    graph = pruner.DG
    alive = type(graph).check_pruning_group
    if alive(graph, group):
        return group
    readers = [
        dep.target.module
        for dep, _ in group
        if dep.target.module in rules.heads and graph.is_out_channel_pruning_fn(dep.handler)
    ]
    places = torch.arange(len(importance))
    if readers:  # whole heads go, each a row of its channels
        units, step = places.reshape(rules.heads[readers[0]], -1), 1
    else:  # of channels in groups one of each goes
        units = places.reshape(pruner._get_channel_groups(group), -1).T
        step = rules.round_to // math.gcd(rules.round_to, units.shape[1])
    order = units[importance[units].mean(1).argsort(stable=True)]
    kept, gone = len(units), len(group[0].idxs) // units.shape[1]
    for left in range(_least(len(units), gone, step, rules), len(units), step):
        fewer = graph.get_pruning_group(*_root(group), order[:-left].flatten().tolist())
        if alive(graph, fewer):
            group, kept = fewer, left
            break
    pruner.num_heads.update(dict.fromkeys(readers, kept))
    return None if kept == len(units) else group


def _least(units: int, gone: int, step: int, rules: _Rules) -> int:
    """The fewest of so many channels that stay, where *gone* of them were to go."""
    left = units - gone
    if left == 0 and not rules.together:  # rounding has taken those that the ratio leaves
        left = int(units * (1 - rules.ratio))
    return max(step, left - left % step)


def _without(parts: list[nn.Module]) -> list[nn.Module]:
    """The layers whose outputs are spared; norms and the like follow what they read."""
    return [part for part in parts if isinstance(part, nn.Linear | nn.Conv2d)]


def _whole(ratio: float, heads: int) -> float:
    """A share of the heads that is rounded up to floor(ratio * heads) of them."""
    return max(0.0, (min(int(ratio * heads + 1e-9), heads - 1) - 0.5) / heads)


def _set_heads(each: Attention, left: int) -> None:
    """Write into a part how many heads it has now; *left* of them."""
    for name in _HEADS:
        if type(getattr(each.part, name, None)) is int:
            setattr(each.part, name, left)
    for name in _WIDTHS:
        width = getattr(each.part, name, None)
        if type(width) is int:
            setattr(each.part, name, width * left // each.heads)


@torch.no_grad()
def _mark(model: nn.Module) -> None:
    """Let every tensor hold the places of its numbers, which float64 counts exactly."""
    for part in model.modules():
        for held in (part._parameters, part._buffers):
            for tensor in held.values():
                if tensor is not None:
                    places = torch.arange(tensor.numel(), dtype=torch.float64)
                    tensor.grad = None
                    tensor.data = places.reshape(tensor.shape)


def _importance(library: Any, name: str) -> Any:
    kinds = {
        "magnitude": "GroupMagnitudeImportance",
        "taylor": "GroupTaylorImportance",
        "batch_norm": "BNScaleImportance",
    }
    return getattr(library.importance, kinds[name])()


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise UsageError(
            f"prune needs the package torch-pruning ({error}); install it: {INSTALL}"
        ) from None
    return torch_pruning
