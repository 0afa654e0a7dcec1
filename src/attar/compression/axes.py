"""What the dimensions of a model's tensors count: which of them must keep the same indices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from attar.runtime import UsageError

# Names of the parts of attention and of the feed-forward layer, as transformers and attar spell
# them. The dimension meant is that of the outputs in the first group, of the inputs in the other.
APART = (  # queries, keys and values, each a layer
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
_QUERIES = re.compile(rf"\.({'|'.join(q for q, _, _ in APART)})\.(weight|bias)$")
_KEYS = re.compile(rf"\.({'|'.join(f'{k}|{v}' for _, k, v in APART)})\.(weight|bias)$")
_FUSED = re.compile(r"((?<=attention)\.qkv|(?<=attn)\.c_attn)\.(weight|bias)$")
_MIXED = re.compile(
    r"(\.(o_proj|out_proj|out_lin|o)|(?<=attention)\.(output\.dense|project)|(?<=attn)\.c_proj)"
    r"\.weight$"
)
_BIAS = re.compile(r"\.relative_attention_bias\.weight$")
_INNER = re.compile(
    r"\.(intermediate\.dense|up_proj|gate_proj|fc1|wi|wi_0|wi_1|lin1|c_fc|(?<=mlp\.)0)"
    r"\.(weight|bias)$"
)
_OUTER = re.compile(
    r"\.(output\.dense|down_proj|fc2|wo|lin2|(?<=mlp\.)c_proj|(?<=mlp\.)2)\.weight$"
)
_GATES = re.compile(r"\.(weight|bias)_(ih|hh)_l\d+(_reverse)?$")
_UNKNOWN = re.compile(r"(qkv|query_key_value|in_proj|gate_up|Wqkv)")
GATES = 4  # of an LSTM cell, one behind another in its tensors


class Heads(NamedTuple):
    """Attention: how many heads, how many of keys and values, and how wide one is."""

    heads: int
    groups: int
    size: int


@dataclass(frozen=True)
class Axis:
    """What one dimension of a tensor counts.

    Attributes:
        space: the dimensions of one space keep the same members.
        size: entries of the source's dimension and of the result's.
        unit: entries that make one member, in the source and in the result: a head's width.
        blocks: how often the members stand one behind another.
        groups: of heads, how many sets of keys and values they read, an equal number each.
    """

    space: str
    size: tuple[int, int]
    unit: tuple[int, int] = (1, 1)
    blocks: int = 1
    groups: tuple[int, int] | None = None

    @property
    def members(self) -> tuple[int, int]:
        """How many the source has, and how many are kept."""
        of, kept = (n // (u * self.blocks) for n, u in zip(self.size, self.unit, strict=True))
        return of, kept


def transposed(part: nn.Module) -> bool:
    """Whether a layer keeps its weight as [inputs, outputs]; GPT-2's do."""
    return type(part).__name__ == "Conv1D"


def axes_of(
    name: str,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    models: tuple[nn.Module, nn.Module],
    scopes: tuple[str, str],
) -> tuple[Axis | None, ...]:
    """What each dimension of a tensor counts where it becomes smaller; None where it does not.

    Args:
        name: of the tensor in the smaller model.
        sizes: the shape there is, and the one that is wanted.
        models: the one that gives and the smaller one.
        scopes: paths of the layers that hold the tensor.

    Errors: a tensor that holds several things in an order that is not known (UsageError).
    """
    theirs, own = sizes
    inputs = 0 if transposed(models[1].get_submodule(scopes[1])) and len(own) > 1 else 1
    outputs = 1 - inputs if len(own) > 1 else 0
    special = _special(name, theirs, own, models, scopes, outputs, inputs)
    if special is None and theirs != own and _UNKNOWN.search(name):
        raise UsageError(
            f"'{name}' holds several matrices in one, in an order that is not known here; "
            "keep its width and change the depth, or give a model whose parts lie apart"
        )
    dim, axis = special or (-1, None)
    return tuple(
        axis if index == dim else _plain(of, kept)
        for index, (of, kept) in enumerate(zip(theirs, own, strict=True))
    )


def _plain(of: int, kept: int) -> Axis | None:
    # All dimensions of these sizes share their indices, as the ones that a residual stream joins
    # must (arXiv:2311.18823).
    return None if of == kept else Axis(f"{of} to {kept}", (of, kept))


def _special(
    name: str,
    theirs: tuple[int, ...],
    own: tuple[int, ...],
    models: tuple[nn.Module, nn.Module],
    scopes: tuple[str, str],
    outputs: int,
    inputs: int,
) -> tuple[int, Axis | None] | None:
    """The dimension of a tensor that counts heads, gates or what is inside of a block."""
    dotted = f".{name}"
    for pattern, kind, dim in (
        (_QUERIES, "heads", outputs),
        (_KEYS, "groups", outputs),
        (_FUSED, "heads", outputs),
        (_MIXED, "heads", inputs),
        (_BIAS, "heads", 1),
    ):
        if found := pattern.search(dotted):
            where = dotted[: found.start()].removeprefix(".").removesuffix(".self")
            size = theirs[dim], own[dim]
            before, after = heads_of(models[0], scopes[0]), heads_of(models[1], scopes[1])
            if before is None or after is None:
                return None
            unit = (1, 1) if pattern is _BIAS else (before.size, after.size)
            blocks = 3 if pattern is _FUSED else 1
            if size[0] == size[1] and unit[0] != unit[1]:
                raise UsageError(
                    f"'{name}' would keep its width of {size[0]} with heads of {unit[1]} in the "
                    f"place of {unit[0]}; keep the width of a head"
                )
            if blocks * unit[0] * getattr(before, kind) != size[0] or size[0] == size[1]:
                return None
            groups = (before.groups, after.groups) if kind == "heads" else None
            # T5 has one table of distances for all layers, which must keep the same heads.
            where = re.sub(r"block\.\d+\.layer\.\d+\.", "", where)
            return dim, Axis(f"{kind} of {where}", size, unit, blocks, groups)
    for pattern, dim in ((_INNER, outputs), (_OUTER, inputs)):
        if found := pattern.search(dotted):
            where = dotted[: found.start()].removeprefix(".")
            size = theirs[dim], own[dim]
            return dim, None if size[0] == size[1] else Axis(f"inside of {where}", size)
    if _GATES.search(dotted) and theirs[0] != own[0]:
        size = theirs[0], own[0]
        return 0, Axis(f"{size[0] // GATES} to {size[1] // GATES}", size, blocks=GATES)
    return None


def heads_of(model: nn.Module, path: str) -> Heads | None:
    """The attention that a layer belongs to; None where the model does not tell."""
    part = model.get_submodule(path.rpartition(".")[0])
    own = getattr(part, "heads", None)
    if isinstance(own, int):  # attar's own
        mixer = part.get_submodule("project")
        assert isinstance(mixer, nn.Linear)
        return Heads(own, own, mixer.in_features // own)
    config = config_of(model)
    if config is None:
        return None
    heads = getattr(config, "num_attention_heads", None)
    side = "decoder_attention_heads"
    if "decoder." in f"{path}." and hasattr(config, side):
        heads = getattr(config, side)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Heads(heads, getattr(config, "num_key_value_heads", None) or heads, size)


def config_of(model: nn.Module) -> Any:
    """The config of a model of transformers, or of the one inside of a wrapper; else None."""
    return next((m.config for m in model.modules() if hasattr(m, "config")), None)
