"""Low rank: the errors that theory gives, the counts, what is left alone, what is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.compression import Factorization, plan_factorize
from attar.compression.low_rank import factors, matrix, options_of, rank_for
from attar.models import build
from attar.models.changed import LowRank
from attar.runtime import UsageError

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)
    )


def product(layer: nn.Module, two: LowRank, split: str) -> Tensor:
    """The matrix that the two layers stand for."""
    first, second = two.first.weight.detach(), two.second.weight.detach()
    if split == "spatial":
        return matrix(torch.einsum("rih,orw->oihw", first[..., 0], second[:, :, 0]), "spatial")
    return second.flatten(1) @ first.flatten(1)


@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_full_rank_answers_as_the_convolution(options, dtype, near):
    layer = nn.Conv2d(3, 8, **options).to(dtype)
    inputs = torch.randn(2, 3, 9, 17, dtype=dtype)
    for option in options_of(layer):
        two = factors(layer, option.split, option.full)
        torch.testing.assert_close(two(inputs), layer(inputs), atol=near, rtol=near)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_full_rank_answers_as_the_linear_layer(dtype, near):
    layer = nn.Linear(12, 7).to(dtype)
    inputs = torch.randn(5, 12, dtype=dtype)
    two = factors(layer, "linear", 7)
    torch.testing.assert_close(two(inputs), layer(inputs), atol=near, rtol=near)


def layer_of(kind: str) -> nn.Module:
    made = nn.Linear(12, 9) if kind == "linear" else nn.Conv2d(4, 6, 3)
    return made.double()


@pytest.mark.parametrize("split", ["linear", "channel", "spatial"])
@given(rank=st.integers(1, 6))
def test_the_error_is_the_tail_of_the_singular_values(split, rank):
    layer = layer_of(split)
    whole = matrix(layer.weight.detach(), split)
    error = torch.linalg.norm(whole - product(layer, factors(layer, split, rank), split))
    tail = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    torch.testing.assert_close(error, tail, atol=1e-10, rtol=1e-10)


def test_no_other_product_of_that_rank_is_nearer():
    layer = layer_of("linear")
    two = factors(layer, "linear", 3)
    start = [two.first.weight.detach(), two.second.weight.detach()]

    def error(first: Tensor, second: Tensor) -> Tensor:
        return (layer.weight.detach() - second @ first).norm()

    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        moved = [
            each + 1e-3 * torch.randn(each.shape, generator=draw, dtype=each.dtype)
            for each in start
        ]
        assert error(*moved) > error(*start)


def test_a_model_of_low_rank_is_found_again_whole():
    model = linear_net().double()
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(factors(layer, "linear", 4).weight.detach())
    inputs = torch.randn(6, 24, dtype=torch.float64)
    plan = plan_factorize(model, energy=1.0)
    assert [each.rank for each in plan.layers] == [4, 4]
    torch.testing.assert_close(plan.apply(model)(inputs), model(inputs), atol=1e-10, rtol=1e-10)


@given(share=st.floats(0.01, 1.0))
def test_energy_keeps_no_less_and_no_rank_more_than_is_asked(share):
    values = torch.linspace(3, 0.1, 12, dtype=torch.float64)
    kept = values.square().cumsum(0) / values.square().sum()
    rank = rank_for(values, share)
    assert kept[rank - 1] >= share - 1e-9
    assert rank == 1 or kept[rank - 2] < share


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit", "mlp"])
@pytest.mark.parametrize("how", [{"rank": 0.25}, {"rank": 3}, {"energy": 0.7}])
def test_the_plan_counts_what_the_model_then_has(family, how):
    model = build(family, shape=(1, 8, 8), outputs=10)
    plan = plan_factorize(model, **how)
    made = plan.apply(model)
    assert plan.parameters[0] == sum(p.numel() for p in model.parameters())
    assert plan.parameters[1] == sum(p.numel() for p in made.parameters()) < plan.parameters[0]
    for each in plan.layers:
        two = made.get_submodule(each.path)
        assert each.weights[1] == sum(part.weight.numel() for part in two) < each.weights[0]


def test_by_rank_a_convolution_is_split_where_more_is_kept_for_no_more_weights():
    model = build("resnet", shape=(1, 8, 8), outputs=10, width=8)
    found = {each.path: each for each in plan_factorize(model, rank=4).layers}
    assert {each.split for each in found.values()} == {"channel", "spatial"}
    for path, each in found.items():
        layer = model.get_submodule(path)
        channel = 4 * (layer.weight[0].numel() + layer.out_channels)
        assert each.weights[1] <= channel
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1).double()).square()
        assert each.energy >= float(values[:4].sum() / values.sum()) - 1e-12


def test_by_energy_a_convolution_is_split_where_the_fewest_weights_keep_it():
    wide = torch.randn(16, 1, 3, 1) @ torch.randn(1, 1, 1, 3)
    layer = nn.Conv2d(4, 16, 3)
    layer.weight = nn.Parameter(wide * torch.randn(16, 4, 1, 1))
    (found,) = plan_factorize(nn.Sequential(layer), energy=0.99, skip=[]).layers
    options = {}
    for option in options_of(layer):
        values = torch.linalg.svdvals(matrix(layer.weight.detach(), option.split).double())
        options[option.split] = rank_for(values, 0.99) * option.cost
    assert options["spatial"] != options["channel"]
    assert found.weights[1] == min(options.values()) == options[found.split]
    assert found.split == "channel" or options["channel"] > options["spatial"]
    layer.weight = nn.Parameter(
        torch.einsum("rih,orw->oihw", torch.randn(2, 4, 3), torch.randn(16, 2, 3))
    )
    (found,) = plan_factorize(nn.Sequential(layer), energy=0.999999, skip=[]).layers
    assert (found.split, found.rank) == ("spatial", 2)


def test_the_model_given_is_left_and_twice_gives_the_same_bits():
    model = build("resnet", shape=(1, 8, 8), outputs=10, width=8)
    before = copy.deepcopy(model.state_dict())
    plan = plan_factorize(model, energy=0.6)
    one, two = (
        plan.apply(model),
        Factorization.read(json.loads(json.dumps(plan.describe()))).apply(model),
    )
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(now, two.state_dict()[name]) for name, now in one.state_dict().items())


def test_type_mode_and_what_learns_stay_as_they_were():
    model = linear_net().to(torch.bfloat16).eval()
    model[0].requires_grad_(False)
    made = attar.factorize(model, rank=4)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert not any(part.training for part in made.modules())
    assert [p.requires_grad for p in made[0].parameters()] == [False] * 3
    assert all(p.requires_grad for p in made[2].parameters())


def test_the_head_is_spared_and_patterns_choose():
    model = build("vit", shape=(1, 8, 8), outputs=10)
    paths = [each.path for each in plan_factorize(model, rank=2).layers]
    assert "head" not in paths
    assert "stem.patches" in paths
    assert [
        each.path for each in plan_factorize(model, rank=2, skip=[], layers=["head"]).layers
    ] == ["head"]
    some = plan_factorize(model, rank=2, layers=["blocks.*.mlp", "!blocks.0"])
    assert [each.path for each in some.layers] == [
        f"blocks.{n}.mlp.{i}" for n in (1, 2, 3) for i in (0, 2)
    ]


def test_layers_that_would_not_be_smaller_share_a_weight_or_have_groups_are_left_and_told():
    tied = nn.Linear(24, 24)
    tied.weight = nn.Parameter(torch.randn(24, 24))
    other = nn.Linear(24, 24)
    other.weight = tied.weight
    model = nn.Sequential(
        tied, other, nn.Linear(24, 2), nn.Linear(2, 40), nn.Linear(40, 40), nn.Linear(40, 2)
    )
    plan = plan_factorize(model, rank=2)
    assert [each.path for each in plan.layers] == ["4"]
    assert plan.left["0"] == plan.left["1"] == "shares its weight with another part"
    assert plan.left["2"] == "would have 52 weights in two layers instead of 48"
    assert plan.apply(model)[0].weight is not model[0].weight
    grouped = plan_factorize(build("mobilenet", shape=(1, 8, 8), outputs=10), rank=0.25)
    assert grouped.left["stage1.0.depthwise.conv"] == "has 64 groups"


def test_with_inputs_the_error_is_the_tail_on_those_inputs():
    layer = layer_of("linear")
    mixing = torch.randn(12, 12, dtype=torch.float64) * torch.logspace(
        0, -2, 12, dtype=torch.float64
    )
    inputs = torch.randn(500, 12, dtype=torch.float64) @ mixing
    moment = inputs.T @ inputs / len(inputs)
    plain, aware = (
        product(layer, factors(layer, "linear", 4, m), "linear") for m in (None, moment)
    )

    def error(matrix: Tensor) -> float:
        return float((inputs @ (layer.weight.detach() - matrix).T).norm() / len(inputs) ** 0.5)

    root = torch.linalg.cholesky(moment)
    tail = float(torch.linalg.svdvals(layer.weight.detach() @ root)[4:].square().sum().sqrt())
    assert error(aware) == pytest.approx(tail, rel=1e-3)
    assert error(aware) < 0.9 * error(plain)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_what_a_model_reads_makes_the_same_rank_answer_better(family):
    model = build(family, shape=(1, 8, 8), outputs=10).eval()
    train, test = attar.data.digits()
    seen, new = (each.rows(torch.arange(200))["inputs"] for each in (train, test))
    plain = attar.factorize(model, rank=6, layers=["*", "!stem"])
    aware = attar.factorize(model, rank=6, layers=["*", "!stem"], example=seen)
    with torch.no_grad():
        errors = [float((each(new) - model(new)).norm()) for each in (plain, aware)]
    assert errors[1] < 0.8 * errors[0]


def test_the_moment_of_a_convolution_is_that_of_its_patches():
    from attar.compression.moments import moments

    layer = nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, padding_mode="circular")
    inputs = torch.randn(4, 2, 6, 7)
    found, count = moments(layer, {"": layer}, inputs)
    out = layer(inputs) - layer.bias[:, None, None]
    mean = torch.einsum("noyx,npyx->op", out.double(), out.double()) / out[:, 0].numel()
    weight = layer.weight.flatten(1).double()
    torch.testing.assert_close(weight @ found[""] @ weight.T, mean, rtol=1e-5, atol=1e-6)
    assert count == 4


def test_a_plan_made_with_examples_cannot_be_applied_from_its_json_alone():
    model = linear_net()
    plan = plan_factorize(model, rank=4, example=torch.randn(50, 24))
    assert plan.examples == 50
    plan.apply(model)
    with pytest.raises(UsageError, match="make it again"):
        Factorization.read(plan.describe()).apply(model)


def masked() -> nn.Module:
    return attar.sparsify(linear_net(), amount=0.5)


def broken() -> nn.Module:
    model = linear_net()
    model[0].weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (linear_net, {}, "either rank= or energy="),
        (linear_net, {"rank": 2, "energy": 0.5}, "either rank= or energy="),
        (linear_net, {"rank": 0}, "not 0"),
        (linear_net, {"rank": 1.5}, r"not 1\.5"),
        (linear_net, {"rank": True}, "not True"),
        (linear_net, {"energy": 1.1}, r"not 1\.1"),
        (linear_net, {"rank": 2, "layers": ["bolcks"]}, "no 'bolcks'"),
        (linear_net, {"rank": 2, "layers": "0"}, r"list of patterns, such as \['0'\]"),
        (linear_net, {"rank": 2, "layers": ["head"]}, "names no layer"),
        (linear_net, {"rank": 1.0}, "no layer would become smaller"),
        (linear_net, {"rank": 2, "example": torch.rand(3, 7)}, "cannot read the example"),
        (masked, {"rank": 2}, r"has masks.*merged\(model\)"),
        (broken, {"rank": 2}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(model, options, said):
    with pytest.raises(UsageError, match=said):
        plan_factorize(model(), **options)


def test_a_plan_for_another_model_is_refused():
    plan = plan_factorize(linear_net(), rank=4)
    with pytest.raises(UsageError, match="a layer '0' of 960 weights"):
        plan.apply(nn.Sequential(nn.Linear(24, 41), nn.Linear(41, 3)))


def test_the_plan_tells_people_how_much_smaller():
    told = plan_factorize(linear_net(), rank=4).told()
    assert told.startswith("2,059 parameters to 651 (68% fewer): 2 layers of low rank, 0 left")
