"""Projectors: laws of the whole family, values of each, errors that name what fits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar import models
from attar.models import projectors
from attar.runtime import UsageError

VECTOR, TOKENS, MAP = (4, 6), (4, 17, 6), (4, 6, 8, 8)
TEACHER = {"vector": (4, 10), "tokens": (4, 17, 10), "map": (4, 10, 4, 4), "same": (4, 10, 8, 8)}
CHANNELWISE = {"linear": projectors.linear, "mlp": projectors.mlp}
CHANNELWISE |= {"orthogonal": projectors.orthogonal}
MEETINGS = [
    (VECTOR, TEACHER["vector"]),
    (TOKENS, TEACHER["tokens"]),
    (TOKENS, TEACHER["vector"]),
    (MAP, TEACHER["same"]),
    (MAP, TEACHER["map"]),
    (MAP, TEACHER["vector"]),
    ((4, 6, 7, 5), (4, 10, 3, 5)),
]
TRAINED: list[tuple[str, Callable[..., nn.Module], tuple[int, ...], tuple[int, ...]]] = [
    *((name, make, s, t) for name, make in CHANNELWISE.items() for s, t in MEETINGS),
    ("conv", projectors.conv, MAP, TEACHER["same"]),
    ("conv", projectors.conv, MAP, TEACHER["map"]),
    ("conv", partial(projectors.conv, kernel=1, relu=False), MAP, (4, 10, 2, 2)),
    ("conv", projectors.conv, (4, 6, 7, 5), (4, 10, 3, 5)),
    ("conv", projectors.conv, (4, 6, 2, 4), TEACHER["map"]),
    ("conv", projectors.conv, (4, 6, 2, 3), (4, 10, 6, 9)),
    ("tokens", projectors.tokens, MAP, TEACHER["tokens"]),
    ("tokens", projectors.tokens, (4, 6, 2, 3), (4, 24, 10)),
    ("tokens", projectors.tokens, TOKENS, TEACHER["same"]),
    ("tokens", projectors.tokens, (4, 65, 6), TEACHER["map"]),
    ("tokens", projectors.tokens, (4, 64, 6), TEACHER["tokens"]),
    ("tokens", projectors.tokens, TOKENS, TEACHER["tokens"]),
    ("tokens", partial(projectors.tokens, prefix=5), (4, 21, 6), TEACHER["map"]),
]
family = pytest.mark.parametrize(
    ("make", "student", "teacher"),
    [case[1:] for case in TRAINED],
    ids=[f"{n}-{list(s)}-{list(t)}".replace(" ", "") for n, _, s, t in TRAINED],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def signals(student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(student, requires_grad=True), torch.randn(teacher)


# Laws of all that are trained.


@family
def test_the_result_has_the_teachers_shape(make, student, teacher):
    own, other = signals(student, teacher)
    module = make(own, other)
    assert module(own).shape == other.shape
    assert module(torch.randn(3, *student[1:])).shape == (3, *teacher[1:])


@family
def test_a_gradient_reaches_the_student_and_every_weight(make, student, teacher):
    own, other = signals(student, teacher)
    with torch.no_grad():  # as an objective builds them
        module = make(own, other)
    F.mse_loss(module(own), other).backward()
    assert own.grad is not None
    assert own.grad.any()
    parameters = list(module.parameters())
    assert parameters
    assert all(p.grad is not None and p.grad.any() for p in parameters)


@family
def test_it_is_built_by_the_seed_alone(make, student, teacher):
    own, other = signals(student, teacher)
    first, second = (make(own, other) for _ in range(2) if torch.manual_seed(3))
    assert torch.equal(first(own), second(own))


@family
def test_a_copy_and_a_loaded_state_give_the_same_bits(make, student, teacher):
    own, other = signals(student, teacher)
    module = make(own, other).eval()
    clone = copy.deepcopy(module)
    assert torch.equal(clone(own), module(own))
    again = make(own, other).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(own), module(own))
    assert {p.data_ptr() for p in clone.parameters()}.isdisjoint(
        p.data_ptr() for p in module.parameters()
    )


@family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_wide_and_any_signal_is_taken(make, student, teacher, dtype):
    own, other = (s.to(dtype) for s in signals(student, teacher))
    module = make(own, other)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in module.parameters()} == {wide}
    assert module(own).isfinite().all()


@family
def test_it_is_finite_under_autocast(make, student, teacher):
    own, other = signals(student, teacher)
    module = make(own, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module(own)
        loss = F.mse_loss(value.float(), other)
    loss.backward()
    assert value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@family
def test_it_is_told_in_one_line(make, student, teacher):
    module = make(*signals(student, teacher))
    assert "\n" not in repr(module)


# Linear, and the perceptron.


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        (VECTOR, (4, 10), nn.Linear),
        (TOKENS, (4, 17, 10), nn.Linear),
        (MAP, (4, 10, 8, 8), nn.Conv2d),
    ],
)
def test_linear_is_one_layer(student, teacher, kind):
    module = projectors.linear(*signals(student, teacher))
    assert isinstance(module, kind)
    assert sum(p.numel() for p in module.parameters()) == 6 * 10 + 10


@pytest.mark.parametrize(("rows", "teacher"), [(2, (4, 10, 4, 4)), (8, (4, 10))])
def test_a_larger_map_is_averaged_and_then_mapped(rows, teacher):
    own, other = signals(MAP, teacher)
    pool, layer = projectors.linear(own, other)
    mean = own.unflatten(3, (-1, rows)).unflatten(2, (-1, rows)).mean((3, 5))
    weight = layer.weight.flatten(1)
    by_hand = torch.einsum("nchw,dc->ndhw", mean, weight) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(pool(own)), by_hand.reshape(teacher))


def test_tokens_become_a_vector_by_their_mean():
    own, other = signals(TOKENS, (4, 10))
    module = projectors.linear(own, other)
    torch.testing.assert_close(module(own), module[1](own.mean(1)))


@pytest.mark.parametrize(("activation", "function"), [("gelu", F.gelu), ("relu", F.relu)])
def test_the_perceptron_by_hand(activation, function):
    own, other = signals(VECTOR, (4, 10))
    module = projectors.mlp(own, other, hidden=7, activation=activation)
    first, _, last = module
    assert first.weight.shape == (7, 6)
    by_hand = function(own @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(module(own), by_hand)


def test_the_perceptron_is_as_wide_as_the_teacher():
    assert projectors.mlp(*signals(MAP, TEACHER["map"]))[1].out_channels == 10


# Convolution.


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (3, 2), (4, 5)])
@pytest.mark.parametrize("grown", [False, True])
def test_conv_bridges_whole_factors_with_one_layer(factors, grown):
    small, large = (3, 4), (3 * factors[0], 4 * factors[1])
    sizes = (small, large) if grown else (large, small)
    own, other = signals((2, 3, *sizes[0]), (2, 5, *sizes[1]))
    module = projectors.conv(own, other, relu=False)
    assert module(own).shape == other.shape
    assert [type(p).__name__ for p in module][1:] == ["BatchNorm2d"]
    assert module[0].stride == factors
    # Every position is read: each has its gradient.
    module.eval()(own).square().sum().backward()
    assert own.grad.ne(0).all()


def test_conv_is_the_regressor_of_fitnets():
    own, other = signals((2, 3, 8, 8), (2, 5, 4, 4))
    module = projectors.conv(own, other)
    assert (module[0].kernel_size, module[0].padding) == ((3, 3), (1, 1))
    by_hand = F.conv2d(own, module[0].weight, stride=2, padding=1)
    by_hand = F.relu(F.batch_norm(by_hand, None, None, training=True))
    torch.testing.assert_close(module(own), by_hand)
    up = projectors.conv(other, own)
    assert (up[0].kernel_size, up[0].padding) == ((4, 4), (1, 1))
    assert projectors.conv(own, other, relu=False)(own).lt(0).any()


# Orthogonal.


@pytest.mark.parametrize(("narrow", "wide"), [(6, 10), (6, 6), (1, 4)])
def test_orthonormal_columns_survive_any_optimiser(narrow, wide):
    own, other = signals((8, narrow), (8, wide))
    module = projectors.orthogonal(own, other)
    before = module.turn.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(module(own), 5 * other).backward()
        optimizer.step()
    after = module.turn.weight.detach()
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after.T @ after, torch.eye(narrow), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("student", "teacher"), MEETINGS[:2] + MEETINGS[3:4])
def test_lengths_and_angles_are_kept(student, teacher):
    own, other = signals(student, teacher)
    turned = projectors.orthogonal(own, other)(own)
    rows = [s.movedim(1, -1) if s.ndim == 4 else s for s in (own, turned)]
    own_rows, turned_rows = (r.flatten(0, -2) for r in rows)
    torch.testing.assert_close(
        turned_rows @ turned_rows.T, own_rows @ own_rows.T, rtol=1e-4, atol=1e-4
    )


def test_the_matrix_is_wide_under_autocast():
    own, other = signals((8, 64), (8, 128))
    module = projectors.orthogonal(own, other)
    seen = []
    linear = F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w: seen.append(w) or linear(x, w))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(own)
    matrix = seen[0].double()
    torch.testing.assert_close(
        matrix.T @ matrix, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_orthogonal_and_layer_norm_are_vkd():
    tokens, maps = torch.randn(5, 9, 6), 3 * torch.randn(5, 10, 4, 4) + 1
    pooled = maps.mean((2, 3))
    student = projectors.orthogonal(tokens, pooled)
    teacher = projectors.layer_norm(maps, tokens.mean(1))
    matrix = student[1].turn.weight
    by_hand = F.smooth_l1_loss(tokens.mean(1) @ matrix.T, F.layer_norm(pooled, (10,)))
    torch.testing.assert_close(F.smooth_l1_loss(student(tokens), teacher(maps)), by_hand)


# Pooling.

SIZES = [(8, 8), (4, 4), (2, 6), (5, 3), (1, 1)]


@pytest.mark.parametrize("one", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_pooled_on_both_sides_two_maps_always_meet(one, other):
    left, right = torch.randn(2, 3, *one), torch.randn(2, 5, *other)
    smaller = tuple(min(a, b) for a, b in zip(one, other, strict=True))
    for own, far in ((left, right), (right, left)):
        module = projectors.pool(own, far)
        torch.testing.assert_close(module(own), F.adaptive_avg_pool2d(own, smaller))
        assert not list(module.parameters())
        assert not module.state_dict()


def test_pool_makes_a_vector_beside_a_vector():
    maps, tokens, vector = torch.randn(2, 3, 4, 4), torch.randn(2, 7, 3), torch.randn(2, 9)
    torch.testing.assert_close(projectors.pool(maps, vector)(maps), maps.mean((2, 3)))
    torch.testing.assert_close(projectors.pool(tokens, vector)(tokens), tokens.mean(1))
    for far in (maps, tokens):
        assert projectors.pool(vector, far)(vector) is vector


# Tokens and maps.


def fixed(first: Tensor, second: Tensor, **options: Any) -> Tensor:
    module = projectors.tokens(first, second, trained=False, **options)
    assert not list(module.parameters())
    return module(first)


def test_patches_lie_row_by_row_after_the_class_token():
    tokens = torch.randn(2, 1 + 12, 5)
    grid = fixed(tokens, torch.randn(2, 3, 3, 4))
    for row in range(3):
        for column in range(4):
            assert torch.equal(grid[:, :, row, column], tokens[:, 1 + 4 * row + column])


@pytest.mark.parametrize("lead", [0, 1])
def test_a_map_of_tokens_and_back(lead):
    grid, like = torch.randn(2, 5, 4, 4), torch.randn(2, 16 + lead, 3)
    there = fixed(grid, like)
    assert there.shape == (2, 16 + lead, 5)
    assert torch.equal(fixed(there, grid), grid)
    if lead:
        torch.testing.assert_close(there[:, 0], grid.mean((2, 3)))


def test_grids_are_averaged_where_larger_and_interpolated_where_smaller():
    tokens, small, large = torch.randn(2, 17, 5), torch.randn(2, 3, 2, 2), torch.randn(2, 3, 8, 8)
    grid = fixed(tokens, torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(fixed(tokens, small), F.adaptive_avg_pool2d(grid, 2))
    torch.testing.assert_close(fixed(tokens, large), F.interpolate(grid, (8, 8), mode="bilinear"))
    # On [0, 1] from left to right, bilinear stays a slope.
    slope = torch.linspace(0, 1, 4).expand(1, 1, 4, 4)
    wide = fixed(slope, torch.zeros(1, 64, 1)).reshape(8, 8)
    torch.testing.assert_close(wide[0], wide[7])
    assert wide[0].diff().ge(0).all()


def test_prefix_tokens_go_one_to_one():
    two, five = torch.randn(2, 2 + 16, 3), torch.randn(2, 16, 3)
    assert torch.equal(fixed(two, torch.randn(2, 2 + 4, 3), prefix=2)[:, :2], two[:, :2])
    with_class = torch.randn(2, 1 + 16, 3)
    shorter = fixed(with_class, torch.randn(2, 4, 3))
    assert shorter.shape == (2, 4, 3)
    assert torch.equal(shorter, fixed(with_class[:, 1:], torch.randn(2, 4, 3)))
    lead = fixed(five, torch.randn(2, 1 + 64, 3))[:, 0]
    torch.testing.assert_close(lead, five.mean(1))


def test_equal_numbers_of_tokens_need_no_grid():
    own, other = signals((2, 7, 3), (2, 7, 5))
    assert isinstance(projectors.tokens(own, other), nn.Linear)


def test_a_maps_proportions_decide_where_tokens_could_be_either():
    # 25 tokens are a square, and one before a grid of 4 x 6.
    module = projectors.tokens(torch.randn(2, 25, 3), torch.randn(2, 3, 2, 3))
    assert tuple(module.source) == (1, 4, 6)
    module = projectors.tokens(torch.randn(2, 25, 3), torch.randn(2, 3, 2, 2))
    assert tuple(module.source) == (0, 5, 5)


# Fusion of stages.

STAGES = [(4, 8, 16, 16), (4, 12, 8, 8), (4, 16, 4, 4), (4, 16)]
GOALS = [(4, 10, 16, 16), (4, 20, 4, 4), (4, 30, 4, 4), (4, 30)]


def stages() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tuple(torch.randn(s, requires_grad=True) for s in STAGES), tuple(
        torch.randn(g) for g in GOALS
    )


def test_fusion_by_its_formula():
    own, other = stages()
    module = projectors.fusion(own, other, width=9)

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    below, expected = None, []
    for level, signal, goal in reversed(list(zip(module.levels, own, other, strict=True))):
        x = signal[:, :, None, None] if signal.ndim == 2 else signal
        x = norm(F.conv2d(x, level.narrow[0].weight))
        if below is not None:
            y = F.interpolate(below, x.shape[2:])
            both = F.conv2d(torch.cat([x, y], 1), level.attention.weight, level.attention.bias)
            a, b = both.sigmoid().unbind(1)
            x = a[:, None] * x + b[:, None] * y
        below = F.interpolate(x, goal.shape[2:] or (1, 1))
        expected.append(norm(F.conv2d(below, level.widen[0].weight, padding=1)).reshape(goal.shape))
    for value, by_hand in zip(module(own), reversed(expected), strict=True):
        torch.testing.assert_close(value, by_hand, rtol=1e-4, atol=1e-4)


def test_each_stage_sees_itself_and_the_deeper_ones():
    own, other = stages()
    fused = projectors.fusion(own, other)(own)
    assert [f.shape for f in fused] == [o.shape for o in other]
    for index, value in enumerate(fused):
        grads = torch.autograd.grad(value.square().sum(), own, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.any()) for g in grads]
        assert reached == [place >= index for place in range(4)]


def test_fusion_trains_every_weight_and_is_as_wide_as_the_deepest():
    own, other = stages()
    with torch.no_grad():
        module = projectors.fusion(own, other)
    sum(F.mse_loss(a, b) for a, b in zip(module(own), other, strict=True)).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert module.levels[0].narrow[0].out_channels == 16
    assert (
        projectors.fusion((torch.randn(2, 600),), (torch.randn(2, 3),))
        .levels[0]
        .narrow[0]
        .out_channels
        == 512
    )
    clone = copy.deepcopy(module)
    for a, b in zip(clone(own), module(own), strict=True):
        assert torch.equal(a, b)


def test_fusion_takes_half_precision():
    own, other = stages()
    module = projectors.fusion(own, other)
    for value in module(tuple(s.bfloat16() for s in own)):
        assert value.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(value.isfinite().all() for value in module(own))


# Through the teacher.


@pytest.fixture
def teacher() -> nn.Sequential:
    model = models.build("resnet", shape=(1, 8, 8), outputs=10, width=4)
    images = torch.rand(16, 1, 8, 8)
    for _ in range(3):
        model(images)  # statistics of its own
    return model.eval()


def ending(teacher: nn.Module, channels: int = 4, **options: Any) -> tuple[nn.Module, Tensor]:
    own = torch.randn(4, channels, 8, 8, requires_grad=True)
    paths = ["stage2", "stage3", "pool", "head"]
    return projectors.through(own, torch.randn(4, 10), path=paths, model=teacher, **options), own


@pytest.mark.parametrize("mode", [True, False])
def test_the_teachers_own_feature_gives_the_teachers_own_answer(teacher, mode):
    images = torch.rand(4, 1, 8, 8)
    module, _ = ending(teacher.train(mode))  # whatever mode the teacher is in as it is built
    feature = teacher.eval()[:3](images)
    with torch.no_grad():
        module.adapter.weight.copy_(torch.eye(4)[:, :, None, None])
        module.adapter.bias.zero_()
    assert torch.equal(module(feature), teacher(images))


def test_what_is_the_teachers_is_neither_trained_nor_saved_nor_moved(teacher):
    before = copy.deepcopy(teacher.state_dict())
    module, own = ending(teacher, 3)
    assert set(module.state_dict()) == {"adapter.weight", "adapter.bias"}
    assert len(list(module.parameters())) == 2
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(own).square().sum().backward()
    optimizer.step()
    assert own.grad.any()
    assert all(p.grad.any() for p in module.parameters())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for part in module._frozen for p in part.parameters())
    module.double()
    assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    assert all(v.dtype == before[n].dtype for n, v in teacher.state_dict().items())


def test_the_part_stays_in_eval_mode(teacher):
    module, own = ending(teacher, 3)
    expected = module.eval()(own)
    teacher.train()
    assert torch.equal(module.train()(own), expected)
    assert torch.equal(copy.deepcopy(module).train()(own), expected)


def test_the_part_is_the_teachers_memory(teacher):
    module, own = ending(teacher, 3)
    before = module(own)
    with torch.no_grad():
        teacher.head.bias.add_(1)
    torch.testing.assert_close(module(own), before + 1)


def test_through_under_autocast_and_for_a_narrow_teacher(teacher):
    module, own = ending(teacher, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(own).isfinite().all()
    narrow, own = ending(teacher.bfloat16(), 3)
    narrow(own).float().sum().backward()
    assert own.grad.isfinite().all()
    assert narrow.adapter.weight.dtype == torch.float32


def test_the_part_goes_where_the_adapter_goes(teacher):
    module, _ = ending(teacher, 3)
    module.to("meta")
    assert all(p.is_meta for part in module._frozen for p in part.state_dict().values())
    assert not any(v.is_meta for v in teacher.state_dict().values())


def test_one_path_and_a_part_that_gives_its_state_first():
    class Layer(nn.Linear):
        def forward(self, x):
            return (super().forward(x), None)

    model = nn.ModuleDict({"last": Layer(5, 7)})
    own = torch.randn(2, 9, 3)
    module = projectors.through(own, torch.randn(2, 9, 7), path="last", model=model)
    assert module(own).shape == (2, 9, 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "stage4"}, "no module 'stage4'.*stage"),
        ({"path": "head"}, r"cannot be run|gives"),
        ({"path": ["stage2", "stage3"]}, r"gives \[4, 16, 2, 2\] and not the teacher's \[4, 10\]"),
        ({"path": "pool"}, "pool does not say how many channels it reads; pass width"),
        ({"path": "pool", "model": None}, "no module to take a part of"),
    ],
)
def test_parts_that_do_not_fit(teacher, options, said):
    options = {"model": teacher, **options}
    with pytest.raises(UsageError, match=said):
        projectors.through(torch.randn(4, 3, 8, 8), torch.randn(4, 10), **options)


def test_a_part_that_does_not_say_its_width_is_told(teacher):
    own, other = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    module = projectors.through(own, other, path="pool", model=teacher, width=5)
    assert module(own).shape == (4, 5)


# The teacher's side.


@pytest.mark.parametrize("shape", [(4, 10), (4, 7, 10), (4, 10, 3, 5)])
def test_layer_norm_is_over_channels(shape):
    signal = 5 * torch.randn(shape) + 2
    module = projectors.layer_norm(signal, torch.randn(shape))
    axis = 1 if len(shape) == 4 else -1
    mean, var = signal.mean(axis, keepdim=True), signal.var(axis, correction=0, keepdim=True)
    torch.testing.assert_close(module(signal), (signal - mean) / (var + 1e-5).sqrt())
    assert not list(module.parameters())
    assert module(signal.bfloat16()).dtype == torch.float32


def batches(shape: tuple[int, ...], count: int) -> list[Tensor]:
    mix = torch.randn(10, 10)
    found = []
    for _ in range(count):
        last = torch.randn(shape).movedim(1, -1) if len(shape) == 4 else torch.randn(shape)
        last = last @ mix + torch.arange(10.0)
        found.append(last.movedim(-1, 1) if len(shape) == 4 else last)
    return found


def rows_of(signal: Tensor) -> Tensor:
    last = signal.movedim(1, -1) if signal.ndim == 4 else signal
    return last.reshape(-1, last.shape[-1]).double()


@pytest.mark.parametrize("shape", [(64, 10), (8, 16, 10), (8, 10, 4, 4)])
@pytest.mark.parametrize("full", [False, True])
def test_whitened_data_have_mean_0_and_variance_1(shape, full):
    data = batches(shape, 6)
    module = projectors.whiten(data[0], data[0], full=full)
    for batch in data:
        module(batch)
    white = torch.cat([rows_of(module.eval()(batch)) for batch in data])
    torch.testing.assert_close(white.mean(0), torch.zeros(10).double(), rtol=0, atol=1e-4)
    covariance = white.T @ white / len(white)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(10).double(), rtol=0, atol=0.02)
    apart = (covariance - torch.diag(covariance.diagonal())).abs().max()
    assert apart < 0.02 if full else apart > 0.1
    assert white.shape == torch.cat([rows_of(batch) for batch in data]).shape


def test_full_whitening_is_the_inverse_square_root_of_the_covariance():
    (data,) = batches((256, 10), 1)
    module = projectors.whiten(data, data, full=True)
    module(data)
    covariance = torch.cov(data.double().T, correction=0)
    assert torch.equal(module.matrix, module.matrix.T) or torch.allclose(
        module.matrix, module.matrix.T, atol=1e-12
    )
    floor = 1e-5 * covariance.diagonal().mean() * torch.eye(10)
    inverse = module.matrix @ module.matrix @ (covariance + floor)
    torch.testing.assert_close(inverse, torch.eye(10).double(), rtol=0, atol=1e-6)


def test_statistics_do_not_depend_on_how_rows_come():
    (data,) = batches((60, 10), 1)
    for full in (False, True):
        whole, parts = (projectors.whiten(data, data, full=full) for _ in range(2))
        whole(data)
        for part in data.split([1, 7, 30, 22]):
            parts(part)
        torch.testing.assert_close(parts.matrix, whole.matrix)
        torch.testing.assert_close(parts.mean, whole.mean)


def test_whitening_looks_in_training_only_and_then_no_more():
    data = batches((16, 10), 4)
    module = projectors.whiten(data[0], data[0], batches=2)
    assert torch.equal(module.eval()(data[0]), data[0])
    module.train()
    for batch in data[:2]:
        module(batch)
    fixed_now = copy.deepcopy(module.state_dict())
    module(100 * data[2])
    assert all(torch.equal(v, fixed_now[n]) for n, v in module.state_dict().items())
    again = projectors.whiten(data[0], data[0], batches=2)
    again.load_state_dict(fixed_now)
    assert torch.equal(again(data[3]), module(data[3]))
    assert not list(module.parameters())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [1, 8])
def test_constant_channels_and_single_rows_stay_finite(full, rows):
    signal = torch.randn(rows, 10)
    signal[:, 3] = 7.0
    module = projectors.whiten(signal, signal, full=full)
    white = module(signal)
    assert white.isfinite().all()
    assert white[:, 3].abs().max() < 1e-3
    assert projectors.whiten(signal, signal, full=full)(torch.zeros(rows, 10)).eq(0).all()


@pytest.mark.parametrize("make", [projectors.layer_norm, projectors.whiten, projectors.pool])
def test_a_teachers_larger_map_is_averaged_to_the_students(make):
    large, small, vector = torch.randn(4, 10, 8, 8), torch.randn(4, 6, 4, 4), torch.randn(4, 6)
    assert make(large, small)(large).shape == (4, 10, 4, 4)
    assert make(large, vector)(large).shape == (4, 10)
    assert make(small, large)(small).shape == (4, 6, 4, 4)


# Errors.

EVERY = [f for f in projectors.__all__ if f not in ("fusion", "select", "through")]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("signal", [torch.ones(2, 3, dtype=torch.int64), (torch.rand(2, 3),), None])
def test_signals_that_are_no_floating_tensor(name, signal):
    make = getattr(projectors, name)
    for pair in ((signal, torch.rand(2, 3)), (torch.rand(2, 3), signal)):
        with pytest.raises(UsageError, match=rf"projector {name}: .* must be one floating tensor"):
            make(*pair)


@pytest.mark.parametrize("name", EVERY)
def test_signals_of_other_forms_or_examples(name):
    make = getattr(projectors, name)
    with pytest.raises(UsageError, match=r"\[N, C, H, W\], not \[2\]"):
        make(torch.rand(2), torch.rand(2, 3))
    with pytest.raises(UsageError, match=r"not \[2, 3, 4, 4, 4\]"):
        make(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4, 4))
    with pytest.raises(UsageError, match="the same examples"):
        make(torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4))


@pytest.mark.parametrize("name", ["linear", "mlp", "orthogonal"])
@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((2, 3, 4, 4), (2, 5, 8, 8), r"larger.*\[2, 3, 4, 4\].*\[2, 5, 8, 8\].*projector: pool"),
        ((2, 3, 8, 4), (2, 5, 4, 8), "larger in height or width.*teacher_projector: pool"),
        ((2, 3), (2, 5, 4, 4), "no positions.*teacher_projector: pool"),
        ((2, 3), (2, 7, 5), "no positions.*teacher_projector: pool"),
        ((2, 7, 3), (2, 8, 5), "positions of the two signals differ.*projector: tokens"),
        ((2, 3, 4, 4), (2, 16, 5), "projector: tokens"),
        ((2, 16, 3), (2, 5, 4, 4), "projector: tokens"),
    ],
)
def test_what_averaging_does_not_bring_together(name, student, teacher, said):
    with pytest.raises(UsageError, match=rf"projector {name}: .*{said}"):
        getattr(projectors, name)(torch.rand(student), torch.rand(teacher))


@pytest.mark.parametrize(
    ("make", "student", "teacher", "said"),
    [
        (projectors.orthogonal, (2, 5), (2, 3), r"more channels.*\[2, 5\].*use projector: linear"),
        (projectors.conv, (2, 5), (2, 3), "must be maps.*tokens for tokens, linear or mlp"),
        (projectors.conv, (2, 5, 4, 4), (2, 3, 6, 6), "whole factor.*teacher_projector: pool"),
        (projectors.conv, (2, 5, 4, 4), (2, 3, 8, 2), "whole factor.*teacher_projector: pool"),
        (partial(projectors.conv, kernel=4), MAP, MAP, "odd, not 4; use 5"),
        (projectors.pool, (2, 9, 4), (2, 3, 3, 3), "use tokens, with trained: false"),
        (projectors.pool, (2, 9, 4), (2, 4, 4), "use tokens"),
        (projectors.tokens, (2, 9, 4), (2, 4), "must have positions.*use linear, or pool"),
        (projectors.tokens, (2, 24, 4), (2, 3, 4, 4), "24 tokens neither none nor one.*prefix"),
        (partial(projectors.tokens, prefix=3), (2, 17, 4), (2, 3, 4, 4), "not 3.*a square"),
        (projectors.tokens, (2, 9, 4), (2, 3, 4, 6), "a grid of 4 to 6"),
        (projectors.tokens, (2, 1, 4), (2, 3, 2, 3), "a grid of 2 to 3"),
    ],
)
def test_what_no_such_projector_joins(make, student, teacher, said):
    with pytest.raises(UsageError, match=said):
        make(torch.rand(student), torch.rand(teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), "must be tuples.*several addresses"),
        ((torch.rand(2, 3),), (torch.rand(2, 3), torch.rand(2, 3)), "1 stages and the teacher 2"),
        ((torch.rand(2, 9, 3),), (torch.rand(2, 3),), r"maps .* not \[2, 9, 3\]"),
        ((torch.rand(2, 3), torch.rand(2, 3, 4, 4)), (torch.rand(2, 3),) * 2, "shallow to deep"),
    ],
)
def test_stages_that_cannot_be_fused(student, teacher, said):
    with pytest.raises(UsageError, match=said):
        projectors.fusion(student, teacher)


def test_select_keeps_evenly_spaced_entries() -> None:
    weight = torch.arange(24.0).reshape(8, 3)
    part = projectors.select(weight, torch.zeros(4, 3))(weight)
    assert torch.equal(part, weight[::2])
    whole = projectors.select(weight, weight)
    assert torch.equal(whole(weight), weight)  # nothing to select: itself
    both = projectors.select(torch.zeros(7, 5), torch.zeros(3, 2))
    assert torch.equal(both(torch.arange(35.0).reshape(7, 5)), torch.tensor(
        [[0.0, 4.0], [15.0, 19.0], [30.0, 34.0]]
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student", "says"),
    [
        ((4, 3), (4,), "different numbers of dimensions"),
        ((4, 3), (4, 5), "nothing can be selected"),
    ],
)
def test_select_says_what_it_cannot(teacher: tuple, student: tuple, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        projectors.select(torch.zeros(teacher), torch.zeros(student))
