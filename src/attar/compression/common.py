"""What every way to make a model smaller asks and tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attar.models.adapters import has_adapters
from attar.models.masks import masked
from attar.models.matching import matching
from attar.models.state import aliases_of
from attar.runtime import UsageError, first_line

_SHARED = "shares its weight with another part"


def check_plain(model: nn.Module, who: str) -> None:
    """Refuse a model on whose weights something was put that is no part of them."""
    what = "masks" if masked(model) else "adapters" if has_adapters(model) else None
    if what:
        raise UsageError(
            f"{who}: the model has {what} on its weights; give attar.models.merged(model), which "
            "has them in its weights"
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
        raise UsageError(
            f"{who}: {', '.join(patterns)} without {', '.join(spared) or 'anything'} names no "
            f"layer of a kind it changes ({', '.join(kind.__name__ for kind in kinds)})"
        )
    return chosen, left


def run(model: nn.Module, inputs: Any, who: str) -> Any:
    """What *model* answers to a tensor, or to a table of arguments."""
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


def count(model: nn.Module) -> int:
    """How many numbers *model* learns; a shared one once."""
    return sum(tensor.numel() for tensor in model.parameters())


def thousands(parameters: tuple[int, int]) -> str:
    """Before and after, for people."""
    of, left = parameters
    return f"{of:,} parameters to {left:,} ({1 - left / of:.0%} fewer)"
