"""Losses with weights or a memory: published values, and the laws of all that are built."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar import losses
from attar.losses import (
    curriculum_kl,
    global_context,
    kl_divergence,
    masked_generative,
    memory_contrast,
    mse,
    variational,
)

ROWS = 20
# Signals of a batch of five that each is built from, and called with.
FORMS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "curriculum_kl": ((6,), (6,)),
    "global_context": ((4, 4, 5), (4, 4, 5)),
    "masked_generative": ((3, 4, 5), (2, 4, 5)),
    "memory_contrast": ((5,), (7,)),
    "variational": ((3, 4, 5), (2, 4, 5)),
}
NAMES = [
    name
    for name in losses.__all__
    if inspect.signature(getattr(losses, name)).return_annotation == "nn.Module"
]
every = pytest.mark.parametrize("name", NAMES)


def signal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(name: str, count: int = 5) -> tuple[Tensor, Tensor]:
    mine, theirs = FORMS[name]
    return signal(count, *mine), signal(count, *theirs, seed=1)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    make: Callable[..., nn.Module] = getattr(losses, name)
    if "rows" in inspect.signature(make).parameters:
        options = {"rows": ROWS, "negatives": 6, "dimensions": 4, **options}
    return make(*pair(name, 2), **options)


def value(loss: nn.Module, student: Tensor, teacher: Tensor, seed: int = 0) -> Tensor:
    """The loss [N], with the same random numbers for the same seed."""
    torch.manual_seed(seed)
    named = inspect.signature(loss.forward).parameters
    known = {"ids": torch.arange(len(student)) * 3, "progress": 0.5}
    return loss(student, teacher, **{key: known[key] for key in known if key in named})


# Laws.


def test_every_factory_is_held_to_the_laws() -> None:
    assert set(FORMS) == set(NAMES)


@every
def test_the_signature_is_the_contract(name: str) -> None:
    make = getattr(losses, name)
    parameters = list(inspect.signature(make).parameters.values())
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional in (["student", "teacher"], ["student", "teacher", "rows"])
    assert all(p.default is not p.empty for p in parameters if p.kind is p.KEYWORD_ONLY)
    for wanted in ("Shapes:", "Returns", "Neighbours:", "Paper:", ">>> "):
        assert wanted in make.__doc__.replace("returns [N]", "Returns")
    forward = list(inspect.signature(build(name).forward).parameters)
    assert forward[:2] == ["student", "teacher"]
    assert set(forward[2:]) <= {"labels", "mask", "ids", "offsets", "progress"}


@every
def test_a_value_a_row_and_gradients_of_student_and_weights_alone(name: str) -> None:
    loss = build(name)
    with torch.no_grad():
        for weight in loss.parameters():
            weight.add_(0.1 * signal(*weight.shape))  # some start at zero, and hold others there
    student, teacher = (side.requires_grad_() for side in pair(name))
    result = value(loss, student, teacher)
    result.sum().backward()
    assert result.shape == (5,)
    assert result.isfinite().all()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    for key, weight in loss.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().sum() > 0, key


@every
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    loss = build(name)
    student, teacher = pair(name)
    value(loss, student, teacher)  # what a first batch sets is no function of later ones
    loss.eval()
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: value(loss, s, teacher), student, atol=1e-6, rtol=1e-4
    )


@every
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_of_none_or_one(name: str, count: int) -> None:
    loss = build(name)
    student, teacher = pair(name, count)
    result = value(loss, student.requires_grad_(), teacher)
    result.sum().backward()
    assert result.shape == (count,)
    assert result.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert value(loss, *pair(name)).isfinite().all()


@every
@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_and_narrow_signals_are_finite(
    name: str, scale: float, dtype: torch.dtype
) -> None:
    loss = build(name).float()
    student, teacher = (scale * side.sign().to(dtype) for side in pair(name))
    result = value(loss, student.requires_grad_(), teacher)
    result.mean().backward()
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@every
def test_what_is_saved_goes_on_to_the_bit(name: str) -> None:
    first = build(name)
    value(first, *pair(name))
    second = build(name)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3):
        one, other = (value(loss, *pair(name), seed=seed) for loss in (first, second))
        assert torch.equal(one, other)


@every
def test_options_out_of_range_and_other_signals_are_refused(name: str) -> None:
    for option in set(inspect.signature(getattr(losses, name)).parameters) - {"student", "teacher"}:
        for wrong in (-1, math.nan):
            with pytest.raises(ValueError, match=rf"{option} must"):
                build(name, **{option: wrong})
    student, teacher = pair(name)
    with pytest.raises(ValueError, match=r"same (shape|number of examples)"):
        value(build(name), student, teacher[:-1])


# Variational.


def test_variational_is_its_definition() -> None:
    student, teacher = signal(3, 4, 5, 6), signal(3, 2, 5, 6, seed=1)
    loss = variational(student, teacher)
    with torch.no_grad():
        loss.variance.copy_(torch.tensor([0.3, -2.0]))
    x = student
    for index in (0, 2, 4):
        x = F.conv2d(x, loss.predict[index].weight.unsqueeze(3))
        x = x.relu() if index < 4 else x
    spread = (F.softplus(loss.variance) + 1e-5).view(1, 2, 1, 1)
    wanted = 0.5 * ((x - teacher) ** 2 / spread + spread.log()).mean((1, 2, 3))
    torch.testing.assert_close(loss(student, teacher), wanted)


def test_the_variance_starts_at_five_and_the_prediction_has_no_bias() -> None:
    loss = variational(signal(1, 4), signal(1, 3))
    result = loss(torch.zeros(2, 4).double(), torch.zeros(2, 3).double())
    assert result.tolist() == pytest.approx([0.5 * math.log(5)] * 2)


def test_variational_pools_the_larger_map_and_takes_tokens_and_vectors() -> None:
    large, small = signal(3, 4, 6, 4), signal(3, 2, 3, 2, seed=1)
    loss = variational(large, small)
    pooled = F.adaptive_avg_pool2d(large, (3, 2))
    torch.testing.assert_close(loss(large, small), loss(pooled, small))
    as_tokens = [x.flatten(2).transpose(1, 2) for x in (pooled, small)]
    torch.testing.assert_close(loss(*as_tokens), loss(pooled, small))
    points = [x[:, :, 0, 0] for x in (pooled, small)]
    torch.testing.assert_close(loss(*points), loss(*(x[:, :, None, None] for x in points)))


def test_rows_do_not_depend_on_the_split() -> None:
    loss = build("variational")
    student, teacher = pair("variational")
    parts = [loss(student[part], teacher[part]) for part in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), loss(student, teacher))


def test_another_number_of_channels_than_it_was_built_for_is_refused() -> None:
    loss = build("variational")
    with pytest.raises(ValueError, match="built for 2 channels of the teacher, got 3"):
        loss(signal(5, 3, 4, 5), signal(5, 3, 4, 5))


# Masked generation.


def test_masked_generation_of_the_given_mask_is_the_golden_value(
    oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code sums over the values, with a weight of 2e-5 inside."""
    case = oracle("mgd_det")
    student, teacher = case.inputs["f_s"], case.inputs["f_t"]
    loss = masked_generative(student, teacher, masked=0.65)
    names = {"0.weight": "w0", "0.bias": "b0", "2.weight": "w1", "2.bias": "b1"}
    loss.generate.load_state_dict({key: case.inputs[name] for key, name in names.items()})
    monkeypatch.setattr(torch, "rand", lambda *shape, device: case.inputs["u"].view(shape))
    result = 2e-5 * loss(student, teacher).mean() * teacher[0].numel()
    case.assert_value(result)
    case.assert_gradient(result, "f_s")


