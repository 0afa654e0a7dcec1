"""Augmentations: their distributions, their labels, and the row that stays itself."""

from __future__ import annotations

from functools import partial
from typing import get_type_hints

import numpy as np
import pytest
import torch
from scipy import stats

from attar.data import DatasetSource, Draw, TensorSource, crop, cutmix, flip, mixup
from attar.data.augment import spelled
from attar.data.draw import augmented
from attar.runtime import DataError, UsageError

EVERYTHING = (crop, flip, mixup, cutmix)
names = pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda f: f.__name__)


def _source(rows: int = 400, *, size: int = 9, labels="classes") -> TensorSource:
    inputs = torch.rand(rows, 2, size, size, generator=torch.Generator().manual_seed(0))
    if labels == "classes":
        return TensorSource(inputs, torch.arange(rows) % 4, classes=4)
    if labels == "values":
        return TensorSource(inputs, torch.arange(2.0 * rows).reshape(rows, 2))
    return TensorSource(inputs)


def _draw(source, *, view: int = 0, seed: int = 0, before=()) -> Draw:
    return Draw(source, torch.arange(len(source)), seed=seed, view=view, before=before)


def _rows(source) -> dict[str, torch.Tensor]:
    return source.rows(torch.arange(len(source)))


@names
def test_a_row_alone_is_the_row_in_any_batch(augmentation) -> None:
    source = _source(37)
    chain = (crop, flip, augmentation)
    together = augmented(source, torch.arange(37), chain, seed=1, view=2)
    backwards = augmented(source, torch.arange(36, -1, -1), chain, seed=1, view=2)
    for row in (0, 5, 36):
        alone = augmented(source, torch.tensor([row]), chain, seed=1, view=2)
        for key in together:
            assert torch.equal(alone[key][0], together[key][row])
            assert torch.equal(alone[key][0], backwards[key][36 - row])


@names
def test_the_given_batch_is_left_alone(augmentation) -> None:
    source = _source(20)
    batch = _rows(source)
    copy = {key: value.clone() for key, value in batch.items()}
    result = augmentation(batch, _draw(source))
    assert all(torch.equal(batch[key], copy[key]) for key in copy)
    assert not torch.equal(result["inputs"], copy["inputs"])
    assert result["inputs"].shape == copy["inputs"].shape
    assert result["inputs"].dtype == torch.float32
    assert torch.equal(result["ids"], copy["ids"])


@names
def test_a_recipe_can_read_the_signature(augmentation) -> None:
    assert get_type_hints(augmentation, include_extras=True)["return"] == dict[str, torch.Tensor]


@pytest.mark.parametrize("augmentation", [crop, flip, cutmix])
def test_tables_are_refused(augmentation) -> None:
    source = TensorSource(torch.rand(4, 3))
    with pytest.raises(DataError, match=f"{augmentation.__name__} needs images .* leave"):
        augmentation(_rows(source), _draw(source))


# Crop and flip


def test_crop_shifts_with_zeros_and_every_shift_is_equally_likely() -> None:
    pixels, size, rows = 2, 7, 5_000
    images = torch.zeros(rows, 1, size, size)
    images[:, 0, 3, 3] = 1  # where the mark lands is the shift
    source = TensorSource(images)
    shifted = crop(_rows(source), _draw(source), pixels=pixels)["inputs"]
    assert shifted.flatten(1).sum(1).eq(1).all()
    down, right = (shifted[:, 0].amax(2).argmax(1) - 3, shifted[:, 0].amax(1).argmax(1) - 3)
    counts = torch.zeros(5, 5).index_put_((down + 2, right + 2), torch.ones(rows), accumulate=True)
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-4


def test_crop_is_a_shift_of_the_whole_image() -> None:
    source = _source(50)
    images = _rows(source)["inputs"]
    shifted = crop(_rows(source), _draw(source), pixels=3)["inputs"]
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3))
    for row in range(50):
        found = [
            (down, right)
            for down in range(7)
            for right in range(7)
            if torch.equal(padded[row, :, down : down + 9, right : right + 9], shifted[row])
        ]
        assert len(found) == 1


