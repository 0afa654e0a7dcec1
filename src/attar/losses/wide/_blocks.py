"""The gradient of a block of logits: a few rows whose intermediate results stay in a cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attar.losses._softmax import LOG_ZERO
from attar.losses.sparse import TopK
from attar.losses.wide._items import Group, Item
from attar.losses.wide._kernels import Free, Sides


class Work:
    """Buffers of the size of a block, by name; made once."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._made: dict[str, Tensor] = {}
        self._rows, self._like = rows, like

    def __call__(self, name: str, rows: int) -> Tensor:
        """The buffer of this name, as many rows of it; with whatever was left in it."""
        if name not in self._made:
            self._made[name] = self._like.new_empty(self._rows, self._like.shape[-1])
        return self._made[name][:rows]


class Block:
    """Rows of logits, which become the gradient with respect to them."""

    def __init__(
        self,
        logits: Tensor,
        items: Sequence[Item],
        values: Sequence[Tensor],
        work: Work,
        *,
        whole: bool,
    ) -> None:
        """Rows of the logits, of the items, and of their values, which are written.

        Args:
            whole: no column is absent, so that nobody has to look.
        """
        self.logits, self.items, self.values = logits, items, values
        self._work, self._whole = work, whole

    def differentiate(self, groups: Sequence[Group], rest: Sequence[int], *, wanted: bool) -> None:
        """Write the items' values, and their gradient over the logits where it is wanted."""
        alone = len(groups) + len(rest) == 1
        total = self.logits if alone else self.buffer("total").zero_()
        for group in groups:
            fused = _sparse if isinstance(self.teacher(group), TopK) else _dense
            part = total if alone else self.buffer("part")
            if not fused(self, group, part):
                self.by_autograd(group.numbers, total, replace=alone, wanted=wanted)
            elif not alone:
                total += part
        self.by_autograd(rest, total, replace=alone, wanted=wanted)
        if not alone:
            self.logits.copy_(total)

    def by_autograd(
        self, numbers: Sequence[int], total: Tensor, *, replace: bool, wanted: bool
    ) -> None:
        """Add (or write, if these are all) the gradients of losses of which nothing is known."""
        parts = [self._by_autograd(number, wanted) for number in numbers]
        if replace and parts:
            total.zero_()
        for part in parts:
            if part is not None:
                total += part

    def _by_autograd(self, number: int, wanted: bool) -> Tensor | None:
        item = self.items[number]
        leaf = self.logits.detach()
        if wanted:
            leaf = leaf.clone().requires_grad_()
        told = () if item.teacher is None else (item.teacher,)
        with torch.set_grad_enabled(wanted):
            value = item.loss(leaf, *told, **item.supplied)
        if not isinstance(value, Tensor) or value.shape != leaf.shape[:1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{item.name} must give a value for each row of its logits, "
                f"[{len(leaf)}], as wide logits come in chunks of rows, got {got}; give it whole "
                f"logits, dense(), or use another loss."
            )
        self.values[number].copy_(value.detach())
        if not value.requires_grad:
            return None
        weights = torch.full_like(value, item.weight)
        return torch.autograd.grad(value, leaf, weights)[0]

    def buffer(self, name: str) -> Tensor:
        """A buffer of the size of the block."""
        return self._work(name, len(self.logits))

    def teacher(self, group: Group) -> Tensor | TopK | None:
        """These rows of the group's teacher."""
        if not group.divergences:
            return None
        teacher = self.items[group.divergences[0][0]].teacher
        assert isinstance(teacher, Tensor | TopK)
        return teacher

    def excluding(self, logs: Tensor) -> bool:
        """Whether a column has no probability in some row."""
        return not self._whole and bool(logs.min() == -math.inf)

    def probabilities(self, logits: Tensor, temperature: float, side: str) -> tuple[Tensor, Tensor]:
        """(log-probabilities, probabilities) at a temperature, in buffers."""
        logs, shares = self.buffer("log_" + side), self.buffer(side)
        if logits.dtype != logs.dtype:
            logits = logs.copy_(logits)
        torch.sub(logits, logits.amax(-1, keepdim=True), out=logs)
        if temperature != 1:
            logs.mul_(1 / temperature)
        total = torch.exp(logs, out=shares).sum(-1, keepdim=True)
        return logs.sub_(total.log()), shares.mul_(total.reciprocal())


def _dense(block: Block, group: Group, out: Tensor) -> bool:
    """Write the gradient of a group; False, and nothing written, where autograd has to do it."""
    log_q, q = block.probabilities(block.logits, group.temperature, "q")
    teacher = block.teacher(group)
    if teacher is None:
        if block.excluding(log_q) and not _plain_labels(block, group):
            return False
        _label_values(block, group, log_q)
        mass = _label_mass(block, group, q)
        torch.mul(q, mass, out=out)
    else:
        assert isinstance(teacher, Tensor)
        log_p, p = block.probabilities(teacher, group.temperature, "p")
        if block.excluding(log_q) or block.excluding(log_p):
            gone = log_q == -math.inf
            if not torch.equal(gone, log_p == -math.inf) or not _plain_labels(block, group):
                return False
            _label_values(block, group, log_q)
            log_q.masked_fill_(gone, LOG_ZERO)
            log_p.masked_fill_(gone, LOG_ZERO)
        else:
            _label_values(block, group, log_q)
        sides = Sides(log_q, q, log_p, p, block.buffer("x"), block.buffer("y"))
        free, total, factor = _divergences(block, group, sides)
        mass = _label_mass(block, group, q) - total.unsqueeze(-1) * factor
        torch.addcmul(free, q, mass / factor, out=out)
        if factor != 1:
            out.mul_(factor)
    _subtract_labels(block, group, out)
    return True


