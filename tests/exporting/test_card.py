"""The model card: what it says, and that no name in it can become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attar
from attar.evaluation import judge
from attar.exporting import export
from attar.exporting.card import escaped

HOSTILE = "<script>alert(1)</script> [x](http://evil) ![y](z) | `a` *b*\n# c \x1b[31m \u202e"


def card_of(folder: Path, **options) -> str:
    torch.manual_seed(0)
    export(nn.Linear(4, 3), folder / "out", example=torch.rand(5, 4), **options)
    return (folder / "out" / "README.md").read_text(encoding="utf-8")


def test_a_bare_card_says_what_is_not_stated(tmp_path: Path) -> None:
    text = card_of(tmp_path)
    for line in (
        "- student: Linear, 15 parameters",
        "- teacher: not stated",
        "- data: not stated",
        "- task: not stated",
        "- input: [n, 4], float32",
        "- output: [n, 3], float32",
        "- licence: not stated",
        "- licence of the teacher: not stated",
        "- licence of the data: not stated",
    ):
        assert f"\n{line}\n" in text
    assert f"attar {attar.__version__}, torch {torch.__version__}" in text
    assert re.search(r"Date: \d{4}-\d\d-\d\d\.\n$", text)


def test_a_card_says_what_it_is_told(tmp_path: Path) -> None:
    task = attar.tasks.TabularClassification(classes=("cat", "dog", "eel"))
    card = {
        "name": "small",
        "teacher": "big net",
        "data": "pets",
        "date": "2026-01-02",
    }
    licences = {"licence": "MIT", "teacher_licence": "Apache-2.0", "data_licence": "CC0"}
    text = card_of(tmp_path, task=task, card=card, **licences)
    assert text.startswith("# small\n")
    for line in (
        "- teacher: big net",
        "- data: pets",
        "- task: TabularClassification",
        "- output: [n, 3], float32, logits in the order of the classes",
        "- classes (3): cat, dog, eel",
        "- licence: MIT",
        "- licence of the teacher: Apache-2.0",
        "- licence of the data: CC0",
    ):
        assert f"\n{line}\n" in text
    assert text.endswith("Date: 2026-01-02.\n")


def test_a_regression_says_its_units(tmp_path: Path) -> None:
    task = attar.tasks.Regression(targets=3, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.5))
    text = card_of(tmp_path, task=task)
    assert "value = output x std + mean, with mean [1.0, 2.0, 3.0] and std [4.0, 5.0, 6.5]" in text


def test_the_verdict_stands_in_the_card(tmp_path: Path) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3

    def rows(noise: float) -> dict[str, torch.Tensor]:
        logits = nn.functional.one_hot(labels, 3) + noise * torch.randn(60, 3, generator=generator)
        return {"logits": logits, "labels": labels}

    verdict = judge(
        task, teacher=rows(0.1), baseline=[rows(2.0)], distilled=[rows(0.5)], resamples=100
    )
    text = card_of(tmp_path, card={"verdict": verdict})
    assert escaped(verdict.headline) in text
    assert re.search(r"^\| \| teacher \| baseline \| distilled \|$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.startswith("| accuracy")]
    assert len(lines) == 1
    assert "100" in lines[0]


def test_every_file_stands_in_the_card_with_its_hash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    formats = ["safetensors", "torch_export"]
    made = export(nn.Linear(4, 3), tmp_path / "out", example=torch.rand(5, 4), formats=formats)
    text = (tmp_path / "out" / "README.md").read_text()
    for artefact in made.values():
        assert f"| `{artefact.path.name}` | {artefact.bytes:,} |" in text
        assert f"`{artefact.sha256}`" in text
    assert "`torch.export.load` can run code" in text
    assert "onnxruntime" not in text


def test_no_name_can_become_markup(tmp_path: Path) -> None:
    task = attar.tasks.TabularClassification(classes=(HOSTILE, "b", "c"))
    card = dict.fromkeys(("name", "teacher", "data", "date"), HOSTILE)
    licences = dict.fromkeys(("licence", "teacher_licence", "data_licence"), HOSTILE)
    text = card_of(tmp_path, task=task, card=card, **licences)
    assert "<" not in text
    assert "http://" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("\n# ") == 0
    assert text.count("script&gt;alert(1)&lt;") == 8


@given(st.text())
def test_escaped_text_is_one_line_of_plain_signs(text: str) -> None:
    line = escaped(text)
    assert line.isprintable()
    assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", line)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]|~]", line)


@pytest.mark.parametrize("count", [100, 101])
def test_a_hundred_classes_are_named_and_the_rest_counted(count: int, tmp_path: Path) -> None:
    names = tuple(f"k{index}" for index in range(count))
    task = attar.tasks.TabularClassification(classes=names)
    text = card_of(tmp_path, task=task)
    assert f"- classes ({count}): k0, " in text
    assert ("and 1 more" in text) is (count == 101)
    assert ("k100" in text) is False
