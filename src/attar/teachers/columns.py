"""How a signal is kept as rows of a cache: the arrays that it becomes, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from attar.losses import Projected, TopK
from attar.runtime import DataError, PreflightError, write_atomic
from attar.teachers.about import HEAD
from attar.teachers.codec import Kind, TopLogits
from attar.teachers.store import Field

Slots = NDArray[np.int64]
Arrays = Mapping[str, NDArray[Any]]

CONTENT = Field("content", "int64", ())


@dataclass(frozen=True, kw_only=True)
class Keep:
    """In what form a cache keeps what the teacher says.

    Attributes:
        dtype: of features, and of outputs that are kept whole. ``float16`` is half the bytes, and
            at most 1/2048 of a value away from it; a value beyond 65,504 is refused.
        top: keep so many of the largest logits of an output, and the exact mass of the rest; all
            of them when left out. For vocabularies; ``attar.losses.TopK`` says which losses.
        logits: form of those: ``uint8``, ``float16`` or ``float32``.
        draws: columns drawn from the rest, for ``sampled_kl``.
        temperatures: those that losses on ``top`` may have.
        head: keep what the teacher's last linear layer reads, in ``dtype``, and that layer: every
            logit of a vocabulary for the bytes of one hidden state, and one matrix product.
    """

    dtype: Literal["float32", "float16"] = "float32"
    top: Annotated[int, Ge(0)] | None = None
    logits: Kind = "float16"
    draws: Annotated[int, Ge(0)] = 0
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    head: bool = False

    def __post_init__(self) -> None:
        if self.head and self.top is not None:
            raise ValueError("head keeps all logits, top some; leave one of them out")

    def column(self, address: str, value: Any, rows: int) -> AnyColumn:
        """How an answer to a batch of so many rows is kept.

        Raises:
            PreflightError: it is not a value for each row, or one too wide to be kept whole.
        """
        known = isinstance(value, Tensor | Projected)
        if not known or not value.shape or len(value) != rows:
            form = list(value.shape) if known else type(value).__name__
            raise PreflightError(
                f"{address}: a cache keeps a value for each row, and for {rows} rows the teacher "
                f"gave {form}; take this term out, or ask the teacher live"
            )
        if isinstance(value, Projected) and self.top is None:
            if self.head:
                hidden = Column(address, self.dtype, tuple(value.hidden.shape[1:]))
                return HeadColumn(hidden, _still(replace(value, hidden=value.hidden[:0])), True)
            raise PreflightError(
                f"{address}: {value.shape[-1]:,} logits a position are not kept whole; give the "
                "cache top, the largest of them, or head, what the last layer reads"
            )
        if self.top is None or not address.startswith("output:"):
            return Column(address, self.dtype, tuple(value.shape[1:]))
        logits = TopLogits(
            width=value.shape[-1],
            k=self.top,
            logits=self.logits,
            draws=self.draws,
            temperatures=self.temperatures,
        )
        return TopColumn(address, logits, tuple(value.shape[1:-1]))


@dataclass(frozen=True)
class Column:
    """A signal that is kept whole: one array of numbers."""

    address: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """What the folder says of this column."""
        return {"kept": "whole", "dtype": self.dtype, "shape": list(self.shape)}

    @property
    def fields(self) -> list[Field]:
        """The arrays of the store."""
        return [Field(self.address, self.dtype, self.shape)]

    def encode(self, value: Tensor, slots: Slots) -> dict[str, NDArray[Any]]:
        """The arrays of these rows."""
        values = value.detach().to("cpu", torch.float32)
        if not torch.isfinite(values).all():
            raise DataError(f"{self.address}: the teacher said something that is not finite")
        with np.errstate(over="ignore"):  # the next line refuses it
            kept = values.numpy().astype(self.dtype, copy=False)
        if self.dtype == "float16" and not np.isfinite(kept).all():
            raise DataError(
                f"{self.address}: the teacher said {float(values.abs().max()):.4g}, and float16 "
                "ends at 65,504; keep float32"
            )
        return {self.address: kept}

    def compare(self, kept: Tensor, now: Tensor) -> tuple[float, float]:
        """How far what is kept is from *now*, and how far rounding can bring it.

        Answers to batches of other sizes differ by 1e-5 of their size; half precision by 1/2048.
        """
        now = now.detach().to("cpu", torch.float32)
        part = 1e-5 if self.dtype == "float32" else 2**-11 + 1e-5
        largest = float(now.abs().max())
        return float((kept - now).abs().max()), part * max(largest, 1.0)

    def decode(self, rows: Arrays) -> Tensor:
        """The signal, float32."""
        return torch.from_numpy(rows[self.address]).float()


@dataclass(frozen=True)
class TopColumn:
    """Logits of which the largest are kept."""

    address: str
    form: TopLogits
    lead: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """What the folder says of this column."""
        return {"kept": "top", "shape": list(self.lead), **asdict(self.form)}

    @property
    def fields(self) -> list[Field]:
        """The arrays of the store."""
        return [
            Field(f"{self.address}/{name}", dtype, (*self.lead, *shape))
            for name, (dtype, shape) in self.form.arrays.items()
        ]

    def encode(self, value: Tensor, slots: Slots) -> dict[str, NDArray[Any]]:
        """The arrays of these rows."""
        found = self.form.encode(value, slots)
        return {f"{self.address}/{name}": values for name, values in found.items()}

    def decode(self, rows: Arrays) -> TopK:
        """What losses take."""
        own = {name: rows[f"{self.address}/{name}"] for name in self.form.arrays}
        return self.form.decode(own)

    def compare(self, kept: TopK, now: Tensor) -> tuple[float, float]:
        """How far what is kept is from *now*, and how far rounding can bring it."""
        return self.form.compare(kept, now)


@dataclass(frozen=True)
class HeadColumn:
    """Logits as what the last linear layer reads, and that layer.

    Attributes:
        hidden: what the layer reads.
        layer: the layer, before a hidden state of no rows.
        wide: whether the logits are left to be made by the losses, block by block.
    """

    hidden: Column
    layer: Projected
    wide: bool

    def to_json(self) -> dict[str, Any]:
        """What the folder says of this column."""
        how = {"scale": self.layer.scale, "softcap": self.layer.softcap} if self.wide else {}
        return self.hidden.to_json() | how | {"kept": "head", "sha256": self._digest()}

    @property
    def fields(self) -> list[Field]:
        """The arrays of the store."""
        return self.hidden.fields

    def encode(self, value: Tensor | Projected, slots: Slots) -> dict[str, NDArray[Any]]:
        """The arrays of these rows; *value* is what the layer reads, or the logits with it."""
        return self.hidden.encode(_read_by_head(value), slots)

    def decode(self, rows: Arrays) -> Tensor | Projected:
        """The logits."""
        hidden = self.hidden.decode(rows).to(self.layer.weight.device)
        logits = replace(self.layer, hidden=hidden)
        return logits if self.wide else logits.dense()

    def compare(self, kept: Any, now: Any) -> tuple[float, float]:
        """How far what is kept is from *now*, and how far rounding can bring it.

        In half precision the roundings of all inputs of the layer add up in each logit: a part of
        a hundred is allowed.
        """
        if self.wide:
            return self.hidden.compare(kept.hidden, now.hidden)
        far, allowed = self.hidden.compare(kept, now)
        return far, allowed if self.hidden.dtype == "float32" else 20 * allowed

    def to(self, device: torch.device) -> HeadColumn:
        """The same, with the layer on another device."""
        return replace(self, layer=self.layer.to(device))

    def save(self, folder: Path) -> None:
        """Write the layer."""
        write_atomic(folder / HEAD, self._bytes())

    @classmethod
    def read(cls, address: str, told: dict[str, Any], folder: Path) -> HeadColumn:
        """The column that ``to_json`` described, with the layer that ``save`` wrote."""
        hidden = Column(address, told["dtype"], tuple(told["shape"]))
        wide = "scale" in told
        how = {name: told[name] for name in ("scale", "softcap")} if wide else {}
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            data = (folder / HEAD).read_bytes()
            found = load(data)
            if hashlib.sha256(data).hexdigest() == told["sha256"]:
                weight = found["weight"]
                nothing = weight.new_empty(0, weight.shape[1])
                return cls(hidden, Projected(nothing, weight, found.get("bias"), **how), wide)
        raise DataError(f"{folder / HEAD}: is damaged or not there; make the cache anew")

    def _bytes(self) -> bytes:
        weight, bias = self.layer.weight, self.layer.bias
        return save({"weight": weight} | ({} if bias is None else {"bias": bias}))

    def _digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()


AnyColumn = Column | TopColumn | HeadColumn


def head_column(hidden: Column, layer: nn.Linear) -> HeadColumn:
    """The column of a layer's outputs, kept as its inputs."""
    nothing = layer.weight.new_empty(0, layer.in_features)
    return HeadColumn(hidden, _still(Projected(nothing, layer.weight, layer.bias)), False)