def _divergences(block: Block, group: Group, sides: Sides) -> Free:
    """What the divergences of a group are to the gradient, summed; writes their values."""
    found: Free | None = None
    for number, kernel, options in group.divergences:
        value, free = kernel(sides, options)
        block.values[number].copy_(value * group.temperature**2)
        factor = free.factor * block.items[number].weight * group.temperature
        if len(group.divergences) == 1 and factor:
            return free._replace(factor=factor)
        total = free.total * factor
        if found is None:
            found = Free(torch.mul(free.a, factor, out=_spare(block, sides)), total, 1.0)
        else:
            found = Free(found.a.add_(free.a, alpha=factor), found.total + total, 1.0)
    assert found is not None
    return found


def _spare(block: Block, sides: Sides) -> Tensor:
    if sides.x.shape == block.logits.shape:
        return block.buffer("sum")
    return torch.empty_like(sides.x)


def _plain_labels(block: Block, group: Group) -> bool:
    return all(
        not smoothing and not block.items[n].supplied["labels"].is_floating_point()
        for n, smoothing in group.labels
    )


def _label_values(block: Block, group: Group, log_q: Tensor) -> None:
    for number, smoothing in group.labels:
        labels = block.items[number].supplied["labels"]
        if labels.is_floating_point():
            right = torch.linalg.vecdot(labels.to(log_q.dtype), log_q)
        else:
            right = log_q.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
        if smoothing:
            right = right * (1 - smoothing) + log_q.mean(-1) * smoothing
        block.values[number].copy_(-right)


def _label_mass(block: Block, group: Group, q: Tensor) -> Tensor:
    """What the cross-entropies' gradients multiply q with: their weights, one a row."""
    mass = q.new_zeros(len(q), 1)
    for number, smoothing in group.labels:
        item = block.items[number]
        labels = item.supplied["labels"]
        if labels.is_floating_point():
            given = labels.to(q.dtype).sum(-1, keepdim=True)
            mass += (given * (1 - smoothing) + smoothing) * item.weight
        else:
            mass += item.weight
    return mass


def _subtract_labels(block: Block, group: Group, out: Tensor) -> None:
    """Take the labels' own part from q, which the gradient has already."""
    for number, smoothing in group.labels:
        item = block.items[number]
        labels, part = item.supplied["labels"], item.weight * (1 - smoothing)
        if smoothing:
            out -= item.weight * smoothing / out.shape[-1]
        if labels.is_floating_point():
            out.sub_(labels.to(out.dtype), alpha=part)
        else:
            column = labels.long().unsqueeze(-1)
            out.scatter_add_(-1, column, torch.full_like(column, -part, dtype=out.dtype))


def _sparse(block: Block, group: Group, out: Tensor) -> bool:
    """The same for a `TopK`: its k columns, and any other, are k + 1 outcomes."""
    teacher = block.teacher(group)
    assert isinstance(teacher, TopK)
    logits, temperature = block.logits, group.temperature
    kept = logits.gather(-1, teacher.ids) / temperature
    others = block.buffer("q")
    torch.mul(logits, 1 / temperature, out=others).scatter_(-1, teacher.ids, -math.inf)
    top = others.amax(-1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)
    spread = others.sub_(top).exp_().sum(-1, keepdim=True)
    lumped = torch.cat([kept, top + spread.log()], dim=-1)
    whole = lumped.logsumexp(-1, keepdim=True)
    log_q = lumped - whole
    log_p = torch.log_softmax(teacher.lumped(temperature).to(log_q.dtype) / temperature, -1)
    gone = log_q == -math.inf
    if (block.excluding(log_q) or block.excluding(log_p)) and not torch.equal(
        gone, log_p == -math.inf
    ):
        return False
    for number, _ in group.labels:
        column = block.items[number].supplied["labels"].long().unsqueeze(-1)
        block.values[number].copy_((whole - logits.gather(-1, column)).squeeze(-1))
    log_q, log_p = log_q.masked_fill(gone, LOG_ZERO), log_p.masked_fill(gone, LOG_ZERO)
    q = log_q.exp()
    sides = Sides(log_q, q, log_p, log_p.exp(), torch.empty_like(q), torch.empty_like(q))
    free, total, factor = _divergences(block, group, sides)
    mass = _label_mass(block, group, q) - total.unsqueeze(-1) * factor
    few = torch.addcmul(free * factor, q, mass)
    # Among the others the last outcome's gradient is shared out as the student shares its mass.
    share = few[:, -1:] / spread.clamp(min=torch.finfo(out.dtype).tiny)
    torch.mul(others, share, out=out).scatter_(-1, teacher.ids, few[:, :-1])
    _subtract_labels(block, group, out)
    return True
