"""Weights that are zero and stay zero: by magnitude, or two of every four."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from attar.compression.common import applied, check_plain, layers_of, planned_layer
from attar.models.adapters import has_adapters
from attar.models.masks import baked, put_mask
from attar.runtime import UsageError

Amount = Annotated[float, Gt(0), Lt(1)]
Among = Literal["model", "layer"]
Pattern = Literal["2:4"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Thinned:
    """One layer: its path, how many weights it has, and how many become zero."""

    path: str
    weights: int
    zeros: int


@dataclass(frozen=True)
class Sparsity:
    """A plan for zeros: which layers, how many in each, in which pattern.

    Attributes:
        layers: the layers that get zeros.
        pattern: ``2:4``, or empty for any place.
        left: why each other layer that was asked for stays as it is, by path.
    """

    layers: tuple[Thinned, ...]
    pattern: Pattern | Literal[""]
    left: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """JSON values, from which `read` makes the plan again."""
        layers = [asdict(each) for each in self.layers]
        return {
            "way": "sparsify", "pattern": self.pattern, "layers": layers, "left": dict(self.left)
        }  # fmt: skip

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Sparsity:
        """The plan that `describe` told."""
        layers = tuple(Thinned(**each) for each in told["layers"])
        return cls(layers, told["pattern"], dict(told["left"]))

    def told(self) -> str:
        """One line for people."""
        zeros, weights = (sum(getattr(each, name) for each in self.layers) for name in _COUNTS)
        how = f", {self.pattern}" * bool(self.pattern)
        return (
            f"{zeros:,} of {weights:,} weights in {len(self.layers)} layers become zero "
            f"({zeros / weights:.0%}{how}), {len(self.left)} left as they are"
        )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of *model* with masks on its layers; *model* is left as it is."""
        made = copy.deepcopy(baked(model))
        for each in self.layers:
            layer = planned_layer(made, each.path, each.weights)
            kept = _two_of_four(layer.weight) if self.pattern else _largest(layer, each.zeros)
            put_mask(layer, "weight", kept)
        return made


_COUNTS = ("zeros", "weights")


@torch.no_grad()
def plan_sparsify(
    model: nn.Module,
    *,
    amount: Amount | None = None,
    pattern: Pattern | None = None,
    among: Among = "model",
    layers: Sequence[str] = ("*",),
    skip: Sequence[str] = ("head",),
) -> Sparsity:
    """A copy of *model* in which the smallest weights are zero, and stay zero while it learns.

    `sparsify` makes it, and `plan_sparsify` tells beforehand how many in which layer; it changes
    nothing.

    By magnitude (Han et al., arXiv:1506.02626), in any place or, with ``pattern="2:4"``, the two
    smallest of every four along a layer's inputs, which the sparse tensor cores of NVIDIA
    multiply at twice the rate (Mishra et al., arXiv:2104.08378). A convolution's four are
    neighbouring input channels.

    The zeros are kept by masks, whatever optimiser, momentum and weight decay do. A model that
    is saved or exported has them in its weights, without masks; its file is as large as before,
    and compresses well. Time and memory become smaller only where a kernel knows of the zeros::

        student = attar.sparsify(model, amount=0.8)
        student = attar.distill(student, attar.Teacher(model, task), train, task, terms)
        attar.models.save(student, "runs/sparse")

    Given a model with masks, it is their number of zeros that grows to *amount*, so a caller can
    go there in steps and train between (`schedule`).

    Args:
        model: left as it is.
        amount: the share of the weights of these layers that become zero.
        pattern: ``2:4``, which is half of them.
        among: where the smallest are looked for: in all layers together (``model``), or in each
            alone (``layer``).
        layers: patterns of the layers, as in ``freeze``.
        skip: patterns of layers to spare; the head by default.

    Errors: neither *amount* nor *pattern*, or both; no such layer; a layer that would keep
    nothing (UsageError).
    """
    _check(amount, pattern, among)
    if has_adapters(model):
        check_plain(model, "sparsify")
    chosen, left = layers_of(baked(model), layers, skip, _KINDS, "sparsify")
    if pattern is not None:
        for path, layer in list(chosen.items()):
            if layer.weight.shape[1] % 4:
                inputs = chosen.pop(path).weight.shape[1]
                left[path] = f"reads {inputs} features a group, no multiple of 4"
    if not chosen:
        reasons = "; ".join(f"{path} {why}" for path, why in list(left.items())[:3])
        raise UsageError(f"sparsify: no layer can have these zeros ({reasons}); name others")
    weights: dict[str, Tensor] = {
        path: layer.weight.detach().abs() for path, layer in chosen.items()
    }
    zeros = _zeros(weights, amount, among)
    _check_kept(weights, zeros)
    found = tuple(Thinned(path, each.numel(), zeros[path]) for path, each in weights.items())
    return Sparsity(found, pattern or "", left)


