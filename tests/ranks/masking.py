"""Run on each rank: weights that are kept at zero stay zero, and learn as on one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import as_kind
from torch import nn
from whole import BATCH, TASK, TERMS, alone, data, net

import attar
from attar.models import merged
from attar.runtime.ranks import Ranks
from attar.training import adamw, fit

PLAN: dict[str, Any] = {
    "epochs": 2,
    "batch_size": BATCH,
    "accumulate": 2,
    "optimizer": partial(adamw, lr=0.01, weight_decay=0.1),
    "clip": 0.5,
}


def trained(kind: str, decay: float | None) -> nn.Module:
    student = attar.sparsify(net(1, 12), amount=0.7, skip=[])
    told = {"validation": data()[1], "average": decay, "parallel": kind}
    return fit(student, net(2, 8), data()[0], TASK, TERMS[:1], **told, **PLAN).student


def zeros(decay: float | None, kind: str, ranks: Ranks) -> None:
    """Every rank ends with the weights and the zeros of one process; the masks are still there."""
    start = merged(attar.sparsify(net(1, 12), amount=0.7, skip=[])).state_dict()
    as_kind(ranks, kind)
    with alone():
        expected = merged(trained("auto", decay)).state_dict()
    made = trained(kind, decay)
    assert len(attar.models.masks.masked(made)) == 2
    found = merged(made).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, start[name])
        if tensor.ndim > 1:
            assert torch.equal(tensor == 0, start[name] == 0)
            assert int((tensor == 0).sum()) > 20


def make() -> dict[str, Callable[[Ranks], None]]:
    return {
        f"masks-{name}-{kind}": partial(zeros, decay, kind)
        for name, decay in {"plain": None, "average": 0.8}.items()
        for kind in ("ddp", "fsdp")
    }