@pytest.mark.parametrize("pixels", [0, -1, 9, 100])
def test_crop_refuses_shifts_that_leave_nothing(pixels: int) -> None:
    source = _source(3)
    with pytest.raises(UsageError, match=f"pixels must be from 1 to 8 .* not {pixels}"):
        crop(_rows(source), _draw(source), pixels=pixels)


def test_flip_mirrors_half_of_the_rows() -> None:
    source = _source(4_000, size=3)
    images = _rows(source)["inputs"]
    flipped = flip(_rows(source), _draw(source))["inputs"]
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(mirrored.float().mean() - 0.5) < 5 * (0.25 / 4_000) ** 0.5


# Mixing


def _shares(labels: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return labels.gather(1, own[:, None])[:, 0]


def test_mixup_mixes_with_the_partner_by_the_share_in_the_labels() -> None:
    source = _source(200, labels="classes")
    draw = _draw(source)
    batch, partner = _rows(source), draw.partner()
    mixed = mixup(batch, draw, alpha=1.0)
    other = batch["labels"] != partner["labels"]  # where the labels tell the share
    share = _shares(mixed["labels"], batch["labels"])[other].reshape(-1, 1, 1, 1)
    expected = share * batch["inputs"][other] + (1 - share) * partner["inputs"][other]
    torch.testing.assert_close(mixed["inputs"][other], expected, rtol=0, atol=1e-6)
    assert other.sum() > 100
    assert torch.equal(mixed["labels"][~other].argmax(1), batch["labels"][~other])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_shares_are_beta(alpha: float) -> None:
    rows = 4_000
    source = TensorSource(torch.arange(2.0 * rows).reshape(rows, 2), torch.arange(float(rows)))
    draw = _draw(source)
    mixed = mixup(_rows(source), draw, alpha=alpha)["labels"][:, 0].double()
    own, other = torch.arange(rows).double(), draw.partner()["labels"][:, 0].double()
    far = (own - other).abs() > rows / 10
    share = ((mixed - other) / (own - other))[far].numpy().clip(0, 1)
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).statistic < 0.05


@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_mixed_labels_are_probabilities(augmentation) -> None:
    source = _source(300)
    labels = augmentation(_rows(source), _draw(source), alpha=1.0)["labels"]
    assert labels.dtype == torch.float32
    assert labels.shape == (300, 4)
    assert labels.min() >= 0
    torch.testing.assert_close(labels.sum(1), torch.ones(300))


@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_the_partner_is_the_one_that_its_own_batch_shows(augmentation) -> None:
    source = _source(60, labels="none")
    before = (crop, flip)
    shown = augmented(source, torch.arange(60), before, seed=4, view=7)["inputs"]
    draw = _draw(source, seed=4, view=7, before=before)
    partner = draw.partner()
    assert torch.equal(partner["inputs"], shown[partner["ids"]])
    mixed = augmented(source, torch.arange(60), (*before, augmentation), seed=4, view=7)
    by_hand = augmentation({**_rows(source), "inputs": shown}, draw)
    assert torch.equal(mixed["inputs"], by_hand["inputs"])


@pytest.mark.parametrize("rows", [(7, 9), (28, 28), (1, 5)])
def test_cutmix_labels_follow_the_exact_area(rows) -> None:
    height, width = rows
    count = 300
    inputs = torch.arange(float(count)).reshape(-1, 1, 1, 1).expand(-1, 1, height, width)
    source = TensorSource(inputs.contiguous(), torch.arange(count), classes=count)
    mixed = cutmix(_rows(source), _draw(source))
    own = (mixed["inputs"] == torch.arange(float(count)).reshape(-1, 1, 1, 1)).flatten(1)
    share = _shares(mixed["labels"], torch.arange(count))
    torch.testing.assert_close(share, own.float().mean(1), rtol=0, atol=1e-6)
    partner = _draw(source).partner()["ids"]
    torch.testing.assert_close(_shares(mixed["labels"], partner), 1 - share, rtol=0, atol=1e-6)
    if min(rows) > 1:
        assert share.min() < 0.5 < share.max()


