"""Whole numbers of few bits instead of floats: learned with, frozen, or for linear layers alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from attar.compression.common import answer, applied, check_plain, layers_of, planned_layer, run
from attar.compression.flow import Flow, flow_of
from attar.models import quantized
from attar.models.adapters import has_adapters
from attar.models.changed import noted, put
from attar.models.masks import baked, masks_of, put_masks
from attar.models.matching import first_names, matching
from attar.models.quantized import Bounds, Learning, Mode, Span
from attar.runtime import UsageError, eval_mode

Bits = Annotated[int, Ge(2), Le(8)]
Limits = tuple[float, float]

_BITS = {"learn": range(2, 9), "dynamic": (8,), "weights": (4, 8)}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_SHOWN = 4

# What multiplies with weights of its own. Whatever is none of these stays float and costs little.
_PRODUCTS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)


@dataclass(frozen=True)
class Quantized:
    """One layer that gets a grid.

    Attributes:
        path: its place in the model.
        weights: how many it has.
        reads: the smallest and largest number that it reads; None where that is on a grid
            already, and where only weights are rounded.
        writes: the same of what it writes, after a ReLU that follows; None where the next layer
            rounds it.
        bounds: what the limits of *writes* never pass.
        takes: the path of the batch norm that goes into its weight.
    """

    path: str
    weights: int
    reads: Limits | None = None
    writes: Limits | None = None
    bounds: Bounds = (None, None)
    takes: str | None = None


@dataclass(frozen=True)
class Quantization:
    """A plan for whole numbers: which layers, how many bits, and the ranges that were seen.

    Attributes:
        mode: learn, freeze, dynamic or weights.
        bits: of each weight.
        layers: those that get a grid.
        left: why each other layer that was asked for stays as it is, by path.
    """

    mode: Mode
    bits: int
    layers: tuple[Quantized, ...]
    left: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """JSON values, from which `read` makes the plan again."""
        layers = [
            {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(each).items()}
            for each in self.layers
        ]
        return {
            "way": "quantize", "mode": self.mode, "bits": self.bits, "layers": layers,
            "left": dict(self.left),
        }  # fmt: skip

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Quantization:
        """The plan that `describe` told."""
        listed: list[dict[str, Any]] = told["layers"]
        layers = (
            {k: tuple(v) if isinstance(v, list) else v for k, v in each.items()} for each in listed
        )
        made: tuple[Any, ...] = tuple(Quantized(**each) for each in layers)  # type: ignore[arg-type]
        return cls(told["mode"], told["bits"], made, dict(told["left"]))

    def told(self) -> str:
        """One line for people."""
        weights = sum(each.weights for each in self.layers)
        norms = sum(each.takes is not None for each in self.layers)
        folded = f", {norms} batch norms go into them" if norms else ""
        return (
            f"{self.mode}: {weights:,} weights of {len(self.layers)} layers in {self.bits} "
            f"bits{folded}, {len(self.left)} layers left as they are"
        )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of *model* with these layers on their grids; *model* is left as it is.

        Errors: a model without these layers (UsageError).
        """
        plain = baked(model)
        made = copy.deepcopy(plain)
        for each in self.layers:
            made = put(made, each.path, self._part(made, each))
            if each.takes is not None:
                made = put(made, each.takes, nn.Identity())
        made = noted(made, plain)
        put_masks(made, masks_of(model))  # whole numbers that are zero stay so by themselves
        return made

    def _part(self, model: nn.Module, each: Quantized) -> nn.Module:
        source: Any = _part_of(model, each, (Learning,) if self.mode == "freeze" else _KINDS)
        if self.mode == "freeze":
            return quantized.frozen_layer(source)
        if each.takes is not None:
            source = folded(source, model.get_submodule(each.takes))
        made = quantized.layer(
            source,
            self.mode,
            self.bits,
            reads=None if each.reads is None else (None, None),
            writes=None if each.writes is None else each.bounds,
        )
        for span, limits in ((getattr(made, name, None), getattr(each, name)) for name in _SPANS):
            if isinstance(span, Span):
                span.limits.copy_(torch.tensor(limits))
        return made