sparsify = applied(plan_sparsify)


def schedule(
    final: float, steps: int, *, start: float = 0.0, of: Literal["all", "rest"] = "all"
) -> list[float]:
    """Shares for *steps* rounds of pruning, with training between: from *start* up to *final*.

    They rise fast at first, where much is superfluous, and slowly at the end: the cubic schedule
    of Zhu & Gupta (arXiv:1710.01878), ``final + (start - final) (1 - t / steps)^3``::

        for amount in attar.compression.schedule(0.8, 3):
            student = attar.sparsify(student, amount=amount)
            student = attar.distill(student, teacher, train, task, terms, epochs=5)

    Args:
        of: what each is a share of: of ``all`` there was at first, as `sparsify` counts, or of
            the ``rest`` that the round before has left, as `prune` counts.

    >>> [round(share, 3) for share in schedule(0.8, 3)]
    [0.563, 0.77, 0.8]
    """
    if not (0 <= start < final < 1) or type(steps) is not int or steps < 1:
        raise UsageError(
            f"schedule: 0 <= start < final < 1 and at least one step, not start={start!r}, "
            f"final={final!r}, steps={steps!r}"
        )
    shares = [final + (start - final) * (1 - step / steps) ** 3 for step in range(steps + 1)]
    if of == "all":
        return shares[1:]
    return [1 - (1 - new) / (1 - old) for old, new in pairwise(shares)]


def keep_zeros(model: nn.Module, *, layers: Sequence[str] = ("*",)) -> nn.Module:
    """A copy of *model* whose weights that are zero stay zero while it learns.

    For a model that `sparsify` made and that was saved and loaded: its zeros are in the weights
    then, and its masks are gone. Only layers that have zeros get one.
    """
    check_plain(model, "keep_zeros")
    made = copy.deepcopy(model)
    for layer in layers_of(made, layers, (), _KINDS, "keep_zeros")[0].values():
        kept = layer.weight.detach() != 0
        if not bool(kept.all()):
            put_mask(layer, "weight", kept)
    return made


def _check(amount: Any, pattern: Any, among: Any) -> None:
    if (amount is None) == (pattern is None):
        raise UsageError('sparsify: say which zeros: either amount= or pattern="2:4"')
    if amount is not None and not (type(amount) is float and 0 < amount < 1):
        raise UsageError(f"sparsify: amount is a share above 0 and below 1, not {amount!r}")
    if pattern not in (None, "2:4"):
        raise UsageError(f"sparsify: the pattern is '2:4', not {pattern!r}")
    if among not in ("model", "layer"):
        raise UsageError(f"sparsify: among is 'model' or 'layer', not {among!r}")


def _zeros(weights: Mapping[str, Tensor], amount: float | None, among: Among) -> dict[str, int]:
    """How many weights of each layer become zero."""
    if amount is None:
        return {path: each.numel() // 2 for path, each in weights.items()}
    if among == "layer":
        return {path: round(amount * each.numel()) for path, each in weights.items()}
    together = torch.cat([each.flatten().float().cpu() for each in weights.values()])
    smallest = together.argsort(stable=True)[: round(amount * len(together))]
    ends = torch.tensor([each.numel() for each in weights.values()]).cumsum(0)
    counts = torch.bincount(torch.bucketize(smallest, ends, right=True), minlength=len(weights))
    return dict(zip(weights, counts.tolist(), strict=True))


def _check_kept(weights: Mapping[str, Tensor], zeros: Mapping[str, int]) -> None:
    for path, each in weights.items():
        if not bool(each.isfinite().all()):
            raise UsageError(f"sparsify: the weight of '{path}' holds NaN or infinity; mend it")
        if zeros[path] == each.numel():
            raise UsageError(
                f"sparsify: all {each.numel():,} weights of '{path}' would be zero; lower amount, "
                'or look for them in each layer alone: among="layer"'
            )


def _largest(layer: Any, zeros: int) -> Tensor:
    """Which weights stay: all but the *zeros* smallest."""
    magnitude = layer.weight.detach().abs().flatten()
    kept = torch.ones_like(magnitude, dtype=torch.bool)
    kept[magnitude.argsort(stable=True)[:zeros]] = False
    return kept.reshape(layer.weight.shape)


def _two_of_four(weight: Any) -> Tensor:
    """Which weights stay: of every four along the second dimension, the two largest."""
    fours = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, 4))
    best = fours.argsort(dim=-1, descending=True, stable=True)[..., :2]
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter(-1, best, True)
    return kept.flatten(-2).movedim(-1, 1).contiguous()
