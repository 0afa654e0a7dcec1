"""Gradients and parameters as signals; student and teacher share what was chosen."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attar
from attar.losses import mse
from attar.runtime import PreflightError, UsageError
from attar.signals import Hearing, parse
from attar.training import Objective, Term

TASK = attar.tasks.ImageClassification(classes=3)


def batch(n: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return {"inputs": inputs, "labels": torch.arange(n) % 3, "ids": torch.arange(n)}


def smooth(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """[N, C, ...] by torch's own function, a row at a time."""
    rows = [torch.autograd.functional.jacobian(model, row[None])[0, :, 0] for row in inputs]
    return torch.stack(rows)


def heard(model: nn.Module, *addresses: str, told: dict | None = None) -> dict[str, Tensor]:
    with Hearing(model, TASK, addresses) as hearing:
        return hearing(batch(), told)[1]


def test_the_gradient_of_the_loss_is_each_rows_own() -> None:
    model, asked = smooth(0), batch()
    x = asked["inputs"].clone().requires_grad_()
    F.cross_entropy(model(x), asked["labels"], reduction="sum").backward()
    torch.testing.assert_close(heard(model, "grad:loss/inputs")["grad:loss/inputs"], x.grad)


def test_the_gradient_of_the_top_class_is_a_row_of_the_jacobian() -> None:
    model, asked = smooth(0), batch()
    found = heard(model, "grad:top/inputs")
    whole = jacobian(model, asked["inputs"])
    top = model(asked["inputs"]).argmax(1)
    torch.testing.assert_close(found["grad:top"][:, 0], top)
    torch.testing.assert_close(found["grad:top/inputs"], whole[torch.arange(5), top])


def test_a_probe_is_a_unit_vector_times_the_jacobian() -> None:
    model = smooth(0)
    found = heard(model, "grad:probe/inputs")
    probe = found["grad:probe"]
    torch.testing.assert_close(probe.norm(dim=1), torch.ones(5, dtype=torch.float64))
    expected = torch.einsum("nc,nci->ni", probe, jacobian(model, batch()["inputs"]))
    torch.testing.assert_close(found["grad:probe/inputs"], expected)


def test_probes_are_drawn_anew() -> None:
    model = smooth(0)
    first, second = (heard(model, "grad:probe/inputs")["grad:probe"] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("of", ["top", "probe"])
def test_the_student_is_differentiated_for_what_the_teacher_chose(of: str) -> None:
    address = f"grad:{of}/inputs"
    teacher, student = smooth(1), smooth(2)
    told = attar.Teacher(teacher, TASK).open([address])(batch())
    own = heard(student, address, told=told)
    choice = told[f"grad:{of}"]
    whole = jacobian(student, batch()["inputs"])
    expected = (
        whole[torch.arange(5), choice[:, 0]]
        if of == "top"
        else torch.einsum("nc,nci->ni", choice, whole)
    )
    torch.testing.assert_close(own[address], expected)
    twin = heard(copy.deepcopy(teacher), address, told=told)
    torch.testing.assert_close(twin[address], told[address])


def test_what_a_teacher_tells_carries_no_graph() -> None:
    wanted = ["grad:top/inputs", "feature:0", "output:logits", "param:0.weight"]
    told = attar.Teacher(smooth(1), TASK).open(wanted)(batch())
    assert not any(value.requires_grad for value in told.values())


def test_a_feature_and_an_embedding_can_be_differentiated_for() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).mean(1))

    model = Words()
    asked = {"inputs": torch.randint(7, (5, 6)), "labels": torch.zeros(5, dtype=torch.long)}
    with Hearing(model, TASK, ["grad:loss/embeddings", "grad:loss/table"]) as hearing:
        _, found = hearing(asked)
    assert found["grad:loss/embeddings"].shape == (5, 6, 4)
    assert torch.equal(found["grad:loss/embeddings"], found["grad:loss/table"])
    with (
        Hearing(model, TASK, ["grad:loss/inputs"]) as hearing,
        pytest.raises(PreflightError, match="write grad:OF/embeddings"),
    ):
        hearing(asked)


