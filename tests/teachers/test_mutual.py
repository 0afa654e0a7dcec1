"""Students that teach each other, and a student that teaches its own exits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import cross_entropy, kl_divergence, mse
from attar.runtime import UsageError

TASK = attar.tasks.TabularClassification(classes=3)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"inputs": torch.randn(5, 2).double(), "labels": torch.tensor([0, 1, 2, 0, 1])}


@pytest.mark.parametrize("count", [2, 3])
def test_each_students_gradient_is_the_papers(net: Any, count: int) -> None:
    """CE + 1 / (K - 1) sum_j KL(p_j || p_i) with p_j held, differentiated by hand for each i."""
    members = [net(seed=seed, width=4 + seed).double() for seed in range(count)]
    group, rows = attar.Group(members, TASK), batch()
    with attar.Objective(group, TASK, attar.mutual(group), label_weight=0) as objective:
        objective(rows).loss.backward()
    answers = [member(rows["inputs"]).log_softmax(1) for member in members]
    for i, member in enumerate(members):
        own = -answers[i][torch.arange(5), rows["labels"]].mean()
        for j in range(count):
            if j != i:
                peer = answers[j].detach()
                own = own + (peer.exp() * (peer - answers[i])).sum(1).mean() / (count - 1)
        expected = torch.autograd.grad(own, list(member.parameters()))
        for parameter, grad in zip(member.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


def test_students_may_learn_from_each_other_alone(net: Any) -> None:
    group = attar.Group([net(seed=1), net(seed=2)], TASK)
    terms = attar.mutual(group, mse, labels=None)
    assert [(t.student, t.teacher, t.weight) for t in terms] == [
        ("output:0", "self:output:1", 1.0),
        ("output:1", "self:output:0", 1.0),
    ]


def test_they_learn_and_come_out_as_they_went_in(digits: Any, tmp_path: Path) -> None:
    """Of real images; the small one's batch statistics move though it came in eval mode."""
    task = attar.tasks.ImageClassification().fitted(digits.train)
    torch.manual_seed(0)
    small = attar.models.build("resnet", data=digits.train, width=4).eval()
    large = attar.models.build("mlp", data=digits.train, widths=[32]).eval()
    statistics = [b.clone() for b in small.buffers()]
    group = attar.Group([small, large], task)
    terms = attar.mutual(group, partial(kl_divergence, temperature=2.0))
    options: dict[str, Any] = {"label_weight": 0, "epochs": 3, "batch_size": 64}
    out = attar.distill(group, None, digits.train, task, terms, run=tmp_path / "run", **options)
    assert out is group
    assert group[0] is small
    assert group[1] is large
    assert not any(part.training for part in group.modules())
    assert not any(part._forward_hooks for part in group.modules())
    assert any(not torch.equal(a, b) for a, b in zip(statistics, small.buffers(), strict=True))
    scores = [attar.evaluate(m, digits.test, task)["accuracy"] for m in (group, small, large)]
    assert scores[0] == scores[1]
    assert min(scores) > 0.75
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_part_of_a_member_is_addressed_by_its_number(net: Any) -> None:
    group = attar.Group([net(seed=1), net(seed=2)], TASK).double()
    term = attar.Term(mse, "feature:0.body", "self:feature:1.body")
    with attar.Objective(group, TASK, [term], label_weight=0) as objective:
        objective(batch()).loss.backward()
    assert group[0].body.weight.grad is not None
    assert group[1].body.weight.grad is None


def test_a_group_needs_two_modules(net: Any) -> None:
    member = net()
    for members in ([member], [member, member]):
        with pytest.raises(UsageError, match="at least two students, each a module of its own"):
            attar.Group(members, TASK)


class Exits(nn.Module):
    """Two exits before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3 = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.exit1, self.exit2, self.head = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.stage1(inputs).tanh()
        second = self.stage2(first).tanh()
        self.exit1(first), self.exit2(second)
        return self.head(self.stage3(second).tanh())


def test_an_exit_learns_from_the_end_by_the_papers_gradient() -> None:
    """Be your own teacher: CE of each exit and T^2 KL to the last, which is held."""
    torch.manual_seed(0)
    net, rows, soft = Exits().double(), batch(), partial(kl_divergence, temperature=3.0)
    terms = [attar.Term(soft, f"feature:exit{k}", "self:output:logits", weight=0.1) for k in (1, 2)]
    terms += [attar.Term(cross_entropy, f"feature:exit{k}", weight=0.9) for k in (1, 2)]
    with attar.Objective(net, TASK, terms, label_weight=0.9) as objective:
        objective(rows).loss.backward()
    first = net.stage1(rows["inputs"]).tanh()
    second = net.stage2(first).tanh()
    logits = [net.exit1(first), net.exit2(second), net.head(net.stage3(second).tanh())]
    target = (logits[2] / 3).softmax(1).detach()
    loss = sum(0.9 * nn.functional.cross_entropy(z, rows["labels"]) for z in logits)
    for z in logits[:2]:  # the cross-entropy with a fixed target has the gradient of the KL
        loss = loss - 0.1 * 9 * (target * (z / 3).log_softmax(1)).sum(1).mean()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
