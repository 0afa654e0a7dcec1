"""Run on each rank: what ranks tell each other, what they hold, and that nothing stays behind."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from common import as_kind, distance, grads, objective, pair, step, student
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from attar.runtime.errors import DataError, PreflightError
from attar.runtime.ranks import Ranks
from attar.training import Objective


def refused(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        call()


def messages(ranks: Ranks) -> None:
    me, world = ranks.rank, ranks.world
    assert ranks.total([me, 2**53 + 1]) == [sum(range(world)), world * (2**53 + 1)]
    assert ranks.any(me == 1)
    assert not ranks.any(False)
    assert ranks.everyone({"né": [me] * me}) == [{"né": [r] * r} for r in range(world)]
    assert ranks.first([me, None]) == [0, None]
    ranks.same("the seed", {"seed": 3})
    refused(lambda: ranks.same("the seed", me), PreflightError, "the seed: rank 0 has 0, rank 1")
    assert ranks.main == (me == 0)


def joint_errors(ranks: Ranks) -> None:
    """One rank's error is raised by all; each rank's own words stay its own."""

    def fail() -> None:
        with ranks.together():
            if ranks.rank == 1:
                raise DataError("row 7 is broken")

    words = "row 7 is broken" if ranks.rank == 1 else "rank 1: row 7 is broken"
    refused(fail, DataError, words)
    with ranks.together():
        pass


def gathering(ranks: Ranks) -> None:
    """Rows of any type and of unequal number come in order of rank, bit for bit."""
    table = torch.arange(40, dtype=torch.float64).reshape(10, 4) / 3
    rows = {
        "ids": torch.arange(10),
        "right": torch.arange(10) % 3 == 0,
        "half": table.to(torch.bfloat16),
        "logits": table,
    }
    edges = [0, *sorted([7, 10, 10][: ranks.world - 1]), 10]
    own = {name: value[edges[ranks.rank] : edges[ranks.rank + 1]] for name, value in rows.items()}
    for mine in (own, own if len(own["ids"]) else {}):
        found = ranks.gather(mine)
        assert list(found) == list(rows)
        for name, value in rows.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name
    nothing = ranks.gather({name: value[:0] for name, value in rows.items()})
    assert nothing["logits"].shape == (0, 4)
    assert ranks.gather({}) == {}
    cut = ranks.gather({"logits": own["logits"].T.contiguous().T})
    assert torch.equal(cut["logits"], table)


def one_start(share: str, ranks: Ranks) -> None:
    """Ranks that start apart are given rank 0's tensors; other models are refused."""
    group, shared = as_kind(ranks, share), objective(seed=ranks.rank)
    with group.wrap(shared, *pair([0, 1])):
        pass
    assert distance(dict(shared.state_dict()), dict(objective(seed=0).state_dict())) == 0
    other = objective("vit" if ranks.rank else "mlp")
    refused(lambda: group.wrap(other, *pair([0, 1])), PreflightError, "agree on the model")


def statistics(share: str, ranks: Ranks) -> None:
    """Equal shares: the first running mean is one process's; all ranks hold the same always."""
    group, shared, alone = as_kind(ranks, share), objective("resnet"), objective("resnet")
    alone.student.register_buffer("third", torch.tensor(1 / 3))
    shared.student.register_buffer("third", torch.tensor(1 / 3))
    count = 12 // ranks.world
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        start = {n: b.clone() for n, b in shared.named_buffers()}
        assert all(torch.equal(b, c) for b, c in zip(start.values(), alone.buffers(), strict=True))
        for first in (0, 12, 24):
            ids = list(range(first, first + 12))
            step(Ranks(), Ranks().wrap(alone), [ids])
            step(group, wrapped, [ids[ranks.rank * count :][:count]])
        means = [m.student.stem.norm.running_mean for m in (shared, alone)]
        torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)
        batches = [m.student.stem.norm.num_batches_tracked.item() for m in (shared, alone)]
        assert batches == [3, 3]
        # A rank without rows has no say, whatever its statistics have become.
        before = shared.student.stem.norm.running_mean.clone()
        shared.student.stem.norm.running_mean.fill_(5.0 if ranks.main else float("nan"))
        wrapped.settle(8 if ranks.main else 0, 8)
        assert shared.student.stem.norm.running_mean.tolist() == [5.0] * len(before)
        wrapped.settle(0, 0)
        shared.student.stem.norm.running_mean.fill_(float(ranks.rank))
        wrapped.settle(*((3, 4) if ranks.rank == 1 else (1, 4) if ranks.main else (0, 4)))
        assert shared.student.stem.norm.running_mean.tolist() == [0.75] * len(before)
        assert torch.equal(shared.student.third, torch.tensor(1 / 3))
    sums = {n: b.double().sum().item() for n, b in shared.named_buffers()}
    group.same("the statistics", sums)


def parts(ranks: Ranks) -> None:
    """A tensor and its optimiser state make the round trip through whole values, bit for bit."""
    group, shared = as_kind(ranks, "fsdp"), objective("vit")
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        optimizer = torch.optim.AdamW(shared.parameters(), lr=0.01, fused=True)
        step(group, wrapped, [[ranks.rank]])
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values()]
        held += list(shared.state_dict().values())
        assert any(hasattr(t, "full_tensor") for t in held)
        for tensor in held:
            whole = group.full(tensor)
            back = group.like(whole, tensor)
            assert type(back) is type(tensor) or not hasattr(tensor, "full_tensor")
            own = [t.to_local() if hasattr(t, "to_local") else t for t in (back, tensor)]
            assert torch.equal(*own)
            with torch.no_grad():
                tensor.mul_(0).copy_(back)
            assert torch.equal(group.full(tensor), whole)
    plain = torch.ones(3)
    assert group.full(plain) is plain
    assert group.like(plain, torch.zeros(3)) is plain


