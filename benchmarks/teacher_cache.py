"""What a cache of the teacher saves: a student of Fashion-MNIST, its teacher live and cached.

The teacher is the ResNet-8 of width 48 of benchmarks/fashion_mnist.py, the student the same net at
width 8, 10,000 images, 6 epochs, 3 seeds, everything else equal. Rows: the teacher asked at every
step; a cache that is empty when the first seed begins, and full afterwards; both again with images
that are shifted and mirrored, live in new ways every epoch, cached in 4 views. Each row of a seed
is a process of its own, whose largest resident memory is given, and they take turns. Seconds are
of the processor, on one thread: what else runs on the machine hardly moves them.

Goals: an epoch that fills a cache takes at most 1.05 of a live one of the same seed, one of a full
cache at most half; the accuracies of cached and live differ by no more than seeds do.

    python benchmarks/teacher_cache.py [--check] [--json FILE] [--quick]
    python benchmarks/teacher_cache.py --row cached --seed 0    # one process
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from _table import Goal, environment, finish, parser_of, table
from fashion_mnist import CACHE
from torch import Tensor

import attar
from attar.evaluation import collect
from attar.training import sgd

PACKAGES = ["torch", "attar"]
TEACHER = CACHE / "teacher-48-6-54000" / "model"
ROWS = ["live", "cached", "live, augmented", "cached, 4 views"]
SEEDS, VIEWS = 3, 4
MOST_FIRST, MOST_LATER = 1.05, 0.5


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    if options.row:
        print(json.dumps(one(options.row, options.seed, Path(options.place), quick=options.quick)))
        return 0
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(1 if options.quick else SEEDS):
            for name in ROWS:
                rows[name].append(_apart(name, seed, place, options.quick))
                print(name, seed, rows[name][-1], file=sys.stderr, flush=True)
    report = {"environment": environment(PACKAGES), "rows": rows}
    return finish(options, report, list(judge(rows)), show(rows))


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--row", choices=ROWS, help="run this one here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", default="runs/cache", help="where caches lie")
    return parser.parse_args()


def _apart(name: str, seed: int, place: str, quick: bool) -> dict[str, Any]:
    """A row in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--row", name, "--seed", str(seed), "--place", place]
    done = subprocess.run(
        command + ["--quick"] * quick, check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


class Timed(attar.data.Subset):
    """Rows whose epochs are timed: from the first batch asked for to the next epoch's."""

    begun: list[float]

    def epoch(self, number: int, **options: Any) -> Iterator[dict[str, Tensor]]:
        if number == len(self.begun):  # the first call of epoch 0 is the dry pass
            self.begun.append(0.0)
        return self._timed(number, super().epoch(number, **options))

    def _timed(
        self, number: int, batches: Iterator[dict[str, Tensor]]
    ) -> Iterator[dict[str, Tensor]]:
        start = time.process_time()
        yield from batches
        self.begun[number] = time.process_time() - start


def one(name: str, seed: int, place: Path, *, quick: bool) -> dict[str, Any]:
    """Train one student; its accuracy, the seconds of its epochs and the peak of memory."""
    images, epochs = (300, 2) if quick else (10_000, 6)
    whole = attar.data.fashion_mnist()
    train = Timed(whole.train, torch.arange(images), name="fashion_mnist")
    train.begun = []
    task = attar.tasks.ImageClassification().fitted(train)
    teacher: Any = attar.Teacher(_teacher(train, quick), task)
    how: dict[str, Any] = {}
    if "augmented" in name or "views" in name:
        how["augment"] = [partial(attar.data.crop, pixels=2), attar.data.flip]
    if "views" in name:
        how["views"] = VIEWS
    if name.startswith("cached"):
        teacher = attar.teachers.Filling(teacher, train, root=place, **how)
    torch.manual_seed(seed)
    student = attar.models.build("resnet", data=train, depth=8, width=8)
    attar.distill(
        student,
        teacher,
        train,
        task,
        [attar.Term(partial(attar.losses.kl_divergence, temperature=4.0), weight=0.9)],
        epochs=epochs,
        seed=seed,
        optimizer=partial(sgd, lr=0.1),
        clip=5.0,
        device="cpu",
        progress=False,
        **how,
    )
    rows = collect(student, whole.test, task)
    return {
        "accuracy": task.primary(rows),
        "epochs": train.begun,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "asked": getattr(teacher, "count", images * epochs),
    }


def _teacher(train: attar.data.Source, quick: bool) -> torch.nn.Module:
    if quick:
        torch.manual_seed(0)
        return attar.models.build("resnet", data=train, depth=8, width=16)
    if not TEACHER.exists():
        raise SystemExit(
            "the teacher is made by: python benchmarks/fashion_mnist.py --rows kd --seeds 0"
        )
    return attar.models.load(TEACHER)


def judge(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Goal]:
    for live, cached in zip(ROWS[::2], ROWS[1::2], strict=True):
        # A view is filled an epoch; from the second seed on everything is there. Beside the live
        # row of the same seed, which had its turn just before: the machine changes in an hour.
        filled = rows[cached][0]["epochs"][: VIEWS if "views" in cached else 1]
        filling = median(filled) / median(_epochs(rows[live][:1]))
        yield Goal(f"{cached}: an epoch that fills / live", filling, MOST_FIRST)
        if len(rows[cached]) > 1:
            full = median(_epochs(rows[cached][1:])) / median(_epochs(rows[live]))
            yield Goal(f"{cached}: a full cache / live", full, MOST_LATER)
            scores = [[row["accuracy"] for row in rows[name]] for name in (live, cached)]
            gap = abs(mean(scores[0]) - mean(scores[1]))
            noise = 2 * max(stdev(each) for each in scores)
            yield Goal(f"{cached}: difference in accuracy to live", gap, noise)


def _epochs(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [seconds for row in rows for seconds in row["epochs"]]


def show(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for name, found in rows.items():
        scores = [100 * row["accuracy"] for row in found]
        spread = f" ± {stdev(scores):.2f}" if len(scores) > 1 else ""
        lines.append(
            [
                name,
                f"{mean(scores):.2f}{spread}",
                f"{found[0]['epochs'][0]:.1f}",
                f"{median(_epochs(found)):.1f}",
                f"{sum(_epochs(found)):.0f}",
                f"{max(row['memory_mb'] for row in found):.0f}",
                f"{sum(row['asked'] for row in found):,}",
            ]
        )
    titles = [
        "teacher",
        "accuracy, %",
        "first epoch, s",
        "an epoch, s",
        "all, s",
        "MB",
        "rows asked",
    ]
    return table(titles, lines)


if __name__ == "__main__":
    sys.exit(main())
