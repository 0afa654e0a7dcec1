"""Laws of the whole family of losses. They walk `attar.losses.__all__`: a new loss is held to them
by being there, and one that asks for something `SUPPLY` does not know fails until it is taught."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as functional
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar import losses

CLASSES = 6
LOGITS = (CLASSES,)
# Forms of one example of a feature; each loss on features is held to the first that it takes.
FEATURES = [(4, 4, 3), (CLASSES,), (4, 12), (2, CLASSES)]
ON_FEATURES = {
    "attention",
    "contrast",
    "dense",
    "encoder",
    "feature",
    "gradient",
    "parameter",
    "relation",
}
ON_FEATURES_TOO = {"focal_features", "label_embeddings", "localization_kl"}
# Weights have any shape; pairs of embeddings are no one tensor; numbers have labels of their shape.
# They have their own tests.
OWN_SHAPES = {"affinity_kl", "bounded_mse", "l1_starting_point", "l2_starting_point"}
# Each class is a question by itself; no class competes with another.
ON_SIGMOIDS = {"binary_kl", "quality_focal"}
# Losses whose labels say of every class, or position, whether and how much it holds.
MULTI_LABEL = {"bounded_mse", "focal_features", "label_embeddings", "partial_softmax_kl"}
REPRODUCIBLE = settings(derandomize=True, deadline=None, max_examples=60)

Arguments = dict[str, Tensor]


def random(
    rows: int,
    seed: int,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float64,
    form: tuple[int, ...] = LOGITS,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, *form, generator=generator, dtype=torch.float64)
    return (values * scale).to(dtype)


def class_numbers(rows: int, seed: int, **_: object) -> Tensor:
    # Never one of the last two classes: the laws on absent classes take those away.
    return torch.randint(CLASSES - 2, (rows,), generator=torch.Generator().manual_seed(seed))


def logits_of(offset: int) -> Callable[..., Tensor]:
    return lambda rows, seed, **options: random(rows, 3 * seed + offset, **options)


def multiple_labels(rows: int, seed: int, form: tuple[int, ...] = LOGITS, **_: object) -> Tensor:
    """What holds, [N, C]; of maps [C, H, W] the weights of positions, [N, H, W]."""
    shape = form[1:] if len(form) == 3 else form[:1]
    generator = torch.Generator().manual_seed(seed)
    holds = torch.rand(rows, *shape, generator=generator, dtype=torch.float64) > 0.5
    holds[:, 0] = True  # distances are in the unit of their mean: of two examples all are equal
    return holds.double()


def counted(rows: int, seed: int, form: tuple[int, ...] = LOGITS, **_: object) -> Tensor:
    """A mask [N, T] that leaves the last position of every other row out."""
    mask = torch.ones(rows, form[0], dtype=torch.bool)
    mask[1::2, -1] = False
    return mask


SUPPLY: dict[str, Callable[..., Tensor]] = {
    "student": logits_of(0),
    "teacher": logits_of(1),
    "labels": class_numbers,
    "mask": counted,
}


def parameters(loss: Callable[..., Tensor]) -> list[inspect.Parameter]:
    return list(inspect.signature(loss).parameters.values())


def supplied(loss: Callable[..., Tensor]) -> list[str]:
    return [p.name for p in parameters(loss) if p.default is p.empty]


def arguments(
    loss: Callable[..., Tensor], rows: int = 5, seed: int = 0, **how: object
) -> Arguments:
    unknown = set(supplied(loss)) - set(SUPPLY)
    if unknown:
        pytest.fail(f"{loss.__name__} asks for {sorted(unknown)}: teach SUPPLY to make it.")
    if "form" not in how:
        how["form"] = form(loss)
    given = {name: SUPPLY[name](rows, seed, **how) for name in supplied(loss)}
    if loss.__name__ in MULTI_LABEL:
        given["labels"] = multiple_labels(rows, seed, **how)
    return given


def is_on_logits(loss: Callable[..., Tensor]) -> bool:
    """Whether -inf is a class that does not exist; `mse` is on logits as well as on features."""
    on_features = loss.__module__.split(".")[-1] in ON_FEATURES
    return loss is losses.mse or not (on_features or loss.__name__ in ON_FEATURES_TOO)


@functools.cache
def form(loss: Callable[..., Tensor]) -> tuple[int, ...]:
    """The shape of one example for this loss: logits, or the first form of features it takes."""
    if is_on_logits(loss):
        return LOGITS
    for shape in FEATURES:
        with contextlib.suppress(ValueError):
            loss(**arguments(loss, form=shape))
            return shape
    pytest.fail(f"{loss.__name__} takes none of the forms {FEATURES}.")


def of_tensors(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss; one that compares tuples, as one of tensors that are cut up along dimension 1."""
    if get_type_hints(loss)["student"] != tuple[Tensor, ...]:
        return loss

    @functools.wraps(loss)
    def stacked(student: Tensor, teacher: Tensor, **rest: object) -> Tensor:
        if student.ndim < 3:
            raise ValueError(f"{tuple(student.shape)} is no tuple of rows")
        return loss(student.unbind(1), teacher.unbind(1), **rest)

    return stacked