def test_cutmix_pastes_one_box_in_place() -> None:
    source = _source(100, labels="none")
    batch, draw = _rows(source), _draw(source)
    pasted = (cutmix(batch, draw)["inputs"] != batch["inputs"]).all(1)
    partner = draw.partner()["inputs"]
    for row in range(100):
        down, right = pasted[row].any(1), pasted[row].any(0)
        assert torch.equal(pasted[row], down[:, None] & right[None])
        for line in (down, right):
            assert line.int().diff().abs().sum() <= 2
        expected = torch.where(pasted[row], partner[row], batch["inputs"][row])
        assert torch.equal(cutmix(batch, draw)["inputs"][row], expected)


def test_cutmix_areas_are_those_of_the_paper() -> None:
    # The box of Yun et al., drawn here from numpy's own generators.
    generator, size, rows = np.random.default_rng(0), 32, 4_000
    side = (np.sqrt(1 - generator.beta(1, 1, rows)) * size).astype(int)
    centres = generator.integers(0, size, (2, rows))
    low, high = np.clip(centres - side // 2, 0, size), np.clip(centres + side // 2, 0, size)
    reference = 1 - np.prod(high - low, axis=0) / size**2
    source = TensorSource(torch.zeros(rows, 1, size, size), torch.arange(rows), classes=rows)
    draw = _draw(source)
    labels = cutmix(_rows(source), draw)["labels"]
    ours = _shares(labels, torch.arange(rows)).numpy()
    assert stats.ks_2samp(ours, reference).pvalue > 1e-4


@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_values_of_regression_are_mixed_linearly(augmentation) -> None:
    source = _source(100, labels="values")
    draw = _draw(source)
    batch, partner = _rows(source), draw.partner()
    mixed = augmentation(batch, draw, alpha=1.0)["labels"]
    low = torch.minimum(batch["labels"], partner["labels"]) - 1e-3
    high = torch.maximum(batch["labels"], partner["labels"]) + 1e-3
    assert ((low <= mixed) & (mixed <= high)).all()
    # Both columns are mixed by the same share: they stay one apart.
    torch.testing.assert_close(mixed[:, 1] - mixed[:, 0], torch.ones(100), rtol=0, atol=1e-3)


@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_unlabelled_rows_stay_unlabelled(augmentation) -> None:
    source = _source(30, labels="none")
    assert augmentation(_rows(source), _draw(source)).keys() == {"inputs", "ids"}


@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_unknown_classes_are_refused(augmentation) -> None:
    source = TensorSource(torch.rand(4, 1, 3, 3), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(DataError, match="number of classes; give classes="):
        augmentation(_rows(source), _draw(source))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("augmentation", [mixup, cutmix])
def test_alpha_must_be_positive(augmentation, alpha: float) -> None:
    source = _source(4)
    with pytest.raises(UsageError, match="alpha must be greater than 0"):
        augmentation(_rows(source), _draw(source), alpha=alpha)


def test_mixing_twice_keeps_probabilities() -> None:
    source = _source(50)
    batch = augmented(source, torch.arange(50), (mixup, cutmix), seed=0, view=0)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(50))


def test_data_sets_are_augmented_alike() -> None:
    tensors = _source(12)
    pairs = [(row["inputs"][0], int(row["labels"][0])) for row in tensors.batches(1)]
    items = DatasetSource(pairs, classes=4)
    ids = torch.tensor([3, 0, 11])
    one, other = (augmented(s, ids, EVERYTHING, seed=0, view=0) for s in (tensors, items))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_augmentations_that_do_the_same_are_spelled_the_same() -> None:
    assert spelled([crop]) == [{"name": "attar.data.augment.crop", "pixels": 2}]
    assert (
        spelled([crop]) == spelled([partial(crop, pixels=2)]) != spelled([partial(crop, pixels=3)])
    )
    assert spelled([flip]) == spelled([partial(flip)]) == ["attar.data.augment.flip"]
    assert spelled([mixup, flip]) != spelled([flip, mixup])
