"""How a model of tokens is run: which parts make its logits, and what it is told of positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attar.losses import Projected
from attar.tasks.task import Batch

POSITIONS = ("position_ids", "positions")

# Fields of a config that say what becomes of a head's result. A family may divide by what another
# one multiplies with, so both are tried.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_EQUAL = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative; float32 and wider: 1e-5


@dataclass(frozen=True)
class Decoder:
    """logits = softcap * tanh(scale * head(backbone(tokens)) / softcap); no softcap: no tanh."""

    backbone: nn.Module
    head: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Projected:
        """The logits [..., V] of hidden states [..., D], not made."""
        return Projected(hidden, self.head.weight, self.head.bias, self.scale, self.softcap)


Ends = tuple[tuple[nn.Module, ...], nn.Linear]

# What became of the ends of each model: a decoder, or None where their product is not its logits.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[Ends, Decoder | None]] = WeakKeyDictionary()


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's answer to a batch; without its logits, where a ``Projected`` can stand for them.

    Whether one can is seen at the first call: the model is run whole then, with what becomes of
    its head's result in plain sight, and later calls run what comes before the head alone.
    """
    ends = ends_of(model)
    if ends is None:
        return _whole(model, batch)
    known = _KNOWN.get(model)
    if known is None or known[0] != ends:
        return _first(model, ends, batch)
    decoder = known[1]
    if decoder is None:
        return _whole(model, batch)
    return _spoken(decoder, decoder.backbone(batch["inputs"], **_told(decoder.backbone, batch)))


def decoder_of(model: nn.Module) -> Decoder | None:
    """The parts that make the model's logits; None where they are not known or not enough."""
    ends, known = ends_of(model), _KNOWN.get(model)
    return known[1] if ends and known and known[0] == ends else None


def ends_of(model: nn.Module) -> Ends | None:
    """What may come right before the last linear layer, and that layer, where a model names them.

    A layer that something else listens to, or that an adapter changes, is run as it is.
    """
    inner = unwrapped(model)
    if callable(named := getattr(inner, "get_output_embeddings", None)):  # of transformers
        head, last = named(), getattr(inner, "get_decoder", lambda: None)()
        found = [getattr(inner, "base_model", None), last]
    else:
        head, found = getattr(inner, "head", None), [getattr(inner, "backbone", None)]
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    if head._forward_hooks or head._forward_pre_hooks:
        return None
    parts = dict.fromkeys(p for p in found if isinstance(p, nn.Module) and p is not inner)
    return (tuple(parts), head) if parts else None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a wrapper of peft."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return inner if isinstance(inner, nn.Module) else model


@dataclass
class _Heard:
    """One pass: how each backbone was called, with what it gave; the head's argument and result."""

    calls: dict[nn.Module, list[tuple[list[Any], Any]]]
    before: Tensor | None = None
    raw: Tensor | None = None


def _first(model: nn.Module, ends: Ends, batch: Batch) -> Any:
    short = "logits_to_keep" in _parameters(type(unwrapped(model)).forward)
    with _listening(ends, instead=short) as heard:
        out = _whole(model, batch, **({"logits_to_keep": 1} if short else {}))
    logits = _logits(out)
    backbone = _alone(ends, heard, batch)
    scaled = None if backbone is None else _recognised(unwrapped(model), heard, logits, backbone)
    if scaled is None or backbone is None:
        if short or (logits is not None and bool(logits.any())):  # zeros say nothing yet
            _KNOWN[model] = ends, None
        return _whole(model, batch) if short else out
    decoder = Decoder(backbone, ends[1], *scaled)
    _KNOWN[model] = ends, decoder
    return _spoken(decoder, heard.calls[backbone][0][1])


