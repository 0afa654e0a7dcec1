"""Fewer channels, features and heads: structured pruning over the graph of a model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from attar.compression.common import (
    answer,
    applied,
    check_float,
    check_plain,
    layers_of,
    run,
    thousands,
)
from attar.compression.graph import attentions, check_known, pruned
from attar.models.changed import differences, noted, replace
from attar.models.quantized import parameters_of
from attar.models.state import aliases_of
from attar.runtime import UsageError, eval_mode, first_line

Ratio = Annotated[float, Gt(0), Lt(1)]
Importance = Literal["batch_norm", "magnitude", "taylor"]
Among = Literal["model", "layer"]
Size = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Pruning:
    """A plan for a model with fewer channels, features and heads.

    Attributes:
        parts: by path, the sizes of each part that changes, as ``model.json`` has them.
        kept: lists of indices.
        tensors: by name, for each dimension of a tensor which list of *kept* it keeps; None for
            all of it.
        parameters: how many the model has, and will have.
    """

    parts: Mapping[str, Any]
    kept: tuple[tuple[int, ...], ...]
    tensors: Mapping[str, tuple[int | None, ...]]
    parameters: tuple[int, int]

    def describe(self) -> dict[str, Any]:
        """JSON values, from which `read` makes the plan again."""
        return {
            "way": "prune",
            "parameters": list(self.parameters),
            "parts": dict(self.parts),
            "kept": [list(each) for each in self.kept],
            "tensors": {name: list(dims) for name, dims in self.tensors.items()},
        }

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Pruning:
        """The plan that `describe` told."""
        kept = tuple(tuple(each) for each in told["kept"])
        tensors = {name: tuple(dims) for name, dims in told["tensors"].items()}
        of, left = told["parameters"]
        return cls(told["parts"], kept, tensors, (of, left))

    def told(self) -> str:
        """One line for people."""
        return f"{thousands(self.parameters)}, {len(self.parts)} parts become smaller"

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """A smaller copy of *model*, which is left as it is.

        Errors: a model of other sizes than the plan was made for (UsageError).
        """
        made = copy.deepcopy(model)
        state = made.state_dict(keep_vars=True)
        aliases = aliases_of(state)
        for name, dims in self.tensors.items():
            self._check(name, dims, state)
            owner, _, own = name.rpartition(".")
            part = made.get_submodule(owner)
            if name in aliases:
                first, _, theirs = aliases[name].rpartition(".")
                part._parameters[own] = made.get_submodule(first)._parameters[theirs]
            else:
                replace(part, own, self._smaller(state[name].detach(), dims))
        for path, sizes in self.parts.items():
            for name, value in sizes["numbers"].items():
                value = tuple(value) if isinstance(value, list) else value
                setattr(made.get_submodule(path), name, value)
        return noted(made, model)

    def _check(self, name: str, dims: Sequence[int | None], state: Mapping[str, Tensor]) -> None:
        found = state.get(name)
        wanted = [None if dim is None else max(self.kept[dim]) for dim in dims]
        if (
            found is None
            or found.ndim != len(dims)
            or any(w is not None and w >= n for w, n in zip(wanted, found.shape, strict=True))
        ):
            raise UsageError(f"the plan is for another model: '{name}' has no such entries here")

    def _smaller(self, tensor: Tensor, dims: Sequence[int | None]) -> Tensor:
        for dim, chosen in enumerate(dims):
            if chosen is not None:
                index = torch.tensor(self.kept[chosen], device=tensor.device)
                tensor = tensor.index_select(dim, index)
        return tensor.clone()


def plan_prune(
    model: nn.Module,
    example: Any,
    *,
    ratio: Ratio,
    importance: Importance = "magnitude",
    among: Among = "layer",
    layers: Sequence[str] = ("*",),
    skip: Sequence[str] = ("head",),
    round_to: Size | None = None,
    task: Any = None,
) -> Pruning:
    """A smaller copy of *model*: the least important channels, features and heads are gone.

    `prune` makes it, and `plan_prune` tells beforehand what would go; it changes nothing.

    Channels that depend on each other, as over a residual sum, go together: the library
    torch-pruning finds them in the graph of the model (DepGraph, arXiv:2301.12900). Of
    attention whole heads go. For convolutional networks, attar's ``vit``, classifiers of
    transformers such as BERT and ViT, and perceptrons::

        student = attar.prune(model, images, ratio=0.5)
        student = attar.distill(student, attar.Teacher(model, task), train, task, terms)

    Half of the channels are about a quarter of the weights and of the time. The result is smaller
    in fact, needs nothing to run, and `attar.models.save` and `load` keep it. For language models
    and whole layers see `attar.shrink`.

    Args:
        model: left as it is.
        example: what the model reads: a tensor [n, ...], or a table of arguments; with *task* a
            batch, with its labels for ``taylor``.
        ratio: the share of the channels, features and heads of each layer that go; one stays at
            any ratio, or *round_to*. In several rounds with training between, take
            `schedule(..., of="rest")`.
        importance: of a channel and all that depends on it: ``magnitude`` of its weights,
            ``taylor`` (weight times gradient of the task's loss on *example*,
            arXiv:1906.10771), or ``batch_norm`` (the scale of its batch norm,
            arXiv:1708.06519).
        among: where the least important are looked for: in each layer alone (``layer``), or in
            all together (``model``).
        layers: patterns of the layers whose outputs may become fewer, as in ``freeze``:
            ``["blocks.*.mlp.0"]`` are the inner features of a perceptron.
        skip: patterns of layers whose outputs stay; the head must.
        round_to: leave multiples of this many; a layer of fewer channels keeps them all.
        task: how the model is run on *example*, and the loss for ``taylor``.

    Errors: torch-pruning is not installed; channels of T5 and of language models with grouped
    queries, which it cannot prune; nothing would go; a model that does not run afterwards
    (UsageError).
    """
    _check(ratio, importance, among, task)
    check_plain(model, "prune")
    check_float(model, "prune")
    chosen, _ = layers_of(model, layers, skip, (nn.Linear, nn.Conv2d), "prune")
    check_known(model, chosen)

    def forward(module: nn.Module, given: Any) -> Tensor:
        out = run(module, given, "prune", task)
        return answer(out)

    with eval_mode(model), torch.no_grad():
        before = forward(model, example)
    marked = pruned(
        copy.deepcopy(model).eval(),
        example,
        forward,
        loss=None if importance != "taylor" else lambda out: task.loss(out, example).mean(),
        chosen=set(chosen),
        ratio=ratio,
        importance=importance,
        together=among == "model",
        round_to=round_to,
    )
    plan = _recorded(model, marked, _advice(model, chosen, ratio, round_to))
    _check_runs(plan, model, forward, example, before)
    return plan


prune = applied(plan_prune)


def _check(ratio: Any, importance: Any, among: Any, task: Any) -> None:
    if type(ratio) is not float or not 0 < ratio < 1:
        raise UsageError(f"prune: ratio is a share above 0 and below 1, not {ratio!r}")
    if importance not in ("batch_norm", "magnitude", "taylor"):
        raise UsageError(
            f"prune: importance is 'magnitude', 'taylor' or 'batch_norm', not {importance!r}"
        )
    if among not in ("layer", "model"):
        raise UsageError(f"prune: among is 'layer' or 'model', not {among!r}")
    if importance == "taylor" and task is None:
        raise UsageError(
            "prune: taylor needs the loss of a task; pass task= and as example a batch with labels"
        )


def _advice(model: nn.Module, chosen: Mapping[str, Any], ratio: float, round_to: int | None) -> str:
    """What to do where nothing would become smaller."""
    widths = [each.weight.shape[0] for each in chosen.values()]
    if widths and max(widths) <= (round_to or 1):
        most = f"its layers have {max(widths)} channels at most, and {round_to or 1} stay"
        return f"{most}; lower round_to" if round_to else f"{most}; name other layers"
    heads = {id(layer): each.heads for each in attentions(model) for layer in each.layers}
    if chosen and all(id(each) in heads for each in chosen.values()):
        most_heads = max(heads[id(each)] for each in chosen.values())
        return (
            f"whole heads go, and {ratio:g} of {most_heads} is less than one; give a ratio of "
            f"{1 / most_heads:.3g} or more"
        )
    return (
        "what these layers make is added to or multiplied by what others make; name those with "
        "them in layers, and take none of them into skip"
    )


def _recorded(model: nn.Module, marked: nn.Module, advice: str) -> Pruning:
    """The plan by which *model* becomes what *marked* is, whose tensors hold where each is from.

    Args:
        advice: for where the two are the same.
    """
    parts = json.loads(json.dumps(differences(model, marked)))
    if parts is None:
        raise UsageError("prune: a part of the model became another, which no plan can say")
    if not parts:
        raise UsageError(f"prune: nothing would become smaller: {advice}")
    lists: dict[tuple[int, ...], int] = {}
    tensors: dict[str, tuple[int | None, ...]] = {}
    left = marked.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape != left[name].shape:
            kept = _kept(tensor.shape, left[name])
            tensors[name] = tuple(
                None if each is None else lists.setdefault(each, len(lists)) for each in kept
            )
    _check_tied(model, tensors)
    before = parameters_of(model)
    plan = Pruning(parts, tuple(lists), tensors, (before, before))
    after = parameters_of(plan.apply(model))
    return Pruning(parts, tuple(lists), tensors, (before, after))


def _kept(shape: torch.Size, marks: Tensor) -> list[tuple[int, ...] | None]:
    """Which entries of each dimension of *shape* are left, by the places that *marks* holds."""
    places = torch.unravel_index(marks.long(), shape)
    found: list[tuple[int, ...] | None] = []
    for dim, place in enumerate(places):
        index = tuple(slice(None) if each == dim else 0 for each in range(len(shape)))
        whole = marks.shape[dim] == shape[dim]
        found.append(None if whole else tuple(place[index].tolist()))
    return found


def _check_tied(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    for alias, name in aliases_of(model.state_dict(keep_vars=True)).items():
        if tensors.get(alias) != tensors.get(name):
            raise UsageError(
                f"prune: '{name}' and '{alias}' are one tensor and would keep other entries; spare "
                "these layers (skip=), or use attar.shrink"
            )


def _check_runs(
    plan: Pruning, model: nn.Module, forward: Any, example: Any, before: Tensor
) -> None:
    made = plan.apply(model)
    try:
        with eval_mode(made), torch.no_grad():
            shape = list(forward(made, example).shape)
    except (RuntimeError, ValueError, TypeError) as error:
        said = first_line(error.__cause__ or error)
        raise UsageError(
            f"prune: the {type(model).__name__} does not run with these parts smaller "
            f"({said:.300}); name fewer layers, or use attar.shrink"
        ) from error
    if shape != list(before.shape):
        raise UsageError(
            f"prune: the model would answer {shape} instead of {list(before.shape)}; spare its "
            "last layer by skip="
        )
