"""Fifteen ways to pass knowledge, on real images, each with the weights that its paper gives.

20,000 training images of Fashion-MNIST, 10 epochs, 10,000 test images that are read once for each
row, after its last epoch. The teacher is a ResNet-8 of width 16 (9.3 MMAC), the student one of
width 4 (0.6 MMAC); the last three rows train a small vision transformer. Every row of a seed starts
from the same weights and sees the same batches, mirrored at random, at the same rate, with the
gradient clipped to norm 5. Nothing is tuned: temperatures, weights and warm-ups are those that
METHODS below says, as published for other nets and other data, so a row tells what a method does
as it comes, not what it could do.

Goals: the teacher is ahead of the student that has labels alone, and every row is above 70 %: none
diverged.

    python benchmarks/methods.py                     # all that is missing, then the table
    python benchmarks/methods.py --rows kd,crd --seeds 0
    python benchmarks/methods.py --table             # train nothing, show what is there

Each number is kept in the results file as soon as it is there: a run that was stopped goes on
where it was. One thread; about two hours of one core in all, teachers and three seeds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _fashion import Results
from _table import Goal, environment, finish, parser_of, table
from torch import nn

import attar
from attar import Term
from attar.evaluation import collect, count_macs
from attar.losses import (
    attention_transfer,
    channel_correlation,
    correlation,
    decoupled_kl,
    hierarchical_context,
    jacobian_matching,
    kl_divergence,
    memory_contrast,
    mse,
    normalized_smooth_l1,
    relation_angle,
    relation_distance,
)
from attar.models.projectors import fusion, layer_norm, linear, orthogonal
from attar.training import ramp, sgd

RESULTS = Path(__file__).parent / "results" / "methods.json"
CACHE = Path.home() / ".cache" / "attar" / "methods"
STAGES = ["feature:stage1", "feature:stage2", "feature:stage3"]
LAST = "input:head"  # the features that the classifier reads
KD = Term(partial(kl_divergence, temperature=4.0), weight=0.9)
TEACHERS = 3


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is the benchmark, the other shows that it runs."""

    images: int = 20_000
    tested: int = 10_000
    teacher_width: int = 16
    student_width: int = 4
    epochs: int = 10
    batch_size: int = 64
    rate: float = 0.1
    clip: float = 5.0


QUICK = Size(images=192, tested=100, teacher_width=8, epochs=1, batch_size=32)


@dataclass(frozen=True)
class Method:
    """A row: what is matched and with what labels, and where the numbers come from."""

    title: str
    terms: Callable[[], Sequence[Term]]
    labels: float
    source: str
    student: str = "resnet"
    teacher: str = "one"


def beside_labels(*terms: Term) -> Callable[[], Sequence[Term]]:
    return lambda: terms


def warmed(weight: float) -> Callable[[float], float]:
    """A weight that grows over the first tenth of the steps."""
    return partial(ramp, end=weight, until=0.1)


