"""Zeros: which weights, that they stay through training, saving, export and resuming."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.compression import Sparsity, keep_zeros, plan_sparsify, schedule
from attar.models import build, load, merged, save
from attar.models.masks import masked, put_mask
from attar.runtime import UsageError
from attar.training.optimization import parameter_groups

INPUTS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TASK = attar.tasks.ImageClassification(classes=10)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(family: str = "resnet", **options: Any) -> nn.Module:
    return build(family, shape=(1, 8, 8), outputs=10, **options).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    kinds = nn.Linear, nn.Conv2d
    layers = {path: part for path, part in model.named_modules() if isinstance(part, kinds)}
    return {path: part.weight.detach() for path, part in layers.items() if path != "head"}


def zeros(model: nn.Module) -> int:
    return sum(int((each == 0).sum()) for each in weights(model).values())


@given(amount=st.floats(0.05, 0.9))
def test_in_all_layers_together_the_smallest_go(amount):
    model = net()
    made = weights(attar.sparsify(model, amount=amount))
    before = weights(model)
    every = torch.cat([each.flatten() for each in before.values()]).abs()
    gone = torch.cat([made[path].flatten() == 0 for path in before])
    assert int(gone.sum()) == round(amount * len(every))
    assert every[gone].max() <= every[~gone].min()


@given(amount=st.floats(0.05, 0.9))
def test_in_each_layer_alone_the_smallest_go(amount):
    model = net("mlp", widths=[7, 9])
    made = weights(attar.sparsify(model, amount=amount, among="layer"))
    for path, each in weights(model).items():
        gone = made[path] == 0
        assert int(gone.sum()) == round(amount * each.numel())
        assert each.abs()[gone].max() <= each.abs()[~gone].min()


def test_two_of_every_four_inputs_go_and_they_are_the_smaller():
    model = net(width=8)
    made = weights(attar.sparsify(model, pattern="2:4"))
    for path, each in weights(model).items():
        fours, left = (
            w.movedim(1, -1).reshape(-1, 4) if path != "stem.conv" else w.reshape(-1, 9)
            for w in (each, made[path])
        )
        if path == "stem.conv":  # it reads one channel
            assert torch.equal(fours, left)
            continue
        assert bool(((left != 0).sum(1) == 2).all())
        assert torch.equal(left.abs().sum(1), fours.abs().topk(2).values.sum(1))
    assert "no multiple of 4" in plan_sparsify(model, pattern="2:4").left["stem.conv"]


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
        partial(torch.optim.LBFGS, lr=0.1),
    ],
    ids=["sgd", "adamw", "lbfgs"],
)
def test_zeros_stay_under_any_optimiser_and_the_rest_learns(optimizer):
    made = attar.sparsify(net(), amount=0.7).train()
    start = {path: each.clone() for path, each in weights(made).items()}
    steps = optimizer(made.parameters())

    def closure() -> Tensor:
        steps.zero_grad()
        loss = made(INPUTS).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        steps.step(closure)
    for path, each in weights(made).items():
        assert bool((each[start[path] == 0] == 0).all())
        assert bool((each[start[path] != 0] != start[path][start[path] != 0]).any())


def test_a_weight_that_is_not_finite_behind_a_mask_is_zero_all_the_same():
    made = attar.sparsify(nn.Sequential(nn.Linear(4, 4)), amount=0.5, skip=[])
    kept = made[0].weight != 0
    made[0].parametrizations.weight.original.data[~kept] = float("nan")
    assert torch.equal(made[0].weight != 0, kept)


def test_what_is_saved_is_the_plain_module_with_its_zeros(tmp_path):
    model = net()
    made = attar.sparsify(model, amount=0.7)
    save(made, tmp_path)
    again = load(tmp_path)
    assert not masked(again)
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(INPUTS), made(INPUTS))
    assert zeros(again) == zeros(made) > 0
    assert masked(made), "the model itself keeps its masks"
    made(INPUTS)


def test_what_is_baked_is_as_before_but_for_the_zeros():
    model = net()
    model.get_submodule("stem.conv").requires_grad_(False)
    whole = merged(attar.sparsify(model, amount=0.5))
    assert [type(part) for part in whole.modules()] == [type(part) for part in model.modules()]
    learns = [(name, p.requires_grad) for name, p in whole.named_parameters()]
    assert learns == [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert merged(model) is model


@pytest.mark.parametrize("family", ["mlp", "vit"])
def test_tensors_are_in_the_order_of_the_plain_model_when_the_masks_are_gone(family):
    """What goes by number fits then: an optimiser's state, and a file's order."""
    model = net(family)
    model.get_submodule("blocks.0").requires_grad_(False)
    made = merged(attar.sparsify(model, amount=0.5))
    assert [name for name, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(made.state_dict()) == list(model.state_dict())
    optimizer = torch.optim.AdamW(made.parameters())
    made(INPUTS).square().sum().backward()
    optimizer.step()
    torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())
    for number, each in enumerate(model.parameters()):
        state = optimizer.state_dict()["state"].get(number)
        assert state is None or state["exp_avg"].shape == each.shape


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_masks_that_spare_every_weight_change_no_bit_of_a_training(decay):
    """So the optimiser has the weights in the order that it has without masks."""
    train, _ = attar.data.digits()
    plain = net("mlp", widths=[16, 12])
    spared = copy.deepcopy(plain)
    for part in list(spared.modules()):
        if isinstance(part, nn.Linear):
            put_mask(part, "weight", torch.ones_like(part.weight, dtype=torch.bool))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 256, "clip": 0.1, "average": 0.9}
    options["optimizer"] = partial(attar.training.adamw, lr=0.01, weight_decay=decay)
    one, two = (attar.train(each, train, TASK, **options) for each in (plain, spared))
    order = [name.replace("parametrizations.weight.original", "weight") for name in _ordered(two)]
    assert order == _ordered(one)
    expected = one.state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in merged(two).state_dict().items())


def _ordered(model: nn.Module) -> list[str]:
    """The names of the parameters as attar's optimiser has them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    return [names[parameter] for group in groups for parameter in group["params"]]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_averaged_weights_have_the_zeros_too(keep):
    train, test = attar.data.digits()
    made = attar.sparsify(net("mlp", widths=[16]), amount=0.8)
    gone = {path: each == 0 for path, each in weights(made).items()}
    options: dict[str, Any] = {"epochs": 2, "batch_size": 128, "average": 0.8, "keep": keep}
    terms = [attar.Term(attar.losses.kl_divergence)]
    made = attar.distill(made, net("mlp"), train, TASK, terms, validation=test, **options)
    assert sum(int(each.sum()) for each in gone.values()) == round(0.8 * 64 * 16)
    for path, each in weights(made).items():
        assert torch.equal(each == 0, gone[path])


