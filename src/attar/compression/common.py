"""What every way to make a model smaller asks and tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol

import torch
from torch import Tensor, nn

from attar.models.adapters import has_adapters
from attar.models.masks import masked
from attar.models.matching import matching
from attar.models.quantized import modes
from attar.models.state import aliases_of
from attar.runtime import UsageError, first_line, suggest

_SHARED = "shares its weight with another part"
_P = ParamSpec("_P")


class Plan(Protocol):
    """What says how a model becomes smaller."""

    def apply(self, model: nn.Module) -> nn.Module:
        """A smaller copy of *model*, which is left as it is."""


def applied(plan: Callable[_P, Plan]) -> Callable[_P, nn.Module]:
    """The verb of a plan: ``prune = applied(plan_prune)`` takes what *plan* takes, a model first.

    It gives what ``plan(model, ...).apply(model)`` gives. Its docstring is that of *plan*, which
    therefore speaks of both.
    """
    # Types as objects: recipes read them, and know nothing of the names in the plan's module.
    signature = inspect.signature(plan, eval_str=True).replace(return_annotation=nn.Module)

    @wraps(plan)
    def verb(*args: _P.args, **kwargs: _P.kwargs) -> nn.Module:
        given = _bound(verb.__name__, signature, args, kwargs)
        return plan(*args, **kwargs).apply(given.args[0])

    for name in ("__name__", "__qualname__"):
        setattr(verb, name, getattr(verb, name).removeprefix("plan_"))
    told: Any = verb
    told.__signature__ = signature
    told.__annotations__ = {**plan.__annotations__, "return": nn.Module}
    return verb


def _bound(
    name: str, signature: inspect.Signature, args: Any, kwargs: Any
) -> inspect.BoundArguments:
    """The arguments of a call by name; what is missing or unknown is said as a verb says it."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        known = signature.parameters
        if unknown := kwargs.keys() - known.keys():
            wrong = min(unknown)
            raise UsageError(f"{name}: there is no {wrong}=; {suggest(wrong, known)}") from None
        needed = [key for key, each in known.items() if each.default is each.empty]
        missing = [key for key in needed[len(args) :] if key not in kwargs]
        if not missing:
            raise UsageError(f"{name}: {error}") from None
        named = (known[key].kind is inspect.Parameter.KEYWORD_ONLY for key in needed)
        call = ", ".join(f"{key}=..." if by else key for key, by in zip(needed, named, strict=True))
        raise UsageError(
            f"{name}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; call "
            f"{name}({call})"
        ) from None


def check_plain(model: nn.Module, who: str) -> None:
    """Refuse a model on whose weights something was put that is no part of them."""
    what = "masks" if masked(model) else "adapters" if has_adapters(model) else None
    if what:
        raise UsageError(
            f"{who}: the model has {what} on its weights; give attar.models.merged(model), which "
            "has them in its weights"
        )


def check_float(model: nn.Module, who: str) -> None:
    """Refuse a model that has layers of whole numbers."""
    if modes(model):
        raise UsageError(
            f"{who}: the model is quantised, and its layers of whole numbers cannot be changed; "
            f"{who} comes before quantize"
        )


def layers_of(
    model: nn.Module,
    patterns: Sequence[str],
    spared: Sequence[str],
    kinds: tuple[type[nn.Module], ...],
    who: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers of *kinds* that *patterns* mean and *spared* do not, by path; why some are left.

    A layer of a class derived from one of *kinds* is not taken: what holds it may use its weight
    itself.
    """
    for name, value in (("layers", patterns), ("skip", spared)):
        if isinstance(value, str):
            raise UsageError(f"{who}: {name} is a list of patterns, such as [{value!r}]")
    told = f"{who}: the model"
    wanted = matching(model, patterns, told)
    kept = matching(model, spared, told) if spared else set()
    state = model.state_dict(keep_vars=True)
    aliases = aliases_of(state)
    tied = {*aliases, *aliases.values()}
    chosen: dict[str, Any] = {}
    left: dict[str, str] = {}
    for path, layer in model.named_modules():
        weight = f"{path}.weight" if path else "weight"
        if type(layer) not in kinds or weight not in wanted | tied or weight in kept:
            continue
        if weight in tied:
            left[path] = _SHARED
        else:
            chosen[path] = layer
    if not chosen and not left:
        check_float(model, who)
        raise UsageError(
            f"{who}: {', '.join(patterns)} without {', '.join(spared) or 'anything'} names no "
            f"layer of a kind it changes ({', '.join(kind.__name__ for kind in kinds)})"
        )
    return chosen, left


def run(model: nn.Module, inputs: Any, who: str, task: Any = None) -> Any:
    """What *model* answers to a tensor, to a table of arguments, or as *task* runs it."""
    if task is not None:
        return task.forward(model, inputs)
    try:
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = first_line(error)
        raise UsageError(f"{who}: the model cannot read the example ({said:.300})") from error


def answer(out: Any) -> Tensor:
    """The main tensor of what a model returned."""
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    first = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return first


def spread(rows: int, data: Any) -> Tensor:
    """The numbers of up to *rows* examples from all over *data*."""
    count = min(rows, len(data))
    return torch.arange(count) * len(data) // count


def thousands(parameters: tuple[int, int]) -> str:
    """Before and after, for people."""
    of, left = parameters
    return f"{of:,} parameters to {left:,} ({1 - left / of:.0%} fewer)"


def planned_layer(
    model: nn.Module, path: str, weights: int, fits: Callable[[Any], bool] = lambda part: True
) -> Any:
    """The layer at *path* that a plan was made for, of so many *weights*.

    Errors: the model has none such (UsageError).
    """
    try:
        part: Any = model.get_submodule(path)
        found = part.weight.numel() == weights and fits(part)
    except AttributeError:
        found = False
    if not found:
        raise UsageError(
            f"the plan is for another model: it has a layer '{path}' of {weights:,} weights, and "
            "this one has not"
        )
    return part
