"""Wide logits as rows of a cache: their largest in a few bytes, and back as a `TopK`.

What is kept whole is a `Column` of `attar.teachers.columns`; this is for vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.draw import hashed, key_of
from attar.losses import Projected, TopK
from attar.runtime import DataError, UsageError

Array = NDArray[Any]
Kind = Literal["uint8", "float16", "float32"]

WIDEST = 1 << 24  # the ids of the 8-bit form have 16 bits and at most 8 more
LEVELS = 254  # code 0 is a logit of -inf
BLOCK = 1 << 22  # numbers that are worked on at a time


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """How the largest logits of each token are written down.

    ======== ============================================ ================================
    logits   bytes a token, k + draws = n                 a logit is off by at most
    ======== ============================================ ================================
    float32  8 n + 4 a temperature                        nothing
    float16  6 n + 4 a temperature                        1/2048 of itself
    uint8    (3 + h/8) n + 4 + 4 a temperature, and 4     half a step: 1/508 of the distance
             more where there are draws                   from the token's largest kept logit to
                                                          its smallest, and 1/1024 of that one
    ======== ============================================ ================================

    The bytes count everything: ids, logits, and the log-partition of each temperature. h is the
    bits of an id above its lowest 16: 0 up to a width of 65,536, 1 to 131,072, 2 to 262,144, 4 to
    1,048,576, 8 to 16,777,216. So k = 32 at three temperatures is 112 to 128 bytes up to a million
    columns. What is known of the tail is exact in each form, as are the ids.

    Attributes:
        width: V, the number of columns.
        k: how many of the largest are kept; 0 where `draws` alone are.
        logits: their form.
        temperatures: those that losses may have; the mass of the tail is kept for each.
        draws: how many columns are drawn with replacement from those that are not kept, for
            `attar.losses.sampled_kl`. A function of seed, slot and position, so that who asks
            again draws the same.
        draw_temperature: one of `temperatures`, at whose probabilities they are drawn; best that
            of the loss, which can have no higher one.
        seed: of the draws.
    """

    width: int
    k: int = 64
    logits: Kind = "uint8"
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    draws: int = 0
    draw_temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        if not 0 <= self.k <= self.width or self.draws < 0 or not self.k + self.draws:
            raise UsageError(
                f"k is {self.k} and draws {self.draws} of {self.width} columns; k must be at most "
                "the width, and one of them above 0"
            )
        if self.draws and self.k == self.width:
            raise UsageError(f"k is all {self.width} columns, which leaves nothing to draw from")
        if self.width > WIDEST and self.logits == "uint8":
            raise UsageError(
                f"the 8-bit form has ids up to {WIDEST:,}, and there are {self.width:,} columns; "
                "use float16"
            )
        if self.logits not in ("uint8", "float16", "float32"):
            raise UsageError(f"logits is '{self.logits}'; it is uint8, float16 or float32")
        wrong = [t for t in self.temperatures if not 0 < t < math.inf]
        if wrong or len(set(self.temperatures)) < max(1, len(self.temperatures)):
            raise UsageError(
                f"temperatures are {list(self.temperatures)}; they must be different numbers "
                "above 0, and one at least"
            )
        if self.draws and self.draw_temperature not in self.temperatures:
            raise UsageError(
                f"draw_temperature is {self.draw_temperature}; it must be one of temperatures, "
                f"{list(self.temperatures)}"
            )

    @cached_property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The arrays of one token: name, numpy type, shape."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for part, count in (("top", self.k), ("tail", self.draws)):
            if not count:
                continue
            if self.logits != "uint8":
                found |= {
                    f"{part}_ids": ("int32", (count,)),
                    f"{part}_logits": (self.logits, (count,)),
                }
                continue
            found[f"{part}_low"] = ("uint16", (count,))
            if self._bits:
                found[f"{part}_high"] = ("uint8", (-(-count * self._bits // 8),))
            found |= {f"{part}_codes": ("uint8", (count,)), f"{part}_range": ("float16", (2,))}
        return found | {"log_tail": ("float32", (len(self.temperatures),))}

    @property
    def token_bytes(self) -> int:
        """What one token takes, everything counted."""
        return sum(np.dtype(d).itemsize * math.prod(s) for d, s in self.arrays.values())

    @property
    def _bits(self) -> int:
        """Bits of an id above the lowest 16; they fill bytes without rest."""
        need = (self.width - 1).bit_length() - 16
        return next(bits for bits in (0, 1, 2, 4, 8) if bits >= need)

    def encode(
        self, logits: Tensor | Projected, slots: NDArray[np.int64] | None = None
    ) -> dict[str, Array]:
        """The arrays of these rows, [n, ...] each.

        Args:
            logits: [n, ..., width], of any float type; those of a `Projected` are made block by
                block.
            slots: int64 [n], which the draws are a function of; not needed without draws.

        Raises:
            DataError: a row has NaN or +inf, or -inf alone; a logit is beyond 65,504, where
                float16 ends.
        """
        if len(logits.shape) < 2 or logits.shape[-1] != self.width:
            raise DataError(
                f"the teacher's logits have the shape {list(logits.shape)}, and [n, ..., "
                f"{self.width}] is to be kept"
            )
        lead = logits.shape[:-1]
        chosen = self._uniform(lead, slots) if self.draws else None
        made = [self._block(part, chosen, rows) for rows, part in _dense(logits.detach())]
        rows = {name: np.concatenate([part[name] for part in made]) for name in self.arrays}
        return {name: values.reshape(*lead, *values.shape[1:]) for name, values in rows.items()}

    def decode(self, rows: Mapping[str, Array]) -> TopK:
        """What losses take, on the CPU; the arrays may hold other names too."""
        log_tail = torch.from_numpy(np.ascontiguousarray(rows["log_tail"]))
        lead = log_tail.shape[:-1]
        ids, logits = self._read("top", rows, lead) if self.k else _nothing(lead)
        kept = TopK(ids, logits, log_tail, self.temperatures, self.width)
        if not self.draws:
            return kept
        ids, logits = self._read("tail", rows, lead)
        at = self.draw_temperature
        return replace(kept, tail_ids=ids, tail_logits=logits, tail_temperature=at)

    def compare(self, kept: TopK, now: Tensor | Projected) -> tuple[float, float]:
        """How far kept logits are from those of *now*, and how far rounding can bring them.

        Both of the token that is nearest to, or furthest beyond, what rounding allows.
        """
        ids, logits = (kept.ids, kept.logits) if self.k else (kept.tail_ids, kept.tail_logits)
        assert ids is not None
        assert logits is not None
        picked = _flat(ids)
        said = [part.to("cpu", torch.float32).gather(-1, picked[r]) for r, part in _dense(now)]
        gap = (torch.cat(said).view_as(logits) - logits).abs()
        gap = gap.nan_to_num(0.0, posinf=math.inf).amax(-1).flatten()  # -inf then and now is 0
        live = logits.masked_fill(logits == -math.inf, 0.0)
        size, reach = live.abs().amax(-1).flatten(), (live.amax(-1) - live.amin(-1)).flatten()
        part = {"float32": 0.0, "float16": 2**-11, "uint8": 2**-10}[self.logits]
        allowed = (part + 1e-5) * size.clamp(min=1.0)
        if self.logits == "uint8":
            allowed = allowed + reach / (2 * LEVELS)
        if not len(gap):
            return 0.0, 0.0
        worst = int((gap / allowed).argmax())
        return float(gap[worst]), float(allowed[worst])

    def _block(self, logits: Tensor, chosen: Tensor | None, rows: slice) -> dict[str, Array]:
        wide = logits.to("cpu", torch.float32)
        self._check(wide, rows.start)
        top = TopK.of(wide, k=self.k, temperatures=self.temperatures)
        found = self._written("top", top.ids, top.logits) if self.k else {}
        if chosen is not None:
            ids = self._drawn(wide.scatter(-1, top.ids, -math.inf), chosen[rows])
            found |= self._written("tail", ids, wide.gather(-1, ids))
        return found | {"log_tail": top.log_tail.numpy()}

    def _drawn(self, rest: Tensor, chosen: Tensor) -> Tensor:
        """Columns by inversion of the cumulative sum, in float64; none where rest is -inf."""
        wide = rest.double() / self.draw_temperature
        top = wide.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
        sums = wide.sub_(top).exp_().cumsum(-1)
        total = sums[:, -1:].contiguous()
        found = torch.searchsorted(sums, chosen * total, right=True)
        # A product that was rounded up to the total belongs to the last column that has a mass.
        return found.minimum(torch.searchsorted(sums, total))

    def _check(self, logits: Tensor, first: int) -> None:
        largest = logits.amax(-1)  # NaN where there is one
        if not largest.isfinite().all():
            row = int((~largest.isfinite()).int().argmax())
            raise DataError(
                f"the teacher's largest logit of token {first + row} is {float(largest[row])}, "
                "which is no distribution; leave that row out"
            )

    def _written(self, part: str, ids: Tensor, logits: Tensor) -> dict[str, Array]:
        values = logits.numpy()
        live = values[values > -math.inf]
        if self.logits != "float32" and live.size and np.abs(live).max() > 65504:
            raise DataError(
                f"the teacher's logits reach {float(live[np.abs(live).argmax()]):.6g}, and float16 "
                "ends at 65,504; use logits: float32"
            )
        if self.logits != "uint8":
            return {
                f"{part}_ids": ids.numpy().astype(np.int32),
                f"{part}_logits": values.astype(self.logits),
            }
        codes, reach = _quantised(values)
        found = {f"{part}_low": (ids.numpy() & 0xFFFF).astype(np.uint16)}
        if self._bits:
            found[f"{part}_high"] = _packed((ids.numpy() >> 16).astype(np.uint8), self._bits)
        return found | {f"{part}_codes": codes, f"{part}_range": reach}

    def _read(
        self, part: str, rows: Mapping[str, Array], lead: torch.Size
    ) -> tuple[Tensor, Tensor]:
        count = self.k if part == "top" else self.draws
        if self.logits != "uint8":
            ids, logits = rows[f"{part}_ids"], rows[f"{part}_logits"]
            return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(
                logits.astype(np.float32)
            )
        made = np.empty((*lead, count), np.int64), np.empty((*lead, count), np.float32)
        names = ("low", "codes", "range", *(["high"] if self._bits else []))
        flat = {n: _flat(rows[f"{part}_{n}"]) for n in names}
        ids, logits = _flat(made[0]), _flat(made[1])
        for block in _blocks(len(ids), 16 * count):  # small enough for the inner cache
            high = flat["high"][block] if self._bits else None
            _read_ids(flat["low"][block], high, self._bits, ids[block])
            _read_logits(flat["codes"][block], flat["range"][block], logits[block])
        return torch.from_numpy(made[0]), torch.from_numpy(made[1])

    def _uniform(self, lead: torch.Size, slots: NDArray[np.int64] | None) -> Tensor:
        """Numbers on [0, 1), float64 [tokens, draws]: of (seed, slot), position and draw."""
        if slots is None or len(slots) != lead[0]:
            raise DataError(
                f"draws are a function of the slot, and there are "
                f"{'no' if slots is None else len(slots)} slots for {lead[0]} rows"
            )
        inner = math.prod(lead[1:])
        start = hashed(key_of("tail", self.seed), np.ascontiguousarray(slots, np.int64))
        number = start[:, None] + np.arange(inner * self.draws, dtype=np.uint64)
        bits = hashed(key_of("draw"), number.view(np.int64))
        return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53).reshape(-1, self.draws)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of so many rows as make a block; one that is empty where there are none."""
    size = max(1, BLOCK // max(1, width))
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def _flat(values: Any) -> Any:
    return values.reshape(-1, values.shape[-1])


def _dense(logits: Tensor | Projected) -> Iterator[tuple[slice, Tensor]]:
    """Logits in blocks of rows, each with its place; those of a `Projected` are made here."""
    logits = logits.detach()
    if isinstance(logits, Tensor):
        flat = _flat(logits)
        yield from ((rows, flat[rows]) for rows in _blocks(len(flat), flat.shape[-1]))
        return
    hidden = _flat(logits.hidden)
    for rows in _blocks(len(hidden), logits.shape[-1]):
        yield rows, replace(logits, hidden=hidden[rows]).dense()


def _nothing(lead: torch.Size) -> tuple[Tensor, Tensor]:
    return torch.empty(*lead, 0, dtype=torch.int64), torch.empty(*lead, 0)


def _quantised(logits: Array) -> tuple[Array, Array]:
    """Codes 1 to 255 on a line from the smallest live logit to the largest, and (start, step)."""
    gone = logits == -math.inf
    largest = logits.max(-1, keepdims=True)
    largest[largest == -math.inf] = 0.0
    smallest = np.where(gone, largest, logits).min(-1, keepdims=True)
    start = _half(smallest, down=True)
    step = _half((largest - start.astype(np.float32)) / LEVELS, down=False)
    unit = np.where(step == 0, np.float32(1), step.astype(np.float32))
    codes = np.rint((np.where(gone, smallest, logits) - start) / unit) + 1
    codes = np.where(gone, 0, codes.clip(1, 255)).astype(np.uint8)
    return codes, np.concatenate([start, step], axis=-1)


def _half(values: Array, *, down: bool) -> Array:
    """The float16 next to each value, below or above it."""
    found = values.astype(np.float16)
    wrong = found > values if down else found < values
    return np.where(wrong, np.nextafter(found, np.float16(-np.inf if down else np.inf)), found)


def _packed(high: Array, bits: int) -> Array:
    """So many bits a number, 8 / bits numbers a byte."""
    each = 8 // bits
    padded = np.pad(high, ((0, 0), (0, -high.shape[1] % each)))
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(padded.reshape(len(high), -1, each) << shifts, axis=-1)


@lru_cache
def _unpacking(bits: int) -> Array:
    """For each byte the numbers in it, side by side in one wider number."""
    byte = np.arange(256, dtype=np.uint8)[:, None]
    numbers = (byte >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(numbers).view(f"u{8 // bits}")[:, 0]


def _read_ids(low: Array, high: Array | None, bits: int, out: Array) -> None:
    if high is None:
        out[...] = low
        return
    numbers = high if bits == 8 else _unpacking(bits)[high].view(np.uint8)
    np.left_shift(numbers[:, : low.shape[1]], 16, out=out, dtype=np.int64)
    np.bitwise_or(out, low, out=out)


def _read_logits(codes: Array, reach: Array, out: Array) -> None:
    start, step = reach.astype(np.float32)[:, :1], reach.astype(np.float32)[:, 1:]
    np.multiply(codes, step, out=out)
    out += start - step
    if not codes.all():
        out[codes == 0] = -np.inf
