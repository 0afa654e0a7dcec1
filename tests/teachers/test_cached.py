"""A teacher that is asked once: what it said is what is learnt from, and from nothing else."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

import attar
from attar.data import TensorSource, crop, flip, mixup
from attar.losses import TopK, kl_divergence, mse
from attar.runtime import DataError, PreflightError
from attar.tasks import ImageClassification
from attar.teachers import (
    Cached,
    Filling,
    Keep,
    Teacher,
    cache,
    compare_again,
    inspect_cache,
    join,
    verify_cache,
)

ROWS = 70
LOGITS = "output:logits"


class Counting(Teacher):
    """A teacher that counts the rows it is asked about."""

    def __init__(self, model, task):
        super().__init__(model, task)
        self.asked = []

    def __call__(self, batch):
        self.asked += batch["ids"].tolist()
        return super().__call__(batch)


def images(seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(rows, 1, 8, 8, generator=generator)
    return TensorSource(pixels, torch.arange(rows) % 4, classes=4, name="squares")


def net(width=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4)
    )


@pytest.fixture
def data():
    return images()


@pytest.fixture
def task(data):
    return ImageClassification().fitted(data)


@pytest.fixture
def teacher(task):
    return Counting(net(seed=1), task)


def learnt(teacher, data, task, **options):
    student = net(seed=2)
    terms = [attar.Term(partial(kl_divergence, temperature=2.0))]
    told = {"epochs": 4, "batch_size": 16, "seed": 5} | options
    attar.distill(student, teacher, data, task, terms, **told)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_what_is_kept_is_what_the_teacher_says(teacher, data, task, tmp_path):
    kept = cache(teacher, data, task, [LOGITS, "feature:3"], into=tmp_path / "c", batch_size=32)
    kept.open([LOGITS, "feature:3"])
    with torch.no_grad():
        logits = teacher.model.eval()(data.rows(torch.arange(ROWS))["inputs"])
    for batch in data.epoch(3, batch_size=9, seed=1):
        told = kept(batch)
        assert told[LOGITS].dtype == torch.float32
        torch.testing.assert_close(told[LOGITS], logits[batch["ids"]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            teacher.model[4](told["feature:3"]), told[LOGITS], rtol=1e-5, atol=1e-6
        )


def test_the_same_batch_is_answered_to_the_bit(teacher, data, task, tmp_path):
    cache(teacher, data, task, into=tmp_path / "c", batch_size=32)
    with torch.no_grad():
        model = teacher.model.eval()
        for batch in data.batches(32):
            assert torch.equal(Cached(tmp_path / "c")(batch)[LOGITS], model(batch["inputs"]))


def test_each_row_is_asked_about_once(teacher, data, task, tmp_path):
    cache(teacher, data, task, into=tmp_path / "c", batch_size=32)
    assert sorted(teacher.asked) == list(range(ROWS))
    cache(teacher, data, task, into=tmp_path / "c", batch_size=32)
    assert len(teacher.asked) == ROWS


def test_a_stage_that_fills_asks_once_and_its_student_is_that_of_a_live_teacher(
    teacher, data, task, tmp_path
):
    filling = Filling(teacher, data, root=tmp_path)
    filled = learnt(filling, data, task)
    # Once for each row, and not again for the batch that the stage was tried with.
    assert sorted(teacher.asked) == list(range(ROWS))
    live = learnt(Teacher(teacher.model, task), data, task)
    torch.testing.assert_close(filled, live, rtol=1e-4, atol=1e-5)


def test_a_full_cache_teaches_to_the_bit_what_the_one_that_filled_it_did(
    teacher, data, task, tmp_path
):
    first = learnt(Filling(teacher, data, root=tmp_path), data, task)
    asked = len(teacher.asked)
    assert torch.equal(first, learnt(Filling(teacher, data, root=tmp_path), data, task))
    assert len(teacher.asked) == asked
    (folder,) = tmp_path.iterdir()
    assert torch.equal(first, learnt(Cached(folder), data, task))


def test_a_full_cache_serves_other_seeds_and_batches(teacher, data, task, tmp_path):
    learnt(Filling(teacher, data, root=tmp_path), data, task)
    asked = len(teacher.asked)
    for options in ({"seed": 9}, {"batch_size": 7, "accumulate": 3}, {"shuffle_block": 4}):
        cached = learnt(Filling(teacher, data, root=tmp_path), data, task, **options)
        live = learnt(Teacher(teacher.model, task), data, task, **options)
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
    assert len(teacher.asked) == asked


@pytest.mark.parametrize("chain", [[crop, flip], [partial(crop, pixels=3), mixup]])
def test_views_are_kept_apart_and_each_is_asked_about_once(teacher, data, task, tmp_path, chain):
    options = {"augment": chain, "views": 3, "epochs": 7}
    filling = Filling(teacher, data, root=tmp_path, views=3, augment=chain)
    filled = learnt(filling, data, task, **options)
    assert sorted(teacher.asked) == sorted([*range(ROWS)] * 3)
    live = learnt(Teacher(teacher.model, task), data, task, **options)
    torch.testing.assert_close(filled, live, rtol=1e-4, atol=1e-5)
    (folder,) = tmp_path.iterdir()
    assert torch.equal(filled, learnt(Cached(folder), data, task, **options))
    made = cache(teacher, data, task, into=tmp_path / "c", views=3, augment=chain)
    torch.testing.assert_close(learnt(made, data, task, **options), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("views", "said"), [(None, "every epoch has new"), (1, "one view is no")])
def test_pixels_that_a_cache_would_hold_but_a_part_of_are_refused(
    teacher, data, task, tmp_path, views, said
):
    with pytest.raises(PreflightError, match=f"augmented .crop, flip.: {said}"):
        cache(teacher, data, task, into=tmp_path / "c", views=views, augment=[crop, flip])
    with pytest.raises(PreflightError, match=said):
        Filling(teacher, data, root=tmp_path, views=views, augment=[crop, flip])
    made = cache(teacher, data, task, into=tmp_path / "c")
    with pytest.raises(PreflightError, match=said):
        learnt(made, data, task, augment=[crop, flip], views=views)


def test_other_pixels_than_those_the_teacher_saw_are_refused(teacher, data, task, tmp_path):
    made = cache(teacher, data, task, into=tmp_path / "c", views=2, augment=[crop])
    for options, said in (
        ({"augment": [flip], "views": 2}, "augment is .*flip.*was.*crop"),
        ({"augment": [partial(crop, pixels=1)], "views": 2}, "augment is .*pixels.*1"),
        ({"augment": [crop], "views": 3}, "views is 3, and was 2"),
        ({}, "augment is"),
    ):
        with pytest.raises(PreflightError, match=said):
            learnt(made, data, task, **options)


def test_other_data_are_refused(teacher, data, task, tmp_path):
    made = cache(teacher, data, task, into=tmp_path / "c")
    with pytest.raises(PreflightError, match=r"data\.rows is 71, and was 70"):
        learnt(made, images(rows=71), task)
    with pytest.raises(PreflightError, match=r"data\.sha256"):
        learnt(made, images(seed=1), task)


def test_a_row_that_changed_where_the_fingerprint_does_not_look_is_found(
    teacher, data, task, tmp_path
):
    made = cache(teacher, data, task, into=tmp_path / "c")
    changed = data.rows(torch.arange(ROWS))["inputs"].clone()
    changed[34, 0, 3, 3] += 2**-20
    other = TensorSource(changed, data.labels, classes=4, name="squares")
    other._fingerprint = data.fingerprint()
    with pytest.raises(DataError, match="row 34 of squares is not what the teacher was asked"):
        learnt(made, other, task)


def test_another_teacher_has_another_cache(teacher, data, task, tmp_path):
    learnt(Filling(teacher, data, root=tmp_path), data, task)
    other = Counting(net(seed=1), task)
    with torch.no_grad():
        other.model[4].bias[2] += 1e-6
    learnt(Filling(other, data, root=tmp_path), data, task)
    assert sorted(other.asked) == list(range(ROWS))
    assert len(list(tmp_path.iterdir())) == 2
    same = Counting(net(seed=1), task)
    learnt(Filling(same, data, root=tmp_path), data, task)
    assert not same.asked


def test_a_folder_of_another_teacher_is_refused_by_the_name_of_the_field(
    teacher, data, task, tmp_path
):
    cache(teacher, data, task, into=tmp_path / "c")
    with pytest.raises(PreflightError, match=r"cache of something else: teacher\.weights is"):
        cache(Teacher(net(seed=3), task), data, task, into=tmp_path / "c")


def test_a_half_filled_cache_is_gone_on_with(teacher, data, task, tmp_path):
    filling = Filling(teacher, data, folder=tmp_path / "c").open([LOGITS])
    for batch in list(data.batches(16))[:2]:
        filling(batch)
    filling.close()
    with pytest.raises(PreflightError, match="38 of 70 answers are missing"):
        Cached(tmp_path / "c").open([LOGITS])
    assert inspect_cache(tmp_path / "c")["filled"] == 32
    cache(teacher, data, task, into=tmp_path / "c")
    assert sorted(teacher.asked) == list(range(ROWS))


def test_a_batch_half_of_which_is_known_asks_about_the_other_half(teacher, data, task, tmp_path):
    filling = Filling(teacher, data, folder=tmp_path / "c").open([LOGITS])
    filling(data.rows(torch.arange(10)))
    told = filling(data.rows(torch.arange(5, 15)))[LOGITS]
    assert teacher.asked == list(range(15))
    with torch.no_grad():
        live = teacher.model(data.rows(torch.arange(5, 15))["inputs"])
    torch.testing.assert_close(told, live, rtol=1e-5, atol=1e-6)
    filling.close()


def test_what_was_not_asked_for_is_refused_by_name(teacher, data, task, tmp_path):
    made = cache(teacher, data, task, into=tmp_path / "c")
    with pytest.raises(PreflightError, match=r"not asked for feature:3, but for output:logits"):
        made.open(["feature:3"])


def test_half_precision_is_within_its_bound_and_an_overflow_is_refused(
    teacher, data, task, tmp_path
):
    keep = Keep(dtype="float16")
    made = cache(teacher, data, task, into=tmp_path / "c", keep=keep).open([LOGITS])
    batch = data.rows(torch.arange(ROWS))
    with torch.no_grad():
        live = teacher.model.eval()(batch["inputs"])
    told = made(batch)[LOGITS]
    assert told.dtype == torch.float32
    assert not torch.equal(told, live)
    assert ((told - live).abs() <= live.abs() / 2048 + 1e-6).all()
    with torch.no_grad():
        teacher.model[4].bias += 1e5
    with pytest.raises(DataError, match="float16 ends at 65,504; keep float32"):
        cache(teacher, data, task, into=tmp_path / "d", keep=keep)


def test_what_is_not_of_rows_cannot_be_kept(teacher, data, task, tmp_path):
    with pytest.raises(
        PreflightError, match=r"param:4\.weight: a cache keeps a value for each row"
    ):
        cache(teacher, data, task, ["param:4.weight"], into=tmp_path / "c")


def test_what_is_not_finite_is_not_kept(teacher, data, task, tmp_path):
    with torch.no_grad():
        teacher.model[4].bias[0] = torch.nan
    with pytest.raises(DataError, match="output:logits: the teacher said something that is not"):
        cache(teacher, data, task, into=tmp_path / "c")
    assert not verify_cache(tmp_path / "c")


def test_a_teacher_that_moves_is_refused(data, task):
    with pytest.raises(PreflightError, match="follows the student"):
        Filling(attar.EMA(net(), task), data)


def test_a_term_on_features_learns_from_the_cache(teacher, data, task, tmp_path):
    made = cache(teacher, data, task, [LOGITS, "feature:3"], into=tmp_path / "c")
    terms = [attar.Term(kl_divergence), attar.Term(mse, "feature:3")]
    cached, live = net(seed=2), net(seed=2)
    options = {"epochs": 2, "batch_size": 16}
    attar.distill(cached, made, data, task, terms, **options)
    attar.distill(live, Teacher(teacher.model, task), data, task, terms, **options)
    for own, other in zip(cached.parameters(), live.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_cache_or_was_changed_is_refused(teacher, data, task, tmp_path):
    with pytest.raises(DataError, match=r"is no teacher's cache: it has no about\.json"):
        Cached(tmp_path)
    cache(teacher, data, task, into=tmp_path / "c")
    about = json.loads((tmp_path / "c" / "about.json").read_text())
    for change, said in (
        ({"format": "zip"}, "is no teacher's cache"),
        ({"version": 99}, "version 99 of the format"),
        ({"asked": {**about["asked"], "views": -1}}, "does not say what was asked"),
        ({"asked": 3}, "does not say what was asked"),
        ({"signals": {LOGITS: {"kept": "pickle"}}}, "how output:logits is kept"),
        ({"signals": {LOGITS: {"kept": "whole", "dtype": "object", "shape": []}}}, "how output"),
    ):
        (tmp_path / "c" / "about.json").write_text(json.dumps(about | change))
        with pytest.raises(DataError, match=said):
            Cached(tmp_path / "c")


def test_inspect_says_what_is_there(teacher, data, task, tmp_path):
    cache(teacher, data, task, into=tmp_path / "c", views=2, augment=[crop])
    told = inspect_cache(tmp_path / "c")
    assert (told["rows"], told["views"], told["filled"]) == (ROWS, 2, 2 * ROWS)
    assert told["bytes_per_row"] == 4 * 4 + 8 + 8  # four logits, the row's content, its number
    assert told["signals"] == {LOGITS: {"kept": "whole", "dtype": "float32", "shape": [4]}}
    assert told["teacher"]["weights"] == teacher.fingerprint()["weights"]
    assert verify_cache(tmp_path / "c") == 2 * ROWS


def test_the_inputs_of_the_last_layer_stand_for_all_its_logits(data, task, tmp_path):
    big = attar.models.build("mlp", data=data, widths=(32, 8))
    made = cache(Teacher(big, task), data, task, into=tmp_path / "c", keep=Keep(head=True))
    batch = data.rows(torch.arange(ROWS))
    with torch.no_grad():
        live = big.eval()(batch["inputs"])
    torch.testing.assert_close(made.open([LOGITS])(batch)[LOGITS], live, rtol=1e-5, atol=1e-6)
    assert inspect_cache(tmp_path / "c")["bytes_per_row"] == 4 * 8 + 16
    half = cache(
        Teacher(big, task), data, task, into=tmp_path / "h", keep=Keep(head=True, dtype="float16")
    )
    assert (half(batch)[LOGITS] - live).abs().max() < 2e-3
    layer = bytearray((tmp_path / "c" / "head.safetensors").read_bytes())
    layer[-3] ^= 1
    (tmp_path / "c" / "head.safetensors").write_bytes(layer)
    with pytest.raises(DataError, match=r"head\.safetensors: is damaged"):
        Cached(tmp_path / "c")


def test_a_teacher_without_a_last_layer_has_no_head_to_keep(teacher, data, task, tmp_path):
    with pytest.raises(PreflightError, match="no such layer; leave head out"):
        cache(teacher, data, task, into=tmp_path / "c", keep=Keep(head=True))


def test_the_largest_logits_teach_what_the_bucket_of_the_rest_allows(data, task, tmp_path):
    live = Teacher(net(seed=1), task)
    whole = learnt(live, data, task)
    for keep, close in ((Keep(top=4, logits="float32"), 1e-4), (Keep(top=3, logits="uint8"), 0.05)):
        folder = tmp_path / str(keep.top)
        made = cache(live, data, task, into=folder, keep=keep)
        assert isinstance(made.open([LOGITS])(data.rows(torch.arange(5)))[LOGITS], TopK)
        torch.testing.assert_close(learnt(made, data, task), whole, rtol=0, atol=close)
        again = Cached(folder)
        far, allowed = compare_again(again, live, data)
        assert far <= allowed


def test_a_loss_that_needs_every_logit_refuses_the_largest(data, task, tmp_path):
    made = cache(Teacher(net(), task), data, task, into=tmp_path / "c", keep=Keep(top=2))
    with pytest.raises((PreflightError, ValueError), match="kl_divergence"):
        attar.distill(net(), made, data, task, [attar.Term(mse)], epochs=1)


def test_asking_again_finds_another_teacher_and_a_wrong_answer(teacher, data, task, tmp_path):
    made = cache(teacher, data, task, into=tmp_path / "c")
    far, _ = compare_again(made, teacher, data)
    assert far < 1e-5
    with pytest.raises(PreflightError, match=r"another teacher: teacher\.weights"):
        compare_again(Cached(tmp_path / "c"), Teacher(net(seed=3), task), data)
    lying = Counting(teacher.model, task)
    lying.fingerprint = teacher.fingerprint
    lying.model = net(seed=3)
    with pytest.raises(DataError, match="from what the teacher says now"):
        compare_again(Cached(tmp_path / "c"), lying, data)


def test_another_form_has_another_cache(teacher, data, task, tmp_path):
    cache(teacher, data, task, into=tmp_path / "c")
    with pytest.raises(PreflightError, match=r"keep\.dtype is float16, and was float32"):
        cache(teacher, data, task, into=tmp_path / "c", keep=Keep(dtype="float16"))


def test_views_are_no_row_of_the_batch_that_a_net_without_statistics_is_tried_with(
    teacher, data, task, tmp_path
):
    options = {"augment": [crop], "views": 2}
    filling = Filling(teacher, data, root=tmp_path, **options)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    # 70 rows in batches of 23: the last has one.
    attar.distill(plain, filling, data, task, [attar.Term(mse)], batch_size=23, epochs=1, **options)
    assert sorted(teacher.asked) == list(range(ROWS))


@pytest.mark.parametrize("there", [False, True])
def test_what_a_stage_uses_is_compared_before_the_first_answer_is_kept(
    teacher, data, task, tmp_path, there
):
    if there:
        learnt(Filling(teacher, data, root=tmp_path), data, task)
    teacher.asked.clear()
    for other, options, said in (
        (data, {"augment": [crop]}, "every epoch has new pixels"),
        (data, {"augment": [crop], "views": 2}, "augment is .*crop.*and was"),
        (images(seed=1), {}, r"data\.sha256 is"),
    ):
        with pytest.raises(PreflightError, match=said):
            learnt(Filling(teacher, data, root=tmp_path), other, task, **options)
    assert not teacher.asked


def test_folders_that_keep_the_last_layer_are_joined_with_it(data, task, tmp_path):
    live = Teacher(attar.models.build("mlp", data=data), task)
    cache(live, data, task, into=tmp_path / "c", keep=Keep(head=True))
    join(tmp_path / "both", [tmp_path / "c"])
    batch = data.rows(torch.arange(ROWS))
    told = Cached(tmp_path / "both").open([LOGITS])(batch)[LOGITS]
    assert torch.equal(told, Cached(tmp_path / "c")(batch)[LOGITS])


def test_a_folder_of_another_teacher_is_not_joined_and_the_field_is_named(data, task, tmp_path):
    for seed in (1, 2):
        cache(Teacher(net(seed=seed), task), data, task, into=tmp_path / str(seed))
    with pytest.raises(DataError, match=r"asked\.teacher\.weights is"):
        join(tmp_path / "both", [tmp_path / "1", tmp_path / "2"])
