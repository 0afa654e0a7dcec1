"""The library torch-pruning at work on a copy of a model."""

from __future__ import annotations

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
                importance=_importance(library, importance),
                pruning_ratio=ratio,
                global_pruning=together,
                round_to=round_to,
                ignored_layers=_without(spared),
                num_heads=heads,
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
            for number, group in enumerate(pruner.step(interactive=True)):
                if number == 0:  # all importances are known by now, and the values have served
                    _mark(model)
                group.prune()
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


def _without(parts: list[nn.Module]) -> list[nn.Module]:
    """The layers whose outputs are spared; norms and the like follow what they read."""
    return [part for part in parts if isinstance(part, nn.Linear | nn.Conv2d)]


def _whole(ratio: float, heads: int) -> float:
    """A share of the heads that is rounded up to floor(ratio * heads) of them."""
    return max(0.0, (int(ratio * heads + 1e-9) - 0.5) / heads)


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