def _still(layer: Projected) -> Projected:
    """A layer in memory, in float32, that nothing writes to."""
    weight, bias = (
        None if each is None else each.detach().to("cpu", torch.float32).contiguous()
        for each in (layer.weight, layer.bias)
    )
    assert weight is not None
    return replace(layer, hidden=weight.new_empty(0, weight.shape[1]), weight=weight, bias=bias)


def _read_by_head(value: Tensor | Projected) -> Tensor:
    return value.hidden if isinstance(value, Projected) else value


def read_column(address: str, told: Any, folder: Path) -> AnyColumn:
    """The column that ``to_json`` described.

    Raises:
        DataError: it is none of ours.
    """
    try:
        options = dict(told)
        kept, shape = options.pop("kept"), tuple(options.pop("shape"))
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError
        if kept == "top":
            options["temperatures"] = tuple(options["temperatures"])
            return TopColumn(address, TopLogits(**options), shape)
        if kept == "head" and options["dtype"] in ("float32", "float16"):
            return HeadColumn.read(address, told, folder)
        if kept != "whole" or options not in ({"dtype": "float32"}, {"dtype": "float16"}):
            raise ValueError
        return Column(address, options["dtype"], shape)
    except DataError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError):
        raise DataError(f"how {address} is kept cannot be read: {str(told)[:80]}") from None
