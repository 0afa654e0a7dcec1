"""Wide logits in chunks: the numbers of the dense losses, what is in memory, what is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attar import losses
from attar.losses import Projected, TopK, wide
from attar.losses.wide import Item, _blocks, _pass

Loss = Callable[..., Tensor]
ROWS, WIDTH = 7, 19
TEMPERED: dict[str, Loss] = {
    "kl": losses.kl_divergence,
    "reverse": losses.reverse_kl,
    "skewed": losses.skewed_kl,
    "skewed, reverse": partial(losses.skewed_kl, reverse=True, skew=0.3),
    "jsd": losses.jensen_shannon,
    "jsd 0.9": partial(losses.jensen_shannon, beta=0.9),
    "jsd normalised": partial(losses.jensen_shannon, beta=0.1, normalized=True),
}
FUSED = {
    f"{name}, {t}": partial(f, temperature=t) for name, f in TEMPERED.items() for t in (1, 2, 4)
}
FUSED["total variation"] = losses.total_variation
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def head(
    rows: int = ROWS, *, width: int = WIDTH, seed: int = 0, bias: bool = False, **options: Any
) -> Projected:
    """Logits of a few rows, to be differentiated."""
    hidden, weight = random(rows, 5, seed=seed), random(width, 5, seed=seed + 1)
    layer = random(width, seed=seed + 2).requires_grad_() if bias else None
    return Projected(hidden.requires_grad_(), weight.requires_grad_(), layer, **options)


def teachers(rows: int = ROWS) -> dict[str, Projected | Tensor | TopK]:
    """The same answers in three forms; the third knows four of them."""
    answers = Projected(random(rows, 3, seed=5), random(WIDTH, 3, seed=6), random(WIDTH, seed=7))
    logits = answers.dense()
    top = TopK.of(logits, k=4, temperatures=(1, 2, 4))
    return {"projected": answers, "tensor": logits, "top k": top}


def dense(teacher: Any) -> Any:
    return teacher.dense() if isinstance(teacher, Projected) else teacher


def labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) * 5 % WIDTH


def parts(student: Projected) -> list[Tensor]:
    found = (student.hidden, student.weight, student.bias)
    return [p for p in found if p is not None and p.requires_grad]


def reference(student: Projected, items: Sequence[Item]) -> tuple[Tensor, list[Tensor]]:
    """The same as `combined`, by the dense losses and autograd."""
    values = []
    for item in items:
        told = () if item.teacher is None else (dense(item.teacher),)
        values.append(item.loss(student.dense(), *told, **item.supplied))
    return sum(i.weight * v for i, v in zip(items, values, strict=True)), values


def assert_same(
    student: Projected,
    items: Sequence[Item],
    *,
    by: Tensor | None = None,
    chunk_bytes: int = 1 << 28,
    tolerance: float = 1e-10,
) -> None:
    """Values, total and all gradients are those of the dense losses."""
    total, values = wide.combined(student, items, chunk_bytes=chunk_bytes)
    wanted, each = reference(student, items)
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(values, [v.detach() for v in each])
    close(total, wanted)
    by = torch.full_like(total, 0.3) if by is None else by
    ours = torch.autograd.grad(total, parts(student), by)
    theirs = torch.autograd.grad(wanted, parts(student), by)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other, msg=lambda m: f"{[i.name for i in items]}: {m}")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of as few rows as the budget says, and blocks of two rows."""
    monkeypatch.setattr(_pass, "LEAST_ROWS", 1)
    monkeypatch.setattr(_pass, "BLOCK", 2 * WIDTH)
    return


# The numbers of the dense losses.


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", teachers())
@pytest.mark.parametrize("loss", FUSED.values(), ids=FUSED)
def test_a_divergence_is_the_dense_one(loss: Loss, kind: str, options: dict[str, Any]) -> None:
    assert_same(head(**options), [Item(loss, 1.0, teachers()[kind])])


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_is_the_dense_one(
    soft: bool, smoothing: float, options: dict[str, Any]
) -> None:
    given = random(ROWS, WIDTH, seed=9).softmax(-1) if soft else labels()
    loss = partial(losses.cross_entropy, label_smoothing=smoothing)
    assert_same(head(**options), [Item(loss, 0.7, supplied={"labels": given})])