def test_baking_a_copy_leaves_other_copies_whole():
    one = attar.sparsify(net(), amount=0.5)
    two = copy.deepcopy(one)
    merged(one), merged(two)
    assert torch.equal(one(INPUTS), two(INPUTS))
    assert len(masked(one)) == len(masked(two)) == 9


def test_every_export_has_the_zeros_and_no_masks(tmp_path):
    made = attar.sparsify(net(), amount=0.7)
    formats = ["safetensors", "torch_export"]
    done = attar.export(made, tmp_path, example=INPUTS, formats=formats)
    assert max(each.difference for each in done.values()) < 1e-5
    program = torch.export.load(tmp_path / "model.pt2")
    names = set(program.state_dict)
    assert names == set(net().state_dict())
    assert zeros(load(tmp_path)) == zeros(made)


@pytest.mark.parametrize("stop", [None, 2])
def test_distilling_keeps_the_zeros_also_after_a_resume(tmp_path, stop):
    train, _ = attar.data.digits()
    teacher = net(width=4)
    terms = [attar.Term(attar.losses.kl_divergence)]
    options: dict[str, Any] = {"batch_size": 512, "run": tmp_path}

    def student() -> nn.Module:
        torch.manual_seed(1)
        return attar.sparsify(net(width=4), amount=0.6)

    made = student()
    before = zeros(made)
    if stop is not None:
        attar.distill(student(), teacher, train, TASK, terms, epochs=2, **options)
        made = attar.distill(
            student(), teacher, train, TASK, terms, epochs=3, resume=True, **options
        )
    else:
        made = attar.distill(made, teacher, train, TASK, terms, epochs=3, **options)
    assert zeros(made) == before
    assert zeros(load(tmp_path / "model")) == before


