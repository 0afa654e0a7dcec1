"""Low-rank adapters of the library peft: put on a model, and merged into its weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from attar.models.masks import baked
from attar.models.state import aliases_of
from attar.runtime import UsageError, first_line, suggest

INSTALL = 'pip install "attar[peft]"'
# What is the library's own to fill in, or says where a model came from.
_SUPPLIED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
_USUAL = (
    "bias",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "target_modules",
    "use_dora",
)


def with_lora(model: nn.Module, lora: Mapping[str, Any] | None, purpose: str) -> nn.Module:
    """*model* with low-rank adapters, which alone learn; *model* itself without a table of them.

    Args:
        lora: values of peft's ``LoraConfig``. Of a classifier, everything after its body learns
            too, unless ``modules_to_save`` says what does.
        purpose: what peft calls the task of the model, ``CAUSAL_LM`` or ``SEQ_CLS``.

    Errors: peft is not installed; a value that its config does not have, or that does not fit the
    model (UsageError).
    """
    if lora is None:
        return model
    peft = _library()
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)} - _SUPPLIED
    for name in lora:
        if name not in known:
            named = sorted(known) if get_close_matches(name, known) else _USUAL
            raise UsageError(f"lora has no '{name:.80}'; {suggest(name, named)}")
    values = dict(lora)
    if purpose == "SEQ_CLS":
        values.setdefault("modules_to_save", _after_the_body(model))
    try:
        made = peft.get_peft_model(model, peft.LoraConfig(task_type=purpose, **values))
    except Exception as error:  # it has errors of many kinds
        said = first_line(error).rstrip(".")
        raise UsageError(f"lora: peft cannot change this model so ({said:.300})") from None
    _check_ties(made)
    return made.train(model.training)


def has_adapters(model: nn.Module) -> bool:
    """Whether *model* is one that peft made."""
    return getattr(model, "peft_config", None) is not None and hasattr(model, "get_base_model")


def merged(model: nn.Module) -> nn.Module:
    """A copy of *model* with all that was put on its weights merged into them.

    That is adapters of peft, LoRA and whatever else it can merge, and the masks of
    `attar.sparsify`. The copy has the names and the layers of the model before them, and answers
    the same up to rounding (with masks to the bit). A model with neither is given back itself.

    Errors: adapters that are no change of weights, such as prompts; an adapter on a weight that
    another part shares; weights that become NaN or infinite (UsageError).

    >>> layer = nn.Linear(2, 2)
    >>> merged(layer) is layer
    True
    """
    if not has_adapters(model):
        return baked(model)
    check_mergeable(model)
    try:
        made = copy.deepcopy(model).merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except Exception as error:
        raise UsageError(
            f"the model's adapters cannot be merged into its weights ({first_line(error):.300}); "
            "save them by peft's own save_pretrained"
        ) from None
    made.train(model.training)
    if (built := getattr(model, "attar_build", None)) is not None:
        made.attar_build = built
    return baked(made)


def check_mergeable(model: nn.Module) -> None:
    """Refuse adapters that `merged` would refuse, as far as it can be known before training."""
    if not has_adapters(model):
        return
    if not hasattr(model, "merge_and_unload"):
        kinds = {str(each.peft_type.value) for each in _configs(model)}
        raise UsageError(
            f"the adapters of the model ({', '.join(sorted(kinds))}) are no change of its weights, "
            "so they cannot be merged into them; use LoRA, or save them by peft's own "
            "save_pretrained"
        )
    _check_ties(model)


def _configs(model: nn.Module) -> list[Any]:
    held: Any = model.peft_config
    return list(held.values()) if isinstance(held, Mapping) else [held]


def _check_ties(model: nn.Module) -> None:
    """Refuse adapters on a weight that has two names: merged, they would change the other too."""
    for alias, name in aliases_of(model.state_dict(keep_vars=True)).items():
        for one, other in ((alias, name), (name, alias)):
            if ".base_layer." in one:
                raise UsageError(
                    f"an adapter sits on '{_plain(one)}', whose weight is also that of "
                    f"'{_plain(other)}', so it cannot be merged; leave that layer out of "
                    "target_modules, or untie the two first"
                )


def _plain(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.rpartition(".")[0] or name


def _after_the_body(model: nn.Module) -> list[str]:
    body = getattr(model, "base_model_prefix", "")
    parts = model.named_children()
    return [name for name, part in parts if name != body and any(True for _ in part.parameters())]


def _library() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError(f"lora needs the package peft ({error}); install it: {INSTALL}") from None
    return peft
