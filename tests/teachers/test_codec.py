"""Wide logits as rows of a cache: what comes back, how far off, in how many bytes, and draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attar.losses import TopK, kl_divergence, sampled_kl
from attar.runtime import DataError, UsageError
from attar.teachers.codec import TopLogits

KINDS = ["uint8", "float16", "float32"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(*shape: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale + 3


def back(codec: TopLogits, values: Tensor, slots: Any = None) -> TopK:
    return codec.decode(codec.encode(values, slots))


def slots(count: int, first: int = 0) -> Any:
    return np.arange(first, first + count, dtype=np.int64)


class TestForms:
    @every_kind
    @pytest.mark.parametrize("shape", [(6,), (6, 3), (2, 3, 4)])
    def test_ids_and_tail_come_back_exactly_and_logits_in_their_shape(
        self, kind: Any, shape: tuple[int, ...]
    ) -> None:
        values = logits(*shape, 500)
        kept = back(TopLogits(width=500, k=7, logits=kind), values)
        wanted = TopK.of(values, k=7)
        assert torch.equal(kept.ids, wanted.ids)
        assert torch.equal(kept.log_tail, wanted.log_tail)
        assert kept.shape == values.shape
        assert kept.logits.dtype == torch.float32
        assert kept.temperatures == (1.0, 2.0, 4.0)

    def test_float32_is_exact(self) -> None:
        values = logits(6, 500)
        kept = back(TopLogits(width=500, k=7, logits="float32"), values)
        assert torch.equal(kept.logits, values.gather(-1, kept.ids))

    @pytest.mark.parametrize("scale", [0.01, 4.0, 1000.0])
    def test_float16_is_off_by_1_of_2048_of_a_logit_at_most(self, scale: float) -> None:
        values = logits(200, 300, scale=scale)
        kept = back(TopLogits(width=300, k=40, logits="float16"), values)
        exact = values.gather(-1, kept.ids)
        assert ((kept.logits - exact).abs() <= exact.abs() / 2048 + 1e-7).all()
        assert not torch.equal(kept.logits, exact)

    @pytest.mark.parametrize("scale", [0.01, 4.0, 1000.0])
    def test_8_bits_are_off_by_half_a_step_at_most(self, scale: float) -> None:
        values = logits(200, 300, scale=scale)
        kept = back(TopLogits(width=300, k=40), values)
        exact = values.gather(-1, kept.ids)
        smallest, largest = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
        bound = (largest - smallest) / 508 + smallest.abs() / 1024
        assert ((kept.logits - exact).abs() <= bound).all()
        # The bound's second part is for logits that stand far from zero in a short distance.
        if scale > 1:
            assert (
                (kept.logits - exact).abs() <= 1.01 * (largest - smallest) / 508
            ).float().mean() > 0.95

    def test_8_bits_change_a_divergence_by_little(self) -> None:
        student, values = logits(300, 2000, seed=1), logits(300, 2000)
        kept = back(TopLogits(width=2000, k=32), values)
        exact = kl_divergence(student, TopK.of(values, k=32), temperature=1.0)
        gap = (kl_divergence(student, kept, temperature=1.0) - exact).abs() / exact
        assert gap.max() < 0.01
        assert gap.mean() < 0.002

    @every_kind
    def test_absent_columns_equal_logits_and_single_columns_come_back(self, kind: Any) -> None:
        values = logits(4, 10)
        values[0, 3:] = -math.inf
        values[1] = 2.5
        values[2, 1:] = -math.inf
        kept = back(TopLogits(width=10, k=6, logits=kind), values)
        exact = values.gather(-1, kept.ids)
        assert torch.equal(kept.logits == -math.inf, exact == -math.inf)
        torch.testing.assert_close(kept.logits, exact, rtol=1e-2, atol=1e-2)
        assert kept.logits[1].tolist() == [2.5] * 6
        assert kl_divergence(torch.zeros(4, 10), kept).isfinite().all()

    @every_kind
    def test_half_precision_and_no_rows_are_taken(self, kind: Any) -> None:
        codec = TopLogits(width=500, k=7, logits=kind)
        values = logits(6, 500).bfloat16()
        assert torch.equal(back(codec, values).ids, back(codec, values.float()).ids)
        assert back(codec, values[:0]).shape == (0, 500)

    def test_many_rows_are_written_in_blocks_that_fit_together(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values, codec = logits(50, 20), TopLogits(width=20, k=5, draws=3)
        whole = codec.encode(values, slots(50))
        monkeypatch.setattr("attar.teachers.codec.BLOCK", 7 * 20)
        parts = codec.encode(values, slots(50))
        assert all(np.array_equal(whole[name], parts[name]) for name in whole)
        kept = codec.decode(parts)
        assert torch.equal(kept.ids, TopK.of(values, k=5).ids)


class TestBytes:
    @pytest.mark.parametrize(
        ("width", "size"),
        [(49_152, 112), (65_536, 112), (65_537, 116), (128_256, 116), (151_936, 120),
         (262_144, 120), (262_145, 128), (1 << 20, 128), ((1 << 20) + 1, 144), (1 << 24, 144)],
    )  # fmt: skip
    def test_a_token_of_32_logits_with_three_partitions(self, width: int, size: int) -> None:
        assert TopLogits(width=width, k=32).token_bytes == size

    @every_kind
    @pytest.mark.parametrize("width", [300, 70_000, 140_000, 300_000])
    def test_the_bytes_are_those_of_the_arrays(self, kind: Any, width: int) -> None:
        codec = TopLogits(width=width, k=13, draws=3, logits=kind)
        rows = codec.encode(logits(2, width), slots(2))
        assert sum(values.nbytes for values in rows.values()) == 2 * codec.token_bytes
        assert {n: (str(v.dtype), v.shape[1:]) for n, v in rows.items()} == codec.arrays

    @pytest.mark.parametrize("width", [65_536, 65_537, 200_000, 1 << 20, (1 << 20) + 9])
    @pytest.mark.parametrize("k", [1, 5, 8, 33])
    def test_ids_of_every_number_of_bits_come_back(self, width: int, k: int) -> None:
        values = torch.zeros(3, width)
        generator = torch.Generator().manual_seed(k)
        high = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(3)])
        high[0, 0], high[1, 0] = width - 1, 0
        values.scatter_(-1, high, torch.rand(3, k, generator=generator) + 1)
        kept = back(TopLogits(width=width, k=k, temperatures=(1.0,)), values)
        assert torch.equal(kept.ids, TopK.of(values, k=k, temperatures=(1.0,)).ids)
        assert kept.ids.max() == width - 1


class TestDraws:
    CODEC = TopLogits(width=40, k=5, draws=6, seed=3)

    def test_they_are_a_function_of_seed_slot_and_position(self) -> None:
        values = logits(8, 3, 40)
        whole = back(self.CODEC, values, slots(8, 100))
        alone = back(self.CODEC, values[4:5], slots(1, 104))
        assert whole.tail_ids is not None
        assert alone.tail_ids is not None
        assert torch.equal(whole.tail_ids[4:5], alone.tail_ids)
        other = back(self.CODEC, values, slots(8)).tail_ids
        assert not torch.equal(whole.tail_ids, other)
        seeded = back(TopLogits(width=40, k=5, draws=6, seed=4), values, slots(8, 100)).tail_ids
        assert not torch.equal(whole.tail_ids, seeded)
        same = back(self.CODEC, values[:1, :1].expand(8, 3, 40), slots(8)).tail_ids
        assert same is not None
        assert len({tuple(row.tolist()) for row in same.reshape(24, 6)}) > 20

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_they_have_the_probabilities_of_the_tail(self, temperature: float) -> None:
        values = logits(1, 12).expand(4000, 12)
        codec = TopLogits(width=12, k=3, draws=5, draw_temperature=temperature)
        kept = back(codec, values, slots(4000))
        assert kept.tail_ids is not None
        assert kept.tail_temperature == temperature
        rest = (values[0] / temperature).index_fill(0, kept.ids[0], -math.inf).softmax(-1)
        found = kept.tail_ids.flatten().bincount(minlength=12)
        assert (found[kept.ids[0]] == 0).all()
        assert kept.tail_logits is not None
        exact = values.gather(-1, kept.tail_ids)
        torch.testing.assert_close(kept.tail_logits, exact, rtol=2e-3, atol=0.05)
        spread = (rest * (1 - rest) * 20_000).sqrt()
        assert ((found - rest * 20_000).abs() <= 4 * spread).all()

    def test_the_ends_of_the_line_are_columns_that_have_a_mass(self) -> None:
        rest = torch.full((2, 6), -math.inf)
        rest[:, 2], rest[:, 4] = 1.0, 2.0
        edges = torch.tensor([[0.0, 1 - 2.0**-53]] * 2, dtype=torch.float64)
        assert self.CODEC._drawn(rest, edges).tolist() == [[2, 4], [2, 4]]

    def test_a_cached_loss_is_near_the_dense_one_over_many_tokens(self) -> None:
        student, teacher = logits(2000, 40, seed=1), logits(2000, 40)
        codec = TopLogits(width=40, k=5, draws=8)
        student.requires_grad_()
        found = sampled_kl(student, back(codec, teacher, slots(2000))).mean()
        exact = kl_divergence(student, teacher, temperature=1.0).mean()
        assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
        bucket = kl_divergence(student, TopK.of(teacher, k=5), temperature=1.0).mean()
        assert float(bucket.detach()) < 0.96 * float(exact.detach())

    @every_kind
    def test_draws_alone_come_back(self, kind: Any) -> None:
        codec = TopLogits(width=40, k=0, draws=9, logits=kind, temperatures=(1.0,))
        kept = back(codec, logits(4, 40), slots(4))
        assert kept.ids.shape == (4, 0)
        assert kept.tail_ids is not None
        assert kept.tail_ids.shape == (4, 9)
        assert sampled_kl(torch.zeros(4, 40), kept).isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({"k": 101}, "k is 101 .* of 100 columns"),
            ({"k": 0}, "one of them above 0"),
            ({"k": 100, "draws": 2}, "leaves nothing to draw from"),
            ({"width": (1 << 24) + 1}, "16,777,217 columns; use float16"),
            ({"logits": "int4"}, "it is uint8, float16 or float32"),
            ({"temperatures": ()}, "one at least"),
            ({"temperatures": (1.0, 0.0)}, "above 0"),
            ({"temperatures": (2.0, 2.0)}, "different"),
            ({"draws": 2, "draw_temperature": 3.0}, r"draw_temperature is 3.0.*\[1.0, 2.0, 4.0\]"),
        ],
    )
    def test_a_form_that_cannot_be(self, how: dict[str, Any], words: str) -> None:
        with pytest.raises(UsageError, match=words):
            TopLogits(**{"width": 100, "k": 10, **how})

    @pytest.mark.parametrize("kind", ["uint8", "float16"])
    def test_what_float16_cannot_hold_is_named(self, kind: Any) -> None:
        values = logits(3, 50)
        values[1, 7] = 70_000.0
        with pytest.raises(DataError, match=r"reach 70000, and float16 ends at 65,504"):
            TopLogits(width=50, k=4, logits=kind).encode(values)
        exact = back(TopLogits(width=50, k=4, logits="float32"), values)
        assert float(exact.logits.max()) == 70_000.0

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_a_row_that_is_no_distribution_is_named(self, wrong: float) -> None:
        values = logits(3, 50)
        values[2, 7] = wrong
        with pytest.raises(DataError, match=f"of token 2 is {wrong}"):
            TopLogits(width=50, k=4).encode(values)
        values[2] = -math.inf
        with pytest.raises(DataError, match="of token 2 is -inf"):
            TopLogits(width=50, k=4).encode(values)

    def test_logits_of_another_width_and_draws_without_slots(self) -> None:
        with pytest.raises(DataError, match=r"shape \[3, 50\], and \[n, ..., 60\]"):
            TopLogits(width=60, k=4).encode(logits(3, 50))
        codec = TopLogits(width=50, k=4, draws=2)
        with pytest.raises(DataError, match="there are no slots for 3 rows"):
            codec.encode(logits(3, 50))
        with pytest.raises(DataError, match="there are 2 slots for 3 rows"):
            codec.encode(logits(3, 50), slots(2))


@every_kind
@pytest.mark.parametrize("k", [0, 6])
def test_a_teacher_that_is_asked_again_is_within_what_rounding_allows(kind: Any, k: int) -> None:
    codec, values = TopLogits(width=50, k=k, draws=3, logits=kind), logits(20, 50)
    kept = back(codec, values, slots(20))
    worst, allowed = codec.compare(kept, values)
    assert worst <= allowed < 0.2
    moved = values.clone()
    moved[7] += 0.3
    worst, allowed = codec.compare(kept, moved)
    assert worst == pytest.approx(0.3, abs=0.1)
    assert worst > allowed