@pytest.mark.parametrize("kind", teachers())
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("temperature", [1, 2])
def test_losses_in_one_pass_are_their_weighted_sum(
    kind: str, smoothing: float, soft: bool, temperature: int
) -> None:
    teacher = teachers()[kind]
    given = random(ROWS, WIDTH, seed=9).softmax(-1) if soft else labels()
    items = [
        Item(
            partial(losses.cross_entropy, label_smoothing=smoothing), 0.5, None, {"labels": given}
        ),
        Item(partial(losses.kl_divergence, temperature=temperature), 0.9, teacher),
        Item(losses.reverse_kl, 0.3, teacher),
        Item(losses.alpha_beta_divergence, 0.2, teacher),
        Item(partial(losses.jensen_shannon, temperature=2), -0.4, teacher),
        Item(losses.skewed_kl, 0.0, teacher),
        Item(losses.cross_entropy, 0.1, None, {"labels": labels().flip(0)}),
    ]
    assert_same(head(bias=True, softcap=5.0), items)
    assert_same(head(), items[:2])
    assert_same(head(), items[5:6])


def test_two_teachers_are_kept_apart() -> None:
    one, other = teachers()["projected"], Projected(random(ROWS, 2), random(WIDTH, 2, seed=4))
    items = [Item(losses.kl_divergence, 1.0, one), Item(losses.kl_divergence, 2.0, other)]
    assert_same(head(), items)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("kind", teachers())
def test_any_split_gives_the_same(kind: str, rows_a_chunk: int) -> None:
    teacher = teachers()[kind]
    items = [
        Item(losses.kl_divergence, 1.0, teacher),
        Item(losses.cross_entropy, 1.0, supplied={"labels": labels()}),
        Item(losses.alpha_beta_divergence, 1.0, teacher),
    ]
    buffers = 2 if kind == "projected" else 1
    size = rows_a_chunk * buffers * WIDTH * 8
    assert_same(head(bias=True), items, chunk_bytes=size)
    assert_same(head(bias=True), items, by=random(ROWS, seed=3), chunk_bytes=size)


def test_chunks_are_of_nearly_one_size_and_within_the_budget() -> None:
    assert _pass._rows_of(100, 95, "cpu") == 95
    assert _pass._rows_of(100, 101, "cpu") == 51
    assert _pass._rows_of(0, 1000, "cpu") == 63  # 16 chunks of the least, 64 rows
    assert _pass._rows_of(100, 0, "cpu") == 0
    assert _pass._rows_of(10_000, 1024, "cpu") == 512
    assert _pass._rows_of(10_000, 1024, "cuda") == 1024


