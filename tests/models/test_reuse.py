"""A student that ends in its teacher's classifier: its parts, its training, its folder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.models import build, load, reuse_head, save
from attar.models.record import encode, read_record
from attar.runtime import DataError, UsageError

INPUTS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PAIRS = [
    (("resnet", {"width": 4}), ("resnet", {"width": 8}), "map"),
    (("resnet", {"width": 4}), ("resnet", {"width": 8, "stem_stride": 2}), "map"),
    (("resnet", {"width": 4, "stem_stride": 2}), ("mobilenet", {"width": 4}), "map"),
    (("mlp", {}), ("mlp", {"widths": [64]}), "vector"),
    (("vit", {"width": 16, "depth": 1}), ("resnet", {"width": 8}), "vector"),
    (("resnet", {"width": 4}), ("vit", {"width": 16, "depth": 1}), "vector"),
]
pairs = pytest.mark.parametrize(
    ("student", "teacher", "form"), PAIRS, ids=[f"{s[0]}-{t[0]}-{f}" for s, t, f in PAIRS]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(family: str, options: dict[str, Any], outputs: int = 10) -> nn.Module:
    model = build(family, shape=(1, 8, 8), outputs=outputs, **options)
    model(torch.rand(16, 1, 8, 8))  # statistics of its own
    return model


def heard(model: nn.Module, part: str) -> Tensor:
    with attar.Tap(model, [f"input:{part}"]) as tap, torch.no_grad():
        return tap(model.eval(), INPUTS)[1][f"input:{part}"]


@pairs
def test_it_is_backbone_projector_pool_and_the_teachers_head(student, teacher, form):
    small, large = made(*student), made(*teacher)
    model = reuse_head(small, large, INPUTS).eval()
    assert [name for name, _ in model.named_children()] == ["backbone", "projector", "pool", "head"]
    # What the backbone gives is what the student's own end read.
    end = "pool" if form == "map" else "head"
    assert torch.equal(model.backbone(INPUTS), heard(small, end))
    # What the projector gives fits where the teacher's own end reads.
    given, read = model.projector(model.backbone(INPUTS)), heard(large, end)
    assert given.shape[:2] == read.shape[:2]
    if form == "map":
        assert given.shape[2] <= read.shape[2]
    assert torch.equal(model(INPUTS), large.head(model.pool(given)))


@pairs
def test_save_and_load_give_the_same_bits(student, teacher, form, tmp_path):
    model = reuse_head(made(*student), made(*teacher), INPUTS).eval()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again(INPUTS), model(INPUTS))
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    assert again.attar_build == model.attar_build


def test_loading_builds_no_teacher_and_draws_nothing(tmp_path):
    save(reuse_head(made("mlp", {}), made("mlp", {"widths": [64]}), INPUTS), tmp_path / "model")
    before = torch.get_rng_state()
    load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_to_note_how_it_is_built_draws_nothing_more():
    small, large = made("mlp", {}), made("mlp", {"widths": [64]})
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        model = reuse_head(small, large, INPUTS)
        states.append(torch.get_rng_state())
        assert hasattr(model, "attar_build") == hasattr(small, "attar_build")
        vars(small).pop("attar_build", None)  # a student that nothing is noted of
    assert torch.equal(*states)


def test_the_bottleneck_is_simkds():
    small, large = made("resnet", {"width": 4}), made("resnet", {"width": 8})
    for factor in (2, 4):
        projector = reuse_head(small, large, INPUTS, factor=factor).projector
        inner = 32 // factor
        convolutions = [m for m in projector.modules() if isinstance(m, nn.Conv2d)]
        assert [c.kernel_size for c in convolutions] == [(1, 1), (3, 3), (1, 1)]
        assert all(c.bias is None for c in convolutions)
        scales = 2 * (inner + inner + 32)
        by_hand = 16 * inner + 9 * inner * inner + inner * 32 + scales
        assert sum(p.numel() for p in projector.parameters()) == by_hand
        assert projector(torch.randn(2, 16, 2, 2)).min() == 0


@pairs
def test_both_models_are_left_as_they_are(student, teacher, form):
    small, large = made(*student), made(*teacher)
    large.eval()
    before = [copy.deepcopy(m.state_dict()) for m in (small, large)]
    model = reuse_head(small, large, INPUTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for now, then in zip((small, large), before, strict=True):
        assert all(torch.equal(v, then[n]) for n, v in now.state_dict().items())
        assert not any(m._forward_pre_hooks for m in now.modules())
        assert all(p.requires_grad for p in now.parameters())
    assert small.training
    assert model.training
    assert not large.training


def test_training_moves_all_but_the_head_and_brings_the_features_together():
    train, _ = attar.data.digits()
    task = attar.tasks.ImageClassification(classes=10)
    large, small = build("resnet", data=train, width=8), build("resnet", data=train, width=4)
    inputs = train.rows(torch.arange(4))["inputs"]
    model = reuse_head(small, large, inputs)
    before = copy.deepcopy(dict(model.named_parameters()))
    term = attar.Term(attar.losses.mse, student="feature:projector", teacher="input:pool")
    first = _distance(model, large, train)
    attar.distill(model, large, train, task, [term], label_weight=0, epochs=4)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, large.head.weight)
    assert _distance(model, large, train) < 0.7 * first


def _distance(model: nn.Module, teacher: nn.Module, source: Any) -> float:
    inputs = source.rows(torch.arange(256))["inputs"]
    with torch.no_grad():
        own = model.eval().projector(model.backbone(inputs))
        return float((own - teacher.eval()[:-2](inputs)).square().mean())


def test_a_student_of_ones_own_is_loaded_into_a_module(tmp_path):
    small = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
    large = made("mlp", {"widths": [64]})
    model = reuse_head(small, large, INPUTS).eval()
    save(model, tmp_path / "model")
    with pytest.raises(DataError, match=r"load\(folder, into=module\)"):
        load(tmp_path / "model")
    fresh = reuse_head(copy.deepcopy(small), large, INPUTS)
    assert torch.equal(load(tmp_path / "model", into=fresh)(INPUTS), model(INPUTS))


def test_a_student_that_was_changed_since_it_was_built_is_not_said_to_be_built():
    small = made("mlp", {})
    small.blocks.append(nn.Linear(32, 32))
    model = reuse_head(small, made("mlp", {"widths": [64]}), INPUTS)
    assert not hasattr(model, "attar_build")


def test_a_doctored_folder_is_refused_and_not_run(tmp_path):
    save(reuse_head(made("mlp", {}), made("mlp", {"widths": [64]}), INPUTS), tmp_path)
    record = read_record(tmp_path)
    student = {"family": "os.system", "options": {}}
    hostile = record.model_copy(update={"options": {**record.options, "student": student}})
    (tmp_path / "model.json").write_bytes(encode(hostile))
    with pytest.raises(DataError, match=r"the student's family 'os.system' is none of attar's"):
        load(tmp_path)


def test_a_head_without_bias_stays_one(tmp_path):
    large = made("mlp", {"widths": [64]})
    large.head = nn.Linear(64, 10, bias=False)
    model = reuse_head(made("mlp", {}), large, INPUTS).eval()
    assert model.head.bias is None
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(INPUTS), model(INPUTS))


def test_the_new_parts_have_the_students_type():
    small = made("mlp", {}).double()
    large = made("mlp", {"widths": [64]}).double()
    model = reuse_head(small, large, INPUTS.double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        (made("mlp", {}, outputs=7), made("mlp", {}), "student has 7 classes and the teacher 10"),
        (
            nn.Sequential(nn.Conv2d(1, 3, 3)),
            made("mlp", {}),
            "student's last layer.*'0' is a Conv2",
        ),
        (made("mlp", {}), nn.Flatten(), "teacher's last layer must be an nn.Linear"),
        (nn.Sequential(nn.Linear(8, 10)), made("mlp", {}), r"vectors \[N, C\], not \[4, 1, 8, 8\]"),
    ],
)
def test_what_has_no_classifier_to_exchange(student, teacher, said):
    with pytest.raises(UsageError, match=f"reuse_head: the {said}|reuse_head: .*{said}"):
        reuse_head(student, teacher, INPUTS)