def is_factory(loss: Callable[..., object]) -> bool:
    return issubclass(get_type_hints(loss)["return"], nn.Module)


# What a student that agrees gives, where that is not the teacher's own values.
AGREEING: dict[str, Callable[[Tensor], Tensor]] = {
    "activation_boundary": lambda teacher: 1e3 * teacher,
    "normalized_smooth_l1": lambda teacher: functional.layer_norm(
        teacher.movedim(1, -1).to(torch.promote_types(teacher.dtype, torch.float32)),
        teacher.shape[1:2],
    ).movedim(-1, 1),
    "transformed_teacher_kl": lambda teacher: 0.1 * teacher.to(torch.float64),
}
# Losses that even full agreement leaves above zero.
NEVER_ZERO = {
    "absolute_and_cosine",
    "affinity_kl",  # the two sides have temperatures of their own
    "contrast",
    "hard_distillation",
    "normalized_kl",
    "ranking_distillation",
    "relaxed_ranking",
    "target_enhanced_kl",
}
# Losses with a weight made of the student's answers, through which no gradient flows.
HELD_WEIGHT = {"adaptive_kl", "weighted_kl"}
# Losses in a power of the signal's unit whose gradient at 1e4 is no number of float16.
BEYOND_HALF = {"focal_features", "gram"}


@functools.cache
def is_per_row(name: str) -> bool:
    """Whether the loss gives a value a row; it must give that or a scalar."""
    loss = of_tensors(getattr(losses, name))
    shape = tuple(loss(**arguments(loss)).shape)
    if shape not in {(5,), ()}:
        pytest.fail(f"{name} gives {shape} for 5 rows: neither a value a row nor a scalar.")
    return shape == (5,)


def value_and_gradient(loss: Callable[..., Tensor], given: Arguments) -> tuple[Tensor, Tensor]:
    student = given["student"].clone().requires_grad_()
    value = loss(**{**given, "student": student})
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def taking(rows: Tensor | slice, given: Arguments) -> Arguments:
    return {name: value[rows] for name, value in given.items()}


NAMES = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]
FACTORIES = [name for name in NAMES if is_factory(getattr(losses, name))]
ALL = [
    pytest.param(of_tensors(getattr(losses, name)), id=name)
    for name in NAMES
    if name not in FACTORIES
]
TOLD = [case for case in ALL if "teacher" in supplied(case.values[0])]
PER_ROW = [case for case in ALL if is_per_row(case.id)]
SCALAR = [case for case in ALL if not is_per_row(case.id)]
every_loss = pytest.mark.parametrize("loss", ALL)
every_told_loss = pytest.mark.parametrize("loss", TOLD)
every_loss_on_logits = pytest.mark.parametrize(
    "loss", [case for case in ALL if is_on_logits(case.values[0])]
)
every_loss_on_features = pytest.mark.parametrize(
    "loss",
    [case for case in ALL if not is_on_logits(case.values[0]) and case.id not in OWN_SHAPES],
)


# The signature is the contract.


