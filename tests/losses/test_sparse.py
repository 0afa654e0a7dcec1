"""Losses on a teacher of which some logits are kept: exactness, laws, errors, draws, refusals."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attar import losses
from attar.losses import (
    TopK,
    alpha_beta_divergence,
    jensen_shannon,
    kl_divergence,
    reverse_kl,
    sampled_kl,
    skewed_kl,
    total_variation,
)
from attar.losses._rows import TAKE_TOP_K
from attar.losses.sparse import BLOCK

Loss = Callable[..., Tensor]
GRID = (0.5, 1.0, 2.0, 4.0)
BUCKETS: dict[str, Loss] = {
    "kl": kl_divergence,
    "reverse": reverse_kl,
    "skewed": skewed_kl,
    "skewed, reverse": partial(skewed_kl, reverse=True),
    "jsd": jensen_shannon,
    "jsd 0.9": partial(jensen_shannon, beta=0.9),
    "total variation": total_variation,
    "alpha beta": alpha_beta_divergence,
    "alpha 0": partial(alpha_beta_divergence, alpha=0.0),
    "beta 0": partial(alpha_beta_divergence, beta=0.0),
    "both 0": partial(alpha_beta_divergence, alpha=0.0, beta=0.0),
}
CASES = [
    pytest.param(
        partial(loss, temperature=t) if loss is not total_variation else loss, t, id=f"{name}, {t}"
    )
    for name, loss in BUCKETS.items()
    for t in ((1.0, 2.0) if loss is not total_variation else (1.0,))
]
every_bucket = pytest.mark.parametrize(("loss", "temperature"), CASES)


def random(rows: int = 5, classes: int = 9, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale


def pair(rows: int = 5, classes: int = 9) -> tuple[Tensor, Tensor]:
    return random(rows, classes), random(rows, classes, seed=1)


def top(teacher: Tensor, k: int, temperatures: tuple[float, ...] = GRID) -> TopK:
    return TopK.of(teacher, k=k, temperatures=temperatures)


def with_draws(kept: TopK, teacher: Tensor, ids: Tensor, at: float = max(GRID)) -> TopK:
    at = at if at in kept.temperatures else max(kept.temperatures)
    return replace(kept, tail_ids=ids, tail_logits=teacher.gather(-1, ids), tail_temperature=at)


def value_and_gradient(loss: Loss, student: Tensor, teacher: Any) -> tuple[Tensor, Tensor]:
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], **how: float) -> None:
    torch.testing.assert_close(one[0], other[0], **how)
    torch.testing.assert_close(one[1], other[1], **how)


class TestTopK:
    @pytest.mark.parametrize("temperature", GRID)
    def test_probabilities_and_tail_are_those_of_all_logits(self, temperature: float) -> None:
        teacher = random()
        kept = top(teacher, 4)
        wanted = (teacher / temperature).log_softmax(-1)
        torch.testing.assert_close(
            kept.log_probabilities(temperature), wanted.gather(-1, kept.ids), rtol=1e-12, atol=1e-12
        )
        rest = wanted.exp().scatter(-1, kept.ids, 0.0).sum(-1)
        torch.testing.assert_close(kept.tail_mass(temperature), rest)
        partition = (teacher / temperature).logsumexp(-1)
        torch.testing.assert_close(kept.log_partition(temperature), partition)

    def test_a_tail_far_below_rounding_keeps_its_digits_in_float32(self) -> None:
        teacher = torch.tensor([[40.0, 39.0, 8.0, 7.5, 1.0]])
        kept = TopK.of(teacher, k=2, temperatures=(1.0,))
        wanted = teacher.double().softmax(-1)[:, 2:].sum(-1)
        assert wanted < 1e-13
        torch.testing.assert_close(kept.tail_mass(1.0).double(), wanted, rtol=1e-5, atol=0)

    def test_a_temperature_that_was_not_stored_names_those_that_were(self) -> None:
        student, teacher = pair()
        with pytest.raises(ValueError, match=r"one of those that were stored, 1.0, 2.0, got 3.0"):
            kl_divergence(student, top(teacher, 3, (1.0, 2.0)), temperature=3.0)
        with pytest.raises(ValueError, match=r"stored, 2.0, got 1.0"):
            total_variation(student, top(teacher, 3, (2.0,)))

    def test_rows_are_chosen_in_every_part(self) -> None:
        teacher = random(6).reshape(2, 3, 9)
        kept = top(teacher, 4)
        kept = with_draws(kept, teacher, kept.ids[..., :2])
        mask = torch.tensor([[True, False, True], [False, False, True]])
        chosen, wanted = kept[mask], top(teacher[mask], 4)
        assert kept.shape == (2, 3, 9)
        assert chosen.shape == (3, 9)
        assert len(chosen) == 3
        assert torch.equal(chosen.ids, wanted.ids)
        assert torch.equal(chosen.logits, wanted.logits)
        assert torch.equal(chosen.log_tail, wanted.log_tail)
        assert chosen.tail_ids is not None
        assert torch.equal(chosen.tail_ids, wanted.ids[:, :2])
        assert chosen.temperatures == GRID

    def test_it_moves_and_detaches_as_a_whole(self) -> None:
        kept = top(random().requires_grad_(), 3)
        kept = replace(kept, logits=kept.logits.clone().requires_grad_())
        assert kept.to("meta").log_tail.device.type == "meta"
        assert kept.to("meta").ids.device.type == "meta"
        assert not kept.detach().logits.requires_grad

    @pytest.mark.parametrize(
        ("part", "value", "words"),
        [
            ("logits", torch.zeros(5, 4), r"\(5, 3\), \(5, 4\)"),
            ("log_tail", torch.zeros(5, 2), r"log_tail \[..., 4\]"),
            ("tail_ids", torch.zeros(5, 2, dtype=torch.int64), "give both"),
        ],
    )
    def test_parts_that_do_not_belong_together_are_refused(
        self, part: str, value: Tensor, words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            replace(top(random(), 3), **{part: value})

    def test_draws_of_other_rows_are_refused(self) -> None:
        ids = torch.zeros(4, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"same rows as ids, got \(4, 2\)"):
            replace(top(random(), 3), tail_ids=ids, tail_logits=ids.double())


class TestBuckets:
    @every_bucket
    @pytest.mark.parametrize("absent", [0, 2])
    def test_all_columns_kept_is_the_dense_loss(
        self, loss: Loss, temperature: float, absent: int
    ) -> None:
        student, teacher = pair()
        if absent:
            student[:, -absent:] = teacher[:, -absent:] = -math.inf
        kept = value_and_gradient(loss, student, top(teacher, 9))
        assert_same(kept, value_and_gradient(loss, student, teacher), rtol=1e-10, atol=1e-12)

    @every_bucket
    def test_it_is_the_loss_of_the_lumped_probabilities(
        self, loss: Loss, temperature: float
    ) -> None:
        student, teacher = pair()
        kept = top(teacher, 3)

        def lumped(logits: Tensor) -> Tensor:
            p = (logits / temperature).softmax(-1).gather(-1, kept.ids)
            return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log() * temperature

        wanted = value_and_gradient(lambda s, t: loss(lumped(s), lumped(t)), student, teacher)
        assert_same(value_and_gradient(loss, student, kept), wanted, rtol=1e-8, atol=1e-10)

    @every_bucket
    def test_the_gradient_is_that_of_the_value(self, loss: Loss, temperature: float) -> None:
        student, teacher = pair(rows=2, classes=6)
        for k in (1, 3, 6):
            of_student = partial(loss, teacher=top(teacher, k))
            assert torch.autograd.gradcheck(
                of_student, student.requires_grad_(), atol=1e-6, rtol=1e-4
            )

    @every_bucket
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_zero_where_the_student_is_the_teacher(
        self, loss: Loss, temperature: float, k: int
    ) -> None:
        teacher = random()
        value, gradient = value_and_gradient(loss, teacher, top(teacher, k))
        assert value.abs().max() < 1e-10
        assert gradient.abs().max() < 1e-8

    @every_bucket
    def test_a_constant_on_either_side_changes_nothing(
        self, loss: Loss, temperature: float
    ) -> None:
        student, teacher = pair()
        wanted = value_and_gradient(loss, student, top(teacher, 3))
        moved = value_and_gradient(loss, student + 7, top(teacher - 11, 3))
        assert_same(moved, wanted, rtol=1e-10, atol=1e-11)

    @every_bucket
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_finite_at_logits_of_ten_thousand(
        self, loss: Loss, temperature: float, dtype: torch.dtype, k: int
    ) -> None:
        student, teacher = (z.sign() * 1e4 for z in pair())
        mixed = torch.where(teacher > 0, teacher, random(seed=1))
        for told in (teacher, mixed):
            kept = top(told.to(dtype), k)
            value, gradient = value_and_gradient(loss, student.to(dtype), kept)
            assert value.isfinite().all()
            assert gradient.dtype == dtype
            if dtype is not torch.float16 or value.max() < 1e8:  # 1e5 is no number of float16
                assert gradient.isfinite().all()

    @every_bucket
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_narrow_logits_are_computed_in_float32(
        self, loss: Loss, temperature: float, dtype: torch.dtype
    ) -> None:
        student, teacher = (z.to(dtype) for z in pair(rows=40))
        value, gradient = value_and_gradient(loss, student, top(teacher, 4))
        exact = value_and_gradient(loss, student.double(), top(teacher.double(), 4))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=1e-5)
        rounding = 1e-5 + torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), exact[1], rtol=rounding, atol=1e-5)

    @pytest.mark.parametrize("loss", [*BUCKETS.values(), sampled_kl], ids=[*BUCKETS, "sampled"])
    def test_no_gradient_reaches_the_teacher(self, loss: Loss) -> None:
        student, teacher = pair()
        kept = with_draws(top(teacher, 3), teacher, teacher.argmin(-1, keepdim=True))
        parts = ("logits", "log_tail", "tail_logits")
        kept = replace(kept, **{n: getattr(kept, n).clone().requires_grad_() for n in parts})
        student.requires_grad_()
        loss(student, kept).sum().backward()
        assert student.grad is not None
        assert all(getattr(kept, name).grad is None for name in parts)

    @every_bucket
    def test_another_row_of_nan_or_an_order_changes_no_row(
        self, loss: Loss, temperature: float
    ) -> None:
        student, teacher = pair()
        kept = top(teacher, 3)
        value, gradient = value_and_gradient(loss, student, kept)
        for order in (torch.tensor([4, 1, 0]), torch.tensor([2])):
            part = value_and_gradient(loss, student[order], kept[order])
            assert_same(part, (value[order], gradient[order]))
        student[3] = math.nan
        counted = torch.tensor([True, True, True, False, True])
        poisoned = value_and_gradient(loss, student[counted], kept[counted])
        assert_same(poisoned, (value[counted], gradient[counted]))

    @every_bucket
    def test_a_batch_of_none(self, loss: Loss, temperature: float) -> None:
        student, teacher = pair(rows=0)
        value, gradient = value_and_gradient(loss, student, top(teacher, 3))
        assert value.shape == (0,)
        assert gradient.shape == (0, 9)

    def test_within_the_tail_the_student_keeps_its_own_proportions(self) -> None:
        student, teacher = pair()
        kept = top(teacher, 3)
        _, gradient = value_and_gradient(partial(kl_divergence, temperature=1.0), student, kept)
        ratio = gradient / student.softmax(-1)
        others = torch.ones_like(ratio, dtype=torch.bool).scatter(-1, kept.ids, False)
        for row, mask in zip(ratio, others, strict=True):
            torch.testing.assert_close(row[mask], row[mask][:1].expand(6))

    @pytest.mark.parametrize("loss", [kl_divergence, reverse_kl, skewed_kl, jensen_shannon])
    def test_lumping_never_adds_divergence(self, loss: Loss) -> None:
        student, teacher = pair(rows=200)
        below = torch.zeros(200, dtype=torch.float64)
        for k in range(1, 10):
            value = loss(student, top(teacher, k), temperature=2.0)
            assert (value >= below - 1e-10).all()  # and more columns never take any away
            below = value
        torch.testing.assert_close(below, loss(student, teacher, temperature=2.0))

    def test_a_tail_that_only_the_student_excludes_is_infinite_as_in_the_dense_loss(self) -> None:
        student, teacher = pair()
        kept = top(teacher, 3)
        student = torch.full_like(student, -math.inf).scatter(
            -1, kept.ids, student.gather(-1, kept.ids)
        )
        value, gradient = value_and_gradient(kl_divergence, student, kept)
        assert (value == math.inf).all()
        assert not gradient.isnan().any()

    def test_a_student_of_another_width_names_both_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"got \(5, 8\) and \(5, 9\)"):
            kl_divergence(random(classes=8), top(random(), 3))

    def test_a_sequence_is_refused_as_in_the_dense_loss(self) -> None:
        teacher = random(6).reshape(2, 3, 9)
        with pytest.raises(ValueError, match=r"shape \[N, V\], got \(2, 3, 9\)"):
            kl_divergence(teacher, top(teacher, 3))


class Large(TorchDispatchMode):
    """Counts the new tensors of at least so many numbers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {a.data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.size and out.data_ptr() not in known:
            self.count += 1
        return out


@pytest.mark.parametrize("loss", [kl_divergence, reverse_kl, jensen_shannon, sampled_kl])
def test_nothing_of_the_size_of_the_logits_is_made_but_their_gradient(loss: Loss) -> None:
    rows, width = 70, 1 << 15
    assert rows * width > 2 * BLOCK
    student = random(rows, width).float().requires_grad_()
    teacher = random(rows, width, seed=1).float()
    kept = top(teacher, 8, (1.0, 2.0))
    kept = with_draws(kept, teacher, torch.full((rows, 2), 5))
    with Large(rows * width) as large:
        value = loss(student, kept, temperature=2.0).sum()
        assert large.count == 0
        value.backward()
    assert large.count == 1
    small = student[:3].detach(), top(teacher[:3], 8, (1.0, 2.0))
    if loss is not sampled_kl:  # and the blocks are put together rightly
        wanted = value_and_gradient(partial(loss, temperature=2.0), *small)[1]
        torch.testing.assert_close(student.grad[:3], wanted)


# Draws.


def every_draw(kept: TopK, teacher: Tensor, count: int, at: float) -> list[tuple[float, Tensor]]:
    """(probability, ids) of all that `count` draws from the tail of one row can give."""
    rest = (teacher / at).scatter(-1, kept.ids, -math.inf)[0].softmax(-1)
    columns = [c for c in range(teacher.shape[1]) if rest[c] > 0]
    return [
        (math.prod(float(rest[c]) for c in ids), torch.tensor([ids]))
        for ids in itertools.product(columns, repeat=count)
    ]


class TestSampled:
    @pytest.mark.parametrize(
        ("temperature", "at"), [(t, at) for t in GRID for at in GRID if t <= at]
    )
    @pytest.mark.parametrize(("k", "count"), [(0, 1), (0, 3), (2, 1), (2, 2), (4, 2)])
    def test_over_all_draws_value_and_gradient_are_those_of_the_dense_loss(
        self, temperature: float, at: float, k: int, count: int
    ) -> None:
        student, teacher = pair(rows=1, classes=6)
        kept = top(teacher, k)
        loss = partial(sampled_kl, temperature=temperature)
        found = [
            (p, *value_and_gradient(loss, student, with_draws(kept, teacher, ids, at)))
            for p, ids in every_draw(kept, teacher, count, at)
        ]
        mean = sum(p * v for p, v, _ in found), sum(p * g for p, _, g in found)
        assert sum(p for p, _, _ in found) == pytest.approx(1)
        assert_same(mean, value_and_gradient(loss, student, teacher), rtol=1e-9, atol=1e-10)
        single = found[0][1]
        assert not torch.allclose(single, mean[0], rtol=1e-3)  # the law is not of each draw

    def test_normalised_weights_would_not_be_unbiased(self) -> None:
        teacher, temperature = random(rows=1, classes=6), 2.0
        kept = top(teacher, 0)
        total = torch.zeros(6, dtype=torch.float64)
        for p, ids in every_draw(kept, teacher, 2, 4.0):
            log_weight = (teacher / temperature - teacher / 4).gather(-1, ids)[0]
            total.index_add_(0, ids[0], p * log_weight.softmax(-1))
        assert not torch.allclose(total, (teacher / temperature).softmax(-1)[0], rtol=1e-2)

    def test_a_tail_of_one_column_leaves_nothing_to_chance(self) -> None:
        student, teacher = pair(classes=6)
        kept = with_draws(top(teacher, 5), teacher, teacher.argmin(-1, keepdim=True))
        loss = partial(sampled_kl, temperature=2.0)
        wanted = value_and_gradient(loss, student, teacher)
        assert_same(value_and_gradient(loss, student, kept), wanted)

    def test_of_logits_it_is_kl_divergence(self) -> None:
        student, teacher = pair()
        wanted = value_and_gradient(partial(kl_divergence, temperature=2.0), student, teacher)
        assert_same(
            value_and_gradient(partial(sampled_kl, temperature=2.0), student, teacher), wanted
        )

    def test_the_gradient_is_that_of_the_value_with_a_column_drawn_twice(self) -> None:
        student, teacher = pair(rows=2, classes=6)
        kept = top(teacher, 2)
        rest = teacher.scatter(-1, kept.ids, -math.inf).argmax(-1, keepdim=True)
        kept = with_draws(kept, teacher, rest.expand(2, 3))
        assert torch.autograd.gradcheck(
            lambda z: sampled_kl(z, kept, temperature=2.0), student.requires_grad_()
        )

    def test_a_tail_without_mass_adds_nothing(self) -> None:
        student, teacher = pair(classes=6)
        teacher[:, 3:] = -math.inf
        kept = with_draws(top(teacher, 3), teacher, torch.full((5, 2), 4))
        value, gradient = value_and_gradient(sampled_kl, student, kept)
        wanted = value_and_gradient(partial(kl_divergence, temperature=1.0), student, kept)
        assert_same((value, gradient), wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_finite_at_logits_of_ten_thousand(self, dtype: torch.dtype) -> None:
        student, teacher = (z.sign() * 1e4 for z in pair())
        mixed = torch.where(teacher > 0, teacher, random(seed=1))
        for told in (teacher, mixed):
            kept = top(told.to(dtype), 3)
            drawn = told.to(dtype).scatter(-1, kept.ids, -math.inf).argmax(-1, keepdim=True)
            kept = with_draws(kept, told.to(dtype).float(), drawn)
            for t in GRID:
                loss = partial(sampled_kl, temperature=t)
                value, gradient = value_and_gradient(loss, student.to(dtype), kept)
                assert value.isfinite().all()
                assert gradient.isfinite().all()

    def test_a_temperature_above_that_of_the_draws_is_refused(self) -> None:
        student, teacher = pair()
        kept = with_draws(top(teacher, 3), teacher, teacher.argmin(-1, keepdim=True), 1.0)
        with pytest.raises(ValueError, match=r"at most that of the teacher's draws, 1.0, got 2.0"):
            sampled_kl(student, kept, temperature=2.0)

    def test_no_draws_and_nothing_but_draws_are_refused_with_the_other_loss_named(self) -> None:
        student, teacher = pair()
        with pytest.raises(ValueError, match=r"without draws of its tail.* or use kl_divergence"):
            sampled_kl(student, top(teacher, 3))
        alone = with_draws(top(teacher, 0), teacher, teacher.argmax(-1, keepdim=True))
        with pytest.raises(ValueError, match="keeps no logits, only draws, which sampled_kl"):
            kl_divergence(student, alone)


# Errors beside those of the field's other estimators.


def zipf(rows: int = 48, width: int = 8000, power: float = 1.85) -> tuple[Tensor, Tensor]:
    """A teacher whose 128 likeliest columns have 0.99 of the mass, and a student like it."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)]) + 1
    teacher = random(rows, width, seed=2, scale=0.3) - power * ranks.double().log()
    student = 0.8 * teacher + random(rows, width, seed=3, scale=0.7)
    return student, teacher


class TestErrors:
    """Relative error of the gradient against the loss of all logits."""

    @staticmethod
    def errors(k: int, head: int, draws: int) -> dict[str, float]:
        student, teacher = zipf()
        kept = top(teacher, k, (1.0,))
        log_p = kept.log_probabilities(1.0)
        mass = log_p.logsumexp(-1, keepdim=True)

        def at(z: Tensor) -> Tensor:
            return z.log_softmax(-1).gather(-1, kept.ids)

        def drawn(count: int, k: int) -> TopK:
            part = top(teacher, k, (1.0,))
            rest = teacher.scatter(-1, part.ids, -math.inf).softmax(-1)
            generator = torch.Generator().manual_seed(4)
            ids = torch.multinomial(rest, count, replacement=True, generator=generator)
            return with_draws(part, teacher, ids)

        target = (log_p - mass).exp()
        estimators: dict[str, Loss] = {
            "both": lambda z, _: (target * (log_p - mass - at(z).log_softmax(-1))).sum(-1),
            "teacher": lambda z, _: (target * (log_p - mass - at(z))).sum(-1),
            "neither": lambda z, _: (log_p.exp() * (log_p - at(z))).sum(-1),
            "bucket": lambda z, _: kl_divergence(z, kept, temperature=1.0),
            "draws": lambda z, _: sampled_kl(z, drawn(k, 0)),
            "hybrid": lambda z, _: sampled_kl(z, drawn(draws, head)),
        }
        _, exact = value_and_gradient(partial(kl_divergence, temperature=1.0), student, teacher)
        return {
            name: float((value_and_gradient(loss, student, None)[1] - exact).norm() / exact.norm())
            for name, loss in estimators.items()
        }

    def test_the_teacher_is_as_described(self) -> None:
        _, teacher = zipf()
        assert 0.985 < float(1 - top(teacher, 128).tail_mass(1.0).mean()) < 0.995

    def test_the_bucket_is_nearest_and_draws_alone_are_furthest(self) -> None:
        bounds = {12: 0.04, 50: 0.007, 128: 0.002}
        for (k, bound), (head, draws) in zip(
            bounds.items(), [(8, 4), (24, 8), (48, 16)], strict=True
        ):
            found = self.errors(k, head, draws)
            assert found["bucket"] < bound
            assert found["bucket"] < min(found["both"], found["teacher"], found["neither"]) / 3
            assert found["neither"] < found["teacher"]  # the same optimum, less of the wrong mass
            assert found["hybrid"] < found["draws"] / 2
            assert max(found.values()) == found["draws"]


# Published numbers.


class TestDistillKit:
    def kept(self, case: Any, temperatures: tuple[float, ...] = (1.0, 2.0)) -> tuple[Tensor, TopK]:
        student, mask = case.inputs["z_s"], case.inputs["mask"].bool()
        kept = TopK.of(case.inputs["z_t"], k=4, temperatures=temperatures)
        assert kept.ids.tolist() == [
            [sorted(row, key=list(row).index) for row in rows]
            for rows in case.expected["target_ids"]
        ]
        torch.testing.assert_close(
            kept.log_probabilities(1.0),
            torch.tensor(case.expected["target_logprobs"], dtype=torch.float64),
            rtol=1e-5,
            atol=1e-5,
        )
        return student[mask], kept[mask]

    def test_symmetric_uniform_at_T_1_is_the_bucket(self, oracle: Any) -> None:
        case = oracle("distillkit_sparse_topk_kl")
        loss = kl_divergence(*self.kept(case), temperature=1.0).sum()
        case.assert_value(loss, "symmetric_uniform_T1")
        (gradient,) = torch.autograd.grad(loss, case.inputs["z_s"])
        wanted = case.gradients["symmetric_uniform_T1::z_s"]
        torch.testing.assert_close(gradient, wanted, rtol=2e-5, atol=1e-6)

    def test_its_tail_at_T_2_is_no_mass_of_the_teacher(self, oracle: Any) -> None:
        case = oracle("distillkit_sparse_topk_kl")
        student, kept = self.kept(case)
        ours = float(kl_divergence(student, kept, temperature=2.0).detach().sum() / 4)
        dense, theirs = case.expected["dense_T2"], case.expected["symmetric_uniform_T2"]
        assert ours == pytest.approx(5.30, abs=0.01)
        assert ours < dense < theirs  # a lumped divergence is never above the whole one
        left = kept.tail_mass(1.0).sqrt()  # what it takes for the tail at T = 2
        at_1 = kept.log_probabilities(1.0)
        log_p = torch.cat([at_1 / 2, left.log().unsqueeze(-1)], -1).log_softmax(-1).detach()
        q = (student / 2).softmax(-1).gather(-1, kept.ids)
        log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).log()
        rebuilt = (log_p.exp() * (log_p - log_q)).sum()
        case.assert_value(rebuilt, "symmetric_uniform_T2")

    def test_zero_asks_for_more_than_the_teacher_has(self, oracle: Any) -> None:
        case = oracle("distillkit_sparse_topk_kl")
        ours = float(kl_divergence(*self.kept(case), temperature=1.0).detach().sum())
        assert ours < case.expected["dense_T1"] < case.expected["zero_T1"]


def test_the_records_of_tinyvit_are_recovered(oracle: Any) -> None:
    case = oracle("tinyvit_sparse_label_recovery")
    kept = TopK.of(case.inputs["z_t"], k=4, temperatures=(1.0,))
    assert kept.ids.tolist() == case.expected["target_ids"]
    probabilities = kept.log_probabilities(1.0).exp()
    spread = (kept.tail_mass(1.0) / 8).unsqueeze(-1).expand(3, 12)
    recovered = spread.scatter(-1, kept.ids, probabilities)
    wanted = torch.tensor(case.expected["recovered_probs"], dtype=torch.float64)
    torch.testing.assert_close(recovered, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_random_sampling_has_the_published_expectation(power: float, oracle: Any) -> None:
    """Draws are from p^power: the logits are those, and the loss is at temperature `power`."""
    case = oracle("indep_rskd_estimator")
    teacher = (case.inputs["z_t"].detach() * power).unsqueeze(0)
    kept = TopK.of(teacher, k=0, temperatures=(1.0, 0.5))
    student = random(rows=1, classes=6)
    mean = torch.zeros(6, dtype=torch.float64)
    for p, ids in every_draw(kept, teacher, 3, 1.0):
        loss = partial(sampled_kl, temperature=power)
        _, gradient = value_and_gradient(loss, student, with_draws(kept, teacher, ids, 1.0))
        mean += p * gradient[0]
    target = (student / power).softmax(-1)[0] - mean / power
    wanted = torch.tensor(case.expected[f"E_unnormalised_t{power}"], dtype=torch.float64)
    torch.testing.assert_close(target, wanted, rtol=1e-9, atol=1e-12)


# Who takes it.

NAMES = [name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))]


def test_the_losses_that_take_it_are_those_that_the_refusal_names() -> None:
    found = {n for n in NAMES if TopK in _parts(get_type_hints(getattr(losses, n)).get("teacher"))}
    assert found == set(TAKE_TOP_K)
    for name in TAKE_TOP_K:
        assert f"`{name}`" in (TopK.__doc__ or "")


def _parts(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", ())


# Where [N, V] is refused before anybody asks what it is.
SHAPES = {
    "attention_relation": (5, 3, 3),
    "label_embeddings": (5, 3, 3),
    "hierarchical_context": (1, 3, 3, 5),
}


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TAKE_TOP_K)))
def test_all_others_refuse_it_and_name_them(name: str) -> None:
    loss = getattr(losses, name)
    parameters = inspect.signature(loss).parameters
    if "teacher" not in parameters:
        return
    values = random(5).reshape(SHAPES.get(name, (5, 9)))
    student, teacher = values, top(values, 3)
    supplied: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "labels": torch.ones(values.shape[:2]) if values.ndim > 2 else torch.arange(5),
        "mask": torch.ones(5, 9, dtype=torch.bool),
        "rows": 5,
    }
    if "tuple" in str(get_type_hints(loss)["student"]):
        supplied |= {"student": (student, student), "teacher": (teacher, teacher)}
    given = {n: supplied[n] for n, p in parameters.items() if p.default is p.empty}

    def compared() -> None:
        made = loss(**given)
        if isinstance(made, nn.Module):
            made(supplied["student"], supplied["teacher"])

    with pytest.raises((ValueError, AttributeError), match="a TopK") as error:
        compared()
    assert all(taker in str(error.value) for taker in TAKE_TOP_K)
