"""The pass over wide logits: chunks of rows are made, compared, and turned into gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attar.losses._rows import wide
from attar.losses.projected import Projected
from attar.losses.wide._blocks import Block, Work
from attar.losses.wide._items import Item, Teacher, grouped

# Numbers of a block: small enough for a cache, large enough that calls cost nothing beside it. An
# accelerator has neither such a cache nor such cheap calls.
BLOCK, BLOCK_ELSEWHERE = 1 << 18, 1 << 22
# Fewer rows than this make a product of matrices slow; so many are taken whatever the budget.
LEAST_ROWS = 64
# On a CPU more rows than this gain a product nothing, and larger buffers take longer to be had.
MOST_ROWS = 512
# Numbers of a last layer in half precision that are widened at a time.
WIDENED = 1 << 22

Needs = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Job:
    """What a pass is about, but for the student's tensors."""

    items: Sequence[Item]
    chunk_bytes: int
    differentiate: bool


class Gradients:
    """Gradients with respect to hidden states, weight and bias, summed over chunks of rows."""

    def __init__(self, student: Projected, needs: Needs, like: Tensor) -> None:
        """Args: like, a tensor of the type that sums are made in."""
        hidden, weight, bias = needs
        self._student, self._begun = student, False
        self.hidden = like.new_zeros(student.hidden.shape) if hidden else None
        self.weight = like.new_empty(student.weight.shape) if weight else None
        self.bias = like.new_zeros(student.shape[-1]) if bias else None

    def add(self, rows: slice | Tensor, to_logits: Tensor) -> None:
        """Bring the gradient of the logits of some rows to what they are made of."""
        scale, like = self._student.scale, to_logits
        hidden = self._student.hidden[rows].to(like.dtype)
        found = torch.zeros_like(hidden)
        for columns in _columns(self._student.weight, like.dtype):
            part = to_logits[:, columns]
            if self.hidden is not None:
                found.addmm_(part, self._student.weight[columns].to(like.dtype), alpha=scale)
            if self.weight is not None:
                kept = float(self._begun)
                self.weight[columns].addmm_(part.T, hidden, beta=kept, alpha=scale)
        if self.hidden is not None:
            self.hidden[rows] = found
        if self.bias is not None:
            self.bias.add_(to_logits.sum(0), alpha=scale)
        self._begun = True

    def finished(self) -> list[Tensor | None]:
        """The three sums, None where one is not needed."""
        if self.weight is not None and not self._begun:
            self.weight.zero_()
        return [self.hidden, self.weight, self.bias]