def user_loss(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    return (student.softmax(-1) - teacher.softmax(-1)).abs().pow(power).sum(-1)


GENERIC = {
    "alpha beta": (losses.alpha_beta_divergence, {}),
    "adaptive": (losses.adaptive_kl, {}),
    "decoupled": (losses.decoupled_kl, {"labels": labels()}),
    "user": (partial(user_loss, power=1.5), {}),
    "options by place": (partial(partial(losses.kl_divergence), temperature=3.0), {}),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("loss", "supplied"), GENERIC.values(), ids=GENERIC)
@pytest.mark.parametrize("kind", ["projected", "tensor"])
def test_any_loss_of_rows_is_taken(loss: Loss, supplied: dict[str, Any], kind: str) -> None:
    items = [Item(loss, 0.8, teachers()[kind], supplied)]
    assert_same(head(bias=True, softcap=4.0), items, chunk_bytes=3 * WIDTH * 16)


def test_what_is_supplied_is_cut_with_the_rows_and_numbers_are_passed_on() -> None:
    def loss(student: Tensor, teacher: Tensor, ids: Tensor, progress: float) -> Tensor:
        return (student - progress * teacher).square().sum(-1) * ids

    for progress in (0.5, torch.tensor(0.5)):
        supplied = {"ids": torch.arange(ROWS), "progress": progress}
        assert_same(head(), [Item(loss, 1.0, teachers()["tensor"], supplied)])


def test_a_loss_without_gradient_has_none() -> None:
    def constant(student: Tensor) -> Tensor:
        return student.detach().sum(-1)

    student = head()
    total, _ = wide.combined(student, [Item(constant)])
    total.sum().backward()
    assert not student.hidden.grad.any()
    assert not student.weight.grad.any()


ALONE = {
    "kl_divergence": {"temperature": 2.0},
    "reverse_kl": {"temperature": 2.0},
    "skewed_kl": {"skew": 0.4, "reverse": True, "temperature": 2.0},
    "jensen_shannon": {"beta": 0.3, "normalized": True, "temperature": 2.0},
    "total_variation": {},
}


@pytest.mark.parametrize("name", ALONE)
def test_the_functions_are_the_dense_ones(name: str) -> None:
    teacher = teachers()["tensor"]
    found = getattr(wide, name)(head(), teacher, **ALONE[name], chunk_bytes=1 << 10)
    torch.testing.assert_close(found, getattr(losses, name)(head().dense(), teacher, **ALONE[name]))
    default = getattr(wide, name)(head(), teacher)
    torch.testing.assert_close(default, getattr(losses, name)(head().dense(), teacher))


def test_cross_entropy_alone_is_the_dense_one() -> None:
    found = wide.cross_entropy(head(), labels(), label_smoothing=0.1)
    wanted = losses.cross_entropy(head().dense(), labels(), label_smoothing=0.1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        wide.cross_entropy(head(), labels()), losses.cross_entropy(head().dense(), labels())
    )


def test_any_loss_can_be_applied() -> None:
    teacher = teachers()["projected"]
    found = wide.apply(losses.decoupled_kl, head(), teacher, labels=labels(), chunk_bytes=1 << 10)
    wanted = losses.decoupled_kl(head().dense(), teacher.dense(), labels())
    torch.testing.assert_close(found, wanted)


PUBLISHED: list[tuple[str, Loss, float]] = [
    ("llm_reverse_kl", losses.reverse_kl, 1.0),
    ("gkd_jsd_b0.5_T0.9", partial(losses.jensen_shannon, temperature=0.9), 0.9),
    ("gkd_jsd_b0.5_T1.0", losses.jensen_shannon, 1.0),
]


@pytest.mark.parametrize(("name", "loss", "temperature"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_published_numbers_are_recovered(
    name: str, loss: Loss, temperature: float, oracle: Any
) -> None:
    case = oracle(name)
    kept = case.inputs["label"] >= 0
    logits, told = case.inputs["z_s"][kept], case.inputs["z_t"][kept]
    student = Projected(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))
    value = wide.apply(loss, student, told).mean() / temperature**2
    case.assert_value(value)
    case.assert_gradient(value)


def test_a_known_loss_does_not_go_through_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(_blocks.Block, "_by_autograd", never)
    whole = TopK.of(teachers()["tensor"], k=WIDTH, temperatures=(1, 2, 4))
    for teacher in (*teachers().values(), whole):
        items = [Item(loss, 1.0, teacher) for loss in FUSED.values()]
        wide.combined(head(), [*items, Item(losses.cross_entropy, 1.0, None, {"labels": labels()})])
    with pytest.raises(AssertionError):
        wide.combined(head(), [Item(losses.adaptive_kl, 1.0, teachers()["tensor"])])


# Columns that are absent, and logits beyond what probabilities show.


def excluding(student: Sequence[int], teacher: Sequence[int]) -> tuple[Projected, Projected]:
    """Heads in which these columns have no probability."""
    sides = head(bias=True), teachers()["projected"]
    for side, columns in zip(sides, (student, teacher), strict=True):
        with torch.no_grad():
            side.bias[list(columns)] = -math.inf
    return sides


EXCLUDED = {"both": ([3, 18], [3, 18]), "student": ([3], []), "teacher": ([], [3])}


@pytest.mark.parametrize("excluded", EXCLUDED.values(), ids=EXCLUDED)
@pytest.mark.parametrize("loss", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("kind", ["projected", "tensor", "top k"])
def test_absent_columns_are_as_in_the_dense_losses(
    loss: Loss, excluded: tuple[list[int], list[int]], kind: str
) -> None:
    student, teacher = excluding(*excluded)
    told = {
        "projected": teacher,
        "tensor": teacher.dense(),
        "top k": TopK.of(teacher.dense(), k=4, temperatures=(1, 2, 4)),
    }[kind]
    items = [
        Item(loss, 1.0, told),
        Item(losses.cross_entropy, 0.5, None, {"labels": (labels() == 3).long()}),
    ]
    assert_same(student, items)
    assert_same(student, items[:1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_label_of_an_absent_column_costs_infinitely(smoothing: float) -> None:
    student, teacher = excluding([3, 18], [3, 18])
    loss = partial(losses.cross_entropy, label_smoothing=smoothing)
    items = [Item(loss, 1.0, None, {"labels": torch.tensor([3, 0, 18, 1, 2, 4, 5])})]
    for several in (items, [Item(losses.reverse_kl, 1.0, teacher), *items]):
        _, values = wide.combined(student, several)
        assert torch.equal(values[-1], reference(student, items)[1][0].detach())
        assert values[-1].isinf().sum() == (ROWS if smoothing else 2)


def test_soft_labels_may_leave_out_absent_columns() -> None:
    student, teacher = excluding([3, 18], [3, 18])
    soft = teacher.dense().softmax(-1)
    hard = Item(losses.cross_entropy, 0.5, None, {"labels": soft})
    assert_same(student, [hard])
    assert_same(student, [hard, Item(losses.reverse_kl, 1.0, teacher)])
    assert_same(student, [hard, Item(losses.cross_entropy, 0.5, None, {"labels": soft.argmax(-1)})])


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("loss", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("kind", teachers())
def test_extreme_logits_are_as_in_the_dense_losses(loss: Loss, scale: float, kind: str) -> None:
    logits = random(ROWS, WIDTH, seed=8, scale=scale)
    told = {"tensor": logits, "top k": TopK.of(logits, k=4, temperatures=(1, 2, 4))}
    told["projected"] = Projected(random(ROWS, 3, scale=scale), random(WIDTH, 3, seed=6))
    assert_same(head(scale=scale), [Item(loss, 1.0, told[kind])], tolerance=1e-8)


def test_all_columns_kept_is_the_dense_loss() -> None:
    logits = teachers()["tensor"]
    whole = TopK.of(logits, k=WIDTH, temperatures=(1,))
    loss = partial(losses.kl_divergence, temperature=1)
    found = [wide.apply(loss, head(), teacher) for teacher in (whole, logits)]
    torch.testing.assert_close(*found)
    assert_same(head(), [Item(loss, 1.0, whole)])


def test_columns_that_are_not_kept_may_all_be_absent() -> None:
    student, teacher = excluding([3, 18], [3, 18])
    most = TopK.of(teacher.dense(), k=WIDTH - 2, temperatures=(1,))
    for loss in (losses.reverse_kl, losses.jensen_shannon, losses.total_variation):
        assert_same(student, [Item(loss, 1.0, most)])


def test_equal_sides_have_no_loss_and_no_gradient() -> None:
    student = head()
    for loss in FUSED.values():
        total = wide.apply(loss, student, student.detach())
        gradients = torch.autograd.grad(total.sum(), parts(student))
        assert total.abs().max() < 1e-12
        assert all(g.abs().max() < 1e-11 for g in gradients)


# Gradients: who gets one, and by what factor of each row.


@pytest.mark.parametrize("loss", [*FUSED.values(), losses.alpha_beta_divergence])
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    teacher = teachers()["tensor"][:2]

    def value(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student = Projected(hidden, weight, bias, scale=0.7, softcap=4.0)
        return wide.apply(loss, student, teacher)

    student = head(2, bias=True)
    assert torch.autograd.gradcheck(value, tuple(parts(student)))


@pytest.mark.parametrize("kind", teachers())
@pytest.mark.parametrize("name", ["kl, 2", "jsd, 1", "total variation"])
def test_rows_may_have_factors_of_their_own(name: str, kind: str) -> None:
    items = [
        Item(FUSED[name], 1.0, teachers()[kind]),
        Item(losses.cross_entropy, 0.5, supplied={"labels": labels()}),
    ]
    factors = random(ROWS, seed=3)
    factors[2] = 0.0
    assert_same(head(bias=True, softcap=5.0), items, by=factors)
    for value in (0.0, 1.0, -2.0):
        assert_same(head(bias=True), items, by=torch.full((ROWS,), value).double())


def test_rows_that_do_not_count_may_hold_anything() -> None:
    counted = torch.tensor([True, False, True, True, False, True, True])
    student, teacher = head(), teachers()["tensor"].clone()
    poisoned = student.hidden.detach().clone()
    poisoned[~counted], teacher[~counted] = math.nan, math.nan
    poisoned.requires_grad_()
    both = Projected(poisoned, student.weight)
    selected = wide.kl_divergence(both[counted], teacher[counted]).sum()
    masked = wide.kl_divergence(both, teacher).where(counted, 0.0).sum()
    clean = losses.kl_divergence(student.dense()[counted], teachers()["tensor"][counted]).sum()
    wanted = torch.autograd.grad(clean, parts(student))
    for value in (selected, masked):
        torch.testing.assert_close(value, clean)
        gradients = torch.autograd.grad(value, (poisoned, student.weight))
        torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_as_before(
    frozen: str, uneven: bool
) -> None:
    student = head(bias=True)
    getattr(student, frozen).requires_grad_(False)
    by = random(ROWS, seed=3) if uneven else None
    assert_same(student, [Item(losses.kl_divergence, 1.0, teachers()["projected"])], by=by)


def test_a_frozen_head_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[Tensor | None]] = []
    monkeypatch.setattr(
        _pass.Gradients,
        "finished",
        lambda self: made.append([self.hidden, self.weight, self.bias]) or made[-1],
    )
    student = head(bias=True)
    student.weight.requires_grad_(False)
    student.bias.requires_grad_(False)
    wide.kl_divergence(student, teachers()["projected"])
    assert [g is None for g in made[0]] == [False, True, True]


@pytest.mark.parametrize("uneven", [False, True])
def test_the_backward_pass_may_be_asked_again(uneven: bool) -> None:
    student = head()
    total = wide.reverse_kl(student, teachers()["projected"])
    by = random(ROWS, seed=3) if uneven else torch.full((ROWS,), 0.1).double()
    asked = partial(torch.autograd.grad, total, parts(student), by)
    first = [g.clone() for g in asked(retain_graph=True)]
    torch.testing.assert_close(list(asked()), first)


def test_without_gradients_there_are_only_values() -> None:
    student, teacher = head(), teachers()["projected"]
    wanted = wide.kl_divergence(student, teacher)
    with torch.no_grad():
        quiet = wide.kl_divergence(student, teacher)
    frozen = wide.kl_divergence(student.detach(), teacher)
    assert wanted.requires_grad
    assert not quiet.requires_grad
    assert not frozen.requires_grad
    assert torch.equal(quiet, wanted)
    assert torch.equal(frozen, wanted)


def test_no_gradient_goes_to_the_teacher() -> None:
    teacher = Projected(random(ROWS, 3).requires_grad_(), random(WIDTH, 3).requires_grad_())
    wide.jensen_shannon(head(), teacher).sum().backward()
    wide.apply(losses.alpha_beta_divergence, head(), teacher).sum().backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None


@pytest.mark.parametrize("loss", [losses.kl_divergence, losses.alpha_beta_divergence])
def test_no_rows_give_zeros_that_can_be_differentiated(loss: Loss) -> None:
    student = head(0, bias=True)
    total = wide.apply(loss, student, teachers(0)["projected"])
    assert total.shape == (0,)
    gradients = torch.autograd.grad(total.sum(), parts(student))
    assert [g.shape for g in gradients] == [p.shape for p in parts(student)]
    assert not any(g.any() for g in gradients)


# Precision.


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("name", ["kl_divergence", "reverse_kl", "jensen_shannon"])
def test_inputs_in_half_precision_lose_nothing_more(name: str, temperature: float) -> None:
    hidden, weight = random(64, 16).bfloat16(), random(300, 16, seed=1).bfloat16()
    teacher = Projected(random(64, 16, seed=2).bfloat16(), random(300, 16, seed=3).bfloat16())
    exact = Projected(hidden.double().requires_grad_(), weight.double().requires_grad_())
    loss = partial(getattr(losses, name), temperature=temperature)
    told = teacher.hidden.double() @ teacher.weight.double().T
    wanted = torch.autograd.grad(loss(exact.dense(), told).mean(), parts(exact))
    # What is given in the type of the input is the exact gradient, rounded once.
    student = Projected(hidden.requires_grad_(), weight.requires_grad_())
    halves = torch.autograd.grad(wide.apply(loss, student, teacher).mean(), parts(student))
    for half, whole in zip(halves, wanted, strict=True):
        assert half.dtype == torch.bfloat16
        assert relative(half, whole) < 1.05 * relative(whole.bfloat16(), whole)
    mixed = Projected(hidden, weight.detach().float().requires_grad_())
    (full,) = torch.autograd.grad(wide.apply(loss, mixed, teacher).mean(), mixed.weight)
    assert relative(full, wanted[1]) < 1e-5


def test_weights_in_half_precision_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student = head()
    half = Projected(student.hidden.detach().half(), student.weight.detach().half())
    wanted = wide.kl_divergence(half, teachers()["tensor"])
    monkeypatch.setattr(_pass, "WIDENED", 4 * 5)
    sizes = [len(half.weight[c]) for c in _pass._columns(half.weight, torch.float32)]
    assert sizes == [4, 4, 4, 4, 3]
    for part in (half.hidden, half.weight):
        part.requires_grad_()
    found = wide.kl_divergence(half, teachers()["tensor"])
    torch.testing.assert_close(found, wanted)
    exact = Projected(*(p.detach().double().requires_grad_() for p in parts(half)))
    theirs = torch.autograd.grad(
        losses.kl_divergence(exact.dense(), teachers()["tensor"]).sum(), parts(exact)
    )
    for mine, other in zip(torch.autograd.grad(found.sum(), parts(half)), theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=2e-3, atol=1e-3)


def test_autocast_does_not_reach_the_loss() -> None:
    student = Projected(random(ROWS, 5).float(), random(WIDTH, 5, seed=1).float())
    teacher = teachers()["tensor"].float()
    wanted = wide.kl_divergence(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.kl_divergence(student, teacher), wanted)


# Memory.


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("kind", ["projected", "top k"])
@pytest.mark.parametrize("loss", [losses.jensen_shannon, losses.alpha_beta_divergence])
def test_nothing_of_the_size_of_the_logits_is_made(loss: Loss, kind: str, uneven: bool) -> None:
    rows, a_chunk = 80, 8
    student = head(rows)
    teacher = teachers(rows)[kind]
    buffers = 2 if kind == "projected" else 1
    with Largest() as largest:
        total = wide.apply(loss, student, teacher, chunk_bytes=a_chunk * buffers * WIDTH * 8)
        total.backward(random(rows) if uneven else torch.ones_like(total))
    most = max(a_chunk * WIDTH, student.hidden.numel(), student.weight.numel())
    assert 0 < largest.numbers <= most
    assert most < rows * WIDTH / 3


# What is refused.


def refused(item: Item, message: str, student: Projected | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        wide.combined(head() if student is None else student, [item])


def test_losses_of_whole_signals_are_refused_by_name() -> None:
    def pooled(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return (student - teacher).square().sum(-1)

    def mean(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean()

    teacher = teachers()["tensor"]
    refused(Item(pooled, 1.0, teacher), r"pooled takes 'mask', so it is of whole signals")
    refused(Item(partial(mean), 1.0, teacher), r"mean must give a value for each row.*got \(\)")
    refused(Item(lambda s: None), r"<lambda> must give a value .* got NoneType")
    refused(Item(nn.Identity()), "Identity has weights or a memory")
    refused(Item(losses.correlation, 1.0, teacher), "correlation must give a value for each row")


def test_shapes_that_do_not_fit_are_refused() -> None:
    teacher = teachers()["tensor"]
    kl = losses.kl_divergence
    refused(Item(kl, 1.0, teacher[:, 1:]), r"same shape, got \(7, 19\) and \(7, 18\)")
    refused(
        Item(kl, 1.0, teacher),
        r"\[N, V\].*got \(2, 3, 19\)",
        Projected(random(2, 3, 5), random(19, 5)),
    )
    refused(Item(kl, 1.0, teacher[:, :1]), "at least two columns", head(width=1))
    ids = {"ids": torch.zeros(3)}
    refused(
        Item(user_loss, 1.0, teacher, ids), r"ids of user_loss must have a row .* 7, got \(3,\)"
    )
    wrong = {"labels": labels()[1:]}
    refused(Item(losses.cross_entropy, 1.0, None, wrong), r"labels must be class numbers \[N\]")
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, got 0"):
        wide.kl_divergence(head(), teacher, chunk_bytes=0)


@pytest.mark.parametrize("wrong", [-100, WIDTH])
def test_labels_that_are_no_columns_are_refused(wrong: int) -> None:
    given = labels()
    given[3] = wrong
    message = rf"labels must lie in \[0, {WIDTH}\), got {wrong}"
    refused(Item(losses.cross_entropy, 1.0, None, {"labels": given}), message)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.kl_divergence, {"temperature": 0.0}, "temperature must be a number above 0"),
        (losses.jensen_shannon, {"beta": 1.0}, "beta must lie between 0 and 1, got 1.0"),
        (losses.skewed_kl, {"skew": 0.0}, "skew must lie between 0 and 1"),
    ],
)
def test_options_are_refused_in_the_words_of_the_loss(
    loss: Loss, options: dict[str, Any], message: str
) -> None:
    refused(Item(partial(loss, **options), 1.0, teachers()["tensor"]), message)
    refused(Item(partial(loss, **options), 1.0, teachers(0)["tensor"]), message, head(0))


def test_what_a_top_k_does_not_know_is_refused() -> None:
    few = TopK.of(teachers()["tensor"], k=4, temperatures=(1.0,))
    refused(
        Item(losses.kl_divergence, 1.0, few), "temperature must be one of those that were stored"
    )
    none = TopK.of(teachers()["tensor"], k=0, temperatures=(4.0,))
    refused(Item(losses.kl_divergence, 1.0, none), "keeps no logits, only draws")
    refused(Item(losses.adaptive_kl, 1.0, few), "holds some of its logits")


@pytest.mark.parametrize("name", sorted({*wide.__all__} & {*losses.__all__}))
def test_a_wide_loss_has_the_options_and_defaults_of_the_dense_one(name: str) -> None:
    """A person who moves from one to the other must not get another loss without a word."""
    dense, own = (
        {
            option.name: option.default
            for option in inspect.signature(getattr(room, name)).parameters.values()
            if option.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for room in (losses, wide)
    )
    own.pop("chunk_bytes")
    assert own == dense
