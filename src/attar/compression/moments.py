"""What layers read: the second moment of their inputs over examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.compression.common import run
from attar.runtime import UsageError, eval_mode

_ROWS = 1 << 16  # of a convolution's patches at a time


def moments(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, task: Any = None
) -> tuple[dict[str, Tensor], int]:
    """The mean of x x' over all that each layer reads, [in, in] in float64; how many examples.

    Args:
        model: run once, in eval mode.
        layers: linear and convolutional layers of *model*, by path. A convolution reads patches.
        inputs: a tensor [n, ...], or a table of arguments; with *task* a batch.

    Errors: a layer that the model does not call (UsageError).
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hear(path: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        for part in _patches(layer, given[0].detach()):
            found = part.double()
            sums[path] = sums.get(path, 0) + found.T @ found
            rows[path] = rows.get(path, 0) + len(found)

    handles = [
        layer.register_forward_pre_hook(partial(hear, path)) for path, layer in layers.items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            run(model, inputs, "factorize", task)
    finally:
        for handle in handles:
            handle.remove()
    for path in layers:
        if path not in sums:
            raise UsageError(
                f"factorize: the model does not call '{path}' on these inputs; name it in skip="
            )
    return {path: sums[path] / rows[path] for path in sums}, _examples(inputs)


def _patches(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
    if isinstance(layer, nn.Linear):
        return [inputs.reshape(-1, layer.in_features)]
    assert isinstance(layer, nn.Conv2d)
    sides = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, sides, mode=mode)
    size = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    each = max(1, _ROWS // (padded.shape[2] * padded.shape[3]))
    return [
        F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)
        .transpose(1, 2)
        .reshape(-1, size)
        for part in padded.split(each)
    ]


def _examples(inputs: Any) -> int:
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return len(first)
