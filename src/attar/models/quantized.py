"""Layers on a grid of whole numbers: while they learn, frozen, and kept small to compute in float.

A number x is kept as a whole number q with ``x = (q - zero) * scale``. Of a weight each output
channel has a scale of its own and zero is 0; what a layer reads or writes has one scale and one
zero, from 0 to 255. Rounding is to the nearest, halves to the even one. So it is in onnxruntime,
and in Jacob et al. (arXiv:1712.05877) and Krishnamoorthi (arXiv:1806.08342), whose training this
is: ranges follow what is seen, and gradients go through the rounding as if it were not there
(Bengio et al., arXiv:1308.3432).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["learn", "freeze", "dynamic", "weights"]
Bounds = tuple[float | None, float | None]

TOP = 255  # of what a layer reads and writes: 8 bits without a sign
GROUP = 32  # inputs that share a scale where two weights share a byte
MOMENTUM = 0.01  # of a range in training
_LEAST = torch.finfo(torch.float32).tiny  # of a scale, whose reciprocal is finite


def most(bits: int) -> int:
    """The largest whole number of a weight; the smallest is its negative.

    >>> most(8), most(4)
    (127, 7)
    """
    return 2 ** (bits - 1) - 1


def scales(weight: Tensor, bits: int) -> Tensor:
    """What one step is worth in each output channel of *weight*: its largest number by ``most``."""
    largest = weight.detach().float().abs().flatten(1).amax(1)
    return (largest / most(bits)).clamp_min(_LEAST)


def whole(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The whole numbers that *weight* [out, ...] is nearest to, in its own type."""
    return (weight.detach() / _each(scale, weight)).round().clamp(-most(bits), most(bits))


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """*weight* [out, ...] as the nearest it can be on its grid; its gradient is that of weight."""
    made = whole(weight, scale, bits) * _each(scale, weight)
    return made + (weight - weight.detach())  # a zero, which learns


def _each(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weight.ndim - 1)).to(weight.device)


class Span(nn.Module):
    """Rounds what passes to 256 steps between two limits, and lets them follow it in training.

    Attributes:
        limits: the smallest and the largest number, [2]; zero is between them.
        bounds: what no limit passes, such as 0 and None where a ReLU comes next.
        fixed: whether the limits stay as they are in training too.
    """

    limits: Tensor

    def __init__(self, bounds: Bounds = (None, None), *, fixed: bool = False) -> None:
        super().__init__()
        self.bounds, self.fixed = bounds, fixed
        self.register_buffer("limits", torch.zeros(2))
        self.constant: tuple[float, int] | None = None  # of a file, see `as_constants`

    def forward(self, inputs: Tensor) -> Tensor:
        if self.constant is not None:
            grid = (*self.constant, 0, TOP, torch.uint8)
            numbers = torch.ops.quantized_decomposed.quantize_per_tensor(inputs, *grid)
            return torch.ops.quantized_decomposed.dequantize_per_tensor(numbers, *grid)
        if self.training and not self.fixed:
            self._follow(inputs)
        scale, zero = self.step()
        given = inputs.float()
        made = given.detach() / scale
        made.round_().add_(zero).clamp_(0, TOP).sub_(zero).mul_(scale)
        if given.requires_grad:  # of what is within the limits; the difference is zero
            within = given.clamp(-zero * scale, (TOP - zero) * scale)
            made = made + (within - within.detach())
        return made.to(inputs.dtype)

    def step(self) -> tuple[Tensor, Tensor]:
        """What one step is worth, and which whole number is zero."""
        low, high = self.limits.float().unbind()
        scale = ((high - low) / TOP).clamp_min(_LEAST)
        return scale, (-low / scale).round().clamp(0, TOP)

    @torch.no_grad()
    def _follow(self, inputs: Tensor) -> None:
        if inputs.numel():
            self.limits.lerp_(self.seen(inputs).to(self.limits), MOMENTUM)

    def seen(self, inputs: Tensor) -> Tensor:
        """The limits that *inputs* ask for."""
        low, high = inputs.detach().float().aminmax()
        limits = torch.stack([low.clamp(max=0), high.clamp(min=0)])
        return limits if self.bounds == (None, None) else limits.clamp(*self.bounds)


