"""Recipes whose teacher or student is a model of transformers, from file to verdict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import attar
from attar.recipes import Recipe, check, parse, resolve, run
from attar.runtime import DataError, PreflightError

hf = pytest.importorskip("transformers")

NAMES = ("dark", "grey", "light")
VIT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 4, "image_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def source(seed: int, count: int) -> attar.data.Source:
    """Images whose class is how light they are."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.integers(0, 80, (count, 1, 8, 8)) + 80 * labels[:, None, None, None]
    return attar.data.TensorSource(images.astype(np.uint8), labels, classes=NAMES, name="light")


def splits():
    return source(0, 120), source(1, 60)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A ViT that knows the classes, in another order, in a folder that only transformers wrote."""
    torch.manual_seed(0)
    order = ("light", "dark", "grey")
    names = dict(enumerate(order))
    config = hf.ViTConfig(**VIT, id2label=names, label2id={n: i for i, n in names.items()})
    model = hf.ViTForImageClassification(config)
    data, _ = splits()
    batch = data.rows(torch.arange(len(data)))
    labels = torch.tensor([order.index(NAMES[label]) for label in batch["labels"]])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        pixels = (batch["inputs"].expand(-1, 3, -1, -1) - 0.5) / 0.5
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def recipe(teacher: str, student: object) -> Recipe:
    text = json.dumps({
        "task": "image-classification",
        "data": "digits",
        "teacher": {"load": teacher},
        "student": student,
        "stages": [{"do": "distill", "epochs": 1, "batch_size": 30,
                    "terms": [{"loss": "kl_divergence"}]}],
    })  # fmt: skip
    written = resolve(parse(text, "recipe")).recipe
    fields = {name: getattr(written, name) for name in written.__dataclass_fields__}
    return Recipe(**fields | {"data": splits()})


@pytest.mark.parametrize("student", ["transformers", "pretrained"])
def test_a_run_ends_in_a_folder_that_both_libraries_read(teacher, student, tmp_path):
    chosen = {"name": "pretrained", "path": str(teacher)}
    if student == "transformers":
        config = {key: value for key, value in VIT.items() if key != "image_size"}
        chosen = {"name": "transformers", "architecture": "vit", "config": config}
    verdict = run(recipe(str(teacher), chosen), folder=tmp_path / "run")
    assert verdict.models["teacher"].primary.value > 0.8  # in the data's order
    folder = tmp_path / "run" / "student"
    images = source(1, 60).rows(torch.arange(60))["inputs"]
    ours = attar.models.load(folder)
    theirs = hf.AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        wanted = theirs(pixel_values=ours.preprocess(images)).logits
        torch.testing.assert_close(ours(images), wanted, rtol=0, atol=1e-6)
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert attar.models.read_extra(folder)["task"]["classes"] == list(NAMES)


def test_a_teacher_of_other_classes_is_refused_before_anything_is_trained(teacher):
    config = json.loads((teacher / "config.json").read_text())
    config["id2label"] = {"0": "cat", "1": "dark", "2": "dog"}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DataError, match=r"\(cat, dark, dog\) are not those of the data.*project: true"
    ):
        check(recipe(str(teacher), "mlp"))


def test_a_teacher_that_is_neither_a_folder_nor_on_the_hub_says_both():
    with pytest.raises(DataError, match="there is no such folder, and the hub did not give"):
        check(recipe("no-one/nothing", "mlp"))


def test_a_misspelt_config_value_is_an_error_of_the_recipe(teacher):
    student = {"name": "transformers", "architecture": "vit", "config": {"hidden_sizes": [8]}}
    with pytest.raises(PreflightError, match="did you mean 'hidden_size'"):
        check(recipe(str(teacher), student))


def test_a_folder_that_only_transformers_wrote_is_evaluated(teacher: Path, tmp_path: Path) -> None:
    """By the command's own function: the classes are put into the order of the data."""
    from attar.cli.write import Choices, evaluate_model

    image = pytest.importorskip("PIL.Image")
    for part, seed, count in (("train", 0, 30), ("test", 1, 60)):
        rows = source(seed, count).rows(torch.arange(count))
        for number, (pixels, label) in enumerate(zip(rows["inputs"], rows["labels"], strict=True)):
            folder = tmp_path / "photos" / part / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray((pixels[0] * 255).byte().numpy()).save(folder / f"{number}.png")
    found = evaluate_model(teacher, str(tmp_path / "photos"), Choices())
    assert found.scores["accuracy"] > 0.8


def test_a_size_that_is_chosen_for_a_folder_of_transformers_is_told(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from attar.cli.write import Choices, evaluate_model

    image = pytest.importorskip("PIL.Image")
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for side in (20, 24, 28, 32, 36):
            image.new("L", (side, side)).save(tmp_path / "photos" / name / f"{side}.png")
    evaluate_model(teacher, str(tmp_path / "photos"), Choices(size=16))
    assert capsys.readouterr().err == ""
    evaluate_model(teacher, str(tmp_path / "photos"), Choices())
    assert "become 32 pixels a side; --size N" in capsys.readouterr().err


def test_a_teacher_of_transformers_with_other_classes_is_projected(teacher: Path) -> None:
    """Two classes of ours for three of its own."""

    def merged(part: attar.data.Source) -> attar.data.Source:
        rows = part.rows(torch.arange(len(part)))
        labels = (rows["labels"] > 0).long()
        return attar.data.TensorSource(rows["inputs"], labels, classes=("dark", "other"))

    plan = recipe(str(teacher), {"name": "resnet", "width": 2})
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    fields["data"] = tuple(merged(part) for part in splits())
    for how in ({"project": True}, {"classes": {"dark": ["dark"], "other": ["grey", "light"]}}):
        made = attar.recipes.TeacherPlan(load=str(teacher), **how)
        verdict = run(
            Recipe(**fields | {"teacher": made}),
            folder=teacher.parent / str(len(how)) / next(iter(how)),
        )
        assert verdict.models["teacher"].primary.value > 0.8
