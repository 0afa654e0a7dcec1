"""Several real processes train as one does: gradients, weights, norms, messages, no trace left."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import nn

from attar.runtime.errors import UsageError
from attar.runtime.ranks import Ranks, connect, gradient_norm

Group = Callable[..., None]


def test_two_ranks_train_as_one_process_and_leave_no_trace(group: Group) -> None:
    group(world=2)


def test_whole_trainings_of_two_ranks_are_those_of_one_process(group: Group) -> None:
    group("trainings", world=2)


def test_language_models_of_two_ranks_are_those_of_one_process(group: Group) -> None:
    pytest.importorskip("transformers")
    group("texts", world=2)


def test_masked_weights_stay_zero_on_two_ranks_and_learn_as_on_one(group: Group) -> None:
    group("masks", world=2)


def test_four_ranks_have_the_gradients_of_one_process(group: Group) -> None:
    group("few-ddp", "few-fsdp", "gathering", "training-ddp", "once", world=4)


@pytest.mark.skipif(not os.environ.get("ATTAR_DEEP"), reason="run by make test-deep")
def test_three_ranks_sum_gradients_and_mean_statistics(group: Group) -> None:
    cases = ["partitions-ddp", "partitions-fsdp", "statistics-ddp", "statistics-fsdp"]
    group(*cases, "gathering", "clipping-fsdp", "parts", world=3)


def test_one_process_is_a_group_of_one() -> None:
    module, rows = nn.Linear(2, 3), {"ids": torch.arange(3)}
    with Ranks() as ranks, ranks.wrap(module) as wrapped, wrapped.micro(True), ranks.together():
        assert (ranks.rank, ranks.world, ranks.main, ranks.kind) == (0, 1, True, "one")
        assert wrapped.module is module
        assert wrapped.measured(2.0, [torch.tensor([3.0]), torch.tensor([[4.0]])]) == (2.0, 5.0)
        assert ranks.total([3, 4]) == [3, 4]
        assert ranks.gather(rows) is rows
        assert ranks.everyone("a") == ["a"]
        assert ranks.first("a") == "a"
        assert ranks.any(True)
        assert not ranks.any(False)
        assert ranks.full(module.weight) is module.weight
        assert ranks.like(rows["ids"], module.weight) is rows["ids"]


def test_the_norm_is_of_all_gradients_as_one_vector() -> None:
    assert gradient_norm([]) == 0
    assert gradient_norm([torch.full((2, 2), 2.0), torch.tensor([3.0])]) == 5
    assert not gradient_norm([torch.tensor([float("nan")]), torch.ones(2)]) < float("inf")


def test_several_ranks_that_were_not_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert connect().world == 1
    for kind in ("ddp", "fsdp"):
        with pytest.raises(UsageError, match=r"one; start it as: torchrun --standalone .*=2 \S"):
            connect(kind)
    with pytest.raises(UsageError, match="did you mean 'fsdp'"):
        connect("fsdp2")  # type: ignore[arg-type]


def test_torchrun_of_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert connect("fsdp").world == 1


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"rank 5 is the 3th on this machine, which has 2"):
        connect(device="cuda")
