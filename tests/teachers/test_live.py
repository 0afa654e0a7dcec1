"""A live teacher answers in eval mode, without gradient, and comes back as it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import attar
from attar.runtime import PreflightError

TASK = attar.tasks.ImageClassification(classes=3)


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)
    )


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    return {"inputs": torch.randn(n, 2), "ids": torch.arange(n)}


def test_the_same_batch_gets_the_same_answer_and_moves_no_statistics() -> None:
    model = noisy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher, asked = attar.Teacher(model, TASK), batch()
    first, second = teacher(asked), teacher(asked)
    assert torch.equal(first["output:logits"], second["output:logits"])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_answer_carries_no_gradient() -> None:
    assert not attar.Teacher(noisy(), TASK)(batch())["output:logits"].requires_grad


def test_features_are_answered_by_address() -> None:
    model = noisy()
    teacher = attar.Teacher(model, TASK).open(["feature:0", "output:logits"])
    told = teacher(batch(5))
    assert told["feature:0"].shape == (5, 16)
    assert told["output:logits"].shape == (5, 3)


def test_modes_and_hooks_are_given_back_part_by_part() -> None:
    model = noisy().train()
    model[1].eval()  # frozen on purpose
    teacher = attar.Teacher(model, TASK).open(["feature:0"])
    assert not any(part.training for part in model.modules())
    teacher.close()
    assert model.training
    assert model[2].training
    assert not model[1].training
    assert not any(part._forward_hooks for part in model.modules())


def test_a_teacher_that_changes_is_refused() -> None:
    model = noisy()
    teacher = attar.Teacher(model, TASK).open()
    teacher.check()
    with torch.no_grad():
        model[4].bias.add_(1)
    with pytest.raises(PreflightError, match=r"4\.bias was written to"):
        teacher.check()


def test_a_teacher_in_training_mode_is_refused() -> None:
    model = noisy()
    teacher = attar.Teacher(model, TASK).open()
    model.train()
    with pytest.raises(PreflightError, match="training mode"):
        teacher.check()


def test_an_output_of_the_wrong_width_is_refused(net: partial[nn.Module]) -> None:
    with pytest.raises(attar.runtime.DataError, match=r"\[6, 5\] where the task has 3 classes"):
        attar.Teacher(net(outputs=5), TASK)(batch())