_KINDS = (nn.Linear, nn.Conv2d)
_SPANS = ("reads", "writes")


def plan_quantize(
    model: nn.Module,
    example: Any = None,
    *,
    mode: Mode = "learn",
    bits: Bits | None = None,
    layers: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    task: Any = None,
) -> Quantization:
    """A copy of *model* whose layers compute with whole numbers of few bits.

    `quantize` makes it, and `plan_quantize` tells beforehand which layers and which ranges; it
    changes nothing. There are four ways:

    - ``learn``: linear and convolutional layers round their weights, and what they read, to 8
      bits each time they run, and learn through it (quantisation-aware training). A batch norm
      that alone reads a layer goes into its weights first.
    - ``freeze``: what ``learn`` made, with weights that are whole numbers, int8, and ranges that
      stay. It answers as before, to the bit, in eval mode; its file is a quarter as large, and
      `attar.export` makes the ``onnx_int8`` file of it, which is as much faster as the processor
      has instructions for it.
    - ``weights``: linear layers keep their weights in 8 or 4 bits and multiply in float.
    - ``dynamic``: the same in 8 bits, and each row that a layer reads is rounded too.

    So it is learned by distillation, from the model itself or from a larger one::

        student = attar.quantize(model, images, mode="learn")
        student = attar.distill(student, attar.Teacher(model, task), train, task, terms)
        student = attar.quantize(student, mode="freeze")

    Weights are symmetric with a scale for each output channel, largest weight by 127 for 8 bits;
    what a layer reads has one range, from 0 to 255, that follows the batches of the training by a
    moving average (Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342). A
    convolution rounds what it writes too, after the ReLU that follows it. ``weights`` in 4 bits
    has a scale for each 32 inputs.

    `attar.models.save` and `load` keep the result, with the same bits. Zeros that `sparsify` made
    stay zero while it learns and when it is frozen.

    Args:
        model: left as it is.
        example: for ``learn``: some hundred training examples, for the ranges to begin with: a
            tensor [n, ...], or a table of arguments; with *task* a batch.
        bits: of each weight: 2 to 8 for ``learn``, 4 or 8 for ``weights``; 8 when left out. 7
            is for processors without VNNI, see the documentation of ``onnx_int8``.
        layers: patterns of the layers, as in ``freeze``.
        skip: patterns of layers that stay as they are.
        task: how the model is run on *example*.

    Errors: a layer that would stay float and is not in *skip*, by name; a layer that the example
    does not run; a model that is quantised already, or has adapters (UsageError).
    """
    bits = _checked(model, mode, bits, layers, skip)
    model = baked(model)
    if mode == "freeze":
        return _freezing(model)
    chosen, left = layers_of(model, layers, skip, _KINDS, "quantize")
    _check_float(model, mode, chosen, left, layers, skip)
    if mode != "learn":
        found = tuple(Quantized(path, part.weight.numel()) for path, part in chosen.items())
        return Quantization(mode, bits, found, left)
    if example is None:
        raise UsageError(
            "quantize: mode 'learn' needs examples for its ranges; pass some hundred training "
            "inputs, quantize(model, inputs)"
        )
    return Quantization(mode, bits, _ranged(model, example, task, chosen), left)


quantize = applied(plan_quantize)