@pytest.mark.parametrize(
    ("over", "shape"), [("positions", (9, 1, 8, 8)), ("channels", (9, 64, 1, 1))]
)
def test_the_share_of_what_is_masked_is_as_asked(over: str, shape: tuple[int, ...]) -> None:
    ones = torch.ones(9, 64, 8, 8)
    loss = masked_generative(ones, ones, masked=0.75, over=over)
    seen: list[Tensor] = []
    loss.generate = nn.Sequential(loss.generate[0])
    loss.generate[0].register_forward_hook(lambda _, given, __: seen.append(given[0]))
    torch.manual_seed(0)
    loss(ones, ones)
    loss(ones, ones)
    mask = seen[0].mean(tuple(d for d, size in enumerate(shape) if size == 1), keepdim=True)
    assert set(mask.unique().tolist()) == {0.0, 1.0}  # whole positions, or whole channels
    assert mask.shape == shape
    assert mask.mean().item() == pytest.approx(0.25, abs=0.06)
    assert not torch.equal(seen[0], seen[1])  # drawn anew


def test_a_mask_over_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="over must be 'positions' or 'channels', got 'rows'"):
        masked_generative(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), over="rows")
    with pytest.raises(ValueError, match="equal height and width"):
        masked_generative(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4))


# Global context.


