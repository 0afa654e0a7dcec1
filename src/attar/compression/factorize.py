"""Layers as two smaller ones: low rank, by truncated singular values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from attar.compression.common import (
    applied,
    check_plain,
    layers_of,
    planned_layer,
    thousands,
)
from attar.compression.low_rank import (
    Options,
    Split,
    factors,
    options_of,
    rank_for,
    spectrum,
)
from attar.compression.moments import moments
from attar.models.changed import LowRank, noted, put
from attar.models.quantized import parameters_of
from attar.runtime import UsageError

Rank = Annotated[
    Annotated[int, Ge(1)] | Annotated[float, Gt(0), Le(1)],
    "rule:it must be a whole number from 1 on, or a share above 0 and up to 1",
]
Energy = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class Factored:
    """One layer that becomes two.

    Attributes:
        path: its place in the model.
        split: how its weight is read as a matrix: ``linear``, ``channel`` or ``spatial``.
        rank: features, or channels, between the two layers.
        full: the most that there could be.
        energy: the share of the squared singular values that is kept.
        weights: how many weights the layer has, and the two have.
    """

    path: str
    split: Split
    rank: int
    full: int
    energy: float
    weights: tuple[int, int]


@dataclass(frozen=True)
class Factorization:
    """A plan for low rank: which layers become two, and how narrow they are between.

    Attributes:
        layers: what becomes of each layer that changes.
        left: why each other layer that was asked for stays as it is, by path.
        parameters: how many the model has, and will have.
        examples: how many examples the weights were seen with; 0 for the weights alone.
    """

    layers: tuple[Factored, ...]
    left: Mapping[str, str]
    parameters: tuple[int, int]
    examples: int = 0
    seen: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def describe(self) -> dict[str, Any]:
        """JSON values, from which `read` makes the plan again."""
        return {
            "way": "factorize",
            "parameters": list(self.parameters),
            "examples": self.examples,
            "layers": [asdict(each) | {"weights": list(each.weights)} for each in self.layers],
            "left": dict(self.left),
        }

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Factorization:
        """The plan that `describe` told."""
        layers = (
            Factored(**{**each, "weights": tuple(each["weights"])}) for each in told["layers"]
        )
        of, left = told["parameters"]
        return cls(tuple(layers), dict(told["left"]), (of, left), told["examples"])

    def told(self) -> str:
        """Two lines for people."""
        line = f"{thousands(self.parameters)}: {len(self.layers)} layers of low rank"
        least = min(self.layers, key=lambda each: each.energy)
        return (
            f"{line}, {len(self.left)} left as they are\n"
            f"least kept: {least.energy:.1%} of the energy of {least.path}, "
            f"rank {least.rank} of {least.full}"
        )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of *model* with its layers in two; *model* is left as it is.

        Errors: a model without these layers; a plan from a file that was made with examples
        (UsageError).
        """
        made = copy.deepcopy(model)
        for each in self.layers:
            layer = planned_layer(made, each.path, each.weights[0], _splits)
            if self.examples and each.path not in self.seen:
                raise UsageError(
                    "this plan was made with examples, which no file keeps; make it again with "
                    "plan_factorize(model, example, ...)"
                )
            two = factors(layer, each.split, each.rank, self.seen.get(each.path))
            made = put(made, each.path, two.train(layer.training))
        return noted(made, model)


def _splits(part: nn.Module) -> bool:
    return type(part) in (nn.Linear, nn.Conv2d)


