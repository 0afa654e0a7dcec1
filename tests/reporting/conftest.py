"""A verdict as ``evaluation`` writes it, and a reader of pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.data import TensorSource
from attar.evaluation import Cost, judge
from attar.evaluation.curves import figures
from attar.tasks import ImageClassification, TabularClassification


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def rows(right: int, of: int = 100, classes: int = 2) -> dict[str, torch.Tensor]:
    labels = torch.arange(of) % classes
    answer = torch.where(torch.arange(of) < right, labels, (labels + 1) % classes)
    return {"logits": torch.nn.functional.one_hot(answer, classes).float() * 4, "labels": labels}


def told(classes: tuple[str, ...] = ("no", "yes"), **more: Any) -> dict[str, Any]:
    """A full verdict as JSON."""
    taken = {"p50_ms": 1.0, "p95_ms": 2.0}
    price = Cost(1000, 10_000, 4000, {"1": taken, "64": taken}, 1, "a chip")
    arms = {"teacher": rows(98, classes=len(classes)), "baseline": [rows(80, classes=len(classes))]}
    arms |= {"distilled": [rows(95, classes=len(classes))]}
    options = {"costs": dict.fromkeys(arms, price), "seconds": dict.fromkeys(arms, 2.0)}
    made = judge(TabularClassification(classes=classes), **(arms | options | more))
    exports = [exported(name) for name in ("model.safetensors", "model.pt2")]
    return json.loads(json.dumps(made.to_json() | {"exports": exports}, allow_nan=False))


def exported(path: str) -> dict[str, Any]:
    """A file as a run tells of it."""
    taken = {"p50_ms": 0.0442, "p95_ms": 0.0677}
    return {
        "format": "any",
        "path": path,
        "bytes": 2_936,
        "sha256": "62cd6dbf" * 8,
        "difference": 7.6e-06,
        "examples": 256,
        "latency": {"1": taken, "64": taken},
        "threads": 1,
    }


def log(arms: tuple[str, ...] = ("teacher", "baseline", "distilled"), term: str = "kl") -> str:
    """The log of four epochs of two seeds."""
    records: list[dict[str, Any]] = []
    for arm, seed, epoch in ((a, s, e) for a in arms for s in (0, 1) for e in range(4)):
        mark = {"arm": arm, "seed": seed, "stage": 0, "epoch": epoch, "step": 5 * epoch + 5}
        terms = {"labels": 2.0 - 0.1 * epoch} | ({term: 1.5} if arm == "distilled" else {})
        records.append(mark | {"split": "train", "loss": 1.0, "terms": terms})
        records.append(mark | {"split": "validation", "accuracy": 0.5 + 0.1 * epoch + 0.01 * seed})
    return "".join(json.dumps(each) + "\n" for each in records)


def drawn(folder: Path, classes: tuple[str, ...] = ("no", "yes"), **more: Any) -> dict[str, Any]:
    """The numbers of the figures of a run on images, as JSON; writes the log into *folder*."""
    (folder / "metrics.jsonl").write_text(log(**more))
    labels = torch.arange(100) % len(classes)
    images = torch.linspace(0, 1, 100 * 3 * 5 * 4).reshape(100, 3, 5, 4)
    source = TensorSource(images, labels, classes=classes)
    amount = len(classes)
    models = {"teacher": [rows(98, classes=amount)], "baseline": [rows(80, classes=amount)]}
    models |= {"distilled": [rows(95, classes=amount)]}
    task = ImageClassification(classes=classes)
    made = figures(task, source, models, log=folder / "metrics.jsonl")
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.fixture
def verdict() -> Callable[..., dict[str, Any]]:
    return told


@pytest.fixture
def figured() -> Callable[..., dict[str, Any]]:
    return drawn


@pytest.fixture
def read() -> Callable[[Path], Page]:
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run folder."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "verdict.json").write_text(json.dumps(told(retain=0.9)))
    (folder / "figures.json").write_text(json.dumps(drawn(folder)))
    (folder / "recipe.json").write_text(json.dumps({"student": {"name": "mlp", "widths": [16]}}))
    return folder
