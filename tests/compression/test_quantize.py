"""Whole numbers: grids by hand, what learns through them, and what is kept of them."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from attar.compression import Quantization, plan_quantize
from attar.compression.quantize import folded
from attar.models import build, load, merged, save
from attar.models.quantized import (
    Frozen,
    Learning,
    Small,
    Span,
    packed,
    parameters_of,
    rounded,
    scales,
    unpacked,
    whole,
)
from attar.models.record import read_record
from attar.runtime import UsageError

IMAGES = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TASK = attar.tasks.ImageClassification(classes=10)
FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"widths": [16]},
    "resnet": {"width": 4},
    "mobilenet": {"width": 4, "depth": 1},
    "vit": {"width": 16, "depth": 1},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(family: str = "resnet", **options: Any) -> nn.Module:
    model = build(family, shape=(1, 8, 8), outputs=10, **(options or FAMILIES[family]))
    with torch.no_grad():
        for _ in range(3):
            model.train()(IMAGES)  # so that batch norms do something
    return model.eval()


def spans(model: nn.Module) -> list[Span]:
    return [part for part in model.modules() if isinstance(part, Span)]


# ---------------------------------------------------------------- the grid


def test_a_weight_becomes_the_whole_numbers_that_were_worked_out_by_hand():
    weight = torch.tensor([[1.27, -0.635, 0.014], [-2.54, 0.03, 0.05], [0.0, 0.0, 0.0]])
    scale = scales(weight, 8)
    torch.testing.assert_close(scale[:2], torch.tensor([0.01, 0.02]))
    # -63.5 goes to the even -64, 1.4 to 1; 1.5 to 2, 2.5 to 2 (as floats just below and above)
    assert whole(weight, scale, 8)[0].tolist() == [127, -64, 1]
    assert whole(weight, scale, 8)[1, 0] == -127
    assert whole(weight, scale, 8)[2].tolist() == [0, 0, 0]
    four = scales(torch.tensor([[0.7, -0.34, 0.06]]), 4)
    assert whole(torch.tensor([[0.7, -0.34, 0.06]]), four, 4).tolist() == [[7, -3, 1]]


def test_halves_go_to_the_even_number():
    scale = torch.tensor([0.5])
    numbers = whole(torch.tensor([[0.25, 0.75, 1.25, -0.25, -0.75, 63.5]]), scale, 8)
    assert numbers.tolist() == [[0, 2, 2, 0, -2, 127]]


def test_what_is_read_becomes_the_steps_that_were_worked_out_by_hand():
    span = Span().eval()
    span.limits.copy_(torch.tensor([-0.5, 2.05]))  # a step of 0.01, zero is number 50
    scale, zero = span.step()
    assert float(scale) == pytest.approx(0.01)
    assert int(zero) == 50
    given = torch.tensor([0.0, 0.014, 0.016, -0.5, -3.0, 2.05, 9.0])
    wanted = torch.tensor([0.0, 0.01, 0.02, -0.5, -0.5, 2.05, 2.05])
    torch.testing.assert_close(span(given), wanted)
    assert span(torch.zeros(1)).item() == 0.0


def test_the_gradient_goes_through_the_rounding_and_stops_outside_of_the_limits():
    span = Span().eval()
    span.limits.copy_(torch.tensor([-1.0, 1.55]))
    given = torch.tensor([0.3, -0.7, -1.4, 1.8, 0.0], requires_grad=True)
    (span(given) * torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0])).sum().backward()
    assert given.grad.tolist() == [2.0, 3.0, 0.0, 0.0, 11.0]
    weight = torch.tensor([[1.0, -0.3], [0.2, 0.9]], requires_grad=True)
    factors = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    (rounded(weight, scales(weight, 4), 4) * factors).sum().backward()
    assert torch.equal(weight.grad, factors)


def test_limits_follow_what_is_read_in_training_alone_and_hold_zero():
    span = Span()
    span.limits.copy_(torch.tensor([-1.0, 1.0]))
    span.train()(torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(span.limits, torch.tensor([-0.99, 1.02]))  # a hundredth of the way
    before = span.limits.clone()
    span.eval()(torch.tensor([50.0]))
    span.fixed = True
    span.train()(torch.tensor([50.0]))
    assert torch.equal(span.limits, before)


def test_four_bits_share_a_byte_and_come_back():
    weight = torch.randn(3, 70)
    bytes_, scale = packed(weight)
    assert (bytes_.shape, bytes_.dtype, scale.shape) == ((3, 48), torch.uint8, (3, 3))
    back = unpacked(bytes_, scale, 70)
    steps = scale.repeat_interleave(32, 1)[:, :70]
    assert bool(((back - weight).abs() <= steps / 2 * 1.0001).all())
    assert torch.equal(packed(back)[0], bytes_)
    first = torch.zeros(1, 32)
    first[0, :2] = torch.tensor([-7.0, 5.0])
    assert packed(first)[0][0, 0] == (1 | 13 << 4)  # 8 - 7 below, 8 + 5 above


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_goes_into_the_layer_before_it(bias, affine):
    norm = nn.BatchNorm2d(6, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    conv = nn.Conv2d(3, 6, 3, bias=bias)
    images = torch.randn(2, 3, 9, 9)
    both = nn.Sequential(conv, norm).eval()
    torch.testing.assert_close(folded(conv, norm)(images), both(images), rtol=1e-5, atol=1e-5)
    lines, rows = nn.Linear(4, 6, bias=bias), torch.randn(5, 4)
    flat = nn.BatchNorm1d(6)
    flat.load_state_dict(norm.state_dict(), strict=False)
    both = nn.Sequential(lines, flat).eval()
    torch.testing.assert_close(folded(lines, flat)(rows), both(rows), rtol=1e-5, atol=1e-5)


def test_only_a_batch_norm_that_alone_reads_the_layer_goes_into_it():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(1, 1, 1) for _ in range(3))
            self.one, self.two, self.three = (nn.BatchNorm2d(1) for _ in range(3))

        def forward(self, images: Tensor) -> Tensor:
            read = self.first(images)
            twice = self.one(read) + read  # the layer is read past its norm
            apart = self.two(self.second(twice).tanh())  # something is between
            return self.three(self.third(apart)).relu() + 1

    plan = plan_quantize(Odd().eval(), IMAGES)
    assert {each.path: each.takes for each in plan.layers} == {
        "first": None,
        "second": None,
        "third": "three",
    }


def test_each_tensor_is_rounded_once():
    plan = {each.path: each for each in plan_quantize(net(), IMAGES).layers}
    # The stem writes for both readers; inside of a block the second layer reads what the first
    # has rounded; after a sum nothing has, so each reader rounds.
    reads = {path: each.reads is not None for path, each in plan.items()}
    assert {path for path, own in reads.items() if own} == {
        "stem.conv", "stage2.0.conv1.conv", "stage2.0.shortcut.conv", "stage3.0.conv1.conv",
        "stage3.0.shortcut.conv", "head",
    }  # fmt: skip
    assert {path for path, each in plan.items() if each.writes is None} == {"head"}
    assert plan["stem.conv"].bounds == (0.0, None)
    assert plan["stem.conv"].writes[0] == 0.0
    assert plan["stage1.0.conv2.conv"].bounds == (None, None)
    assert plan["stage1.0.conv2.conv"].writes[0] < 0
    clipped = plan_quantize(net("mobilenet"), IMAGES).layers
    assert {each.bounds for each in clipped if each.writes} == {(0.0, 6.0), (None, None)}
    assert all(
        each.writes is None or each.writes[1] <= 6 or None in each.bounds for each in clipped
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_answers_nearly_as_before_and_as_the_plan_says(family):
    model = net(family)
    before = copy.deepcopy(model.state_dict())
    plan = plan_quantize(model, IMAGES)
    made, again = (
        plan.apply(model).eval(),
        Quantization.read(json.loads(json.dumps(plan.describe()))),
    )
    assert again == plan
    twice = again.apply(model).eval()
    with torch.no_grad():
        wanted, found = model(IMAGES), made(IMAGES)
        assert torch.equal(twice(IMAGES), found)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in made.modules())
    assert "8 bits" in plan.told()


def test_more_bits_are_nearer_and_each_is_on_its_grid():
    model = net("resnet", width=8)
    gaps = []
    for bits in (2, 4, 6, 8):
        made = attar.quantize(model, IMAGES, bits=bits).eval()
        with torch.no_grad():
            gaps.append(float((made(IMAGES) - model(IMAGES)).norm()))
        weights = attar.quantize(made, mode="freeze")
        largest = [
            part.weight.abs().max() for part in weights.modules() if isinstance(part, Frozen)
        ]
        assert {int(each) for each in largest} == {2 ** (bits - 1) - 1}
    assert gaps == sorted(gaps, reverse=True)


def test_examples_may_be_a_table_of_arguments_or_a_batch_of_a_task():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 2)

        def forward(self, given: Tensor) -> Tensor:
            return self.one(given)

    rows = torch.randn(3, 4)
    by_table = plan_quantize(Named(), {"given": rows})
    by_task = plan_quantize(Named(), {"inputs": rows}, task=TASK)
    assert by_table == by_task
    assert by_table.layers[0].reads == (float(rows.min()), float(rows.max()))
    # Zero has a number of its own, so it is always within the limits.
    assert plan_quantize(Named(), {"given": rows + 9}).layers[0].reads[0] == 0
    assert plan_quantize(Named(), {"given": rows - 9}).layers[0].reads[1] == 0


def test_it_learns_from_its_teacher_under_the_loop(digits, tmp_path):
    train, test = digits[0], digits[-1]
    teacher = build("resnet", data=train, width=4)
    attar.train(teacher, train, TASK, epochs=3, batch_size=64, seed=0)
    images = train.rows(torch.arange(128))["inputs"]
    student = attar.quantize(teacher, images, bits=3).eval()
    term = attar.Term(attar.losses.mse)
    before = distance(student, teacher, test)
    limits = [span.limits.clone() for span in spans(student)]
    learned = attar.distill(
        student, attar.Teacher(teacher, TASK), train, TASK, [term], label_weight=0.0, epochs=2,
        batch_size=64, seed=0, optimizer=partial(attar.training.adamw, lr=2e-3),
        run=tmp_path / "run",
    )  # fmt: skip
    assert learned is student
    assert distance(learned, teacher, test) < before / 2
    assert any(
        not torch.equal(old, span.limits) for old, span in zip(limits, spans(learned), strict=True)
    )


def distance(student: nn.Module, teacher: nn.Module, test: Any) -> float:
    images = test.rows(torch.arange(len(test)))["inputs"]
    with torch.no_grad():
        return float((student.eval()(images) - teacher.eval()(images)).square().mean())


# ---------------------------------------------------------------- keeping


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_it_answers_the_same_bits_and_is_smaller_and_both_come_back(family, tmp_path):
    learning = attar.quantize(net(family), IMAGES).eval()
    frozen = attar.quantize(learning, mode="freeze").eval()
    with torch.no_grad():
        wanted = learning(IMAGES)
        assert torch.equal(frozen(IMAGES), wanted)
        for name, model in (("learning", learning), ("frozen", frozen)):
            save(model, tmp_path / name)
            again = load(tmp_path / name)
            assert torch.equal(again(IMAGES), wanted)
            assert type(again.get_submodule("head")) is type(model.get_submodule("head"))
    again = load(tmp_path / "learning").train()
    again(IMAGES).sum().backward()
    assert again.head.weight.grad is not None
    assert again.head.weight.grad.abs().sum() > 0
    assert {part.weight.dtype for part in frozen.modules() if isinstance(part, Frozen)} == {
        torch.int8
    }


def test_a_frozen_file_is_a_quarter_as_large(tmp_path):
    model = net("mlp", widths=[256, 256])
    save(model, tmp_path / "float")
    save(attar.quantize(attar.quantize(model, IMAGES), mode="freeze"), tmp_path / "frozen")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "frozen")]
    assert sizes[1] < 0.3 * sizes[0]


def test_frozen_limits_stay_in_training_too():
    frozen = attar.quantize(attar.quantize(net(), IMAGES), mode="freeze").train()
    before = [span.limits.clone() for span in spans(frozen)]
    frozen(IMAGES * 9)
    assert all(
        torch.equal(old, span.limits) for old, span in zip(before, spans(frozen), strict=True)
    )


# ---------------------------------------------------------------- linear layers alone


@pytest.mark.parametrize(("mode", "bits"), [("weights", 8), ("weights", 4), ("dynamic", 8)])
def test_linear_layers_are_kept_small_and_come_back_with_the_same_bits(mode, bits, tmp_path):
    model = net("mlp", widths=[256, 250])
    made = attar.quantize(model, mode=mode, bits=bits)
    assert all(part.bits == bits for part in made.modules() if isinstance(part, Small))
    with torch.no_grad():
        wanted, found = model(IMAGES), made(IMAGES)
    # Half a step of 254, or of 14, to both sides: uniform, so by the root of 3 less, and weights
    # are a third of their largest or more.
    assert 0 < float((found - wanted).norm() / wanted.norm()) < (0.02 if bits == 8 else 0.2)
    save(model, tmp_path / "float")
    save(made, tmp_path / "made")
    again = load(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), found)
    before, after = (
        (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "made")
    )
    assert after < before * (0.28 if bits == 8 else 0.19)


def test_a_linear_layer_of_whole_numbers_is_worked_out_by_hand():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.27, -0.004]])  # 127 and 0 steps of 0.01
    layer.bias.data = torch.tensor([0.5])
    rows = torch.tensor([[2.0, 100.0], [127.0, 1.4]])
    by_weights = attar.quantize(layer, mode="weights")
    torch.testing.assert_close(by_weights(rows), torch.tensor([[2 * 1.27 + 0.5], [161.79]]))
    # Each row in steps of its own largest by 127: 2 is 2.54 of them, so 3; 127 is 127.
    dynamic = attar.quantize(layer, mode="dynamic")
    wanted = torch.tensor([[3 * 100 / 127 * 1.27 + 0.5], [127 * 1.27 + 0.5]])
    torch.testing.assert_close(dynamic(rows), wanted)


# ---------------------------------------------------------------- errors


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Conv1d(1, 2, 3)
        self.memory = nn.LSTM(2, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, given: Tensor) -> Tensor:
        seen, _ = self.memory(self.sound(given).mT)
        return self.head(self.attention(seen, seen, seen)[0][:, -1])


@pytest.mark.parametrize("mode", ["learn", "dynamic", "weights"])
def test_a_layer_that_would_stay_float_is_named_unless_it_is_skipped(mode):
    given = torch.randn(2, 1, 9)
    with pytest.raises(
        UsageError, match=r"'sound' \(is a Conv1d\), 'memory' \(is a LSTM\)"
    ) as said:
        attar.quantize(Mixed(), given, mode=mode)
    assert "'attention' (is a MultiheadAttention)" in str(said.value)
    assert "skip=" in str(said.value)
    skip = ["sound", "memory", "attention*"]
    made = attar.quantize(Mixed(), given, mode=mode, skip=skip)
    assert isinstance(made.head, Learning if mode == "learn" else Small)
    only = attar.quantize(Mixed(), given, mode=mode, layers=["head"])
    assert isinstance(only.head, Learning if mode == "learn" else Small)


@pytest.mark.parametrize("mode", ["dynamic", "weights"])
def test_convolutions_are_named_where_only_linear_layers_get_small(mode):
    with pytest.raises(UsageError, match=r"'stem.conv' \(is a Conv2d\).*mode='learn'.*onnx_int8"):
        attar.quantize(net(), mode=mode)
    made = attar.quantize(net(), mode=mode, layers=["head"])
    assert isinstance(made.head, Small)
    assert isinstance(made.stem.conv, nn.Conv2d)


def test_a_weight_that_another_part_shares_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(UsageError, match=r"'0' \(shares its weight with another part\), '2'"):
        attar.quantize(model, mode="weights")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "int8"}, "mode is 'learn', 'freeze', 'dynamic' or 'weights', not 'int8'"),
        ({"bits": 9}, "bits of mode 'learn' is 2, 3, 4, 5, 6, 7, 8, not 9"),
        ({"bits": True}, "not True"),
        ({"mode": "weights", "bits": 5}, "bits of mode 'weights' is 4, 8, not 5"),
        ({"mode": "dynamic", "bits": 4}, "bits of mode 'dynamic' is 8, not 4"),
        ({"mode": "freeze"}, "no layer of the model learns on a grid"),
        ({"example": None}, "needs examples for its ranges"),
        ({"example": torch.full((2, 64), torch.nan)}, "what '0' computes with .* is not finite"),
        ({"skip": ["nowhere"]}, "has no 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said(given, said):
    with pytest.raises(UsageError, match=said):
        attar.quantize(nn.Sequential(nn.Linear(64, 8)), **{"example": torch.rand(2, 64), **given})


def test_a_model_is_quantised_once():
    learning = attar.quantize(net(), IMAGES)
    with pytest.raises(UsageError, match=r"'stem.conv' is quantised already \(learn\).*freeze"):
        attar.quantize(learning, IMAGES)
    with pytest.raises(UsageError, match="leave bits, layers and skip out"):
        attar.quantize(learning, mode="freeze", skip=["head"])
    broken = net()
    broken.head.weight.data[0, 0] = torch.inf
    with pytest.raises(UsageError, match="the weight of 'head' holds NaN or infinity"):
        attar.quantize(broken, IMAGES)


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which numbers of each convolution and linear layer but the head are zero."""
    parts = merged(model).named_modules()
    return {
        path: (part.weight == 0)
        for path, part in parts
        if isinstance(getattr(part, "weight", None), torch.Tensor)
        and part.weight.ndim > 1
        and path != "head"
    }