@every_loss
def test_signature_and_docstring(loss: Callable[..., Tensor]) -> None:
    assert parameters(loss)[0].name == "student"
    assert set(supplied(loss)) & {"teacher", "labels"}
    for parameter in parameters(loss):
        is_option = parameter.kind is parameter.KEYWORD_ONLY
        assert is_option == (parameter.default is not parameter.empty), parameter
    assert set(get_type_hints(loss, include_extras=True)) == {
        *inspect.signature(loss).parameters,
        "return",
    }
    assert loss.__doc__
    for wanted in ("Shapes:", "Returns", "Neighbours:", ">>> "):
        assert wanted in loss.__doc__


def limits(loss: Callable[..., Tensor]) -> Iterator[tuple[str, float]]:
    """(option, a value just outside what its annotation allows)."""
    for option, hint in get_type_hints(loss, include_extras=True).items():
        if get_origin(hint) is Annotated:
            for limit in get_args(hint)[1:]:
                match limit:
                    case Gt(bound) | Lt(bound):
                        yield option, bound
                    case Ge(bound):
                        yield option, bound - 1
                    case Le(bound):
                        yield option, bound + 1
                    case _:
                        pytest.fail(f"{loss.__name__}: teach `limits` about {limit}.")
            yield option, math.nan


@every_loss
def test_what_the_annotations_forbid_is_refused_in_python_too(loss: Callable[..., Tensor]) -> None:
    for option, wrong in limits(loss):
        with pytest.raises(ValueError, match=f"{option} must .*got {wrong}"):
            loss(**arguments(loss), **{option: wrong})


@pytest.mark.parametrize("loss", [case for case in TOLD if is_on_logits(case.values[0])])
@pytest.mark.parametrize(
    "wrong", [(5, CLASSES - 1), (1, CLASSES), (5, 1), (4, CLASSES), (CLASSES,)]
)
def test_a_shape_mismatch_names_both_shapes(
    loss: Callable[..., Tensor], wrong: tuple[int, ...]
) -> None:
    given = arguments(loss)
    with pytest.raises(ValueError, match="same shape") as error:
        loss(**{**given, "teacher": torch.zeros(wrong, dtype=torch.float64)})
    assert str(wrong) in str(error.value)
    assert str(tuple(given["student"].shape)) in str(error.value)


@every_loss_on_features
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_features_of_other_examples_name_both_shapes(
    loss: Callable[..., Tensor], rows: int
) -> None:
    given = arguments(loss)
    wrong = (rows, *form(loss))
    with pytest.raises(ValueError, match=r"same (shape|number of examples)") as error:
        loss(**{**given, "teacher": torch.zeros(wrong, dtype=torch.float64)})
    assert str(wrong) in str(error.value)
    assert str(tuple(given["student"].shape)) in str(error.value)


@every_loss_on_features
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7])
def test_features_of_another_size_are_compared_or_refused(
    loss: Callable[..., Tensor], axis: int, size: int
) -> None:
    shape = [5, *form(loss)]
    shape[min(axis, len(shape) - 1)] = size
    given = {**arguments(loss), "teacher": random(5, 1, form=tuple(shape[1:]))}
    try:
        value = loss(**given)
    except ValueError:
        return
    assert value.shape == ((5,) if is_per_row(loss.__name__) else ())
    assert value.isfinite().all()


