"""What the Fashion-MNIST benchmark keeps: its settings, its results, a teacher's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attar
from attar.runtime import write_atomic


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is the benchmark, the other shows that it runs."""

    images: int = 60_000
    tested: int = 10_000
    labels: int = 2_000
    teacher_width: int = 48
    student_width: int = 8
    teacher_epochs: int = 6
    own_teacher_epochs: int = 60
    epochs: int = 15
    chosen_epochs: int = 3
    batch_size: int = 128


QUICK = Size(300, 100, 30, 8, 4, 1, 1, 1, 1, 32)


@dataclass(frozen=True)
class Settings:
    """Everything a row is trained with; two rows of equal settings and seed are one."""

    epochs: int
    batch_size: int
    width: int
    rate: float
    labels: int  # that somebody had to give: to this row, or to its teacher
    teacher: Mapping[str, Any] | None = None  # its name, width and epochs
    share: float = 0.0  # weight of the term; the labels have the rest
    augment: Sequence[str] = ("flip",)
    options: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """These settings as JSON values."""
        return asdict(self) | {"augment": list(self.augment)}


class Results:
    """The numbers so far, in a file that is whole after each of them; without one, in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._kept: dict[str, list[dict[str, Any]]] = {"choices": [], "rows": []}

    def read(self, kind: str) -> list[dict[str, Any]]:
        """All records of this kind: ``choices`` or ``rows``."""
        if self.path is not None and self.path.exists():
            self._kept = json.loads(self.path.read_text(encoding="utf-8"))
        return self._kept[kind]

    def find(self, kind: str, row: str, seed: int, settings: Settings) -> dict[str, Any] | None:
        """The record of this row, seed and settings, where there is one."""
        wanted = row, seed, settings.to_json()
        records = self.read(kind)
        return next((r for r in records if (r["row"], r["seed"], r["settings"]) == wanted), None)

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Keep *record*; the file is read anew, as another process may have added to it."""
        self.read(kind).append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, (json.dumps(self._kept, indent=1) + "\n").encode())


class Answers:
    """A teacher's logits kept for two views of every image: as it is, and mirrored."""

    def __init__(self, source: attar.data.Source, logits: Tensor) -> None:
        self.source = source
        self.logits = logits  # [2, N, C]

    def open(self, addresses: Any = (), device: Any = None) -> Answers:
        """Nothing to prepare."""
        return self

    def close(self) -> None:
        """Nothing to give back."""

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = self.source.rows(batch["ids"])["inputs"]
        mirrored = (batch["inputs"] != plain).flatten(1).any(1).long()
        return {"output:logits": self.logits[mirrored, batch["ids"]]}


def answered(teacher: attar.Teacher, source: attar.data.Source) -> Tensor:
    """The logits [2, N, C] of every image of *source*, as it is and mirrored."""
    parts = []
    for batch in source.batches(256):
        views = [batch, {**batch, "inputs": batch["inputs"].flip(-1)}]
        parts.append(torch.stack([teacher(view)["output:logits"] for view in views]))
    teacher.close()
    return torch.cat(parts, 1)


def verify(answers: Answers, teacher: attar.Teacher) -> None:
    """What was kept is what the teacher says of an augmented batch."""
    batch = next(answers.source.epoch(0, batch_size=64, seed=0, augment=[attar.data.flip]))
    far = (answers(batch)["output:logits"] - teacher(batch)["output:logits"]).abs().max().item()
    teacher.close()
    assert far < 1e-3, f"the kept logits are {far:.1e} from the teacher's; delete the cache"
