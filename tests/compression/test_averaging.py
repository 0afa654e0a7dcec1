"""Averages of weights, and batch statistics that fit them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.compression import interpolate, reestimate_batch_norm, soup
from attar.runtime import UsageError


def net(seed: int, width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return attar.models.build("resnet", shape=[3, 16, 16], outputs=5, width=width).eval()


def pictures(count: int = 60) -> attar.data.TensorSource:
    generator = torch.Generator().manual_seed(0)
    images = 3 + 2 * torch.randn(count, 3, 16, 16, generator=generator)
    return attar.data.TensorSource(images, torch.arange(count) % 5, classes=5)


def test_a_soup_is_the_mean_of_each_number() -> None:
    models = [net(seed) for seed in range(3)]
    made = soup(models, [0.5, 0.3, 0.2]).state_dict()
    states = [model.state_dict() for model in models]
    for name, tensor in made.items():
        if tensor.is_floating_point():
            expected = 0.5 * states[0][name] + 0.3 * states[1][name] + 0.2 * states[2][name]
            torch.testing.assert_close(tensor, expected)
    for name, tensor in soup(models[:1]).state_dict().items():
        assert torch.equal(tensor, states[0][name])


def test_the_models_of_a_soup_are_left_as_they_are() -> None:
    models = [net(0), net(1)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    soup(models)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_soup_of_halves_is_summed_in_float32() -> None:
    models = [net(0).half(), net(1).half(), net(2).half()]
    parts = [model.state_dict()["head.weight"].float() for model in models]
    made = soup(models).state_dict()["head.weight"]
    assert made.dtype is torch.float16
    assert torch.equal(made, sum(1 / 3 * part for part in parts).half())


def test_interpolation_goes_from_the_student_to_the_teacher() -> None:
    student, teacher = net(0), net(1)
    for weight, other in ((0.0, student), (1.0, teacher)):
        made = interpolate(student, teacher, weight).state_dict()
        assert all(torch.equal(t, made[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize(
    ("models", "weights", "message"),
    [
        ([], None, "at least one model"),
        ([0, 1], [0.5], "2 numbers that add up to 1"),
        ([0, 1], [0.5, 0.6], "2 numbers that add up to 1"),
    ],
)
def test_shares_that_are_none_are_refused(
    models: list[int], weights: list[float] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        soup([net(seed) for seed in models], weights)


def test_models_of_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"another architecture than the first: .*stem"):
        soup([net(0), net(0, width=6)])


def test_statistics_are_those_of_the_data_they_are_taken_from() -> None:
    """The first norm sees the images themselves, so that its mean can be worked out."""
    task, data = attar.tasks.ImageClassification(), pictures()
    layers = [nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 256, 5)]
    model = nn.Sequential(*layers)  # the dropout rests
    made = reestimate_batch_norm(model, data, task)
    images: Tensor = data.rows(torch.arange(60))["inputs"]
    torch.testing.assert_close(made[1].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(made[1].running_var, images.var((0, 2, 3)))
    assert made[1].momentum == model[1].momentum
    assert torch.equal(model[1].running_mean, torch.zeros(3))


def test_it_counts_all_batches_alike_and_keeps_the_weights() -> None:
    task, data, model = attar.tasks.ImageClassification(), pictures(300), net(0).train()
    made = reestimate_batch_norm(model, data, task)
    assert made.training
    assert int(made.stem.norm.num_batches_tracked) == 3
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
    again = reestimate_batch_norm(made, data, task)
    torch.testing.assert_close(
        again.stage3[0].conv1.norm.running_var, made.stage3[0].conv1.norm.running_var
    )
