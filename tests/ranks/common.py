"""What the ranks' scripts share: an objective, a step cut in shares, a runner of cases."""

from __future__ import annotations

import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence, mse
from attar.models.projectors import linear
from attar.runtime.ranks import Group, Ranks, Wrap, connect
from attar.training import Counts, Objective, Term

ROWS, CLASSES, WIDTH = 64, 5, 6
TASK = attar.tasks.ImageClassification(classes=CLASSES)
_draw = torch.Generator().manual_seed(0)
IMAGES = torch.randn(ROWS, 1, 8, 8, generator=_draw)
LOGITS = torch.randn(ROWS, CLASSES, generator=_draw)
FEATURE = torch.randn(ROWS, WIDTH, generator=_draw)
GOAL = torch.randn(8, 64, generator=_draw)

Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def pair(ids: list[int]) -> Pair:
    """A batch of these rows, and what a teacher would say of them."""
    at = torch.tensor(ids)
    batch = {"inputs": IMAGES[at], "labels": at % CLASSES, "ids": at}
    told = {"output:logits": LOGITS[at], "feature:goal": FEATURE[at]}
    told |= {"grad:top": at[:, None] % CLASSES, "feature:slope": -IMAGES[at]}
    return batch, told | {"feature:weight": GOAL}


def student(kind: str = "mlp", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind not in ("vit", "resnet"):
        return attar.models.mlp((1, 8, 8), CLASSES, widths=(8, 7))
    if kind == "vit":
        return attar.models.vit((1, 8, 8), CLASSES, width=8, depth=2, heads=2)
    return attar.models.resnet((1, 8, 8), CLASSES, depth=8, width=4)


HEARD = {"mlp": "feature:blocks.1", "vit": "feature:pool", "resnet": "feature:pool"}


class Scaled(nn.Module):
    """A loss of two signals, with a trained weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, student: tuple[Tensor, ...], teacher: Tensor) -> Tensor:
        return sum((s * self.scale - teacher).square().mean(1) for s in student)  # type: ignore[return-value]


def scaled(student: tuple[Tensor, ...], teacher: Tensor) -> nn.Module:
    return Scaled(teacher.shape[1])


# Of a gradient and of parameters: not for fsdp, which holds a part of each on a rank.
WHOLE = [
    Term(mse, "grad:top/inputs", "feature:slope", weight=30.0),
    Term(mse, "param:blocks.0.linear.weight", "feature:weight", weight=0.3),
]
BUILT = [
    Term(
        scaled,
        ["feature:blocks.0", "feature:blocks.1"],
        "feature:goal",
        weight=0.5,
        projector=linear,
    )
]
MORE = {"built": BUILT, "whole": BUILT + WHOLE}


def objective(kind: str = "mlp", seed: int = 0, **options: Any) -> Objective:
    """A student that learns from labels, from logits and, through a projector, from a feature."""
    terms = [
        Term(partial(kl_divergence, temperature=2.0), weight=0.9),
        Term(mse, HEARD.get(kind, HEARD["mlp"]), "feature:goal", weight=0.5, projector=linear),
        *MORE.get(kind, ()),
    ]
    model = student(kind, seed)
    return Objective(model, TASK, terms, example=pair([0, 1, 2]), **options)


def cut(total: int, parts: int, luck: random.Random) -> list[int]:
    """Any sizes that sum to *total*; some may be 0."""
    edges = sorted(luck.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in zip([0, *edges], [*edges, total], strict=True)]


class Share:
    """One step over *ids*: cut into batches of *sizes*, and each batch over the ranks."""

    def __init__(self, ids: list[int], sizes: list[int], world: int, seed: int) -> None:
        luck = random.Random(seed)
        self.batches = [ids[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        self.shares = []
        for batch in self.batches:
            lengths = cut(len(batch), world, luck)
            starts = [sum(lengths[:r]) for r in range(world)]
            self.shares.append([batch[s : s + n] for s, n in zip(starts, lengths, strict=True)])

    def of(self, rank: int) -> list[list[int]]:
        return [shares[rank] for shares in self.shares]


def step(ranks: Ranks, wrapped: Wrap, pieces: list[list[int]]) -> tuple[float, Counts]:
    """Forward and backward of this rank's pieces of one step: the loop in small."""
    own = sum(map(len, pieces))
    counts = Counts(*ranks.total([own, own]))
    loss = 0.0
    for index, ids in enumerate(pieces):
        batch, told = pair(ids or [0])
        with wrapped.micro(last=index + 1 == len(pieces)):
            value = wrapped.module(batch, told, counts, 0.5).loss
            if not ids:  # a rank without a share takes part, and adds nothing
                value = value * 0
            value.backward()
        loss += value.item()
    wrapped.settle(own, counts.examples)
    return loss, counts


def grads(ranks: Ranks, module: nn.Module) -> dict[str, Tensor]:
    """The whole gradient by name."""
    named = module.named_parameters()
    return {name: ranks.full(p.grad) for name, p in named if p.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> float:
    """Relative L2 distance of two families of tensors, over the names with *prefix*."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    names = [name for name in one if name.startswith(prefix)]
    assert names, f"nothing is named {prefix}"
    a, b = (
        torch.cat([t[name].detach().flatten().double() for name in names]) for t in (one, other)
    )
    return float((a - b).norm() / b.norm())


def as_kind(ranks: Ranks, kind: str) -> Group:
    """The same processes, sharing modules in another way."""
    assert isinstance(ranks, Group)
    return Group(kind, ranks.device)


def main(cases: dict[str, Callable[[Ranks], None]], wanted: list[str]) -> None:
    """Run the *wanted* cases; a rank that fails says why and takes the others down."""
    torch.set_num_threads(1)
    with connect(device="cpu") as ranks:
        for name in wanted:
            try:
                start = time.perf_counter()
                cases[name](ranks)
                ranks.barrier()
                print(f"{name}: {time.perf_counter() - start:.1f} s")
            except BaseException:
                print(f"case {name}")
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
                os._exit(1)
    sys.exit()