@every_loss_on_features
@pytest.mark.parametrize("shape", [(), (5,), (5, 0), (5, 4, 0), (5, 4, 3, 0), (5, 0, 3, 3)])
def test_features_without_values_are_refused(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    given = {**arguments(loss), "student": torch.zeros(shape), "teacher": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"features|maps") as error:
        loss(**given)
    assert str(shape) in str(error.value)


@every_loss
def test_labels_of_other_rows_name_both_shapes(loss: Callable[..., Tensor]) -> None:
    given = arguments(loss)
    if "labels" in given:
        with pytest.raises(ValueError, match="labels must be") as error:
            loss(**{**given, "labels": given["labels"][:-1]})
        assert str(tuple(given["labels"][:-1].shape)) in str(error.value)
        assert f"{tuple(given['student'].shape)}" in str(error.value)


# Values.


@every_told_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_at_equality(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    if loss.__name__ in NEVER_ZERO:
        return
    given = arguments(loss, dtype=dtype)
    agreeing = AGREEING.get(loss.__name__, torch.clone)(given["teacher"])
    value, gradient = value_and_gradient(loss, {**given, "student": agreeing})
    assert value.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


@every_told_loss
@REPRODUCIBLE
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 30))
def test_never_negative_and_not_zero_apart(
    loss: Callable[..., Tensor], seed: int, scale: float
) -> None:
    value = loss(**arguments(loss, seed=seed, scale=scale))
    assert (value > -1e-9).all()
    assert value.sum() > 1e-6 or loss is losses.bounded_mse  # a student ahead of its teacher


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_value_and_gradient_at_logits_of_ten_thousand(
    loss: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    given = arguments(loss, dtype=dtype)
    signs = {name: given[name].sign() * 1e4 for name in ("student", "teacher") if name in given}
    mixed = {name: torch.where(value > 0, value, given[name]) for name, value in signs.items()}
    for extreme in (signs, mixed):
        value, gradient = value_and_gradient(loss, {**given, **extreme})
        assert value.isfinite().all()
        if dtype is not torch.float16 or loss.__name__ not in BEYOND_HALF:
            assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_narrow_inputs_are_computed_in_float32(
    loss: Callable[..., Tensor], dtype: torch.dtype, seed: int
) -> None:
    narrow = arguments(loss, rows=64, seed=seed, dtype=dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in narrow.items()}
    value, gradient = value_and_gradient(loss, narrow)
    true_value, true_gradient = value_and_gradient(loss, exact)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-5)
    # The gradient itself is rounded to the width of the student's logits, once.
    rounding = 1e-5 + torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=rounding, atol=1e-5)


@every_loss
@pytest.mark.parametrize("width", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_width_is_welcome(
    loss: Callable[..., Tensor], width: torch.dtype
) -> None:
    given = arguments(loss)
    mixed = {**given, "student": given["student"].float()}
    if "teacher" in given:
        mixed["teacher"] = given["teacher"].to(width)
    value, gradient = value_and_gradient(loss, mixed)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(**given), rtol=0.05, atol=0.05)


# Gradients.


@every_loss
def test_gradient_is_that_of_the_value(loss: Callable[..., Tensor]) -> None:
    if loss.__name__ in HELD_WEIGHT:
        return
    for temperature in (0.5, 1.0, 4.0):
        options = {"temperature": temperature} if "temperature" in loss.__annotations__ else {}
        given = arguments(loss, rows=3)
        student = given.pop("student").requires_grad_()
        assert torch.autograd.gradcheck(
            lambda z, given=given, options=options: loss(z, **given, **options),
            student,
            atol=1e-6,
            rtol=1e-4,
        )


@every_told_loss
def test_no_gradient_reaches_the_teacher(loss: Callable[..., Tensor]) -> None:
    given = {k: v.requires_grad_(v.is_floating_point()) for k, v in arguments(loss).items()}
    loss(**given).sum().backward()
    assert given["student"].grad is not None
    assert given["teacher"].grad is None


@every_loss
def test_inputs_are_not_changed(loss: Callable[..., Tensor]) -> None:
    given = arguments(loss)
    before = {name: value.clone() for name, value in given.items()}
    value_and_gradient(loss, given)
    for name, value in given.items():
        assert torch.equal(value, before[name]), name


# Absent classes: -inf on both sides.


def without_last(given: Arguments, columns: int) -> tuple[Arguments, Arguments]:
    """The same arguments with the last columns at -inf, and with them cut off."""
    padded, cut = dict(given), dict(given)
    for name in {"student", "teacher"} & set(given):
        padded[name] = given[name].clone()
        padded[name][:, -columns:] = -math.inf
        cut[name] = given[name][:, :-columns]
    if given.get("labels", torch.empty(0)).ndim == 2:
        cut["labels"] = given["labels"][:, :-columns]
    return padded, cut


@every_loss_on_logits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2])
def test_absent_classes_are_as_if_cut_off(
    loss: Callable[..., Tensor], dtype: torch.dtype, columns: int
) -> None:
    padded, cut = without_last(arguments(loss, dtype=dtype), columns)
    value, gradient = value_and_gradient(loss, padded)
    wanted, wanted_gradient = value_and_gradient(loss, cut)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient[:, :-columns], wanted_gradient)
    assert (gradient[:, -columns:] == 0).all()


