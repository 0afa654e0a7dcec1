"""A smaller model of the same kind, which starts from the weights of a larger one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from attar.compression.axes import config_of
from attar.compression.common import applied, check_plain, thousands
from attar.compression.inherit import Choice, Inheritance, Layers, Share, plan_inheritance
from attar.models import build, families
from attar.models.changed import FAMILY as CHANGED
from attar.models.quantized import parameters_of
from attar.runtime import UsageError, suggest

Depth = Annotated[int, Ge(1)]
Factor = Annotated[float, Gt(0), Le(1)]

# What configs of transformers call how many layers there are, and what is inside of one; the
# first of each is what their attribute_map translates.
_DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
_INNER = (
    "intermediate_size",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "n_inner",
)
_FOLLOWS = ("pooler_output_size",)  # equal to the width where it was
_LISTS = ("layer_types",)  # one entry a layer


@dataclass(frozen=True)
class Shrink:
    """A plan for a smaller model: how it is built, and what it inherits.

    Attributes:
        changes: options of the model's family, or values of its config, that become others.
        inheritance: where each tensor comes from.
        seed: of the start of what is not inherited.
        parameters: how many the model and the smaller one have.
    """

    changes: Mapping[str, Any]
    inheritance: Inheritance
    seed: int
    parameters: tuple[int, int]

    def describe(self) -> dict[str, Any]:
        """JSON values, for the run and the report."""
        return {
            "way": "shrink",
            "changes": dict(self.changes),
            "seed": self.seed,
            "parameters": list(self.parameters),
            **self.inheritance.describe(),
        }

    def told(self) -> str:
        """A few lines for people."""
        named = ", ".join(f"{key}: {value}" for key, value in self.changes.items())
        return f"{thousands(self.parameters)}: {named}\n{self.inheritance.told()}"

    def apply(self, model: nn.Module) -> nn.Module:
        """The smaller model; *model* is left as it is."""
        student = _smaller(model, self.changes, self.seed)
        return self.inheritance.apply(student, model).train(model.training)


def plan_shrink(
    teacher: nn.Module,
    *,
    depth: Depth | Mapping[str, int] | None = None,
    width: Factor | Mapping[str, Any] | None = None,
    layers: Layers | Mapping[str, Layers] = "spaced",
    select: Choice = "spaced",
    data: Any = None,
    task: Any = None,
    rows: int = 256,
    scale: float = 1.0,
    blend: Share = 1.0,
    seed: int = 0,
) -> Shrink:
    """A smaller model made from *teacher*: fewer layers, narrower ones, and its weights.

    The result is an ordinary model of the teacher's class, with a smaller config or other options
    of its family, so that it is saved, loaded and exported as any other. `shrink` makes it, and
    `plan_shrink` tells beforehand what it will be; it changes nothing::

        student = attar.shrink(teacher, depth=10)
        student = attar.shrink(teacher, width=0.5, select="importance", data=train, task=task)

    Args:
        teacher: a model that `attar.models.build` made, or one of transformers (BERT-, ViT-,
            Llama- and GPT-2-like, and encoder-decoders as T5 and BART); it is left as it is.
        depth: how many layers the student has; of an encoder-decoder the same for both sides, or a
            table such as ``{"decoder_layers": 3}``. Left out with a list of *layers*, as many. For
            attar's resnet it is what the family calls depth: 8, 14, 20, ...; *layers* are the
            blocks of each of its stages.
        width: the share of channels, heads and inner features, or a table of values such as
            ``{"hidden_size": 384, "num_attention_heads": 6}`` or ``{"width": 8}``. A share keeps
            the width of a head and takes heads away.
        layers, select, data, task, rows, scale, blend: what is inherited; see `plan_inheritance`.
        seed: of the start of what is not inherited.

    Errors: a model of another kind, an option or a value that it does not have, what
    `plan_inheritance` refuses (UsageError).
    """
    config = config_of(teacher)
    built = getattr(teacher, "attar_build", None)
    if depth is None and isinstance(layers, Sequence) and not isinstance(layers, str):
        depth = _as_many(layers, None if config is not None else built)
    if depth is None and width is None:
        raise UsageError("shrink: say what becomes smaller: depth=, width=, or layers=[0, 2, 4]")
    check_plain(teacher, "shrink")
    if config is not None:
        changes = _config_changes(config, depth, width, layers)
    elif built is not None and built["family"] in families():
        changes = _option_changes(built, depth, width, layers)
    elif built is not None and built["family"] == CHANGED:
        raise UsageError(
            "shrink: other changes of this model's layers came before, and shrink builds one of "
            "its family anew; shrink comes before prune, factorize and quantize"
        )
    else:
        raise UsageError(
            f"shrink: a {type(teacher).__name__} does not tell how it is built; give a model of "
            "attar.models.build or of transformers, or build the smaller one and call "
            "attar.transfer(student, teacher)"
        )
    student = _smaller(teacher, changes, seed)
    plan = plan_inheritance(
        student,
        teacher,
        layers=layers,
        select=select,
        data=data,
        task=task,
        rows=rows,
        scale=scale,
        blend=blend,
    )
    return Shrink(changes, plan, seed, (parameters_of(teacher), parameters_of(student)))


shrink = applied(plan_shrink)


def _smaller(model: nn.Module, changes: Mapping[str, Any], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = _rebuilt(model, changes)
    like = next(model.parameters())
    return student.to(device=like.device, dtype=like.dtype)


def _rebuilt(model: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    built = getattr(model, "attar_build", None)
    if built is not None and built["family"] in families():
        options = dict(built["options"])
        if isinstance(options.get("config"), Mapping):
            options["config"] = {**options["config"], **changes}
        else:
            options |= changes
        student = build(built["family"], **options)
        if hasattr(getattr(model, "config", None), "use_cache"):  # often set after it was built
            student.config.use_cache = model.config.use_cache  # type: ignore[union-attr]
        return student
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    student = type(model)(config)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student


# Configs of transformers


def _config_changes(config: Any, depth: Any, width: Any, layers: Any) -> dict[str, Any]:
    changes = _config_depth(config, depth)
    if isinstance(width, Mapping):
        changes |= _known_values(config, width)
    elif width is not None:
        changes |= _scaled(config, width)
    for key in _LISTS:
        if isinstance(entries := getattr(config, key, None), list | tuple) and changes:
            changes |= _listed(config, key, entries, changes, layers)
    return changes


def _config_depth(config: Any, depth: Any) -> dict[str, int]:
    if depth is None:
        return {}
    own = {_own(config, key): getattr(config, key) for key in _DEPTHS if hasattr(config, key)}
    if not isinstance(depth, Mapping):
        depth = dict.fromkeys(own, depth)
    for key, wanted in depth.items():
        if key not in own:
            raise UsageError(f"shrink: depth has no '{key}'; {suggest(key, own)}")
        if not 1 <= wanted <= own[key]:
            raise UsageError(f"shrink: {key} must be from 1 to {own[key]}, not {wanted}")
    return dict(depth)


def _own(config: Any, key: str) -> str:
    """What this config itself calls it."""
    return str(getattr(config, "attribute_map", {}).get(key, key))


def _known_values(config: Any, width: Mapping[str, Any]) -> dict[str, Any]:
    known = config.to_dict()
    for key, value in width.items():
        if _own(config, key) not in known:
            raise UsageError(f"shrink: the config has no '{key}'; {suggest(key, known)}")
        if isinstance(known[_own(config, key)], int) and not (
            isinstance(value, int) and 1 <= value <= known[_own(config, key)]
        ):
            raise UsageError(
                f"shrink: {key} must be from 1 to {known[_own(config, key)]}, not {value}"
            )
    return {_own(config, key): value for key, value in width.items()}


def _scaled(config: Any, factor: float) -> dict[str, Any]:
    """All widths times *factor*; heads keep theirs and become fewer."""
    known = config.to_dict()
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None)
    apart = _own(config, "head_dim") in known  # the width of a head is a value of its own
    left = max(1, round(factor * (groups or heads)))
    changes: dict[str, Any] = {}
    for key in {_own(config, key) for key in _HEADS if hasattr(config, key)}:
        changes[key] = left * (getattr(config, key) // (groups or heads))
    if groups:
        changes["num_key_value_heads"] = left
    size = hidden // heads
    wide = round(factor * hidden) if apart else size * left * (heads // (groups or heads))
    if apart and hidden % 8 == 0:
        wide = max(8, 8 * round(factor * hidden / 8))
    changes[_own(config, "hidden_size")] = wide
    for key in _INNER:
        if isinstance(inner := known.get(key), int):
            changes[key] = max(1, round(factor * inner))
    for key in _FOLLOWS:
        if known.get(key) == hidden:
            changes[key] = wide
    return changes


def _listed(
    config: Any, key: str, entries: Sequence[Any], changes: Mapping[str, Any], layers: Any
) -> dict[str, Any]:
    """A list of one entry a layer, for the layers that are kept."""
    depth = changes.get(_own(config, "num_hidden_layers"))
    if depth is None or depth >= len(entries):
        return {}
    if isinstance(layers, str | Mapping):
        if len(set(entries)) > 1:
            raise UsageError(
                f"shrink: the layers of this model differ ({key}); say which are kept: layers=[...]"
            )
        return {key: list(entries[:depth])}
    return {key: [entries[index] for index in layers]}


# Families of attar


def _option_changes(
    built: Mapping[str, Any], depth: Any, width: Any, layers: Any
) -> dict[str, Any]:
    family, options = built["family"], built["options"]
    changes: dict[str, Any] = {}
    if isinstance(width, Mapping):
        for key in width:
            if key not in options or key in ("shape", "outputs"):
                raise UsageError(f"shrink: {family} has no option '{key}'; {suggest(key, options)}")
        changes |= width
    elif width is not None:
        changes |= _narrower(family, options, width)
    if isinstance(depth, Mapping):
        raise UsageError(f"shrink: a {family} has one depth; give a number")
    if depth is None:
        return changes
    if "widths" in options:
        return changes | {"widths": _fewer(changes.get("widths", options["widths"]), depth)}
    if "depth" not in options:
        raise UsageError(f"shrink: a {family} has no depth that could be less; give width=")
    if depth > options["depth"]:
        raise UsageError(f"shrink: depth must be {options['depth']} at most, not {depth}")
    return changes | {"depth": depth}


def _as_many(layers: Sequence[int], built: Mapping[str, Any] | None) -> int:
    """The depth of a model that keeps *layers*; in a resnet they are blocks of each stage.

    Errors: a family of attar has no such layer (UsageError).
    """
    family, options = (built["family"], built["options"]) if built else ("", {})
    if not isinstance(options.get("depth"), int):
        return len(layers)
    of = (options["depth"] - 2) // 6 if family == "resnet" else options["depth"]
    where = " in each stage" if family in ("resnet", "mobilenet") else ""
    for number in layers:
        if type(number) is not int or not 0 <= number < of:
            known = "layer 0 alone" if of == 1 else f"layers 0 to {of - 1}"
            raise UsageError(
                f"shrink: there is no layer {number!r}; this {family} has {known}{where}"
            )
    return 6 * len(layers) + 2 if family == "resnet" else len(layers)


def _narrower(family: str, options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if "heads" in options:  # heads keep their width
        heads = max(1, round(factor * options["heads"]))
        return {"heads": heads, "width": heads * (options["width"] // options["heads"])}
    found: dict[str, Any] = {
        key: max(1, round(factor * options[key])) for key in ("width", "hidden") if key in options
    }
    if "widths" in options:
        found["widths"] = [max(1, round(factor * wide)) for wide in options["widths"]]
    if not found:
        raise UsageError(f"shrink: a {family} has no width that could be less; give depth=")
    return found


def _fewer(widths: Sequence[int], depth: int) -> list[int]:
    if not 1 <= depth <= len(widths) or len(set(widths)) > 1:
        raise UsageError(
            f"shrink: hidden layers of {list(widths)} cannot become {depth}: they must be of one "
            "width, and fewer; give width={'widths': [...]}"
        )
    return list(widths[:depth])
