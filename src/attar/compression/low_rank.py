"""The weight of a layer as a matrix, its singular values, and the two layers of its product."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attar.models.changed import LowRank
from attar.models.masks import PLAIN

Split = Literal["linear", "channel", "spatial"]


class Options(NamedTuple):
    """One way to split a layer: the most features between the two, and the weights of each."""

    split: Split
    full: int
    cost: int


def options_of(layer: nn.Module, *, aware: bool = False) -> list[Options]:
    """The ways to split *layer*; *aware* of its inputs there is one."""
    if isinstance(layer, nn.Linear):
        return [_option("linear", layer)]
    assert isinstance(layer, nn.Conv2d)
    flat = aware or min(layer.kernel_size) == 1
    return [_option("channel", layer)] + ([] if flat else [_option("spatial", layer)])


def _option(split: Split, layer: Any) -> Options:
    rows, columns = matrix(layer.weight, split).shape
    return Options(split, min(rows, columns), rows + columns)


def matrix(weight: Tensor, split: Split) -> Tensor:
    """*weight* as the matrix whose rank is lowered: [out, in] but for ``spatial``.

    ``spatial`` reads a kernel [out, in, h, w] as [in h, out w].
    """
    if split == "spatial":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def spectrum(layer: Any, split: Split, moment: Tensor | None = None) -> Tensor:
    """The singular values of the layer's matrix, largest first, in float64."""
    values, _ = _seen(layer, split, moment)
    return torch.linalg.svdvals(values)


def rank_for(values: Tensor, energy: float) -> int:
    """The lowest rank that keeps the share *energy* of the squared singular values.

    >>> rank_for(torch.tensor([3.0, 1.0]), 0.9)
    1
    """
    squares = values.square().cumsum(0)
    if not squares[-1] > 0:
        return 1
    # Rounding may leave the sum of all a hair below all of it.
    enough = squares >= energy * squares[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def factors(layer: Any, split: Split, rank: int, moment: Tensor | None = None) -> LowRank:
    """Two layers whose product is the nearest of *rank* to the weight of *layer*.

    Args:
        moment: second moment [in, in] of what the layer reads; the nearest is then meant on such
            inputs.
    """
    values, root = _seen(layer, split, moment)
    left, singular, right = torch.linalg.svd(values, full_matrices=False)
    share = singular[:rank].sqrt()
    second, first = left[:, :rank] * share, share[:, None] * right[:rank]
    if root is not None:
        first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
    made = _layers(layer, split, rank, first, second)
    return made.requires_grad_(layer.weight.requires_grad)


def _seen(layer: Any, split: Split, moment: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The matrix to lower, times the root of the inputs' second moment where that is known."""
    values = matrix(layer.weight.detach(), split).double()
    if moment is None:
        return values, None
    root = _root(moment.to(values))
    return values @ root, root


def _root(moment: Tensor) -> Tensor:
    """Lower triangular S with S S' = *moment*, of which a little is added to the diagonal.

    Directions that no example has would else have no inverse.
    """
    scale = moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    return torch.linalg.cholesky(moment + 1e-6 * scale * torch.eye(len(moment)).to(moment))


def _layers(layer: Any, split: Split, rank: int, first: Tensor, second: Tensor) -> LowRank:
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        two: tuple[Any, Any] = (
            nn.Linear(layer.in_features, rank, bias=False, device="meta"),
            nn.Linear(rank, layer.out_features, bias=layer.bias is not None, device="meta"),
        )
    else:
        assert isinstance(layer, nn.Conv2d)
        two = _convolutions(layer, split, rank)
    if split == "spatial":
        # [in h, r] of the first, [r, out w] of the second.
        first, second = second.T, first.T
        first = first.unflatten(1, (weight.shape[1], weight.shape[2], 1))
        second = second.unflatten(0, (weight.shape[0], 1, weight.shape[3])).movedim(3, 1)
    for part, values in zip(two, (first, second), strict=True):
        shaped = values.reshape(part.weight.shape)
        part.weight = nn.Parameter(shaped.to(weight).clone(memory_format=PLAIN))
        if part.bias is not None:
            part.bias = nn.Parameter(layer.bias.detach().clone())
    return LowRank(*two)


def _convolutions(layer: nn.Conv2d, split: Split, rank: int) -> tuple[nn.Module, nn.Module]:
    names = ("kernel_size", "stride", "padding", "dilation")
    both: dict[str, Any] = {name: getattr(layer, name) for name in names}
    ours: dict[str, Any]
    theirs: dict[str, Any]
    if split == "channel":
        ours, theirs = both, {"kernel_size": 1}
    else:
        ours, theirs = (_along(both, dim) for dim in (0, 1))
    mode = layer.padding_mode
    biased = layer.bias is not None
    return (
        nn.Conv2d(layer.in_channels, rank, **ours, bias=False, padding_mode=mode, device="meta"),
        nn.Conv2d(
            rank, layer.out_channels, **theirs, bias=biased, padding_mode=mode, device="meta"
        ),
    )


def _along(both: dict[str, Any], dim: int) -> dict[str, Any]:
    """The sizes of a convolution that works along one side only."""
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {
        name: value
        if isinstance(value, str)
        else ((value[0], neutral[name]) if dim == 0 else (neutral[name], value[1]))
        for name, value in both.items()
    }