def test_a_state_dict_keeps_masks_and_fills_a_model_with_masks():
    one, two = attar.sparsify(net(), amount=0.7), attar.sparsify(net(), amount=0.2)
    two.load_state_dict(one.state_dict())
    assert zeros(two) == zeros(one)
    assert torch.equal(one(INPUTS), two(INPUTS))


def test_zeros_grow_from_round_to_round_and_none_comes_back():
    made = net()
    before = None
    for amount in schedule(0.9, 3):
        made = attar.sparsify(made, amount=amount)
        gone = {path: each == 0 for path, each in weights(made).items()}
        assert before is None or all(bool(gone[p][before[p]].all()) for p in gone)
        before = gone
    total = sum(each.numel() for each in weights(made).values())
    assert zeros(made) == round(0.9 * total)
    assert all(len(list(part.parametrizations.weight)) == 1 for part in masked(made))


def test_a_loaded_model_can_be_told_to_keep_its_zeros(tmp_path):
    made = attar.sparsify(net(), amount=0.7)
    save(made, tmp_path)
    again = keep_zeros(load(tmp_path))
    assert len(masked(again)) == len(masked(made))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, weight_decay=0.1)
    again(INPUTS).sum().backward()
    optimizer.step()
    assert zeros(again) == zeros(made)
    assert not masked(keep_zeros(net()))


def test_the_schedule_is_the_published_one_and_its_rests_multiply_to_it():
    shares = schedule(0.8, 4, start=0.2)
    assert shares[0] == pytest.approx(0.8 - 0.6 * 0.75**3)
    assert shares[-1] == pytest.approx(0.8)
    left = 0.8
    for share, part in zip(shares, schedule(0.8, 4, start=0.2, of="rest"), strict=True):
        left *= 1 - part
        assert 1 - left == pytest.approx(share)


def test_the_plan_is_json_tells_its_counts_and_gives_the_same_bits_twice():
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = plan_sparsify(model, amount=0.5)
    again = Sparsity.read(json.loads(json.dumps(plan.describe())))
    assert again == plan
    one, two = plan.apply(model).state_dict(), again.apply(model).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    count = sum(each.numel() for each in weights(model).values())
    assert plan.told().startswith(
        f"{count // 2:,} of {count:,} weights in 9 layers become zero (50%)"
    )


def broken() -> nn.Module:
    model = net()
    model.get_parameter("stem.conv.weight").data[0] = float("inf")
    return model


def faint() -> nn.Module:
    model = net()
    model.get_parameter("stem.conv.weight").data.mul_(1e-9)
    return model


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (net, {}, "either amount= or pattern"),
        (net, {"amount": 0.5, "pattern": "2:4"}, "either amount= or pattern"),
        (net, {"amount": 1.0}, r"not 1\.0"),
        (net, {"amount": 1}, "not 1"),
        (net, {"pattern": "4:8"}, "not '4:8'"),
        (net, {"amount": 0.5, "among": "net"}, "not 'net'"),
        (net, {"pattern": "2:4", "layers": ["stem"]}, "no multiple of 4"),
        (net, {"amount": 0.5, "layers": ["stme"]}, "did you mean 'stem'"),
        (broken, {"amount": 0.5}, "NaN or infinity"),
        (faint, {"amount": 0.5}, 'all 144 weights of .stem.conv. would be zero.*among="layer"'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_way_out(model, options, said):
    with pytest.raises(UsageError, match=said):
        plan_sparsify(model(), **options)


@pytest.mark.parametrize("wrong", [(0.0, 3), (1.0, 3), (0.5, 0), (0.5, 1.5)])
def test_a_schedule_that_goes_nowhere_is_refused(wrong):
    with pytest.raises(UsageError, match="schedule: 0 <= start < final < 1"):
        schedule(*wrong)
