"""Which layers, heads and features of a model matter, by what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.compression.axes import Axis, transposed
from attar.compression.common import spread
from attar.runtime import eval_mode, to_device

if TYPE_CHECKING:
    from attar.compression.inherit import Row

BATCH = 16


def ranked_layers(
    model: nn.Module, path: str, count: int, data: Any, task: Any, rows: int
) -> tuple[int, ...]:
    """The *count* layers of a list that turn what goes through them the farthest, in order.

    That is 1 - cos(what enters, what leaves), a mean over positions (arXiv:2403.03853).
    """
    layers = list(model.get_submodule(path).children())
    totals, seen = torch.zeros(len(layers)), [0] * len(layers)

    def hook(index: int) -> Callable[..., None]:
        def note(part: nn.Module, args: Any, named: Any, out: Any) -> None:
            before, after = (args or tuple(named.values()))[0], out
            after = after[0] if isinstance(after, tuple | list) else after
            if before.shape == after.shape:  # one that changes the size cannot be left out anyway
                dim = 1 if after.ndim == 4 else -1
                totals[index] += (1 - F.cosine_similarity(before, after, dim=dim)).mean().cpu()
                seen[index] += 1

        return note

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            handle = layer.register_forward_hook(hook(index), with_kwargs=True)
            stack.callback(handle.remove)
        for _ in _passes(model, data, task, rows):
            pass
    score = torch.stack(
        [
            total / n if n else total.new_tensor(float("inf"))
            for total, n in zip(totals, seen, strict=True)
        ]
    )
    return tuple(sorted(score.topk(count).indices.tolist()))


def ranked_members(
    model: nn.Module, pairs: Sequence[Row], data: Any, task: Any, rows: int
) -> dict[str, Tensor]:
    """A score for each member of each space: how strongly layers are fed by it.

    The mean of absolute activations over positions, its Euclidean norm over examples, summed over
    the entries of a head and over all layers that read it (arXiv:2407.14679, section 2.2).
    """
    parts = dict(model.named_modules())
    squares: dict[tuple[str, str], Tensor] = {}
    last: dict[str, Tensor] = {}
    heard: dict[str, Axis] = {}

    def hook(path: str, axis: Axis) -> Callable[..., None]:
        def note(part: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            if last.get(axis.space) is inputs:  # queries, keys and values read the same
                return
            last[axis.space] = inputs
            dim = 1 if isinstance(part, nn.modules.conv._ConvNd) else inputs.ndim - 1
            others = [d for d in range(1, inputs.ndim) if d != dim]
            size = inputs.detach().abs().float()
            mean = size.mean(others) if others else size
            found = mean.square().sum(0).cpu()
            key = axis.space, path
            squares[key] = squares[key] + found if key in squares else found

        return note

    with ExitStack() as stack:
        for row in pairs:
            path, _, kind = (row.source or "").rpartition(".")
            if not row.matrix or kind != "weight" or len(row.axes) < 2:
                continue
            axis = row.axes[0 if transposed(parts[path]) else 1]
            if axis is not None and axis.size[0] == _inputs(parts[path]):
                stack.callback(parts[path].register_forward_pre_hook(hook(path, axis)).remove)
                heard[path] = axis
        for _ in _passes(model, data, task, rows):
            last.clear()
    scores: dict[str, Tensor] = {}
    for (space, path), found in squares.items():
        axis = heard[path]
        members = found.sqrt().reshape(axis.blocks, axis.members[0], -1)
        scores[space] = scores.get(space, torch.zeros(())) + members.sum((0, 2))
    return scores


def _inputs(part: nn.Module) -> int:
    """How many features a layer reads; a convolution in groups has fewer in its weight."""
    for name in ("in_features", "in_channels", "nx"):
        if isinstance(value := getattr(part, name, None), int):
            return value
    return -1


def _passes(model: nn.Module, data: Any, task: Any, rows: int) -> Iterator[None]:
    """Run the model on *rows* examples from all over the data, a batch at a time."""
    place = next(iter(model.parameters())).device
    with torch.no_grad(), eval_mode(model):
        for ids in spread(rows, data).split(BATCH):
            task.forward(model, to_device(data.rows(ids), place))
            yield