@contextmanager
def _listening(ends: Ends, *, instead: bool) -> Iterator[_Heard]:
    """Hear one pass; with *instead*, numbers that show any scale stand for the head's result."""
    heard = _Heard({backbone: [] for backbone in ends[0]})

    def after_backbone(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        heard.calls[module].append(([*args, *kwargs.values()], out))

    def after_head(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        heard.before, heard.raw = args[0], out
        if instead:
            sizes = torch.logspace(-3, 2, out.shape[-1], device=out.device)
            sizes[::2] *= -1
            heard.raw = sizes.to(out.dtype).expand_as(out)
        return heard.raw

    handles = [part.register_forward_hook(after_backbone, with_kwargs=True) for part in ends[0]]
    handles.append(ends[1].register_forward_hook(after_head))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _alone(ends: Ends, heard: _Heard, batch: Batch) -> nn.Module | None:
    """The backbone that was called once, with tokens and positions and nothing else of weight."""
    given = [batch["inputs"], batch.get("positions")]
    for backbone in ends[0]:
        if len(calls := heard.calls[backbone]) != 1 or _hidden(calls[0][1]) is None:
            continue
        told = [value for value in calls[0][0] if not isinstance(value, bool | int | float | str)]
        known = [any(value is one for one in (None, *given)) for value in told]
        if all(known) and any(value is given[0] for value in told):
            return backbone
    return None


def _recognised(
    inner: nn.Module, heard: _Heard, logits: Tensor | None, backbone: nn.Module
) -> tuple[float, float | None] | None:
    """The scale and the soft-cap that make the model's logits of its head's result."""
    seen = [_hidden(heard.calls[backbone][0][1]), heard.before, heard.raw, logits]
    if any(part is None or part.ndim != 3 for part in seen):
        return None
    # At the last position of the first row, which a model that makes few logits makes too.
    state, read, made, said = (part[0, -1].detach().cpu() for part in seen if part is not None)
    if not torch.equal(state.to(read.dtype), read) or made.shape != said.shape or not said.any():
        return None
    size = float(said.abs().max())
    least, found = _EQUAL.get(made.dtype, 1e-5), None
    for scale, cap in product(*_candidates(inner)):
        tried = made.double() * scale
        tried = tried if cap is None else cap * torch.tanh(tried / cap)
        error = float((tried - said).abs().max()) / size
        if error < least:
            least, found = error, (scale, cap)
    return found


def _candidates(inner: nn.Module) -> tuple[list[float], list[float | None]]:
    config = getattr(inner, "config", None)
    scales: list[float] = [1.0]
    caps: list[float | None] = [None]
    for name in _SCALES:
        if value := _number(config, name):
            scales += [value, 1 / value]
    caps += [value for name in _CAPS if (value := _number(config, name))]
    return list(dict.fromkeys(scales)), list(dict.fromkeys(caps))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number else None  # type: ignore[arg-type]


def _spoken(decoder: Decoder, out: Any) -> dict[str, Any]:
    """What the backbone returned by name, and the logits."""
    hidden = _hidden(out)
    assert hidden is not None, "a backbone gives what it gave at the first call"
    named = dict(out) if hasattr(out, "keys") else {}
    return {**named, "last_hidden_state": hidden, "logits": decoder.logits(hidden)}


def _hidden(out: Any) -> Tensor | None:
    if not isinstance(out, Tensor):
        first = out[0] if isinstance(out, tuple | list) and out else None
        out = getattr(out, "last_hidden_state", first)
    return out if isinstance(out, Tensor) and out.ndim == 3 else None


def _logits(out: Any) -> Tensor | None:
    if not isinstance(out, Tensor):
        first = out[0] if isinstance(out, tuple | list) and out else None
        named = out.get("logits") if isinstance(out, dict) else None
        out = named if named is not None else getattr(out, "logits", first)
    return out if isinstance(out, Tensor) else None


def _whole(model: nn.Module, batch: Batch, **more: Any) -> Any:
    return model(batch["inputs"], **_told(unwrapped(model), batch), **more)


def _told(reader: nn.Module, batch: Batch) -> dict[str, Any]:
    """What is said besides the tokens, to a module that has parameters for it.

    No attention mask: where positions begin again a new document begins, and the attention of
    transformers looks no further back than that, but only without a mask and without a cache.
    """
    names = _parameters(type(reader).forward)
    told: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if "positions" in batch:
        for name in POSITIONS:
            if name in names:
                return {**told, name: batch["positions"]}
    return told


@lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