def published_context(maps: Tensor, block: nn.Module) -> Tensor:
    """The published block on maps [N, C, H, W], written with two-dimensional layers."""
    count, channels = maps.shape[:2]
    where = F.conv2d(maps, block.look.weight.unsqueeze(3)).view(count, -1).softmax(1)
    context = torch.einsum("ncp,np->nc", maps.flatten(2), where).view(count, channels, 1, 1)
    first, norm, _, last = block.transform
    hidden = F.conv2d(context, first.weight[:, :, None, None], first.bias)
    weights = (given.view(-1, 1, 1) for given in (norm.weight, norm.bias))
    hidden = F.layer_norm(hidden, hidden.shape[1:], *weights).relu()
    return maps + F.conv2d(hidden, last.weight[:, :, None, None], last.bias)


def test_global_context_is_the_published_blocks_on_both_sides() -> None:
    student, teacher = signal(3, 6, 4, 5), signal(3, 6, 4, 5, seed=1)
    loss = global_context(student, teacher)
    torch.testing.assert_close(loss(student, teacher), mse(student, teacher))
    with torch.no_grad():
        for number, weight in enumerate(loss.parameters()):
            weight.copy_(signal(*weight.shape, seed=number))
    mine = published_context(student, loss.student)
    theirs = published_context(teacher, loss.teacher)
    torch.testing.assert_close(loss(student, teacher), mse(mine, theirs))
    tokens = [side.flatten(2).transpose(1, 2) for side in (student, teacher)]
    torch.testing.assert_close(loss(*tokens), loss(student, teacher))


def test_global_context_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(1, 3, 4, 4\) and \(1, 2, 4, 4\)"):
        global_context(signal(1, 3, 4, 4), signal(1, 2, 4, 4))
    with pytest.raises(ValueError, match="built for 4 channels of the teacher, got 3"):
        build("global_context")(signal(1, 3, 4, 4), signal(1, 3, 4, 4))


# A trained temperature.


def test_the_curriculum_is_the_golden_one_with_its_gradient_turned_round(oracle: Any) -> None:
    case = oracle("ctkd_global_T")
    student, teacher = case.inputs["z_s"], case.inputs["z_t"]
    loss = curriculum_kl(student, teacher, lowest=1.0, highest=21.0, warmup=0.5)
    result = loss(student, teacher, 0.25).mean()
    case.assert_value(result)
    case.assert_gradient(result)
    case.assert_value(loss.temperature, "T")
    (gradient,) = torch.autograd.grad(result, loss.theta)
    case.assert_value(gradient, "grad_theta_reversed")


@pytest.mark.parametrize(
    ("warmup", "progress", "strength"),
    [(0.4, 0.0, 0.0), (0.4, 0.1, (1 - math.sqrt(0.5)) / 2), (0.4, 0.4, 1), (0.4, 1, 1), (0, 0, 1)],
)
def test_the_temperature_is_trained_against_the_student_by_progress(
    warmup: float, progress: float, strength: float
) -> None:
    student, teacher = pair("curriculum_kl")
    loss = curriculum_kl(student, teacher, lowest=2.0, highest=7.0, warmup=warmup)
    with torch.no_grad():
        loss.theta.fill_(-0.5)

    def free(theta: Tensor) -> Tensor:
        t = 2 + 5 * theta.sigmoid()
        logs = ((side / t).log_softmax(1) for side in (student, teacher))
        return F.kl_div(*logs, reduction="batchmean", log_target=True) * t**2

    theta = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(free(theta), theta)
    result = loss(student, teacher, progress).mean()
    (gradient,) = torch.autograd.grad(result, loss.theta)
    torch.testing.assert_close(result, free(theta))
    torch.testing.assert_close(gradient, -strength * wanted)