class Layer(nn.Module):
    """What all of these share: the product, which is a linear or a convolutional layer's."""

    weight: nn.Parameter
    bits: int
    sizes: dict[str, Any]

    def __init__(self, source: Any) -> None:
        super().__init__()
        sizes = source.sizes if isinstance(source, Layer) else sizes_of(source)
        self.sizes = sizes
        self.convolved: tuple[Any, ...] | None = None  # how a convolution goes over its input
        if sizes["kind"] == "linear":
            self.in_features, self.out_features = sizes["in_features"], sizes["out_features"]
        else:
            names = ("stride", "padding", "dilation", "groups")
            self.convolved = tuple(sizes[name] for name in names)
        self.bias = None if source.bias is None else _own(source.bias)

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """The answer of the layer with *weight*."""
        if self.convolved is None:
            return F.linear(inputs, weight, self.bias)
        return F.conv2d(inputs, weight, self.bias, *self.convolved)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.sizes.items())


class _Spanned(Layer):
    """A layer that rounds what it reads, or what it writes, or both."""

    def __init__(
        self,
        source: Any,
        bits: int,
        reads: Span | None,
        writes: Span | None,
    ) -> None:
        super().__init__(source)
        self.bits, self.reads, self.writes = bits, reads, writes

    def forward(self, inputs: Tensor) -> Tensor:
        read = inputs if self.reads is None else self.reads(inputs)
        made = self.product(read, self.on_grid().to(read.dtype))
        return made if self.writes is None else self.writes(made)

    def on_grid(self) -> Tensor:
        """The weight that is multiplied with."""
        raise NotImplementedError


class Learning(_Spanned):
    """A layer whose weight learns in float, and is rounded each time it is used."""

    def __init__(self, source: Any, bits: int, reads: Span | None, writes: Span | None) -> None:
        super().__init__(source, bits, reads, writes)
        self.weight = _own(source.weight)

    def on_grid(self) -> Tensor:
        weight = self.weight.float()
        return rounded(weight, scales(weight, self.bits), self.bits)