@pytest.mark.parametrize("address", ["grad:loss/inputs", "grad:top/1", "grad:probe/inputs"])
def test_a_term_on_gradients_has_the_right_gradient(address: str) -> None:
    """Against finite differences: the gradient of a gradient reaches every weight."""
    student, asked = smooth(2), batch()
    told = attar.Teacher(smooth(1), TASK).open([address])(asked)
    objective = Objective(student, TASK, [Term(mse, address)], label_weight=0)
    parameters = tuple(student.parameters())

    def loss(*_: Tensor) -> Tensor:
        return objective(asked, told).loss

    assert torch.autograd.gradcheck(loss, parameters)


def test_attention_can_be_differentiated_twice() -> None:
    student = attar.models.vit((1, 8, 8), 3, width=8, depth=2, heads=2)
    asked = {"inputs": torch.randn(4, 1, 8, 8), "labels": torch.arange(4) % 3}
    told = attar.Teacher(copy.deepcopy(student), TASK).open(["grad:top/inputs"])(asked)
    term = Term(mse, "grad:top/inputs")
    with torch.no_grad():
        student.head.weight.add_(1)
    Objective(student, TASK, [term], label_weight=0)(asked, told).loss.backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if n == "head.weight")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("grad:los/inputs", "OF one of loss, top, probe"),
        ("grad:loss", "write grad:OF/WRT"),
    ],
)
def test_a_mistyped_gradient_is_explained(address: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(address)


def test_what_cannot_be_differentiated_is_said() -> None:
    model = smooth(0)
    with (
        Hearing(model, TASK, ["grad:loss/inputs"]) as hearing,
        pytest.raises(PreflightError, match="write grad:top or grad:probe"),
    ):
        hearing({"inputs": batch()["inputs"]})
    model[0].requires_grad_(False)
    with (
        Hearing(model, TASK, ["grad:top/0"]) as hearing,
        pytest.raises(PreflightError, match="without gradient"),
    ):
        hearing(batch())
    with pytest.raises(UsageError, match="has no module '22'"):
        Hearing(model, TASK, ["grad:top/22"])
    with pytest.raises(UsageError, match=r"'grad:top/inptus': .*did you mean 'inputs'"):
        Hearing(model, TASK, ["grad:top/inptus"])
    with pytest.raises(UsageError, match="has no embedding"):
        Hearing(model, TASK, ["grad:top/embeddings"])


def test_parameters_are_heard_by_path_and_by_pattern() -> None:
    model = smooth(0)
    found = heard(model, "param:0.weight", "param:*.bias")
    assert found["param:0.weight"] is model[0].weight
    first, second = found["param:*.bias"]
    assert first is model[0].bias
    assert second is model[2].bias
    with pytest.raises(UsageError, match=r"no parameter '0\.wieght'; did you mean '0\.weight'"):
        Hearing(model, TASK, ["param:0.wieght"])


def test_no_hook_is_left(net: partial[nn.Module]) -> None:
    model = net()
    with Hearing(model, TASK, ["grad:top/body", "feature:body"]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_teachers_parameters_carry_no_graph_either() -> None:
    told = attar.Teacher(smooth(1), TASK).open(["param:0.weight", "param:*.bias"])(batch())
    assert not told["param:0.weight"].requires_grad
    assert not any(part.requires_grad for part in told["param:*.bias"])


def test_a_second_call_can_be_differentiated_for() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()
            self.start = nn.Linear(2, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(self.start(x))))

    torch.manual_seed(0)
    model = Twice()
    last = heard(model, "grad:top/layer@1")
    goal = F.one_hot(last["grad:top"][:, 0], 3).double()
    torch.testing.assert_close(last["grad:top/layer@1"], goal)  # the output for itself
    first = heard(model, "grad:top/layer@0")["grad:top/layer@0"]
    assert not torch.allclose(first, goal)