def test_zeros_stay_while_it_learns_and_when_it_is_frozen(digits, tmp_path):
    train, _ = digits
    model = build("resnet", data=train, width=4)
    sparse = attar.sparsify(model, amount=0.6)
    before = zeros_of(sparse)
    images = train.rows(torch.arange(64))["inputs"]
    student = attar.quantize(sparse, images, layers=["*", "!stage3"])
    start = zeros_of(student)
    assert start.keys() == before.keys()
    assert all(bool((start[path] >= before[path]).all()) for path in before)
    student = attar.train(
        student, train, TASK, epochs=1, optimizer=partial(attar.training.adamw, lr=0.01)
    )
    frozen_ = attar.quantize(student, mode="freeze")
    for made in (student, frozen_):
        after = zeros_of(made)
        assert all(bool((after[path] >= before[path]).all()) for path in before)
    weight = frozen_.get_submodule("stage2.0.conv1.conv").weight
    assert weight.dtype == torch.int8
    assert 0.2 < float(before["stage2.0.conv1.conv"].float().mean()) < 0.8
    save(frozen_.eval(), tmp_path)
    assert torch.equal(load(tmp_path)(images), merged(frozen_)(images))


@pytest.mark.parametrize(("mode", "bits"), [("weights", 8), ("weights", 4), ("dynamic", 8)])
def test_zeros_stay_in_whole_numbers_of_linear_layers(mode, bits):
    sparse = attar.sparsify(net("mlp", widths=[32, 32]), amount=0.5)
    made = attar.quantize(sparse, mode=mode, bits=bits, skip=["blocks.1"])
    layer = made.get_submodule("blocks.0.linear")
    numbers = layer.weight
    if bits == 4:
        numbers = unpacked(layer.weight, layer.weight_scale, layer.in_features)
    kept = merged(sparse).get_submodule("blocks.0.linear").weight
    assert int((kept == 0).sum()) > 100
    assert bool((numbers[kept == 0] == 0).all())
    left = made.get_submodule("blocks.1.linear")  # which stays float, and its zeros are kept
    left.parametrizations.weight.original.data += 1
    assert int((left.weight == 0).sum()) > 100


