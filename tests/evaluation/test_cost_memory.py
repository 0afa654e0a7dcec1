"""What a pass holds at once is what can be counted by hand, and the same each time."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.evaluation import Cost, cost, judge
from attar.evaluation.memory import peak_bytes
from attar.evaluation.table import table


class Residual(nn.Module):
    """x + second(first(x)), for x of 8 numbers, and 16 between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.second(self.first(inputs))


class Keeps(nn.Module):
    """Holds all its steps until the end, of which each is a double of the one before."""

    def forward(self, inputs: Tensor) -> list[Tensor]:
        steps = []
        for _ in range(3):
            inputs = torch.cat([inputs, inputs], 1)
            steps.append(inputs)
        return steps


class Writes(nn.Module):
    """Makes one tensor, fills it by halves through views of it, and gives a view of it."""

    def forward(self, inputs: Tensor) -> Tensor:
        made = torch.empty(len(inputs), 6)
        left, right = made.chunk(2, 1)
        left.fill_(1.0)
        right.copy_(inputs[:, :3]).mul_(2.0)
        return made.t()[1:]


class Own(nn.Module):
    """Gives a view of its own weight, and one of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 5))
        self.other = torch.ones(7)  # nobody knows of it

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return self.weight.t()[2:], inputs[:1].flatten(), self.other[1:]


def perceptron(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(**options), nn.Linear(8, 2))


# Numbers of four bytes that one example needs; what a layer reads lives until it has answered.
COUNTED = [
    (perceptron(), (4,), 8 + 8),
    (perceptron(inplace=True), (4,), 8 + 2),
    (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 30)), (4,), 8 + 30),
    (nn.Sequential(nn.Flatten(), nn.Identity(), nn.Unflatten(1, (2, 6))), (3, 4), 0),
    (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 4), 3),
    (Residual(), (8,), 16 + 8),
    (Keeps(), (4,), 8 + 16 + 32),
    (Writes(), (4,), 6),
    (Own(), (3,), 0),
    (nn.Conv2d(2, 5, 3), (2, 6, 6), 5 * 4 * 4),
    (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh()), (4,), 4 + 4),
]


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize(
    ("model", "shape", "numbers"), COUNTED, ids=[str(index) for index in range(len(COUNTED))]
)
def test_the_peak_is_what_is_counted_by_hand(
    model: nn.Module, shape: tuple[int, ...], numbers: int, count: int
) -> None:
    with torch.no_grad():
        found = [peak_bytes(model.eval(), torch.rand(count, *shape)) for _ in range(3)]
    assert found == [4 * numbers * count] * 3


def test_a_type_of_half_the_bytes_needs_half_the_memory() -> None:
    model = perceptron().bfloat16()
    with torch.no_grad():
        assert peak_bytes(model, torch.rand(3, 4, dtype=torch.bfloat16)) == 2 * 16 * 3


def test_what_one_kernel_would_hide_is_counted() -> None:
    """An encoder layer of torch runs as one kernel, in which 16 numbers a token are made."""
    layer = nn.TransformerEncoderLayer(8, 2, 1000, batch_first=True).eval()
    with torch.no_grad():
        found = peak_bytes(layer, torch.rand(2, 5, 8))
    assert found >= 4 * 2 * 5 * 1000
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_failed_leaves_nothing_that_listens() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError), torch.no_grad():
        peak_bytes(nn.Linear(5, 3), torch.rand(1, 4))
    assert torch.backends.mha.get_fastpath_enabled() is before
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_cost_has_the_peak_of_one_and_of_64_and_what_a_second_brings() -> None:
    found = cost(perceptron(), torch.rand(3, 4), device="cpu")
    assert found.peak_bytes == {"1": 64, "64": 64 * 64}
    for size in (1, 64):
        seconds = found.latency[str(size)]["p50_ms"] / 1000
        assert found.throughput[str(size)] == pytest.approx(size / seconds)
    told = json.loads(json.dumps(found.to_json()))
    assert told["peak_bytes"] == {"1": 64, "64": 4096}
    assert Cost(**told) == found


OLD: dict[str, Any] = {
    "parameters": 10, "macs": 20, "bytes": 40, "threads": 1, "device": "a chip",
    "latency": {"1": {"p50_ms": 0.5, "p95_ms": 1.0}, "64": {"p50_ms": 2.0, "p95_ms": 4.0}},
}  # fmt: skip


def test_a_cost_that_was_written_before_has_no_memory_and_its_throughput() -> None:
    found = Cost(**OLD)
    assert found.peak_bytes == {}
    assert found.throughput == {"1": 2000, "64": 32_000}


def told(teacher: Cost, student: Cost) -> tuple[str, list[str]]:
    """Of a verdict on models of these costs, the table in the terminal and the method."""
    from rich.console import Console

    task = attar.tasks.ImageClassification(classes=2)
    logits = torch.eye(2).repeat(20, 1)
    rows = task.rows(logits, {"labels": torch.arange(40) % 2, "ids": torch.arange(40)})
    prices = {"teacher": teacher, "baseline": student, "distilled": student}
    verdict = judge(task, teacher=rows, baseline=[rows], distilled=[rows], costs=prices)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as text:
        console.print(table(verdict))
    return text.get(), verdict.to_json()["method"]


def test_the_table_says_the_memory_beside_the_teachers() -> None:
    large, small = (
        Cost(**OLD, peak_bytes={"1": 64, "64": most}) for most in (4_096_000, 1_024_000)
    )
    text, method = told(large, small)
    lines = text.splitlines()
    place = next(number for number, line in enumerate(lines) if "memory for 64" in line)
    assert lines[place].split()[3:] == ["4.1", "MB", "1.02", "MB", "1.02", "MB"]
    assert lines[place + 1].split() == ["4.0", "x", "less"] * 2
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Memory: ") for line in method)


def test_a_pass_that_holds_nothing_is_told_without_a_ratio() -> None:
    costs = [Cost(**OLD, peak_bytes={"64": most}) for most in (4000, 0)]
    for pair in (costs, costs[::-1]):
        line = next(line for line in told(*pair)[0].splitlines() if "memory for 64" in line)
        assert sorted(line.split()[3:]) in (
            ["0", "0", "4", "B", "B", "kB"],
            ["0", "4", "4", "B", "kB", "kB"],
        )


def test_the_table_says_nothing_of_memory_where_it_was_not_measured() -> None:
    text, method = told(Cost(**OLD), Cost(**OLD))
    assert "memory" not in text
    assert not any("Memory" in line for line in method)