@pytest.mark.parametrize("loss", [case for case in TOLD if is_on_logits(case.values[0])])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_class_only_one_side_excludes_gives_no_nan(
    loss: Callable[..., Tensor], side: str
) -> None:
    given = arguments(loss)
    given[side][:, -1] = -math.inf
    value, gradient = value_and_gradient(loss, given)
    assert not value.isnan().any()
    assert not gradient.isnan().any()
    if value.isfinite().all():
        assert gradient.isfinite().all()


# Sizes.


@every_loss
@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_none_or_one(loss: Callable[..., Tensor], rows: int) -> None:
    value, gradient = value_and_gradient(loss, arguments(loss, rows=rows))
    assert value.shape == ((rows,) if is_per_row(loss.__name__) else ())
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@every_loss_on_logits
def test_two_classes_work_or_are_refused(loss: Callable[..., Tensor]) -> None:
    given = arguments(loss)
    two = {name: value[:, :2] if value.ndim == 2 else value % 2 for name, value in given.items()}
    if loss is losses.decoupled_kl:
        with pytest.raises(ValueError, match=r"decoupled_kl needs at least three classes"):
            loss(**two)
        return
    value, gradient = value_and_gradient(loss, two)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@every_loss_on_logits
@pytest.mark.parametrize("shape", [(5, 1), (5,), (5, 3, 4)])
def test_a_softmax_is_over_rows_of_two_or_more(
    loss: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    if loss is losses.mse:
        assert loss(torch.zeros(shape), torch.ones(shape)).tolist() == [1.0] * 5
        return
    if loss.__name__ in ON_SIGMOIDS:
        with pytest.raises(ValueError, match="at least one class") as error:
            loss(*[torch.zeros(shape if shape != (5, 1) else (5, 0))] * 2)
        return
    odd = {name: torch.zeros(shape) for name in ("student", "teacher")}
    with pytest.raises(ValueError, match="at least two classes") as error:
        loss(**{name: odd.get(name, value) for name, value in arguments(loss).items()})
    assert str(shape) in str(error.value)


# Rows and relations.


@pytest.mark.parametrize("loss", PER_ROW)
@REPRODUCIBLE
@given(data=st.data())
def test_rows_do_not_depend_on_order_or_split(
    loss: Callable[..., Tensor], data: st.DataObject
) -> None:
    rows = data.draw(st.integers(1, 9))
    given_ = arguments(loss, rows=rows, seed=data.draw(st.integers(0, 1000)))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows))) | {0, rows})
    shuffled = taking(order, given_)
    parts = [
        value_and_gradient(loss, taking(slice(a, b), shuffled)) for a, b in itertools.pairwise(cuts)
    ]
    value, gradient = value_and_gradient(loss, given_)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), value[order])
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), gradient[order])


@pytest.mark.parametrize("loss", SCALAR)
@REPRODUCIBLE
@given(order=st.permutations(range(7)), seed=st.integers(0, 1000))
def test_relations_do_not_depend_on_the_order(
    loss: Callable[..., Tensor], order: list[int], seed: int
) -> None:
    given_ = arguments(loss, rows=7, seed=seed)
    value, gradient = value_and_gradient(loss, given_)
    again, gradient_again = value_and_gradient(loss, taking(torch.tensor(order), given_))
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(gradient_again, gradient[order])


@every_loss
def test_memory_layout_changes_nothing(loss: Callable[..., Tensor]) -> None:
    given = arguments(loss)
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in given.items()}
    assert not strided["student"].is_contiguous()
    torch.testing.assert_close(loss(**strided), loss(**given))


@every_loss
def test_one_graph_when_compiled(loss: Callable[..., Tensor]) -> None:
    given = arguments(loss)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given), loss(**given))


def test_a_loss_that_asks_for_the_unknown_fails_the_laws() -> None:
    def stranger(student: Tensor, offsets: Tensor) -> Tensor:
        return student.sum(1) + offsets

    with pytest.raises(pytest.fail.Exception, match=r"stranger asks for \['offsets'\]"):
        arguments(stranger)
