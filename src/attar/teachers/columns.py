"""How a signal is kept as rows of a cache: the arrays that it becomes, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import linear

from attar.losses import TopK
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

    def column(self, address: str, value: Any, rows: int) -> Column | TopColumn:
        """How an answer to a batch of so many rows is kept.

        Raises:
            PreflightError: it is not a value for each row.
        """
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
            form = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PreflightError(
                f"{address}: a cache keeps a value for each row, and for {rows} rows the teacher "
                f"gave {form}; take this term out, or ask the teacher live"
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
    """Logits as what the last linear layer reads, and that layer."""

    hidden: Column
    weight: Tensor
    bias: Tensor | None

    def to_json(self) -> dict[str, Any]:
        """What the folder says of this column."""
        return self.hidden.to_json() | {"kept": "head", "sha256": self._digest()}

    @property
    def fields(self) -> list[Field]:
        """The arrays of the store."""
        return self.hidden.fields

    def encode(self, value: Tensor, slots: Slots) -> dict[str, NDArray[Any]]:
        """The arrays of these rows; *value* is what the layer reads."""
        return self.hidden.encode(value, slots)

    def decode(self, rows: Arrays) -> Tensor:
        """The logits."""
        return linear(self.hidden.decode(rows), self.weight, self.bias)

    def compare(self, kept: Tensor, now: Tensor) -> tuple[float, float]:
        """How far what is kept is from *now*, and how far rounding can bring it.

        In half precision the roundings of all inputs of the layer add up in each logit: a part of
        a hundred is allowed.
        """
        far, allowed = self.hidden.compare(kept, now)
        return far, allowed if self.hidden.dtype == "float32" else 20 * allowed

    def save(self, folder: Path) -> None:
        """Write the layer."""
        write_atomic(folder / HEAD, self._bytes())

    @classmethod
    def read(cls, address: str, told: dict[str, Any], folder: Path) -> HeadColumn:
        """The column that ``to_json`` described, with the layer that ``save`` wrote."""
        hidden = Column(address, told["dtype"], tuple(told["shape"]))
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            data = (folder / HEAD).read_bytes()
            found = load(data)
            if hashlib.sha256(data).hexdigest() == told["sha256"]:
                return cls(hidden, found["weight"], found.get("bias"))
        raise DataError(f"{folder / HEAD}: is damaged or not there; make the cache anew")

    def _bytes(self) -> bytes:
        found = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return save(found)

    def _digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()


AnyColumn = Column | TopColumn | HeadColumn


def head_column(hidden: Column, layer: nn.Linear) -> HeadColumn:
    """The column of a layer's outputs, kept as its inputs."""
    weight, bias = (
        None if each is None else each.detach().to("cpu", torch.float32).contiguous()
        for each in (layer.weight, layer.bias)
    )
    assert weight is not None
    return HeadColumn(hidden, weight, bias)


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