METHODS = {
    "baseline": Method("labels alone", beside_labels(), 1.0, ""),
    "kd": Method("KD", beside_labels(KD), 0.1, "T 4, 0.9 with 0.1 of labels (RepDistiller)"),
    "dkd": Method(
        "DKD",
        beside_labels(
            Term(partial(decoupled_kl, beta=8.0, temperature=4.0), weight=warmed(1.0))
        ),
        1.0,
        "alpha 1, beta 8, T 4, warm-up (mdistiller)",
    ),
    "dist": Method(
        "DIST",
        beside_labels(Term(partial(correlation, temperature=4.0), weight=2.0)),
        1.0,
        "2, T 4 (official, CIFAR-100)",
    ),
    "fitnets": Method(
        "FitNets",
        beside_labels(Term(mse, "feature:stage2", weight=100.0, projector=linear)),
        1.0,
        "100 on stage 2 (mdistiller)",
    ),
    "at": Method(
        "AT",
        lambda: [Term(attention_transfer, stage, weight=1000.0) for stage in STAGES],
        1.0,
        "1000 on every stage (official)",
    ),
    "rkd": Method(
        "RKD",
        beside_labels(
            Term(relation_distance, LAST, weight=25.0), Term(relation_angle, LAST, weight=50.0)
        ),
        1.0,
        "25 and 50 on the last features (official)",
    ),
    "pkd": Method(
        "PKD",
        beside_labels(
            Term(channel_correlation, "feature:stage3", weight=2.0, projector=linear)
        ),
        1.0,
        "2 on stage 3 (official, for detectors)",
    ),
    "vkd": Method(
        "VkD",
        beside_labels(
            Term(
                normalized_smooth_l1, LAST, projector=orthogonal, teacher_projector=layer_norm
            )
        ),
        1.0,
        "1 on the last features (none is published for this)",
    ),
    "crd": Method(
        "CRD + KD",
        lambda: [
            Term(partial(kl_divergence, temperature=4.0)),
            Term(partial(memory_contrast, negatives=4096), LAST, weight=0.8),
        ],
        1.0,
        "0.8 with KD 1 (official); 4,096 negatives, as there are 20,000 rows",
    ),
    "reviewkd": Method(
        "ReviewKD",
        beside_labels(
            Term(hierarchical_context, STAGES, weight=warmed(1.0), projector=fusion)
        ),
        1.0,
        "1 with warm-up (0.6 to 8 by pair, official)",
    ),
    "jacobian": Method(
        "Jacobian + KD",
        beside_labels(KD, Term(jacobian_matching, "grad:top/inputs")),
        0.1,
        "1 beside KD (none is published)",
    ),
    "ensemble": Method(
        "KD of three teachers", beside_labels(KD), 0.1, "as KD; probabilities averaged",
        teacher="three",
    ),
    "mutual": Method(
        "two students (DML)", beside_labels(), 0.0, "T 1, weight 1 (official)", teacher="none"
    ),
    "vit": Method("transformer, labels alone", beside_labels(), 1.0, "", student="vit"),
    "vit-kd": Method(
        "transformer, KD of the ResNet", beside_labels(KD), 0.1, "as KD", student="vit"
    ),
    "vit-rkd": Method(
        "transformer, KD and relations of its last features",
        beside_labels(KD, Term(relation_distance, LAST, weight=25.0)),
        0.1,
        "25 (official)",
        student="vit",
    ),
}  # fmt: skip


