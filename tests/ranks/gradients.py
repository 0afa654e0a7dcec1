"""Run on each rank: gradients and weights are those of one process, however a step is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from common import Share, as_kind, distance, grads, objective, pair, step
from torch import Tensor

from attar.runtime.compiling import compiled, recomputed
from attar.runtime.errors import AttarError
from attar.runtime.ranks import Ranks, Wrap
from attar.training import Counts, Objective
from attar.training.optimization import make_optimizer

CLOSE = 1e-5


def reference(ids: list[int], kind: str) -> tuple[float, dict[str, Tensor], Objective]:
    """Loss and gradients of one process that sees all rows as one batch."""
    alone = objective(kind)
    loss = alone(*pair(ids), Counts(len(ids), len(ids)), 0.5).loss
    loss.backward()
    return loss.item(), grads(Ranks(), alone), alone


def partitions(share: str, ranks: Ranks, trials: int = 6) -> None:
    """Any cut into 1 or 3 batches and over the ranks, idle ranks and a short batch included."""
    group, luck = as_kind(ranks, share), random.Random(1)
    for kind in ("mlp", "vit", "whole" if share == "ddp" else "built"):
        shared = objective(kind)
        with group.wrap(shared, *pair([0, 1])) as wrapped:
            for trial in range(trials):
                ids = luck.sample(range(64), luck.choice([3, 8, 17]))
                sizes = [len(ids)] if trial % 2 else [len(ids) - 2, 1, 1]
                pieces = Share(ids, sizes, ranks.world, seed=trial).of(ranks.rank)
                loss, _ = step(group, wrapped, pieces)
                expected, known, _ = reference(ids, kind)
                found = grads(group, shared)
                for prefix in ("student", "adapters"):
                    far = distance(found, known, prefix)
                    assert far <= CLOSE, (share, kind, trial, prefix, far)
                own = [p.grad for p in shared.parameters() if p.grad is not None]
                total, norm = wrapped.measured(loss, own)
                whole = torch.cat([g.flatten() for g in known.values()]).norm().item()
                assert abs(total - expected) <= CLOSE * expected, (total, expected)
                assert abs(norm - whole) <= CLOSE * whole, (norm, whole)
                shared.zero_grad()


def train(ranks: Ranks, wrapped: Wrap, module: Objective, factory: Callable, cuts: int) -> None:
    """Five steps of a real optimiser over rows in order, some batches short."""
    optimizer = make_optimizer(factory, module)
    for number in range(5):
        ids = list(range(number * 9, number * 9 + 9 - number))
        share = Share(ids, [len(ids) - 2, 2][:cuts] if cuts == 2 else [len(ids)], ranks.world, 7)
        step(ranks, wrapped, share.of(ranks.rank))
        optimizer.step()
        module.zero_grad()


def optimizers(share: str, ranks: Ranks) -> None:
    group = as_kind(ranks, share)
    # torch has no fused SGD for parts of tensors.
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, fused=False)
    # A larger eps, as Adam makes of a gradient of 1e-9 a step as large as any.
    adamw = partial(torch.optim.AdamW, lr=0.01, eps=1e-4, weight_decay=0.1)
    for factory in (sgd, partial(sgd, foreach=True), adamw, partial(adamw, fused=True)):
        alone, shared = objective(), objective()
        train(Ranks(), Ranks().wrap(alone), alone, factory, 1)
        with group.wrap(shared, *pair([0, 1])) as wrapped:
            train(group, wrapped, shared, factory, 2)
        far = distance(dict(shared.named_parameters()), dict(alone.named_parameters()))
        assert far <= CLOSE, (share, factory, far)


def unused(share: str, ranks: Ranks) -> None:
    """A parameter that nothing reads gets no gradient, and nobody waits for it."""
    group, shared = as_kind(ranks, share), objective("mlp", label_weight=0.0)
    shared._bound[0].weight = 0.0
    shared.student.spare = torch.nn.Linear(2, 2)
    shared.student.forward = partial(_without_spare, shared.student)
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        for _ in range(3):
            step(group, wrapped, [[ranks.rank], [2 + ranks.rank]])
            assert shared.student.spare.weight.grad is None
            assert shared.student.blocks[0].linear.weight.grad is not None


def _without_spare(model: torch.nn.Sequential, inputs: Tensor) -> Tensor:
    for part in list(model)[:4]:
        inputs = part(inputs)
    return inputs


def bypass(ranks: Ranks) -> None:
    """To call the objective around its wrapper leaves each rank its own gradient: it is refused."""
    group, shared = as_kind(ranks, "ddp"), objective()
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        step(group, wrapped, [[ranks.rank * 3, 9]])
        shared.zero_grad()
        loss = shared(*pair([ranks.rank * 3, 9]), Counts(4, 4), 0.5).loss
        loss.backward()
        known = reference([0, 9, 3, 9], "mlp")[1]
        assert distance(grads(group, shared), known) > 0.1
        own = [p.grad for p in shared.parameters() if p.grad is not None]
        with pytest.raises(AttarError, match="different gradients"):
            wrapped.measured(loss.item(), own)


def savings(share: str, ranks: Ranks) -> None:
    """Recomputing and compiling change no gradient on several ranks either."""
    group, ids = as_kind(ranks, share), list(range(6))
    ways = [("vit", recomputed), ("mlp", partial(compiled, backend="eager"))]
    ways += [("whole" if share == "ddp" else "built", recomputed)]
    for kind, context in ways:
        known, shared = reference(ids, kind)[1], objective(kind)
        with context(shared.student), group.wrap(shared, *pair([0, 1])) as wrapped:
            for _ in range(2):
                shared.zero_grad()
                step(group, wrapped, [ids[ranks.rank * 3 :][:3]])
            far = distance(grads(group, shared), known)
        assert far <= CLOSE, (share, kind, far)


def make() -> dict[str, Callable[[Ranks], None]]:
    cases: dict[str, Callable] = {"bypass": bypass}
    for share in ("ddp", "fsdp"):
        for case in (partitions, optimizers, unused, savings):
            cases[f"{case.__name__}-{share}"] = partial(case, share)
        cases[f"few-{share}"] = partial(partitions, share, trials=2)
    return cases
