"""What distillation is worth on Fashion-MNIST: every method with the same teacher and student.

One teacher, a ResNet-8 of width 48, answers every training image once, as it is and mirrored, and
all students learn from these answers. A student is the same net at width 8. 6,000 of the 60,000
training images are held back: settings are chosen on them and on nothing else, and nobody trains
on them. The test split is read once for each row, after its last epoch.

First table, all labels: the labels alone and four losses. Every row of a seed starts from the same
weights and sees the same batches at the same rate, the one that was best for the labels alone. A
term of weight w goes with labels of weight 1 - w.

Second table, 2,000 labels: the labels alone, and the teacher's answers to all 54,000 images with
no label at all, in equally many optimiser steps. "A given teacher" is that of the first table, so
somebody had 54,000 labels; "own teacher" has seen these 2,000 labels and no other.

Goals: the teacher is ahead of the student on labels. With 2,000 labels a given teacher brings at
least 3 points in the mean, and no seed loses.

    python benchmarks/fashion_mnist.py               # all that is missing, then both tables
    python benchmarks/fashion_mnist.py --choose      # only what is tried on the validation part
    python benchmarks/fashion_mnist.py --rows baseline,kd --seeds 0
    python benchmarks/fashion_mnist.py --table       # train nothing, show what is there

Each number is kept in the results file as soon as it is there, and is not made again: a run that
was stopped goes on where it was. One thread; about an hour and a half of one core in all.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from _fashion import QUICK, Answers, Results, Settings, Size, answered, verify
from _table import Goal, environment, finish, parser_of, table
from torch import nn

import attar
from attar.evaluation import collect, count_macs
from attar.runtime import DivergedError
from attar.training import sgd

RESULTS = Path(__file__).parent / "results" / "fashion_mnist.json"
CACHE = Path.home() / ".cache" / "attar" / "fashion_mnist"
AUGMENTATIONS = {"flip": attar.data.flip, "crop": partial(attar.data.crop, pixels=2)}
LOSSES = {
    "kd": attar.losses.kl_divergence,
    "dkd": attar.losses.decoupled_kl,
    "dist": attar.losses.correlation,
    "standardized": attar.losses.standardized_kl,
}
TITLES = {
    "teacher": "teacher",
    "baseline": "labels alone",
    "kd": "KD, kl_divergence",
    "dkd": "DKD, decoupled_kl",
    "dist": "DIST, correlation",
    "standardized": "logit standardisation, standardized_kl",
    "few-labels": "2,000 labels alone",
    "few-given": "no labels, a given teacher",
    "few-own": "no labels, own teacher",
    "own-teacher": "own teacher, of 2,000 labels",
}
ALL_LABELS = ["baseline", "kd", "dkd", "dist", "standardized"]
FEW_LABELS = ["few-labels", "few-given", "few-own"]
TEACHERS = ["teacher", "own-teacher"]

# What --choose tries, in the order in which it is tried. The labels alone choose the rate that all
# rows of the first table then have. With 2,000 labels the labels alone may also choose a rate and
# an augmentation of their own; answers that are kept for two views of an image cannot be cropped.
RATES = (0.2, 0.4, 0.8)
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "baseline": {"rate": RATES},
    "kd": {"temperature": (2.0, 4.0), "share": (0.5, 0.9)},
    "dkd": {"temperature": (2.0, 4.0), "beta": (2.0, 8.0)},
    "dist": {"temperature": (1.0, 4.0), "share": (0.5, 0.9)},
    "standardized": {"temperature": (2.0, 4.0), "share": (0.5, 0.9)},
    "few-labels": {"rate": (0.1, *RATES[:2]), "augment": (("flip",), ("flip", "crop"))},
    "few-given": {"temperature": (1.0, 2.0, 4.0)},
}
TEACHER_RATE = 0.1


class Bench:
    """The data, the teachers and the rows."""

    def __init__(self, size: Size, results: Results, cache: Path, folder: str | None) -> None:
        self.size = size
        self.results = results
        self.cache = cache
        train, test = attar.data.fashion_mnist(folder=folder)
        train, self.test = _first(train, size.images), _first(test, size.tested)
        self.rest, self.validation = attar.data.split(train, 0.1, seed=0)
        _, self.few = attar.data.split(self.rest, size.labels / len(self.rest), seed=0)
        self.task = attar.tasks.ImageClassification().fitted(train)
        self.started = time.process_time()
        self._answers: dict[str, Answers] = {}

    def model(self, width: int, seed: int) -> nn.Module:
        """A net of this width, the same for every row of a seed."""
        torch.manual_seed(seed)
        return attar.models.build("resnet", data=self.rest, depth=8, width=width, stem_stride=2)

    def settings(self, row: str, epochs: int, choice: Mapping[str, Any]) -> Settings:
        """The settings of *row* with what was chosen for it."""
        size, told = self.size, dict(choice)
        common: dict[str, Any] = {"batch_size": size.batch_size, "rate": told.pop("rate")}
        if row in TEACHERS:
            own = row == "own-teacher"
            return Settings(
                epochs=size.own_teacher_epochs if own else size.teacher_epochs,
                width=size.teacher_width,
                labels=len(self.few if own else self.rest),
                augment=("flip", "crop") if own else ("flip",),
                **common,
            )
        if row == "few-labels":  # as many steps as the others take, over fewer images
            steps = epochs * math.ceil(len(self.rest) / size.batch_size)
            epochs = round(steps / math.ceil(len(self.few) / size.batch_size))
        few = row in ("few-labels", "few-own")
        labels = len(self.few if few else self.rest)
        common |= {"epochs": epochs, "width": size.student_width, "labels": labels}
        if row in ("baseline", "few-labels"):
            return Settings(**common, augment=told.pop("augment", ("flip",)))
        share = 1.0 if row in FEW_LABELS else told.pop("share", 0.5)
        name = "own-teacher" if row == "few-own" else "teacher"
        by = self.settings(name, 0, {"rate": TEACHER_RATE})
        teacher = {"name": name, "width": by.width, "epochs": by.epochs}
        return Settings(**common, teacher=teacher, share=share, options=told)

    def final(self, row: str) -> Settings:
        """The settings with which *row* is tested."""
        if row in TEACHERS:
            return self.settings(row, 0, {"rate": TEACHER_RATE})
        return self.settings(row, self.size.epochs, self.chosen(row))

    def row(self, row: str, seed: int) -> None:
        """Train and test *row*, unless that was done."""
        if row in TEACHERS:
            self.answers(row)
        elif self.results.find("rows", row, seed, settings := self.final(row)) is None:
            self.keep("rows", row, seed, settings, self.test, self.trained(row, seed, settings))

    def grid(self, row: str) -> list[tuple[dict[str, Any], Settings]]:
        """What is tried for *row*; where no rate is, that of the first table is taken."""
        names, values = zip(*GRIDS[row].items(), strict=True)
        base = {} if "rate" in names else {"rate": self.chosen("baseline")["rate"]}
        choices = [base | dict(zip(names, tried, strict=True)) for tried in product(*values)]
        return [(c, self.settings(row, self.size.chosen_epochs, c)) for c in choices]

    def choose(self, row: str) -> None:
        """Try all of the row's grid on the validation part, unless that was done."""
        for choice, settings in self.grid(row):
            if self.results.find("choices", row, 0, settings) is not None:
                continue
            try:
                model = self.trained(row, 0, settings)
            except DivergedError as error:
                print(f"{row}: {error}", flush=True)
                model = None
            self.keep("choices", row, 0, settings, self.validation, model, choice=choice)

    def tried(self, row: str) -> list[tuple[float, dict[str, Any], Settings]]:
        """What was tried for *row*, with its accuracy on the validation part."""
        grid = [(c, s, self.results.find("choices", row, 0, s)) for c, s in self.grid(row)]
        return [(record["accuracy"], c, s) for c, s, record in grid if record is not None]

    def chosen(self, row: str) -> dict[str, Any]:
        """The best of what was tried for *row*, the first of equals."""
        tried = self.tried(chooser(row))
        if not tried:
            raise SystemExit(f"nothing was chosen for {row} yet: run it with --choose")
        return max(tried, key=lambda item: item[0])[1]

    def trained(self, row: str, seed: int, settings: Settings) -> nn.Module:
        """A student of these settings after its last epoch."""
        options = self.plan(settings, seed)
        student = self.model(settings.width, seed)
        if settings.teacher is None:
            source = self.few if row == "few-labels" else self.rest
            return attar.train(student, source, self.task, **options)
        loss = partial(LOSSES.get(row, LOSSES["kd"]), **settings.options)
        return attar.distill(
            student,
            self.answers(settings.teacher["name"]),
            self.rest,
            self.task,
            [attar.Term(loss, weight=settings.share)],
            label_weight=1 - settings.share,
            **options,
        )

    def plan(self, settings: Settings, seed: int) -> dict[str, Any]:
        """The options of the verbs."""
        return {
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "optimizer": partial(sgd, lr=settings.rate),
            "augment": [AUGMENTATIONS[name] for name in settings.augment],
            "seed": seed,
            "device": "cpu",
            "progress": False,
        }

    def keep(
        self,
        kind: str,
        row: str,
        seed: int,
        settings: Settings,
        source: attar.data.Source,
        model: nn.Module | None,
        **more: Any,
    ) -> None:
        """Score *model* on *source* and keep the record; one that diverged has 0."""
        scores = {"accuracy": 0.0}
        if model is not None:
            scores = self.task.score(collect(model, source, self.task, device="cpu"))
        record = {
            "row": row,
            "seed": seed,
            **{name: round(value, 6) for name, value in scores.items()},
            **more,
            "settings": settings.to_json(),
            "examples": len(source),
            "cpu_seconds": round(time.process_time() - self.started),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        self.started = time.process_time()
        self.results.add(kind, record)
        percent = f"{100 * scores['accuracy']:.2f} %"
        print(kind, row, f"seed {seed}", _told(record["settings"]), percent, flush=True)

    def answers(self, name: str) -> Answers:
        """The teacher's logits for every training image; it is trained where it was not yet."""
        if name not in self._answers:
            settings = self.final(name)
            folder = self.cache / f"{name}-{settings.width}-{settings.epochs}-{settings.labels}"
            model = self.teacher(name, settings, folder).to(memory_format=torch.channels_last)
            kept = folder / "logits.npy"
            if not kept.exists():
                logits = answered(attar.Teacher(model, self.task), self.rest)
                np.save(kept, logits.numpy(), allow_pickle=False)
            found = Answers(self.rest, torch.from_numpy(np.load(kept, allow_pickle=False)))
            verify(found, attar.Teacher(model, self.task))
            if self.results.find("rows", name, 0, settings) is None:
                self.keep("rows", name, 0, settings, self.test, model)
            self._answers[name] = found
        return self._answers[name]

    def teacher(self, name: str, settings: Settings, folder: Path) -> nn.Module:
        """The trained teacher, from *folder* where it is there; else it goes on being trained."""
        if not (folder / "model").exists():
            source = self.few if name == "own-teacher" else self.rest
            model = self.model(settings.width, 0).to(memory_format=torch.channels_last)
            attar.train(model, source, self.task, run=folder, resume=True, **self.plan(settings, 0))
        return attar.models.load(folder / "model")


def chooser(row: str) -> str:
    """The row whose settings *row* has."""
    return "few-given" if row == "few-own" else row


def _first(source: attar.data.Source, count: int) -> attar.data.Source:
    if count >= len(source):
        return source
    return attar.data.Subset(source, torch.arange(count), name=source.name)


def percents(records: Sequence[dict[str, Any]], row: str) -> dict[int, float]:
    """The test accuracy of *row* by seed, the newest of each."""
    return {r["seed"]: 100 * r["accuracy"] for r in records if r["row"] == row}


def gains(records: Sequence[dict[str, Any]], row: str, base: str) -> list[float]:
    """Points of *row* beyond *base*, for each seed that both have."""
    first, second = percents(records, row), percents(records, base)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def show(records: Sequence[dict[str, Any]], rows: Sequence[str], base: str) -> str:
    """One table: the accuracy over the seeds and the paired difference to *base*."""
    lines = []
    for row in rows:
        found = percents(records, row)
        if not found:
            continue
        values = [value for _, value in sorted(found.items())]
        others = gains(records, row, base) if row not in (base, *TEACHERS) else []
        settings = next(r["settings"] for r in reversed(records) if r["row"] == row)
        lines.append(
            [
                TITLES[row],
                _spread(values),
                ", ".join(f"{value:.2f}" for value in values),
                ", ".join(f"{value:+.2f}" for value in others),
                f"{mean(others):+.2f}" if others else "",
                _told(settings),
            ]
        )
    head = ["", "test, %", "each seed", f"beyond {TITLES[base]}", "mean", "settings"]
    return table(head, lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _told(settings: dict[str, Any]) -> str:
    told = [f"rate {settings['rate']:g}", *settings["augment"]]
    if settings["teacher"] is not None:
        told.append(f"weight {settings['share']:g}")
    return ", ".join(told + [f"{name} {value:g}" for name, value in settings["options"].items()])


def choices_table(bench: Bench) -> str:
    """What was tried on the validation part."""
    lines = [
        [TITLES[row], _told(settings.to_json()), f"{100 * accuracy:.2f}"]
        for row in GRIDS
        if row == "baseline" or bench.tried("baseline")
        for accuracy, _, settings in bench.tried(row)
    ]
    return table(["", "settings", "validation, %"], lines)


def current(bench: Bench) -> list[dict[str, Any]]:
    """The records of the settings that are chosen now; others are in the file and not shown."""
    if not bench.tried("baseline"):
        return []
    wanted = {row: bench.final(row).to_json() for row in TITLES if chosen_yet(bench, row)}
    return [r for r in bench.results.read("rows") if r["settings"] == wanted.get(r["row"])]


def missing(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Which of the rows that were asked for are not there yet."""
    there = {(row["row"], row["seed"]) for row in rows}
    asked = [
        (row, seed)
        for seed in options.seeds
        for row in options.rows
        if seed == 0 or row not in TEACHERS
    ]
    left = [f"{row} of seed {seed}" for row, seed in asked if (row, seed) not in there]
    return f"still missing: {', '.join(left)}" if left else "all rows are there"


def chosen_yet(bench: Bench, row: str) -> bool:
    """Whether it is settled what *row* is trained with."""
    return row in TEACHERS or len(bench.tried(chooser(row))) == len(bench.grid(chooser(row)))


def judge(records: Sequence[dict[str, Any]], strict: bool) -> list[Goal]:
    """The goals; one without its rows is missed where *strict*, else left out."""
    gap = gains(records, "teacher", "baseline")
    few = gains(records, "few-given", "few-labels")
    goals = [
        Goal("labels alone beyond the teacher, points", -gap[0] if gap else math.nan, 0.0),
        Goal("2,000 labels alone beyond a given teacher, mean", -mean(few or [math.nan]), -3.0),
        Goal("the same, the worst seed", -min(few or [math.nan]), 0.0),
    ]
    return [goal for goal in goals if strict or not math.isnan(goal.value)]


def facts(bench: Bench) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds of an image, of teacher and student."""
    inputs = bench.test.rows(torch.arange(1))["inputs"]
    widths = {"teacher": bench.size.teacher_width, "student": bench.size.student_width}
    nets = {name: bench.model(width, 0) for name, width in widths.items()}
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "macs": count_macs(net, inputs),
        }
        for name, net in nets.items()
    }


def flags() -> argparse.Namespace:
    """Read the flags: those of every benchmark, and which parts to do."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--choose", action="store_true", help="try the settings, and no rows")
    parser.add_argument("--table", action="store_true", help="train nothing")
    known = [*TEACHERS[:1], *ALL_LABELS, *FEW_LABELS]
    parser.add_argument("--rows", type=lambda text: text.split(","), default=known)
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER")
    parser.add_argument("--data", metavar="FOLDER", help="where the four idx files are")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in TITLES]:
        parser.error(f"there is no row {unknown[0]}; the rows are {', '.join(TITLES)}")
    return options


def work(options: argparse.Namespace, bench: Bench) -> None:
    """Do what is missing, one number at a time; a seed is complete before the next begins."""
    students = [row for row in options.rows if row not in TEACHERS]
    for row in dict.fromkeys(["baseline", *map(chooser, students)] if students else []):
        bench.choose(row)
    for seed in [] if options.choose else options.seeds:
        for row in options.rows:
            bench.row(row, seed)


def main() -> int:
    options = flags()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = Results(None if options.quick else options.results)
        cache = Path(scratch) if options.quick else options.cache
        bench = Bench(QUICK if options.quick else Size(), results, cache, options.data)
        if not options.table:
            work(options, bench)
    if options.choose:
        print(choices_table(bench))
        return 0
    rows = current(bench)
    tables = [
        show(rows, ["teacher", *ALL_LABELS], "baseline"),
        show(rows, [*TEACHERS, *FEW_LABELS], "few-labels"),
    ]
    nets = facts(bench)
    report = {
        "environment": environment(["torch", "attar"]),
        "models": nets,
        "choices": results.read("choices"),
        "rows": rows,
    }
    for name, cost in nets.items():
        print(f"{name}: {cost['parameters']:,} parameters, {cost['macs']:,} multiply-adds")
    print(missing(options, rows))
    goals = [] if options.quick else judge(rows, options.check)
    return finish(options, report, goals, "\n\n".join(tables))


if __name__ == "__main__":
    sys.exit(main())
