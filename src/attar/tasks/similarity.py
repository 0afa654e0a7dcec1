"""How alike two sets of embeddings see the same things."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

MOST = 2_000  # rows of which all pairs are compared
GROUP = 16  # rows whose pairs `paired` takes
_BLOCK = 1 << 22  # similarities that are made at a time
_SEED = 0

Numbers = NDArray[np.float64]


def similarity_agreement(
    student: Tensor, teacher: Tensor, *, neighbours: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """How far two embeddings of the same rows agree on what is like what.

    ``similarity_spearman`` is Spearman's rank correlation of the cosines of all pairs of rows;
    above 2,000 rows, of as many pairs as those have, drawn with a fixed seed. ``recall_at_K`` is
    the share of each row's K nearest others by the teacher that are among its K nearest by the
    student, by exact search in blocks of rows; left out where there are not more than K rows.

    Args:
        student: [N, D], N >= 2.
        teacher: [N, D'] of the same rows; D' may differ.
        neighbours: the values of K.

    >>> points = torch.eye(4) + torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    >>> similarity_agreement(points, 3 * points, neighbours=[1])
    {'similarity_spearman': 1.0, 'recall_at_1': 1.0}
    """
    if len(student) != len(teacher) or student.ndim != 2 or teacher.ndim != 2 or len(student) < 2:
        raise ValueError(
            "student and teacher must be embeddings [N, D] of the same 2 rows or more, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    mine, theirs = (F.normalize(side.detach().float(), dim=1) for side in (student, teacher))
    first, second = _pairs(len(mine))
    cosines = [_cosines(side, first, second) for side in (mine, theirs)]
    found = {"similarity_spearman": spearman(*cosines)}
    most = [k for k in neighbours if k < len(mine)]
    return found | {f"recall_at_{k}": v for k, v in _recall(mine, theirs, most).items()}


def spearman(first: Tensor | Numbers, second: Tensor | Numbers) -> float:
    """Spearman's rank correlation of two rows of numbers [N]; 0 where either is constant.

    Equal numbers share the mean of their ranks.

    >>> spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.3, 0.2]))
    0.5
    """
    one, two = (_ranks(side) for side in (first, second))
    one, two = one - one.mean(), two - two.mean()
    size = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / size if size else 0.0


def paired(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the pairs of rows that lie in one of the groups of 16, and which are of two rows.

    The groups are of rows in an order that is drawn with a fixed seed. A row that was drawn twice
    for a resample, and so has the same id as another, makes pairs that say nothing.

    Args:
        rows: embeddings [N, D].
        ids: int64 [N], which row each is.

    Returns:
        float32 [P], bool [P].
    """
    order = torch.from_numpy(np.random.default_rng(_SEED).permutation(len(rows)))
    unit, ids = F.normalize(rows[order], dim=1), ids[order]
    whole = len(rows) // GROUP * GROUP
    cosines, apart = [], []
    for part, known in ((unit[:whole], ids[:whole]), (unit[whole:], ids[whole:])):
        if not len(part):
            continue
        groups = part.unflatten(0, (-1, min(GROUP, len(part))))
        names = known.unflatten(0, (-1, groups.shape[1]))
        one, two = torch.triu_indices(groups.shape[1], groups.shape[1], 1)
        cosines.append((groups @ groups.mT)[:, one, two].flatten())
        apart.append((names[:, one] != names[:, two]).flatten())
    return torch.cat(cosines), torch.cat(apart)


def _ranks(values: Tensor | Numbers) -> Numbers:
    numbers = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    order = np.argsort(numbers)
    ordered = numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(ordered))
    ranks[order] = np.repeat(starts + (counts - 1) / 2, counts)
    return ranks


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    """All pairs of two rows; of many rows, pairs that are drawn."""
    if count <= MOST:
        first, second = torch.triu_indices(count, count, 1)
        return first, second
    draw = np.random.default_rng(_SEED)
    amount = MOST * (MOST - 1) // 2
    first_row = draw.integers(count, size=amount)
    second_row = (first_row + draw.integers(1, count, size=amount)) % count
    return torch.from_numpy(first_row), torch.from_numpy(second_row)


def _cosines(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    if len(unit) <= MOST:
        return (unit @ unit.T)[first, second]
    step = max(1, _BLOCK // unit.shape[1])
    parts = zip(first.split(step), second.split(step), strict=True)
    return torch.cat([(unit[one] * unit[two]).sum(1) for one, two in parts])


def _recall(mine: Tensor, theirs: Tensor, neighbours: Sequence[int]) -> dict[int, float]:
    hits = dict.fromkeys(neighbours, 0)
    step = max(1, _BLOCK // len(mine))
    for start in range(0, len(mine) if neighbours else 0, step):
        near, wanted = (_nearest(side, start, step, max(neighbours)) for side in (mine, theirs))
        for k in neighbours:
            same = near[:, :k, None] == wanted[:, None, :k]
            hits[k] += int(same.sum())
    return {k: found / (k * len(mine)) for k, found in hits.items()}


def _nearest(unit: Tensor, start: int, step: int, most: int) -> Tensor:
    """The rows nearest to each of some rows, nearest first, themselves left out."""
    similar = unit[start : start + step] @ unit.T
    own = torch.arange(len(similar), device=unit.device)
    similar[own, own + start] = -torch.inf
    return similar.topk(most, dim=1).indices