@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_layers_of_low_rank_get_their_grids_and_come_back(family, tmp_path):
    low = attar.factorize(net(family), rank=0.5)
    made = attar.quantize(attar.quantize(low, IMAGES), mode="freeze")
    near = low(IMAGES).detach()
    assert float((made(IMAGES) - near).detach().abs().max()) < 0.1 * float(near.abs().max())
    save(made, tmp_path)
    assert torch.equal(load(tmp_path)(IMAGES), made(IMAGES))


@pytest.mark.parametrize("mode", ["learn", "freeze", "dynamic", "weights"])
@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_are_as_many_parameters_as_floats(mode, bits, tmp_path):
    if (mode, bits) == ("dynamic", 4):
        bits = 8
    model = build("mlp", shape=(65,), outputs=10, widths=[34])  # no multiple of what shares a scale
    inputs = torch.rand(8, 65)
    if mode == "freeze":
        made = attar.quantize(attar.quantize(model, inputs, bits=bits), mode="freeze")
    else:
        made = attar.quantize(model, inputs, mode=mode, bits=bits)
    expected = 65 * 34 + 34 + 34 * 10 + 10
    assert parameters_of(model) == parameters_of(made) == expected
    found = attar.evaluation.cost(made.eval(), inputs, device="cpu", one_thread=False)
    assert found.parameters == expected
    save(made, tmp_path)
    assert read_record(tmp_path).parameters == expected
    assert parameters_of(load(tmp_path)) == expected


def test_a_layer_that_the_example_does_not_run_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].spare = nn.Linear(4, 4)
    with pytest.raises(UsageError, match=r"'0\.spare' is not run by the example"):
        attar.quantize(model, torch.rand(2, 4))


def test_a_plan_for_another_model_is_refused():
    plan = plan_quantize(net(width=4), IMAGES)
    with pytest.raises(
        UsageError, match=r"the plan is for another model: it has a layer 'stem\.conv'"
    ):
        plan.apply(net(width=8))


def test_a_sequence_and_a_table_go_through_a_linear_layer_alike():
    layer = nn.Linear(8, 5)
    rows = torch.randn(3, 7, 8)
    for mode in ("weights", "dynamic"):
        made = attar.quantize(layer, mode=mode)
        torch.testing.assert_close(made(rows).flatten(0, 1), made(rows.flatten(0, 1)))
    learning = attar.quantize(layer, rows).eval()
    near = F.linear(rows, layer.weight, layer.bias)
    assert float((learning(rows) - near).detach().abs().max()) < 0.1