def run(
    student: Projected, job: Job, needs: Needs, rows: Tensor | None = None, by: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(values [N] of each item, gradients of hidden, weight and bias of their weighted sum).

    With *rows* [n], only those are looked at, and the gradient of each is multiplied by that number
    of *by* [n]; the values are then of no use.
    """
    count = len(student) if rows is None else len(rows)
    like = student.hidden.new_empty(0, dtype=_dtype(student))
    values = [like.new_zeros(count) for _ in job.items]
    gradients = Gradients(student, needs, like)
    device = like.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        chunks = Chunks(student, job, like, count)
        for place in chunks.places():
            chosen = place if rows is None else rows[place]
            logits = chunks.compare(chosen, [v[place] for v in values], wanted=any(needs))
            if by is not None:
                logits.mul_(by[place].to(logits.dtype).unsqueeze(-1))
            if any(needs):
                gradients.add(chosen, logits)
    return values, gradients.finished()


class Chunks:
    """The buffers of a pass, for as many rows at a time as the budget allows."""

    def __init__(self, student: Projected, job: Job, like: Tensor, count: int) -> None:
        self._student, self._items = student, job.items
        self._groups, self._rest = grouped(job.items)
        width, self._count = student.shape[-1], count
        sides = [student, *(item.teacher for item in job.items if item.teacher is not None)]
        self._whole = all(isinstance(s, Projected) and s.bias is None for s in sides)
        told = {id(s): s for s in sides[1:] if isinstance(s, Projected)}
        budget = job.chunk_bytes // ((1 + len(told)) * width * like.itemsize)
        self._rows = _rows_of(budget, count, like.device.type)
        self._logits = like.new_empty(self._rows, width)
        self._told = {key: torch.empty_like(self._logits) for key in told}
        numbers = BLOCK if like.device.type == "cpu" else BLOCK_ELSEWHERE
        self._block = min(self._rows, max(1, numbers // width))
        self._work = Work(self._block, self._logits)

    def places(self) -> list[slice]:
        """The chunks, as slices of the rows that are looked at."""
        starts = range(0, self._count, max(1, self._rows))
        return [slice(start, min(start + self._rows, self._count)) for start in starts]

    def compare(self, rows: slice | Tensor, values: Sequence[Tensor], *, wanted: bool) -> Tensor:
        """Write the items' values of some rows; the gradient with respect to their logits."""
        logits = _logits(self._student, rows, self._logits)
        made: dict[int, Teacher] = {}
        items = [self._cut(item, rows, made) for item in self._items]
        for start in range(0, len(logits), self._block):
            at = slice(start, start + self._block)
            parts, into = [item[at] for item in items], [value[at] for value in values]
            block = Block(logits[at], parts, into, self._work, whole=self._whole)
            slope = self._slope(block)
            block.differentiate(self._groups, self._rest, wanted=wanted)
            if slope is not None:
                block.logits.mul_(slope)
        return logits

    def _cut(self, item: Item, rows: slice | Tensor, made: dict[int, Teacher]) -> Item:
        """The item of some rows; a teacher that several share is made once."""
        teacher = item.teacher
        if teacher is None:
            return item[rows]
        if id(teacher) not in made:
            made[id(teacher)] = (
                _logits(teacher, rows, self._told[id(teacher)])
                if isinstance(teacher, Projected)
                else teacher[rows].detach()
            )
        return replace(replace(item, teacher=None)[rows], teacher=made[id(teacher)])

    def _slope(self, block: Block) -> Tensor | None:
        """The derivative of the soft-cap, which the gradient will stand in place of."""
        cap = self._student.softcap
        if cap is None:
            return None
        slope = block.buffer("slope")
        return torch.mul(block.logits, block.logits, out=slope).mul_(-1 / cap**2).add_(1)


def _rows_of(budget: int, count: int, device: str) -> int:
    """The rows of a chunk, the same in all of them or nearly so."""
    most = max(LEAST_ROWS, min(budget, MOST_ROWS) if device == "cpu" else budget)
    chunks = max(1, -(-count // most))
    return -(-count // chunks)


def _dtype(student: Projected) -> torch.dtype:
    parts = [p for p in (student.hidden, student.weight, student.bias) if p is not None]
    return torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32


def _logits(head: Projected, rows: slice | Tensor, out: Tensor) -> Tensor:
    """The logits of some rows, in the buffer."""
    hidden = head.hidden.detach()[rows].to(out.dtype)
    out = out[: len(hidden)]
    for columns in _columns(head.weight, out.dtype):
        torch.mm(hidden, head.weight.detach()[columns].to(out.dtype).T, out=out[:, columns])
    if head.bias is not None:
        out += head.bias.detach()
    if head.scale != 1:
        out *= head.scale
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def _columns(weight: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Parts of a last layer: all of it, or few rows at a time where they have to be widened."""
    size = len(weight) if weight.dtype == dtype else max(1, WIDENED // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, start + size)


class Combined(torch.autograd.Function):
    """(hidden, weight, bias, the rest) to (total [N], values [N] of each item).

    The gradients are made in the forward pass, for a total whose rows all have the same factor.
    If it turns out that they do not, the pass is made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Projected, job: Job
    ) -> tuple[Tensor, ...]:
        student = replace(head, hidden=hidden, weight=weight, bias=bias)
        needs = tuple(ctx.needs_input_grad[:3]) if job.differentiate else (False, False, False)
        values, ctx.gradients = run(student, job, needs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.job, ctx.needs = replace(head, hidden=hidden[:0]), job, needs
        ctx.mark_non_differentiable(*values)
        total = values[0].new_zeros(len(hidden)) if values else wide(hidden).new_zeros(len(hidden))
        for item, value in zip(job.items, values, strict=True):
            total.add_(value, alpha=item.weight)
        return total, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        made, ctx.gradients = ctx.gradients, None  # given away: whoever gets them may change them
        factor = _common(by)
        if made is None or factor is None:
            rows = by.nonzero().squeeze(-1)
            hidden, weight, bias = inputs
            student = replace(ctx.head, hidden=hidden, weight=weight, bias=bias)
            made = run(student, ctx.job, ctx.needs, rows, by[rows])[1]
        elif factor != 1:
            made = [g if g is None else g.mul_(factor) for g in made]
        made = [g if g is None else g.to(i.dtype) for g, i in zip(made, inputs, strict=True)]
        return *made, None, None


def _common(by: Tensor) -> float | None:
    """The one factor of all rows, unless they differ or it is zero."""
    if not len(by):
        return 1.0
    if any(by.stride()):
        low, high = (float(x) for x in by.aminmax())
    else:
        low = high = float(by[0])
    return low if low == high != 0 else None
