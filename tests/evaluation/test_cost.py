"""Costs are exact where they are counted, and measuring leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.evaluation import cost, costs, count_macs
from attar.runtime import UsageError


class Attention(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(inputs, inputs, inputs)


class Half(nn.Module):
    """A head that shares its weight with the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(5, 3), (5,), 15),
        (nn.Conv2d(2, 4, 3, padding=1, stride=2), (2, 8, 8), 4 * 4 * 4 * 2 * 9),
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), (6, 8, 8), 8 * 8 * 6 * 9),
        (nn.LSTM(8, 16, batch_first=True), (5, 8), 5 * (8 * 64 + 16 * 64)),
        (Attention(), (2, 5, 4), 2 * 2 * 5 * 5 * 4),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            (5, 8),
            5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16,
        ),
        (nn.Identity(), (3,), 0),
    ],
)
def test_multiply_adds_of_one_example(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(model, torch.rand(7, *shape)) == macs


def test_counting_gives_the_fast_kernels_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        count_macs(nn.Linear(5, 3), torch.rand(1, 4))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_a_cost_is_counted_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = cost(model, torch.rand(3, 4), device="cpu")
    assert (found.parameters, found.macs) == (4 * 8 + 8 + 16 + 18, 4 * 8 + 8 * 2)
    assert found.bytes == 4 * (found.parameters + 16) + 8  # running mean, variance and a count
    assert found.threads == torch.get_num_threads()
    assert found.device
    assert [module.training for module in model] == [True, False, True, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_latency_is_of_one_and_of_64_examples() -> None:
    sizes = []

    class Spy(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            sizes.append((len(inputs), torch.is_grad_enabled(), self.training))
            return inputs

    found = cost(Spy(), torch.rand(10, 4), device="cpu", one_thread=False)
    assert set(sizes) == {(1, False, False), (64, False, False)}
    assert sizes.count((64, False, False)) == 1 + 500 + 5 + 10  # the first for its memory
    assert set(found.latency) == {"1", "64"}
    for taken in found.latency.values():
        assert 0 < taken["p50_ms"] <= taken["p95_ms"]


@pytest.mark.parametrize(
    ("seconds", "passes"),
    [(0.08, 20 + 4 + 10), (0.4, 20 + 1), (1.0, 10 + 1), (60.0, 1 + 1)],
)
def test_a_slow_model_is_run_often_enough_and_no_longer(
    seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 passes, those before the first and those that fill the caches; about 10 s of slow ones."""
    import importlib

    runs, now = [], [0.0]
    module = importlib.import_module("attar.evaluation.cost")

    def clock() -> float:
        now[0] += seconds
        return now[0]

    class Spy(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            runs.append(len(inputs))
            return inputs

    monkeypatch.setattr(module.time, "perf_counter", clock)
    found = cost(Spy(), torch.rand(1, 4), device="cpu", one_thread=False)
    assert runs.count(64) == 1 + passes
    assert found.latency["64"] == pytest.approx(
        {"p50_ms": 1000 * seconds, "p95_ms": 1000 * seconds}
    )


def test_tied_weights_are_counted_once() -> None:
    found = cost(Half(), torch.rand(1, 4), device="cpu")
    assert (found.parameters, found.bytes) == (16 + 8, 4 * (16 + 8))
    assert found.macs == 32


def test_the_file_on_disk_is_its_size(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x" * 123)
    assert cost(nn.Linear(2, 2), torch.rand(1, 2), device="cpu", file=file).bytes == 123


def test_no_example_no_cost() -> None:
    with pytest.raises(UsageError, match="at least one example"):
        cost(nn.Linear(2, 2), torch.rand(0, 2), device="cpu")


def test_models_take_turns_so_that_what_slows_one_slows_all() -> None:
    """Each is called again after each of the others, many times over."""
    called: list[str] = []

    class Says(torch.nn.Linear):
        def __init__(self, name: str) -> None:
            super().__init__(2, 2)
            self.name = name

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            called.append(self.name)
            return super().forward(inputs)

    found = costs({name: Says(name) for name in "abc"}, torch.zeros(1, 2))
    assert list(found) == ["a", "b", "c"]
    order = "".join(
        name for name, before in zip(called, [None, *called], strict=False) if name != before
    )
    assert order.count("abc") > 20  # ten turns for each of two batch sizes, and the warm-up


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Counts(nn.Module):
    """Notes on how many threads each pass runs, by the size of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, int]] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.add((len(inputs), torch.get_num_threads()))
        return inputs


def test_where_torch_has_several_threads_one_is_timed_too(
    threads: Callable[[int], None],
) -> None:
    threads(2)
    found = cost(model := Counts(), torch.rand(3, 4), device="cpu")
    assert model.seen == {(1, 1), (1, 2), (64, 1), (64, 2)}
    assert found.threads == torch.get_num_threads() == 2
    assert found.one_thread.keys() == found.latency.keys() == {"1", "64"}
    assert found.one_thread != found.latency
    found = cost(model := Counts(), torch.rand(3, 4), device="cpu", one_thread=False)
    assert {each for _, each in model.seen} == {2}
    assert found.one_thread == {}


def test_one_thread_is_not_timed_twice(threads: Callable[[int], None]) -> None:
    threads(1)
    found = cost(nn.Identity(), torch.rand(3, 4), device="cpu")
    assert (found.threads, found.one_thread) == (1, {})


def test_a_model_that_breaks_gives_the_threads_back(threads: Callable[[int], None]) -> None:
    class Breaks(Counts):
        def forward(self, inputs: Tensor) -> Tensor:
            if torch.get_num_threads() == 1:
                raise RuntimeError("broken")
            return inputs

    threads(2)
    with pytest.raises(RuntimeError, match="broken"):
        cost(Breaks(), torch.rand(3, 4), device="cpu")
    assert torch.get_num_threads() == 2
