"""Each family: its size, its shapes, its gradients, and that a tapped feature stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attar import models
from attar.runtime import UsageError

FAMILIES = ["mlp", "mobilenet", "resnet", "vit"]  # those that need no other library
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 13)]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def perturbed(module: nn.Module) -> nn.Module:
    """Away from the start, where a scale of zero hides what stands before it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    ("family", "shape", "options", "parameters"),
    [
        ("mlp", (1, 8, 8), {"widths": (32,)}, 2_410),
        ("mlp", (1, 8, 8), {"widths": ()}, 650),
        ("mlp", (13,), {"widths": (7, 5)}, 13 * 7 + 7 + 7 * 5 + 5 + 5 * 10 + 10),
        ("resnet", (1, 8, 8), {}, 77_754),
        ("resnet", (1, 8, 8), {"width": 2}, 1_384),
        ("resnet", (1, 28, 28), {"width": 8, "stem_stride": 2}, 19_810),
        ("resnet", (1, 28, 28), {"width": 64, "stem_stride": 2}, 1_226_442),
        ("resnet", (3, 32, 32), {"depth": 20}, 272_474),
        ("mobilenet", (1, 8, 8), {}, 79_930),
        ("vit", (1, 8, 8), {}, 202_186),
    ],
)
def test_parameter_count(family, shape, options, parameters):
    assert count(models.families()[family](shape, 10, **options)) == parameters


def test_vit_count_by_formula():
    width, depth, patches = 24, 3, 16
    attention = 4 * width * width + 4 * width
    perceptron = 2 * 2 * width * width + 3 * width
    block = attention + perceptron + 4 * width
    stem = 3 * 2 * 2 * width + width + width + (patches + 1) * width
    built = models.vit((3, 8, 8), 5, patch=2, width=width, depth=depth, heads=3, mlp_ratio=2)
    assert count(built) == stem + depth * block + 2 * width + 5 * width + 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_output_shape_and_named_parts(family, shape):
    module = models.families()[family](shape, 7)
    assert module(torch.rand(3, *shape)).shape == (3, 7)
    assert isinstance(module.head, nn.Linear)
    assert next(name for name, _ in module.named_children()) == "normalize"
    assert isinstance(module.normalize, nn.Identity)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_example_can_be_trained_on(family):
    module = models.families()[family]((1, 8, 8), 3)
    module(torch.rand(1, 1, 8, 8)).sum().backward()


