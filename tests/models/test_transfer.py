"""Weights go from one model to another by name, and sizes that differ keep their meaning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.models import build, head_of, transfer, transferable
from attar.runtime import UsageError


def made(family: str, seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    options = {"shape": (1, 8, 8), "outputs": 10, **options}
    return build(family, **options).eval()


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit"])
def test_the_body_is_the_sources_and_the_head_is_not(family: str) -> None:
    source, student = made(family, 1, outputs=7), made(family, 2)
    fresh = copy.deepcopy(student.state_dict())
    found = transfer(student, source)
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(student[:-1](images), source[:-1](images))
    assert torch.equal(student.head.weight, fresh["head.weight"])
    assert found.fresh == {"head.weight": "the head", "head.bias": "the head"}


def test_the_head_comes_too_where_it_is_asked_for() -> None:
    source, student = made("resnet", 1), made("resnet", 2)
    assert not transfer(student, source, head=True).fresh
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(student(images), source(images))


def test_the_source_is_not_shared_and_not_changed() -> None:
    source, student = made("resnet", 1), made("resnet", 2)
    before = copy.deepcopy(source.state_dict())
    transfer(student, source)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in source.state_dict().items())


def test_a_look_changes_nothing() -> None:
    student = made("resnet", 2)
    before = copy.deepcopy(student.state_dict())
    assert transferable(student, made("resnet", 1)).tensors
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_inputs_are_normalised_as_the_students_data_want_it() -> None:
    source = made("resnet", 1, mean=(0.1,), std=(0.2,))
    student = made("resnet", 2, mean=(0.7,), std=(0.3,))
    transfer(student, source)
    assert student.normalize.mean.item() == pytest.approx(0.7)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1)])
def test_a_grey_image_gives_the_same_in_one_channel_and_in_three(theirs: int, ours: int) -> None:
    source, student = made("resnet", 1, shape=(theirs, 8, 8)), made("resnet", 2, shape=(ours, 8, 8))
    transfer(student, source)
    grey = torch.rand(2, 1, 8, 8)

    def features(model: nn.Module, channels: int) -> Tensor:
        return model[:-1](grey.expand(-1, channels, -1, -1))

    with torch.no_grad():
        torch.testing.assert_close(features(student, ours), features(source, theirs))


def test_a_grid_of_positions_is_resized_and_the_class_token_kept() -> None:
    source, student = (
        made("vit", 1, shape=(1, 8, 8), patch=2),
        made("vit", 2, shape=(1, 16, 16), patch=2),
    )
    with torch.no_grad():  # a slope along one axis stays one
        grid = torch.arange(4.0).repeat(4, 1).reshape(1, 16, 1).expand(-1, -1, 64)
        source.stem.positions[:, 1:] = grid
    transfer(student, source)
    found = student.stem.positions.detach()
    assert torch.equal(found[:, 0], source.stem.positions[:, 0])
    rows = found[0, 1:, 0].unflatten(0, (8, 8))
    assert torch.allclose(rows, rows[:1].expand(8, -1), atol=1e-5)
    assert (rows[0].diff() > 0).all()
    assert rows.mean().item() == pytest.approx(1.5, abs=1e-4)


def test_what_has_another_shape_stays_fresh_with_its_reason() -> None:
    source, student = made("resnet", 1, width=8), made("resnet", 2, width=8)
    student.stage3[0].conv2.conv = nn.Conv2d(32, 32, 1, bias=False)
    found = transfer(student, source)
    assert found.fresh["stage3.0.conv2.conv.weight"] == "is [32, 32, 1, 1] and [32, 32, 3, 3] there"
    assert found.told().endswith("fresh: stage3.0.conv2.conv.weight, head.weight, head.bias")


def test_a_kernel_is_not_taken_for_a_grid_of_positions() -> None:
    """5 = 1 + 2 x 2 and 10 = 1 + 3 x 3: as many inputs as a grid would have rows."""
    theirs, own = (nn.Sequential(nn.Conv1d(n, 8, 3), nn.Linear(4, 2)) for n in (5, 10))
    assert "0.weight" in transferable(own, theirs).fresh


def test_another_architecture_is_refused_before_anything_changes() -> None:
    student = made("mlp", 2, shape=(64,))
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UsageError, match=r"nothing of the source fits .* has no partner there"):
        transfer(student, made("resnet", 1))
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_the_head_is_the_last_layer_with_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(2, 3), nn.Dropout()))
    assert head_of(model) == ["1.0.weight", "1.0.bias"]
    assert head_of(made("resnet", 0)) == ["head.weight", "head.bias"]


def test_it_is_a_start_of_training(digits: attar.data.Splits) -> None:
    task = attar.tasks.ImageClassification().fitted(digits.train)
    source = made("resnet", 1, width=4, outputs=3)
    student = made("resnet", 2, width=4)
    rows = attar.data.Subset(digits.train, torch.arange(64))
    attar.train(student, rows, task, init=source, freeze=["*", "!head"], epochs=1)
    assert torch.equal(student.stage1[0].conv1.conv.weight, source.stage1[0].conv1.conv.weight)
