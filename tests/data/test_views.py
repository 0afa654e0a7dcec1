"""Views of augmented rows, shuffles by blocks, and what a row holds as a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attar
from attar.data import TensorSource, crop, cutmix, mixup
from attar.data.contents import contents
from attar.data.draw import augmented, permutation
from attar.runtime import PreflightError, UsageError


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(50, 1, 8, 8, generator=generator)
    labels = torch.arange(50) % 5
    return TensorSource(pixels, labels, classes=5)


def seen(source, number, **options):
    rows = {}
    for batch in source.epoch(number, batch_size=16, **options):
        for row, pixels in zip(batch["ids"].tolist(), batch["inputs"], strict=True):
            rows[row] = pixels
    return torch.stack([rows[row] for row in range(len(source))])


@pytest.mark.parametrize("chain", [[crop], [crop, mixup], [cutmix]])
def test_a_view_has_the_same_pixels_in_each_epoch_and_for_each_seed(images, chain):
    first = seen(images, 1, seed=0, augment=chain, views=3)
    assert torch.equal(first, seen(images, 4, seed=0, augment=chain, views=3))
    assert torch.equal(first, seen(images, 7, seed=99, augment=chain, views=3))
    assert not torch.equal(first, seen(images, 2, seed=0, augment=chain, views=3))
    # The same as the pixels by row: what a cache is made of.
    assert torch.equal(first, augmented(images, torch.arange(50), chain, seed=0, view=1)["inputs"])


def test_without_views_every_epoch_and_seed_has_pixels_of_its_own(images):
    first = seen(images, 1, seed=0, augment=[crop])
    assert not torch.equal(first, seen(images, 4, seed=0, augment=[crop]))
    assert not torch.equal(first, seen(images, 1, seed=99, augment=[crop]))


def test_a_batch_says_its_view_where_there_are_views(images):
    said = [int(next(images.epoch(n, batch_size=8, seed=0, views=3))["view"]) for n in range(5)]
    assert said == [0, 1, 2, 0, 1]
    assert "view" not in next(images.epoch(0, batch_size=8, seed=0))


def test_the_order_does_not_know_of_views(images):
    plain = [b["ids"].tolist() for b in images.epoch(3, batch_size=8, seed=5)]
    assert plain == [b["ids"].tolist() for b in images.epoch(3, batch_size=8, seed=5, views=2)]


def test_no_views_and_no_block_are_refused(images):
    for wrong in ({"views": 0}, {"block": 0}):
        with pytest.raises(UsageError, match="must be at least 1, not 0"):
            images.epoch(0, batch_size=8, seed=0, **wrong)


@pytest.mark.parametrize(("count", "block"), [(1000, 7), (64, 4), (5, 1), (10, 100), (1, 1)])
def test_a_shuffle_by_blocks_has_each_row_once_and_another_order_in_each_epoch(count, block):
    orders = [permutation(count, seed=3, number=n, block=block) for n in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(count))
    assert count < 5 or not np.array_equal(orders[0], orders[1])


def test_a_shuffle_by_blocks_reads_16_blocks_at_a_time_and_mixes_them():
    block, count = 10, 1600
    order = permutation(count, seed=0, number=0, block=block)
    for start in range(0, count, 16 * block):
        window = order[start : start + 16 * block]
        assert len(np.unique(window // block)) == 16
        # Not one block after the other: their rows are mixed through one another.
        assert np.mean(np.diff(window // block) == 0) < 0.2
    assert len(np.unique(order[: 16 * block] // (16 * block))) > 1  # the blocks come from all over


def test_a_block_as_large_as_the_data_is_the_plain_shuffle():
    plain = permutation(100, seed=1, number=2)
    assert np.array_equal(plain, permutation(100, seed=1, number=2, block=100))


def test_contents_change_with_one_bit_a_form_or_a_name_and_with_nothing_else():
    inputs = torch.rand(6, 3, 5)
    batch = {"inputs": inputs, "ids": torch.arange(6), "labels": torch.arange(6)}
    known = contents(batch)
    assert len(set(known.tolist())) == 6
    assert np.array_equal(known, contents({"inputs": inputs, "view": torch.tensor(3)}))
    for row in range(6):
        bits = inputs.clone().view(torch.int32)
        bits[row, 2, 4] ^= 1
        changed = contents({"inputs": bits.view(torch.float32)}) != known
        assert changed.nonzero()[0].tolist() == [row]
    assert (contents({"inputs": inputs.reshape(6, 5, 3)}) != known).all()
    assert (contents({"inputs": inputs, "query": inputs}) != known).all()


def test_contents_of_a_row_do_not_know_the_batch_it_is_in_or_how_it_lies_in_memory():
    inputs = torch.rand(8, 4, 2500)  # more words than are hashed at a time
    known = contents({"inputs": inputs})
    for row in range(8):
        assert contents({"inputs": inputs[row : row + 1]})[0] == known[row]
    changed = inputs.clone()
    changed[5, 3, 2499] += 1
    assert (contents({"inputs": changed}) != known).nonzero()[0].tolist() == [5]
    turned = inputs.transpose(1, 2).contiguous().transpose(1, 2)
    assert np.array_equal(contents({"inputs": turned}), known)


def test_two_words_that_change_places_are_another_row():
    inputs = torch.rand(1, 10)
    swapped = inputs[:, [1, 0, *range(2, 10)]]
    assert contents({"inputs": inputs})[0] != contents({"inputs": swapped})[0]


def test_bytes_that_fill_no_word_count_too():
    tokens = torch.arange(7, dtype=torch.uint8)[None]
    known = contents({"inputs": tokens})
    assert contents({"inputs": tokens + torch.eye(7, dtype=torch.uint8)[6]})[0] != known[0]


def test_a_stage_passes_views_and_blocks_on(images):
    class Told(TensorSource):
        def epoch(self, number, **options):
            asked.append({name: options.get(name) for name in ("views", "block")})
            return super().epoch(number, **options)

    asked = []
    data = Told(images.rows(torch.arange(50))["inputs"], images.labels, classes=5)
    task = attar.tasks.ImageClassification()
    student = attar.models.build("mlp", data=data)
    attar.train(student, data, task, epochs=1, augment=[crop], views=2, shuffle_block=4)
    assert asked
    assert all(each == {"views": 2, "block": 4} for each in asked)


def test_views_of_nothing_are_refused(images):
    """All would be the same; one view of each example is no mistake."""
    student = attar.models.build("mlp", data=images)
    task = attar.tasks.ImageClassification()
    with pytest.raises(PreflightError, match="views is 4, but nothing is augmented"):
        attar.train(student, images, task, epochs=1, views=4)
    attar.train(student, images, task, epochs=1, views=1)