@pytest.mark.parametrize("shape", [(13,), (5, 7), (2, 3, 4, 5)])
def test_mlp_reads_any_shape(shape):
    statistics = {"mean": [0.5] * shape[0], "std": [2.0] * shape[0]}
    assert models.mlp(shape, 2, **statistics)(torch.rand(4, *shape)).shape == (4, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_parameter(family):
    module = perturbed(models.families()[family]((3, 16, 16), 5))
    nn.functional.cross_entropy(module(torch.randn(8, 3, 16, 16)), torch.arange(8) % 5).backward()
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    # The key's bias adds the same to every score of a query, so the softmax takes it away;
    # the rest of qkv.bias is reached, so it does not show here.
    assert silent == []


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_follow_the_seed(family):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(models.families()[family]((1, 8, 8), 4).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_does_not_depend_on_its_batch_in_eval_mode(family):
    module = perturbed(models.families()[family]((1, 8, 8), 4)).eval()
    batch = torch.rand(6, 1, 8, 8)
    together = module(batch)
    with_others = module(torch.cat([batch[:1], torch.rand(5, 1, 8, 8)]))
    torch.testing.assert_close(module(batch[:1]), together[:1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_others[:1], together[:1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_captured_feature_is_changed_afterwards(family, training):
    module = perturbed(models.families()[family]((3, 16, 16), 4)).train(training)
    held: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}

    def capture(name):
        def hook(_module, _inputs, output):
            held[name], copies[name] = output, output.detach().clone()

        return hook

    for name, part in module.named_modules():
        part.register_forward_hook(capture(name))
    inputs = torch.rand(4, 3, 16, 16)
    before = inputs.clone()
    module(inputs)
    assert len(held) > 8 or family == "mlp"
    assert [name for name in held if not torch.equal(held[name], copies[name])] == []
    assert torch.equal(inputs, before)


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("mlp", ["blocks.0", "head"]),
        ("resnet", ["stem", "stage1", "stage2", "stage3", "pool", "head"]),
        ("mobilenet", ["stem", "stage1", "stage2", "stage3", "neck", "pool", "head"]),
        ("vit", ["stem", "blocks.0", "blocks.3", "norm", "pool", "head"]),
    ],
)
def test_documented_tap_addresses_exist(family, paths):
    function = models.families()[family]
    module = function((1, 8, 8), 2)
    for path in paths:
        module.get_submodule(path)
        assert f"``{path}``" in function.__doc__ or path == "blocks.3"


def test_stage_sizes_of_an_8x8_image():
    for family, sizes in {"resnet": [8, 8, 4, 2], "mobilenet": [8, 8, 4, 2]}.items():
        module, seen = models.families()[family]((1, 8, 8), 2), []
        value = torch.rand(2, 1, 8, 8)
        for name, part in module.named_children():
            value = part(value)
            if name.startswith("st"):
                seen.append(value.shape[-1])
        assert seen == sizes


def test_residual_block_adds_its_shortcut():
    module = models.resnet((1, 8, 8), 2, width=4)
    block = module.stage1[0].eval()
    inputs = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(inputs), (block.conv2(block.conv1(inputs)) + inputs).relu())
    assert not torch.equal(block(inputs), inputs)
    assert isinstance(block.shortcut, nn.Identity)
    assert module.stage2[0].shortcut(inputs).shape == (2, 8, 4, 4)


def test_mobile_block_adds_its_input_where_the_shape_stays():
    stage = models.mobilenet((1, 8, 8), 2, width=4).stage2.eval()
    inputs = torch.rand(2, 8, 4, 4)
    with torch.no_grad():
        stage[1].project.norm.weight.zero_()
    assert torch.equal(stage[1](inputs), inputs)
    assert not stage[0].residual


def test_depthwise_convolution_mixes_no_channels():
    depthwise = models.mobilenet((1, 8, 8), 2, width=4).stage1[0].depthwise.eval()
    inputs = torch.rand(1, 16, 8, 8)
    changed = inputs.clone()
    changed[:, 3] += 1
    moved = (depthwise.conv(inputs) != depthwise.conv(changed)).flatten(2).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [3]


def test_attention_is_softmax_of_scaled_products():
    attention = models.vit((1, 8, 8), 2, width=8, heads=2).blocks[0].attention.double()
    perturbed(attention)
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 4**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    expected = attention.project(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-10, atol=1e-12)


def test_vit_block_adds_both_branches_to_its_input():
    block = models.vit((1, 8, 8), 2, width=8, heads=2).blocks[0]
    tokens = torch.randn(2, 5, 8)
    middle = tokens + block.attention(block.norm1(tokens))
    assert torch.equal(block(tokens), middle + block.mlp(block.norm2(middle)))


def test_vit_head_reads_the_class_token():
    module = models.vit((1, 8, 8), 2, width=8, heads=2)
    with torch.no_grad():
        module.stem.token.add_(3)
    tokens = module.stem(torch.rand(2, 1, 8, 8))
    expected = module.stem.token[:, 0] + module.stem.positions[:, 0]
    assert torch.equal(module.pool(tokens), expected.expand(2, -1))


def test_vit_sees_positions_and_every_pixel_of_a_padded_image():
    module = perturbed(models.vit((1, 9, 10), 2, patch=4)).eval()
    assert module.stem(torch.rand(2, 1, 9, 10)).shape == (2, 1 + 9, 64)
    image = torch.rand(1, 1, 9, 10, requires_grad=True)
    module(image)[0, 0].backward()
    assert image.grad.ne(0).all()
    assert not torch.allclose(module(image), module(image.flip(-1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_normalisation_belongs_to_the_model(family):
    function, state = models.families()[family], {}
    torch.manual_seed(1)
    plain = function((2, 8, 8), 3).eval()
    torch.manual_seed(1)
    own = function((2, 8, 8), 3, mean=[0.5, 1.0], std=[2.0, 0.25]).eval()
    state = own.state_dict()
    assert state["normalize.mean"].flatten().tolist() == [0.5, 1.0]
    inputs = torch.rand(4, 2, 8, 8)
    scaled = (inputs - torch.tensor([0.5, 1.0]).view(2, 1, 1)) / torch.tensor([2.0, 0.25]).view(
        2, 1, 1
    )
    torch.testing.assert_close(own(inputs), plain(scaled))
    assert not any(name.startswith("normalize") for name, _ in own.named_parameters())


def test_one_statistic_alone():
    inputs = torch.rand(3, 4)
    only_mean = models.mlp((4,), 2, mean=[1.0] * 4).normalize
    only_std = models.mlp((4,), 2, std=[2.0] * 4).normalize
    assert torch.equal(only_mean(inputs), inputs - 1)
    assert torch.equal(only_std(inputs), inputs / 2)


def test_initial_weights_keep_the_scale():
    module = models.resnet((3, 32, 32), 10, width=64)
    conv = module.stage3[0].conv2.conv.weight
    assert conv.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert module.head.weight.std().item() == pytest.approx((1 / 256) ** 0.5, rel=0.05)
    assert not module.head.bias.any()
    vit = models.vit((3, 32, 32), 10)
    assert vit.blocks[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert vit.stem.positions.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: models.resnet((1, 8, 8), 2, depth=9), r"depth must be 6 n \+ 2.*not 9"),
        (lambda: models.resnet((1, 8, 8), 2, depth=2), "nearest is 8"),
        (lambda: models.resnet((64,), 2), r"\[C, H, W\].*use mlp"),
        (lambda: models.mobilenet((8, 8), 2), r"\[C, H, W\].*use mlp"),
        (lambda: models.vit((1, 1, 8, 8), 2), r"\[C, H, W\].*use mlp"),
        (lambda: models.vit((1, 8, 12), 2, patch=9), "patch must not exceed.*8x12"),
        (lambda: models.vit((1, 8, 8), 2, width=10, heads=4), "heads must divide width"),
        (lambda: models.mlp((4,), 2, mean=[0.0]), "holds 1 numbers.*needs 4"),
        (lambda: models.mlp((2,), 2, std=[1.0, 0.0]), "std must be positive"),
        (lambda: models.mlp((2,), 2, mean=[1.0, float("nan")]), "finite"),
    ],
)
def test_errors_name_the_rule(call, said):
    with pytest.raises(UsageError, match=said):
        call()