def test_classes_that_are_excluded_leave_the_trained_temperature_a_number() -> None:
    student, teacher = pair("curriculum_kl")
    student[:, 4:], teacher[:, 3:] = -math.inf, -math.inf
    loss = build("curriculum_kl")
    result = value(loss, student.requires_grad_(), teacher)
    result.sum().backward()
    wanted = kl_divergence(student, teacher, temperature=loss.temperature.item())
    torch.testing.assert_close(result, wanted)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert loss.theta.grad is not None
    assert loss.theta.grad.isfinite()


def test_a_highest_temperature_below_the_lowest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"above lowest, 3\.0, got 2\.0"):
        curriculum_kl(*pair("curriculum_kl"), lowest=3.0, highest=2.0)


# Memory.


def published(case: Any) -> nn.Module:
    loss = memory_contrast(
        case.inputs["f_s"], case.inputs["f_t"], ROWS, negatives=6, dimensions=4, temperature=0.07
    )
    names = {
        "embed_student.weight": "ws",
        "embed_student.bias": "bs_",
        "embed_teacher.weight": "wt",
        "embed_teacher.bias": "bt",
        "memory_student": "memory_v1",
        "memory_teacher": "memory_v2",
    }
    given = {key: case.inputs[name].detach() for key, name in names.items()}
    loss.load_state_dict({**given, "log_z": torch.full((2,), math.nan, dtype=torch.float64)})
    negatives = case.inputs["contrast_idx"][:, 1:]
    loss._draw = lambda count: negatives[:count]  # type: ignore[method-assign]
    return loss


def test_first_batch_of_the_memory_is_the_golden_value(oracle: Any) -> None:
    case = oracle("crd")
    loss = published(case)
    result = loss(case.inputs["f_s"], case.inputs["f_t"], case.inputs["idx"]).mean()
    case.assert_value(result)
    case.assert_gradient(result, "f_s")
    case.assert_value(loss.log_z[0].exp(), "Z_v1")
    case.assert_value(loss.log_z[1].exp(), "Z_v2")
    case.assert_value(loss.memory_student, "memory_v1_after")
    case.assert_value(loss.memory_teacher, "memory_v2_after")


def test_later_batches_keep_the_first_ones_scale(oracle: Any) -> None:
    case = oracle("crd")
    loss = published(case)
    given = case.inputs["f_s"], case.inputs["f_t"], case.inputs["idx"]
    loss(*given)
    before = loss.log_z.clone()
    loss(*(3 * side for side in given[:2]), given[2])
    assert torch.equal(loss.log_z, before)


def test_in_eval_mode_the_memory_stays(oracle: Any) -> None:
    case = oracle("crd")
    loss = published(case).eval()
    before = {key: kept.clone() for key, kept in loss.state_dict().items()}
    result = loss(case.inputs["f_s"], case.inputs["f_t"], case.inputs["idx"]).mean()
    case.assert_value(result)
    for key, kept in loss.state_dict().items():
        torch.testing.assert_close(kept, before[key], rtol=0, atol=0, equal_nan=True)


def test_negatives_come_from_all_rows_and_from_the_global_generator() -> None:
    loss = memory_contrast(signal(1, 3), signal(1, 3), ROWS, negatives=500)
    torch.manual_seed(3)
    drawn = loss._draw(4)
    torch.manual_seed(3)
    assert torch.equal(loss._draw(4), drawn)
    assert drawn.unique().tolist() == list(range(ROWS))
    assert drawn.shape == (4, 500)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 2, 3, ROWS], rf"ids must lie in \[0, {ROWS}\), got {ROWS}"),
        ([0, 1, 2, 3, -1], rf"ids must lie in \[0, {ROWS}\), got -1"),
        ([0, 1], r"ids must be the numbers \[N\] .* \(2,\) for 5 rows"),
    ],
)
def test_rows_that_are_not_there_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("memory_contrast")(*pair("memory_contrast"), torch.tensor(ids))


def test_features_of_maps_are_flattened() -> None:
    student, teacher = signal(5, 2, 2, 3), signal(5, 7, seed=1)
    torch.manual_seed(0)
    loss = memory_contrast(student, teacher, ROWS, negatives=6, dimensions=4).eval()
    torch.manual_seed(1)
    result = loss(student, teacher, torch.arange(5))
    torch.manual_seed(1)
    torch.testing.assert_close(loss(student.flatten(1), teacher, torch.arange(5)), result)
