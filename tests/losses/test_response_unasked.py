"""On an accelerator nobody asks the numbers first: the masked way must give the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attar import losses

LABELS = torch.tensor([0, 1, 2, 3])
CASES: dict[str, Callable[..., Tensor]] = {
    "kl_divergence": losses.kl_divergence,
    "standardized_kl": losses.standardized_kl,
    "transformed_teacher_kl": losses.transformed_teacher_kl,
    "decoupled_kl": lambda s, t: losses.decoupled_kl(s, t, LABELS),
    "normalized_kl": lambda s, t: losses.normalized_kl(s, t, LABELS),
    "target_enhanced_kl": lambda s, t: losses.target_enhanced_kl(s, t, LABELS),
    "weighted_kl": lambda s, t: losses.weighted_kl(s, t, LABELS),
    "virtual_teacher": lambda s, t: losses.virtual_teacher(s, LABELS),
    "reverse_kl": losses.reverse_kl,
    "adaptive_kl": losses.adaptive_kl,
    "earth_mover": losses.earth_mover,
    "alpha 0": lambda s, t: losses.alpha_beta_divergence(s, t, alpha=0.0),
    "beta 0": lambda s, t: losses.alpha_beta_divergence(s, t, beta=0.0),
    "both 0": lambda s, t: losses.alpha_beta_divergence(s, t, alpha=0.0, beta=0.0),
    "binary_kl": losses.binary_kl,
    "centered_mse": losses.centered_mse,
}


def value_and_gradient(name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = CASES[name](student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


@pytest.mark.parametrize("excluding", ["nobody", "both", "teacher"])
@pytest.mark.parametrize("name", CASES)
def test_the_masked_way_is_the_same(
    name: str, excluding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    if excluding != "nobody":
        teacher[:2, 4] = -math.inf
    if excluding == "both":
        student[:2, 4] = -math.inf
    asked = value_and_gradient(name, student, teacher)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    unasked = value_and_gradient(name, student, teacher)
    torch.testing.assert_close(unasked[0], asked[0])
    assert unasked[1].isfinite().all()
    assert asked[1].isfinite().all()
    torch.testing.assert_close(unasked[1], asked[1])