def _checked(model: nn.Module, mode: Any, bits: Any, layers: Any, skip: Any) -> int:
    if mode not in ("learn", "freeze", "dynamic", "weights"):
        raise UsageError(
            f"quantize: mode is 'learn', 'freeze', 'dynamic' or 'weights', not {mode!r}"
        )
    if has_adapters(model):
        check_plain(model, "quantize")
    if mode == "freeze":
        if bits is not None or tuple(layers) != ("*",) or tuple(skip):
            raise UsageError(
                "quantize: mode 'freeze' keeps the layers and bits that mode 'learn' chose; leave "
                "bits, layers and skip out"
            )
        return 8
    if there := quantized.modes(model):
        path, how = next(iter(there.items()))
        raise UsageError(
            f"quantize: '{path}' is quantised already ({how}); "
            + ("give mode='freeze'" if how == "learn" else "give the model from before")
        )
    bits = 8 if bits is None else bits
    if type(bits) is not int or bits not in _BITS[mode]:
        allowed = ", ".join(map(str, _BITS[mode]))
        raise UsageError(f"quantize: bits of mode '{mode}' is {allowed}, not {bits!r}")
    return bits


def _freezing(model: nn.Module) -> Quantization:
    learning = [(path, part) for path, part in model.named_modules() if isinstance(part, Learning)]
    if not learning:
        raise UsageError(
            "quantize: no layer of the model learns on a grid; make it with mode='learn' first"
        )
    bits = max(part.bits for _, part in learning)
    found = tuple(Quantized(path, part.weight.numel()) for path, part in learning)
    return Quantization("freeze", bits, found, {})


def _check_float(
    model: nn.Module,
    mode: Mode,
    chosen: dict[str, Any],
    left: Mapping[str, str],
    layers: Sequence[str],
    skip: Sequence[str],
) -> None:
    """Refuse layers that were asked for and would stay float without a word."""
    asked = matching(model, layers) - (matching(model, skip) if skip else set())
    first, small = first_names(model), mode in ("dynamic", "weights")
    why: dict[str, str] = {}
    for path, part in model.named_modules():
        own = (f"{path}.{name}".lstrip(".") for name in part._parameters)
        if not asked & {first.get(name) for name in own} or not _multiplies(part):
            continue
        if path not in chosen:
            why[path] = left.get(path, f"is a {type(part).__name__}")
        elif small and isinstance(part, nn.Conv2d):
            why[path] = "is a Conv2d"
        elif isinstance(part, nn.Conv2d) and part.padding_mode != "zeros":
            why[path] = f"pads by {part.padding_mode}"
        elif not bool(part.weight.isfinite().all()):
            raise UsageError(f"quantize: the weight of '{path}' holds NaN or infinity; mend it")
    if why:
        shown = ", ".join(f"'{path}' ({reason})" for path, reason in list(why.items())[:_SHOWN])
        more = f" and {len(why) - _SHOWN} more" if len(why) > _SHOWN else ""
        other = "; convolutions are for mode='learn' or the export format onnx_int8" * small
        raise UsageError(
            f"quantize: {shown}{more} would stay float; name what may in skip=[...]{other}"
        )


def _multiplies(part: nn.Module) -> bool:
    # transformers has a linear layer of its own, with its weight the other way round.
    return isinstance(part, _PRODUCTS) or type(part).__name__ == "Conv1D"


# ---------------------------------------------------------------- what the examples tell


def _ranged(
    model: nn.Module, example: Any, task: Any, chosen: dict[str, Any]
) -> tuple[Quantized, ...]:
    norms = {path: part for path, part in model.named_modules() if type(part) in _NORMS}

    def forward() -> Tensor:
        out = run(model, example, "quantize", task)
        return answer(out)

    with eval_mode(model):
        flow = flow_of(model, [*chosen, *norms], forward)
    if unread := [path for path in chosen if path not in flow.reads]:
        raise UsageError(
            f"quantize: '{unread[0]}' is not run by the example, so its range is not known; name "
            "it in skip=[...]"
        )
    takes = _foldable(flow, chosen, norms)
    written = {path: _written(flow, path, part, takes) for path, part in chosen.items()}
    rounded = {made[0] for made in written.values() if made is not None}
    return tuple(
        _layer_plan(flow, path, part, takes.get(path), written[path], rounded)
        for path, part in chosen.items()
    )