class Frozen(_Spanned):
    """A layer whose weight is whole numbers, int8, and what one step is worth in each channel."""

    weight_scale: Tensor

    def __init__(self, source: Any, bits: int, reads: Span | None, writes: Span | None) -> None:
        super().__init__(source, bits, reads, writes)
        scale = scales(source.weight, bits)
        self.weight = _numbers(whole(source.weight, scale, bits).to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.in_file = False

    def on_grid(self) -> Tensor:
        if self.in_file:
            zero = torch.zeros_like(self.weight_scale, dtype=torch.int8)
            top = most(8)
            return torch.ops.quantized_decomposed.dequantize_per_channel(
                self.weight, self.weight_scale, zero, 0, -top, top, torch.int8
            )
        return self.weight.float() * _each(self.weight_scale, self.weight)


class Small(Layer):
    """A linear layer whose weight is kept in 8 or 4 bits, and multiplied with in float.

    With *dynamic* each row that it reads is rounded too, to steps of its own. The product of two
    rows of whole numbers is then a whole number, which float32 holds exactly up to 2^24.
    """

    weight_scale: Tensor

    def __init__(self, source: nn.Linear, bits: int, *, dynamic: bool) -> None:
        super().__init__(source)
        self.bits, self.dynamic = bits, dynamic
        make = packed if bits == 4 else _by_channel
        weight, scale = make(source.weight.detach())
        self.weight = _numbers(weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.bits == 4:
            weight = unpacked(self.weight, self.weight_scale, self.in_features)
            return F.linear(inputs, weight.to(inputs.dtype), self.bias)
        read, step = self._read(inputs)
        # The scale goes over the answer, which is smaller than the weight.
        made = F.linear(read, self.weight.to(read.dtype)) * (self.weight_scale.to(read) * step)
        return made if self.bias is None else made + self.bias

    def _read(self, inputs: Tensor) -> tuple[Tensor, Tensor | float]:
        if not self.dynamic:
            return inputs, 1.0
        step = (inputs.abs().amax(-1, keepdim=True) / most(8)).clamp_min(_LEAST)
        return (inputs / step).round().clamp(-most(8), most(8)), step


def _by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = scales(weight, 8)
    return whole(weight, scale, 8).to(torch.int8), scale


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """*weight* [out, in] in 4 bits: two to a byte, and a scale for each `GROUP` inputs.

    Returns:
        uint8 [out, groups * GROUP / 2], the first of two in the lower half, 8 is zero; and
        float32 [out, groups]. The last group is filled with zeros.
    """
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    full = F.pad(weight.float(), (0, groups * GROUP - columns)).reshape(rows * groups, GROUP)
    scale = scales(full, 4)
    numbers = whole(full, scale, 4).reshape(rows, -1, 2) + 8
    first, second = numbers.to(torch.uint8).unbind(-1)
    return first | (second << 4), scale.reshape(rows, groups)


def unpacked(weight: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The float32 [out, columns] that `packed` was told, on its grid."""
    numbers = torch.stack([weight & 15, weight >> 4], -1).to(torch.int8) - 8
    each = numbers.reshape(len(weight), -1, GROUP).float() * scale.unsqueeze(-1)
    return each.flatten(1)[:, :columns]


def _own(tensor: Tensor) -> nn.Parameter:
    learns = tensor.requires_grad and tensor.is_floating_point()
    return nn.Parameter(tensor.detach().clone(), requires_grad=learns)


def _numbers(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def sizes_of(source: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    """The arguments by which *source* was made, as JSON has them."""
    if isinstance(source, nn.Linear):
        sizes: dict[str, Any] = {
            "kind": "linear",
            "in_features": source.in_features,
            "out_features": source.out_features,
        }
    else:
        names = (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
            "groups", "padding_mode",
        )  # fmt: skip
        sizes = {"kind": "conv2d", **{name: getattr(source, name) for name in names}}
    return sizes | {"bias": source.bias is not None}


# ---------------------------------------------------------------- what a layer becomes


def layer(
    source: Any,
    mode: Mode,
    bits: int,
    *,
    reads: Bounds | None = None,
    writes: Bounds | None = None,
) -> Layer:
    """*source*, linear or convolutional, on its grid; what it reads and writes within bounds."""
    if mode in ("dynamic", "weights"):
        return Small(source, bits, dynamic=mode == "dynamic").train(source.training)
    fixed = mode == "freeze"
    spans = (None if each is None else Span(each, fixed=fixed) for each in (reads, writes))
    kind = Learning if mode == "learn" else Frozen
    return kind(source, bits, *spans).to(source.weight.device).train(source.training)


def told(part: nn.Module) -> dict[str, Any] | None:
    """What *part* is, as JSON, by which `layer` makes it again; None for any other part."""
    if not isinstance(part, Layer):
        return None
    sizes = {"kind": "quantized", "layer": dict(part.sizes), "bits": part.bits}
    if isinstance(part, Small):
        return sizes | {"mode": "dynamic" if part.dynamic else "weights"}
    assert isinstance(part, _Spanned)
    bounds = {
        name: None if span is None else list(span.bounds)
        for name, span in (("reads", part.reads), ("writes", part.writes))
    }
    return sizes | {"mode": "learn" if isinstance(part, Learning) else "freeze", **bounds}


def frozen_layer(part: Learning) -> Frozen:
    """*part* with its weight as whole numbers and its limits as they are."""
    made = Frozen(part, part.bits, _fixed(part.reads), _fixed(part.writes))
    return made.to(part.weight.device).train(part.training)


def _fixed(span: Span | None) -> Span | None:
    if span is None:
        return None
    made = copy.deepcopy(span)
    made.fixed = True
    return made


def modes(model: nn.Module) -> dict[str, Mode]:
    """Which layers of *model* are on a grid, by path, and in which way."""
    return {
        path: described["mode"]
        for path, part in model.named_modules()
        if (described := told(part)) is not None
    }


def parameters_of(model: nn.Module) -> int:
    """How many numbers the parameters of *model* hold; a shared one once.

    Weights of 4 bits count each, though two of them share a byte, and what fills their last group
    counts nothing: whole numbers instead of floats are as many as before.
    """
    return sum(tensor.numel() for tensor in model.parameters()) + packed_away(model)


def packed_away(model: nn.Module) -> int:
    """How many weights of *model* the sizes of its tensors leave out, as two share a byte."""
    small = (part for part in model.modules() if isinstance(part, Small) and part.bits == 4)
    return sum(part.in_features * part.out_features - part.weight.numel() for part in small)


def frozen(model: nn.Module) -> nn.Module:
    """A copy of *model* whose learning layers are frozen; *model* itself where none learns."""
    learning = [path for path, mode in modes(model).items() if mode == "learn"]
    if not learning:
        return model
    made = copy.deepcopy(model)
    for path in learning:
        owner, _, name = path.rpartition(".")
        part = frozen_layer(made.get_submodule(path))  # type: ignore[arg-type]
        if not path:
            return part
        setattr(made.get_submodule(owner), name, part)
    return made


def as_constants(model: nn.Module) -> nn.Module:
    """A copy of *model*, frozen, whose scales are part of its graph, as a file has them."""
    made = copy.deepcopy(frozen(model))
    for part in made.modules():
        if isinstance(part, Span):
            scale, zero = part.step()
            part.constant = float(scale), int(zero)
        elif isinstance(part, Frozen):
            part.in_file = True
    return made