@torch.no_grad()
def plan_factorize(
    model: nn.Module,
    example: Any = None,
    *,
    rank: Rank | None = None,
    energy: Energy | None = None,
    layers: Sequence[str] = ("*",),
    skip: Sequence[str] = ("head",),
    task: Any = None,
) -> Factorization:
    """A copy of *model* whose linear and convolutional layers are two smaller ones each.

    `factorize` makes it, and `plan_factorize` tells beforehand what would become of each layer; it
    changes nothing.

    A weight W [out, in] becomes B A with A [rank, in] and B [out, rank], of all such products the
    nearest to W: its largest singular values (Eckart & Young 1936). The error is the root of the
    sum of squares of the others. The two layers share the square roots of the singular values.

    A convolution is split in the way of these two that keeps more: into k x k to *rank* channels
    and 1 x 1 (``channel``; Zhang et al., arXiv:1505.06798), or into k x 1 and 1 x k (``spatial``;
    Jaderberg et al., arXiv:1405.3866; Tai et al., arXiv:1511.06067). Convolutions of several
    groups stay as they are.

    With *example* the error is that of what a layer answers to them: the singular values are those
    of W S, where S S' is the second moment of what the layer reads (SVD-LLM, arXiv:2403.07378).
    Convolutions are split by channel then. The rank alone decides how much smaller the model is.

    What comes out answers nearly as the model does. Distilling it from the model for some epochs
    brings most of the rest back::

        student = attar.factorize(model, energy=0.9)
        student = attar.distill(student, attar.Teacher(model, task), train, task, terms)

    It has the model's parts but for the layers that are two, ``first`` and ``second``, at their
    path; `attar.models.save` and `load` keep it.

    Args:
        model: left as it is.
        example: what the model reads: a tensor [n, ...], or a table of arguments; with *task* a
            batch. Some hundreds of rows are enough.
        rank: how many features there are between the two layers: a number, or a share of the most
            there could be. Of a convolution it is the number of channels of the first split; the
            second has as many weights at most.
        energy: choose the rank of each layer by the share of squared singular values it keeps.
        layers: patterns of the layers to change, as in ``freeze``: paths, with ``*`` for any
            letters and ``!`` for a layer to spare.
        skip: patterns of layers to spare. The head is small, and nothing after it can make good
            what it loses.
        task: how the model is run on *example*.

    Layers that would not become smaller, and those whose weight another part shares, stay as they
    are; `plan_factorize` tells which.

    Errors: neither *rank* nor *energy*, or both; nothing would become smaller; weights that are
    not finite; a model with masks or adapters (UsageError).
    """
    _check(rank, energy)
    check_plain(model, "factorize")
    chosen, left = layers_of(model, layers, skip, (nn.Linear, nn.Conv2d), "factorize")
    for path, layer in list(chosen.items()):
        if (why := _spared(model, path, layer)) is not None:
            left[path] = why
            del chosen[path]
    seen, examples = ({}, 0) if example is None else moments(model, chosen, example, task)
    found: list[Factored] = []
    for path, layer in chosen.items():
        try:
            found.append(_planned(path, layer, rank, energy, seen.get(path)))
        except _Left as why:
            left[path] = str(why)
    if not found:
        reasons = "; ".join(f"{path} {why}" for path, why in list(left.items())[:3])
        raise UsageError(
            f"factorize: no layer would become smaller ({reasons}); lower rank or energy, or "
            "name other layers"
        )
    before = parameters_of(model)
    after = before - sum(each.weights[0] - each.weights[1] for each in found)
    return Factorization(tuple(found), left, (before, after), examples, seen)


factorize = applied(plan_factorize)


class _Left(Exception):
    """Why a layer stays as it is."""


def _check(rank: Any, energy: Any) -> None:
    if (rank is None) == (energy is None):
        raise UsageError("factorize: say how much is kept: either rank= or energy=")
    if energy is not None and not (type(energy) in (int, float) and 0 < energy <= 1):
        raise UsageError(f"factorize: energy is a share above 0 and up to 1, not {energy!r}")
    whole = type(rank) is int and rank >= 1
    if rank is not None and not whole and not (type(rank) is float and 0 < rank <= 1):
        raise UsageError(
            "factorize: rank is a whole number from 1 on, or a share above 0 and up to 1, not "
            f"{rank!r}"
        )


def _spared(model: nn.Module, path: str, layer: nn.Module) -> str | None:
    """Why *layer* is not asked for its singular values; None where it is."""
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return f"has {layer.groups} groups"
    owner = model.get_submodule(path.rpartition(".")[0])
    return "is of low rank already" if isinstance(owner, LowRank) else None


def _planned(
    path: str, layer: Any, rank: Any, energy: float | None, moment: Tensor | None
) -> Factored:
    """The best split of *layer*; raises `_Left` where none is smaller."""
    if not bool(layer.weight.isfinite().all()):
        raise UsageError(f"factorize: the weight of '{path}' holds NaN or infinity; mend it first")
    options = options_of(layer, aware=moment is not None)
    values = {each.split: spectrum(layer, each.split, moment) for each in options}
    choose = _by_energy if energy is not None else _by_rank
    best = choose(options, values, energy if energy is not None else rank)
    old, new = layer.weight.numel(), best[1] * best[0].cost
    if new >= old:
        raise _Left(f"would have {new:,} weights in two layers instead of {old:,}")
    option, width = best
    kept = _kept(values[option.split], width)
    return Factored(path, option.split, width, option.full, kept, (old, new))


_Values = Mapping[Split, Tensor]


def _by_energy(options: Sequence[Options], values: _Values, energy: float) -> tuple[Options, int]:
    """The option with the fewest weights of those that keep *energy*."""
    found = [(each, rank_for(values[each.split], energy)) for each in options]
    return min(found, key=lambda pair: pair[1] * pair[0].cost)


def _by_rank(options: Sequence[Options], values: _Values, rank: float) -> tuple[Options, int]:
    """The option that keeps the most with no more weights than the first has at *rank*."""
    first = options[0]
    wanted = min(rank, first.full) if isinstance(rank, int) else max(1, round(rank * first.full))
    budget = wanted * first.cost
    found = [(each, min(each.full, budget // each.cost)) for each in options]
    within = [(each, width) for each, width in found if width]
    return max(within, key=lambda pair: _kept(values[pair[0].split], pair[1]))


def _kept(values: Tensor, rank: int) -> float:
    squares = values.square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total else 1.0
