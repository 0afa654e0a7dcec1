"""Compiling and recomputing change no result, are heard once by taps, and leave no trace."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import mse
from attar.runtime.blocks import blocks
from attar.runtime.compiling import compiled, recomputed
from attar.runtime.errors import PreflightError, UsageError
from attar.training import Objective, Term

TASK = attar.tasks.ImageClassification(classes=5)
SHAPE = (1, 8, 8)
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(attar.models.resnet, SHAPE, 5, depth=8, width=4),
    "vit": partial(attar.models.vit, SHAPE, 5, width=8, depth=3, heads=2),
    "mobilenet": partial(attar.models.mobilenet, SHAPE, 5, width=4),
    "mlp": partial(attar.models.mlp, SHAPE, 5, widths=(8, 7)),
}
HEARD = {"resnet": "stage2.0.conv1", "vit": "blocks.1.mlp.0", "mobilenet": "stage1.0.expand",
         "mlp": "blocks.1.linear"}  # fmt: skip


def batch(count: int = 6, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *SHAPE, generator=draw)
    return {"inputs": images, "labels": torch.arange(count) % 5, "ids": torch.arange(count)}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def objective(name: str, model: nn.Module) -> tuple[Objective, dict[str, Tensor]]:
    """A student that is also told a feature inside one of its blocks."""
    address = f"feature:{HEARD[name]}"
    teacher = attar.Teacher(copy.deepcopy(model), TASK).open([address])
    told = {"feature:goal": teacher(batch())[address] + 1}
    return Objective(model, TASK, [Term(mse, address, "feature:goal")]), told


def steps(name: str, context: Callable[[nn.Module], Any] | None) -> list[Tensor]:
    """Losses, gradients and buffers of two steps, the second from where the first ended."""
    model = build(name)
    shared, told = objective(name, model)
    found: list[Tensor] = []
    with context(model) if context else torch.enable_grad(), shared:
        for _ in range(2):
            loss = shared(batch(), told).loss
            loss.backward()
            found.append(loss.detach())
    return [*found, *(p.grad for p in model.parameters()), *model.buffers()]


def traces(module: nn.Module) -> list[Any]:
    return [
        (name, type(part), sorted(part.__dict__), id(part.__dict__.get("forward")))
        for name, part in module.named_modules()
    ]


@pytest.mark.parametrize("name", NETS)
def test_recomputing_changes_no_bit(name: str) -> None:
    for found, known in zip(steps(name, recomputed), steps(name, None), strict=True):
        assert torch.equal(found, known)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_compiling_changes_no_result(name: str) -> None:
    compile_it = partial(compiled, backend="aot_eager")
    for found, known in zip(steps(name, compile_it), steps(name, None), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-6)


# Not of nets with few channels: torch 2.13 compiles those, on a CPU, to code that corrupts memory.
@pytest.mark.skipif(not os.environ.get("ATTAR_DEEP"), reason="run by make test-deep")
@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_the_default_compiler_changes_no_result(name: str) -> None:
    for found, known in zip(steps(name, compiled), steps(name, None), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "students"), [("mlp", 5), ("resnet", 1)])
def test_the_whole_student_is_one_graph_and_sizes_end(name: str, students: int) -> None:
    """Also with a tap inside, and for the next students of the same process."""
    alive = []
    for _ in range(students):
        graphs: list[Any] = []

        def keep(graph: Any, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        model = build(name)
        alive.append(model)
        shared, told = objective(name, model)
        with compiled(model, backend=keep), shared:
            for index, count in enumerate([6, 6, 3, 5, 2, 6, 4]):
                goal = {name: value[:count] for name, value in told.items()}
                shared(batch(count), goal).loss.backward()
                if index == 0:
                    assert len(graphs) == 1
            assert len(graphs) <= 2  # this size, then any size


def test_blocks_are_the_parts_that_repeat() -> None:
    found = {}
    for name in NETS:
        model = build(name)
        names = {id(part): path for path, part in model.named_modules()}
        found[name] = [names[id(block)] for block in blocks(model)]
    stages = [f"stage{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1)]
    assert found == {
        "resnet": ["stem", "stage1.0", "stage2.0", "stage3.0"],
        "vit": ["stem", "blocks.0", "blocks.1", "blocks.2"],
        "mobilenet": ["stem", *stages, "neck"],
        "mlp": ["blocks.0", "blocks.1"],
    }


class Encoder(nn.Module):
    """Layers of the author's own in lists, one of them in both, as in the hub's models."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 1, 8)
        self.embed = nn.Embedding(3, 4)
        self.layers = nn.ModuleList([layer, nn.TransformerEncoderLayer(4, 1, 8)])
        self.again = nn.ModuleList([layer])


def test_blocks_are_found_below_modules_of_ones_own() -> None:
    model = nn.ModuleDict({"encoder": Encoder(), "head": nn.Linear(4, 2)})
    layers = model["encoder"].layers
    assert [id(block) for block in blocks(model)] == [id(layers[0]), id(layers[1])]
    assert blocks(nn.Linear(2, 2)) == []


class Noisy(nn.Module):
    """Dropout, statistics, and a buffer that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.drop(self.norm(self.linear(inputs))).tanh() * self.calls


def test_recomputing_repeats_dropout_and_moves_no_buffer_twice() -> None:
    model, inputs = nn.Sequential(Noisy(), Noisy()), torch.randn(5, 4)
    found = []
    for context in (None, recomputed):
        copied = copy.deepcopy(model)
        torch.manual_seed(0)
        with context(copied) if context else torch.enable_grad():
            for _ in range(3):
                copied(inputs).square().sum().backward()
            real = list(copied.buffers())
            loss = copied(inputs).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            assert all(a is b for a, b in zip(copied.buffers(), real, strict=True))
        assert copied[0].calls == 4
        found.append([*(p.grad for p in copied.parameters()), *copied.buffers(), torch.rand(3)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_recomputing_keeps_less() -> None:
    kept = []
    for context in (None, recomputed):
        model, sizes = build("resnet"), []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with context(model) if context else torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(batch()["inputs"]).sum()
            kept.append(sum(sizes))
        del loss
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("context", [recomputed, partial(compiled, backend="eager")])
def test_nothing_stays_behind(context: Callable[[nn.Module], Any]) -> None:
    """After an error too; a forward and a compiled call of the owner's own come back."""
    model = build("mlp")
    own = model.blocks[0].forward
    model.blocks[0].forward = own
    before = traces(model)

    def fail() -> None:
        model(batch()["inputs"]).sum().backward()
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), context(model):
        fail()
    assert traces(model) == before
    assert model.blocks[0].__dict__["forward"] is own
    del model.blocks[0].forward
    model.compile(backend="eager")
    known = model._compiled_call_impl
    with compiled(model, backend="eager"):
        assert model._compiled_call_impl is not known
    assert model._compiled_call_impl is known


def test_a_failing_compiler_is_one_sentence() -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no such machine")

    model = build("mlp")
    said = r"cannot be compiled \(.*no such machine\); leave compile"
    with pytest.raises(UsageError, match=said), compiled(model, backend=fail):
        model(batch()["inputs"])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PreflightError, match="finds no blocks"), recomputed(nn.Linear(2, 2)):
        pass
    model = build("mlp")
    for one, other in ((recomputed, compiled), (compiled, recomputed)):
        with pytest.raises(UsageError, match="exclude each other"), one(model), other(model):
            pass
    assert traces(model) == traces(build("mlp"))