def _foldable(flow: Flow, chosen: dict[str, Any], norms: dict[str, Any]) -> dict[str, str]:
    """By path of a layer, the batch norm that alone reads what it writes."""
    by_value = {value: path for path, values in flow.reads.items() for value in values}
    found: dict[str, str] = {}
    for path, part in chosen.items():
        value = _once(flow.writes, path)
        norm = by_value.get(-1 if value is None else value)
        if value is None or norm not in norms or _once(flow.reads, norm) is None:
            continue
        outputs = part.out_features if isinstance(part, nn.Linear) else part.out_channels
        # Along a linear layer's features, and not along a sequence of as many tokens.
        along = isinstance(norms[norm], nn.BatchNorm2d) is isinstance(part, nn.Conv2d)
        whole = norms[norm].running_mean is not None and norms[norm].num_features == outputs
        step = flow.only_step(value)
        if along and whole and step is not None and "batch_norm" in step.name:
            found[path] = norm
    return found


def _written(
    flow: Flow, path: str, part: nn.Module, takes: Mapping[str, str]
) -> tuple[int, Limits, Bounds] | None:
    """The value that a convolution rounds, after the ReLU that follows; its limits and bounds.

    None for linear layers, which onnxruntime multiplies as whole numbers all the same, and for
    what the model answers.
    """
    value = _once(flow.writes, takes.get(path, path))
    if value is None or not isinstance(part, nn.Conv2d):
        return None
    after, bounds = flow.through(value)
    if not flow.steps.get(after):
        return None
    return after, _limits(flow, [value], path, bounds), bounds


def _layer_plan(
    flow: Flow,
    path: str,
    part: Any,
    takes: str | None,
    written: tuple[int, Limits, Bounds] | None,
    rounded: set[int],
) -> Quantized:
    values = flow.reads[path]
    reads = None if rounded.issuperset(values) else _limits(flow, values, path)
    writes, bounds = (None, (None, None)) if written is None else written[1:]
    return Quantized(path, part.weight.numel(), reads, writes, bounds, takes)


def _limits(flow: Flow, values: Sequence[int], path: str, bounds: Bounds = (None, None)) -> Limits:
    """The limits of *values* together, with zero between them."""
    seen = [flow.limits[value] for value in values if value in flow.limits]
    low = min([0.0, *(each[0] for each in seen)])
    high = max([0.0, *(each[1] for each in seen)])
    if not seen or not all(abs(each) < torch.inf for limits in seen for each in limits):
        raise UsageError(
            f"quantize: what '{path}' computes with on the example is not finite; mend the model "
            "or the example"
        )
    least, most = bounds
    return (low if least is None else max(low, least), high if most is None else min(high, most))


def _once(held: Mapping[str, Sequence[int]], path: str | None) -> int | None:
    """The value of a part that ran once; None where it ran never or several times."""
    values = held.get(path or "", ())
    return values[0] if len(values) == 1 else None


@torch.no_grad()
def folded(layer: nn.Linear | nn.Conv2d, norm: Any) -> nn.Linear | nn.Conv2d:
    """A copy of *layer* that answers what *norm*, in eval mode, makes of what *layer* answers."""
    made: Any = copy.deepcopy(layer)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    weight = layer.weight
    each = scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = -norm.running_mean.double() if layer.bias is None else layer.bias - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    learns = weight.requires_grad
    made.weight = nn.Parameter((weight.double() * each).to(weight.dtype), requires_grad=learns)
    made.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=learns)
    return made


def _part_of(model: nn.Module, each: Quantized, kinds: tuple[type, ...]) -> nn.Module:
    def fits(part: nn.Module) -> bool:
        norm = None if each.takes is None else type(model.get_submodule(each.takes))
        return type(part) in kinds and (norm is None or norm in _NORMS)

    return planned_layer(model, each.path, each.weights, fits)