class Bench:
    """Data, teachers and results; trains what is missing."""

    def __init__(self, size: Size, path: Path | None, cache: Path) -> None:
        splits = attar.data.fashion_mnist()
        self.size, self.results, self.cache = size, Results(path), cache
        self.train = _first(splits.train, size.images)
        self.test = _first(splits.test, size.tested)
        self.task = attar.tasks.ImageClassification().fitted(self.train)
        self.started = time.process_time()

    def run(self, row: str, seed: int) -> None:
        """Train *row* at *seed* and keep its number, unless it is there."""
        settings = Settings(row, METHODS[row].source, self.size)
        if self.results.find("rows", row, seed, settings) is None:
            self.keep(row, seed, settings, self.trained(METHODS[row], seed))

    def trained(self, method: Method, seed: int) -> nn.Module:
        """The student of a row after its last epoch."""
        student = self.model(method.student, self.size.student_width, seed)
        if method.teacher == "none":
            other = self.model("resnet", self.size.student_width, seed + 100)
            group = attar.Group([student, other], self.task)
            terms = attar.mutual(group)
            attar.distill(
                group, None, self.train, self.task, terms, label_weight=0, **self.plan(seed)
            )
            return group[0]
        terms, teacher = method.terms(), None
        if terms:
            teacher = self.teachers(1 if method.teacher == "one" else TEACHERS)
        return attar.distill(
            student, teacher, self.train, self.task, terms,
            label_weight=method.labels, **self.plan(seed),
        )  # fmt: skip

    def teachers(self, count: int) -> Any:
        """The first teacher, or several as one."""
        found = [attar.Teacher(self.teacher(number), self.task) for number in range(count)]
        return found[0] if count == 1 else attar.Ensemble(found, self.task)

    def teacher(self, number: int) -> nn.Module:
        """A trained teacher, from the cache where it is there."""
        folder = self.cache / f"{self.size.teacher_width}-{self.size.images}-{number}"
        if not (folder / "model").exists():
            model = self.model("resnet", self.size.teacher_width, number)
            attar.train(model, self.train, self.task, run=folder, resume=True, **self.plan(number))
        model = attar.models.load(folder / "model")
        settings = Settings("teacher", "", self.size)
        if self.results.find("rows", "teacher", number, settings) is None:
            self.keep("teacher", number, settings, model)
        return model

    def model(self, name: str, width: int, seed: int) -> nn.Module:
        """A net that depends on the seed alone."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if name == "vit":
                options = {"width": 8 * width, "depth": 2, "heads": 2, "patch": 7}
            else:
                options = {"width": width, "depth": 8}
            return attar.models.build(name, data=self.train, **options)

    def plan(self, seed: int) -> dict[str, Any]:
        """The options that all rows share."""
        return {
            "epochs": self.size.epochs,
            "batch_size": self.size.batch_size,
            "optimizer": partial(sgd, lr=self.size.rate),
            "clip": self.size.clip,
            "augment": [attar.data.flip],
            "seed": seed,
            "device": "cpu",
            "progress": False,
        }

    def keep(self, row: str, seed: int, settings: Settings, model: nn.Module) -> None:
        """Score *model* on the test images and keep the record."""
        scores = self.task.score(collect(model, self.test, self.task, device="cpu"))
        record = {
            "row": row,
            "seed": seed,
            **{name: round(value, 6) for name, value in scores.items()},
            "macs": count_macs(model, self.train.rows(torch.arange(1))["inputs"]),
            "parameters": sum(p.numel() for p in model.parameters()),
            "settings": settings.to_json(),
            "cpu_seconds": round(time.process_time() - self.started),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "torch": torch.__version__,
        }
        self.started = time.process_time()
        self.results.add("rows", record)
        print(row, f"seed {seed}", f"{100 * scores['accuracy']:.2f} %", flush=True)


@dataclass(frozen=True)
class Settings:
    """Everything a row is trained with; two rows of equal settings and seed are one."""

    row: str
    source: str
    size: Size

    def to_json(self) -> dict[str, Any]:
        """These settings as JSON values."""
        return asdict(self)


def _first(source: attar.data.Source, count: int) -> attar.data.Source:
    return attar.data.Subset(source, torch.arange(min(count, len(source))), name=source.name)


def show(records: Sequence[dict[str, Any]]) -> str:
    """Accuracy of every row over its seeds, and the difference to labels alone, paired by seed."""
    found: dict[str, dict[int, float]] = {}
    seconds: dict[str, list[int]] = {}
    for record in records:
        found.setdefault(record["row"], {})[record["seed"]] = 100 * record["accuracy"]
        seconds.setdefault(record["row"], []).append(record["cpu_seconds"])
    lines = []
    for row, values in found.items():
        method = METHODS.get(row)
        base = found.get("vit" if method and method.student == "vit" else "baseline", {})
        gains = [values[s] - base[s] for s in sorted(values.keys() & base.keys())]
        if row in ("teacher", "baseline", "vit"):
            gains = []
        lines.append(
            [
                method.title if method else "teacher",
                f"{mean(values.values()):.2f}"
                + (f" ± {stdev(values.values()):.2f}" if len(values) > 1 else ""),
                ", ".join(f"{gain:+.2f}" for gain in gains),
                f"{mean(gains):+.2f}" if gains else "",
                f"{mean(seconds[row]):.0f}",
                method.source if method else "labels",
            ]
        )
    order = ["teacher", *METHODS]
    ranked = sorted(zip((order.index(row) for row in found), lines, strict=True))
    lines = [line for _, line in ranked]
    return table(["", "test, %", "beyond labels alone", "mean", "CPU s", "weights"], lines)


def judge(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals, as far as there are rows for them."""
    by = {
        row: [r["accuracy"] for r in records if r["row"] == row] for row in ("teacher", "baseline")
    }
    goals = [
        Goal("every row above 70 %: share wrong", max(1 - r["accuracy"] for r in records), 0.3)
    ]
    if all(by.values()):
        gap = mean(by["baseline"]) - mean(by["teacher"])
        goals.append(Goal("labels alone, beyond the teacher", gap, 0.0))
    return goals


def main() -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--rows", default=",".join(METHODS), help="which rows")
    parser.add_argument("--seeds", default="0,1,2", help="which seeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = _bench(options)
    if not options.table:
        for seed in options.seeds.split(","):
            for row in options.rows.split(","):
                bench.run(row, int(seed))
    records = bench.results.read("rows")
    report = {"environment": environment(["torch", "attar"]), "rows": records}
    return finish(options, report, judge(records), show(records))


def _bench(options: argparse.Namespace) -> Bench:
    if not options.quick:
        return Bench(Size(), RESULTS, CACHE)
    import tempfile

    return Bench(QUICK, None, Path(tempfile.mkdtemp()))


if __name__ == "__main__":
    sys.exit(main())