def clipping(share: str, ranks: Ranks) -> None:
    """The whole gradient is cut to its norm, on parts as on wholes."""
    group, shared, alone = as_kind(ranks, share), objective(), objective()
    step(Ranks(), Ranks().wrap(alone), [[0, 1, 2]])
    known = torch.cat([p.grad.flatten() for p in alone.parameters()])
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        loss, _ = step(group, wrapped, [[ranks.rank] if ranks.rank < 2 else []])
        step(group, wrapped, [[2] if ranks.main else []])
        shared.zero_grad()
        pieces = {0: [0, 1], 1: [2]}.get(ranks.rank, [])
        loss, _ = step(group, wrapped, [pieces])
        held = list(shared.parameters())
        _, norm = wrapped.measured(loss, [p.grad for p in held])
        clip_grads_with_norm_(held, 0.01, torch.tensor(norm))
        found = torch.cat([g.flatten() for g in grads(group, shared).values()])
    torch.testing.assert_close(found, known * (0.01 / known.norm()), rtol=1e-4, atol=1e-7)


def traces(module: nn.Module) -> list[Any]:
    """All that a module carries besides the values of its tensors."""
    found: list[Any] = []
    for name, part in module.named_modules():
        fields = {
            key: sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            for key, value in part.__dict__.items()
        }
        hooks = {key: len(v) for key, v in part.__dict__.items() if key.endswith("_hooks") and v}
        found.append((name, type(part), fields, hooks))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [*found, [(n, type(t), id(t), t.shape, t.requires_grad) for n, t in tensors]]


def no_trace(share: str, ranks: Ranks) -> None:
    """After training the same objects are back, plain and whole, and train alone; twice."""
    group, shared = as_kind(ranks, share), objective("vit")
    shared.student.head.weight.requires_grad_(False)
    before = traces(shared)
    for _ in range(2):
        with group.wrap(shared, *pair([0, 1])) as wrapped:
            step(group, wrapped, [[ranks.rank], [5]])
            shared.state_dict()
            shared.zero_grad()
            wrapper = weakref.ref(wrapped.module)
        assert wrapper() is (shared if share == "fsdp" else None)
        assert traces(shared) == before
        assert wrapped.module is shared
        wrapped.close()
    same = copy.deepcopy(shared.state_dict())
    assert distance(same, dict(objective("vit").state_dict())) == 0
    shared(*pair([ranks.rank])).loss.backward()
    alone = objective("vit")
    alone.student.head.weight.requires_grad_(False)
    alone(*pair([ranks.rank])).loss.backward()
    assert distance(grads(Ranks(), shared), grads(Ranks(), alone)) <= 1e-6
    shared.close()
    assert not any(part._forward_hooks for part in shared.modules())


def validating(ranks: Ranks) -> None:
    """The student alone can be called between steps, in eval mode, and answers as a whole one."""
    group, shared = as_kind(ranks, "fsdp"), objective("vit")
    known = student("vit")(pair([3, 4])[0]["inputs"])
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        for _ in range(2):
            step(group, wrapped, [[ranks.rank]])
            shared.zero_grad()
            shared.student.to("cpu").eval()
            with torch.no_grad():
                found = shared.student(pair([3, 4])[0]["inputs"])
            shared.train()
            torch.testing.assert_close(found, known)


class Tied(nn.Sequential):
    """Two blocks that share a weight."""

    def __init__(self) -> None:
        one, two = student("mlp").blocks, nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        three = nn.Sequential(nn.Linear(7, 7), nn.ReLU())
        three[0].weight = two[0].weight
        super().__init__(nn.Flatten(), one, nn.Sequential(two, three), nn.Linear(7, 5))


def tied(share: str, ranks: Ranks) -> None:
    """A shared weight has one gradient and stays shared."""
    from common import TASK

    def make() -> Objective:
        torch.manual_seed(1)
        return Objective(Tied(), TASK, label_weight=1.0)

    group, shared, alone = as_kind(ranks, share), make(), make()
    step(Ranks(), Ranks().wrap(alone), [[0, 1]])
    with group.wrap(shared, *pair([0, 1])) as wrapped:
        step(group, wrapped, [[ranks.rank] if ranks.rank < 2 else []])
        assert distance(grads(group, shared), grads(Ranks(), alone)) <= 1e-5
        shared.zero_grad()
    assert shared.student[2][0][0].weight is shared.student[2][1][0].weight


def refusals(ranks: Ranks) -> None:
    group, example = as_kind(ranks, "fsdp"), pair([0, 1])
    half = partial(group.wrap, objective(), *example, precision=torch.float16)
    refused(half, PreflightError, "bf16")
    shared = objective()
    shared.student.scale = nn.Parameter(torch.tensor(1.0))
    refused(lambda: group.wrap(shared, *example), PreflightError, "'student.scale'")
    frozen = objective()
    frozen.requires_grad_(False)
    refused(lambda: group.wrap(frozen, *example), PreflightError, "depends on no parameter")


def make() -> dict[str, Callable[[Ranks], None]]:
    cases: dict[str, Callable] = {
        case.__name__: case
        for case in (messages, joint_errors, gathering, parts, validating, refusals)
    }
    for share in ("ddp", "fsdp"):
        for case in (one_start, statistics, clipping, no_trace, tied):
            cases[f"{case.__name__}-{share}"] = partial(case, share)
    return cases
