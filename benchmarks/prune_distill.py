"""Pruned by torch-pruning and fine-tuned by hand, or pruned by attar and distilled: equal budgets.

One network, a ResNet-14 of width 16 trained on 54,000 images of Fashion-MNIST, loses half of the
channels of every layer and is then trained for as many steps, in five ways: (1) torch-pruning by
itself, by the magnitude of weights, and a training loop by hand on the labels, as its README has
it; (2) `attar.prune` by magnitude and `attar.train` on the labels; (3) the same pruning and
`attar.distill` from the network before it was pruned; (4) and (5) `attar.prune` by the Taylor
expansion, on labels and distilled. All have the same multiply-adds, batches in the same order,
optimiser (SGD with momentum) and form of schedule. Of five rates the best is taken on 6,000 images
that are neither trained nor tested on, with a seed that is not shown: for labels by way 1, for
distillation by way 3. Temperature 4 and weight 0.9 are those of RepDistiller; nothing else was
tried. The test images are read once for each training, after its last step, and once before the
first.

Goals: (1) and (2) keep the same channels, and come to the same test accuracy within half a point:
they are one thing done by two libraries, which round differently. For distillation there is no
goal.

    python benchmarks/prune_distill.py                  # all that is missing, then the table
    python benchmarks/prune_distill.py --ways 3,4 --seeds 0
    python benchmarks/prune_distill.py --table          # train nothing, show what is there

Each number is kept in the results file as soon as it is there: a run that was stopped goes on
where it was. Seconds are of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import mkdtemp
from typing import Any

import torch
import torch.nn.functional as F
from _fashion import Results
from _table import Goal, environment, finish, parser_of, table
from _trained import CACHE, QUICK, Images, Size, spread
from torch import nn

import attar
from attar.evaluation import count_macs
from attar.training import cosine

RESULTS = Path(__file__).parent / "results" / "prune_distill.json"
CHOOSER = 100  # the seed that chooses the rate
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
CHOOSERS = {"1": "1", "2": "1", "3": "3", "4": "1", "5": "3"}  # which way chooses the rate of a way
RATIO = 0.5
EXAMPLES = 512  # that the Taylor expansion is measured on
TITLES = {
    "1": "torch-pruning, labels by hand",
    "2": "attar, magnitude, labels",
    "3": "attar, magnitude, distilled",
    "4": "attar, Taylor, labels",
    "5": "attar, Taylor, distilled",
}
TERM = attar.Term(partial(attar.losses.kl_divergence, temperature=4.0), weight=0.9)


@dataclass(frozen=True)
class Settings:
    """Everything a training depends on beside its way and seed."""

    epochs: int
    rate: float
    ratio: float
    size: Size

    def to_json(self) -> dict[str, Any]:
        """These settings as JSON values."""
        return asdict(self)


class Bench:
    """The network, the ways, the results."""

    def __init__(self, size: Size, results: Results, cache: Path, folder: str | None) -> None:
        self.images = Images(size, cache, folder)
        self.network = self.images.network()
        self.results = results
        self.epochs = 1

    def run(self, ways: Sequence[str], seeds: Sequence[int]) -> None:
        """Choose the rate, then train all that is missing."""
        self.keep_network()
        for way, rate in product(dict.fromkeys(CHOOSERS[way] for way in ways), RATES):
            self.choose(way, rate)
        for seed in seeds:
            for way in ways:
                self.row(way, seed)

    def choose(self, way: str, rate: float) -> None:
        """Try a rate on the validation images, unless that was done."""
        settings = self.settings(rate)
        if self.results.find("choices", way, CHOOSER, settings) is None:
            began = time.process_time()
            model = self.trained(way, CHOOSER, rate)
            took = time.process_time() - began
            score = self.images.accuracy(model, self.images.validation)
            self.keep("choices", way, CHOOSER, settings, model, took, accuracy=score)

    def rate(self, way: str) -> float:
        """The best for this way, or for the one that chooses for it; the first of equals."""
        of = CHOOSERS[way]
        tried = [(self.results.find("choices", of, CHOOSER, self.settings(r)), r) for r in RATES]
        return max((t for t in tried if t[0] is not None), key=lambda t: t[0]["accuracy"])[1]

    def settings(self, rate: float) -> Settings:
        """Those of every way."""
        return Settings(self.epochs, rate, RATIO, self.images.size)

    def row(self, way: str, seed: int) -> None:
        """Train and test one way, unless that was done."""
        settings = self.settings(self.rate(way))
        if self.results.find("rows", way, seed, settings) is not None:
            return
        test = partial(self.images.accuracy, source=self.images.test)
        before = test(self.pruned(way))
        began = time.process_time()
        model = self.trained(way, seed, settings.rate)
        took = time.process_time() - began
        self.keep(
            "rows", way, seed, settings, model, took, accuracy=test(model), before=before,
            same_channels=self.same_channels() if way == "2" else None,
        )  # fmt: skip

    def keep_network(self) -> None:
        """The network itself, as it was before."""
        settings = self.settings(self.images.size.rate)
        if self.results.find("rows", "0", 0, settings) is None:
            score = self.images.accuracy(self.network, self.images.test)
            self.keep("rows", "0", 0, settings, self.network, 0.0, accuracy=score)

    # The ways

    def pruned(self, way: str) -> nn.Module:
        """The smaller network before its training."""
        rows = self.images.train.rows(torch.arange(min(EXAMPLES, len(self.images.train))))
        if way == "1":
            return by_hand(self.network, rows["inputs"][:64])
        if way in "45":
            return attar.prune(
                self.network, rows, ratio=RATIO, importance="taylor", task=self.images.task
            )
        return attar.prune(self.network, rows["inputs"][:64], ratio=RATIO)

    def same_channels(self) -> bool:
        """Whether ways 1 and 2 start from the same numbers, to the bit."""
        ours, theirs = (self.pruned(way).state_dict() for way in "21")
        return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)

    def trained(self, way: str, seed: int, rate: float) -> nn.Module:
        """The smaller network after its last step."""
        images, student = self.images, self.pruned(way)
        if way == "1":
            return fine_tuned(student, images, self.epochs, rate, seed)
        options = images.options(self.epochs, rate, seed)
        if way in "24":
            return attar.train(student, images.train, images.task, **options)
        teacher = attar.Teacher(self.network, images.task)
        return attar.distill(
            student, teacher, images.train, images.task, [TERM], label_weight=0.1, **options
        )

    def keep(
        self,
        kind: str,
        way: str,
        seed: int,
        settings: Settings,
        model: nn.Module,
        seconds: float,
        **numbers: Any,
    ) -> None:
        """Keep the record of one training."""
        example = self.images.train.rows(torch.arange(1))["inputs"]
        record = {
            "row": way,
            "seed": seed,
            **numbers,
            "macs": count_macs(model, example),
            "parameters": sum(p.numel() for p in model.parameters()),
            "cpu_seconds": round(seconds, 1),
            "settings": settings.to_json(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "torch": torch.__version__,
        }
        self.results.add(kind, record)
        print(kind, way, f"seed {seed}", f"rate {settings.rate}", numbers, flush=True)


def by_hand(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """What torch-pruning does by itself, called as its README calls it."""
    import torch_pruning

    smaller = copy.deepcopy(network).requires_grad_(True).eval()
    pruner = torch_pruning.pruner.BasePruner(
        smaller,
        images,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=RATIO,
        ignored_layers=[smaller.get_submodule("head")],
    )
    pruner.step()
    return smaller


def fine_tuned(model: nn.Module, images: Images, epochs: int, rate: float, seed: int) -> nn.Module:
    """A plain loop: cross-entropy, SGD with momentum, a cosine; the batches of the other ways."""
    # attar decays no biases and no norms; here too, or the ways would differ in that.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    size, done = images.size.batch_size, 0
    steps = epochs * -(-len(images.train) // size)
    model.train()
    for epoch in range(epochs):
        for batch in images.train.epoch(epoch, batch_size=size, seed=seed):
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine((done + 0.5) / steps, warmup=0.05)
            optimizer.zero_grad()
            F.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
            optimizer.step()
            done += 1
    return model.eval()


def scores(records: Sequence[dict[str, Any]], way: str) -> dict[int, float]:
    """Test accuracy by seed."""
    return {r["seed"]: r["accuracy"] for r in records if r["row"] == way}


def show(records: Sequence[dict[str, Any]]) -> str:
    """Accuracy of every way, and the difference to way 1, paired by seed."""
    lines, base = [], scores(records, "1")
    for way, title in {"0": "before pruning", **TITLES}.items():
        rows = list({r["seed"]: r for r in records if r["row"] == way}.values())  # the newest
        if not rows:
            continue
        found = scores(rows, way)
        gains = [found[s] - base[s] for s in sorted(found.keys() & base.keys())]
        start = f"{mean(row['before'] for row in rows):.2f}" if way != "0" else ""
        seconds = f"{mean(row['cpu_seconds'] for row in rows):.0f}" if way != "0" else ""
        lines.append(
            [
                title,
                start,
                spread(list(found.values())),
                ", ".join(f"{gain:+.2f}" for gain in gains) if way not in "01" else "",
                f"{rows[0]['macs']:,}",
                f"{rows[0]['parameters']:,}",
                seconds,
            ]
        )
    columns = ["", "pruned, %", "trained, %", "beyond the first", "MACs", "parameters", "CPU s"]
    return table(columns, lines)


def judge(records: Sequence[dict[str, Any]]) -> Iterator[Goal]:
    """What the module's docstring claims, as far as there are rows for it."""
    first, second = scores(records, "1"), scores(records, "2")
    apart = [abs(first[seed] - second[seed]) for seed in first.keys() & second.keys()]
    if apart:
        yield Goal("points between torch-pruning by hand and attar on labels", max(apart), 0.5)
    same = [record["same_channels"] for record in records if record["row"] == "2"]
    if same:
        yield Goal("prunings by magnitude that kept other channels", same.count(False), 0)
    macs = {record["macs"] for record in records if record["row"] != "0"}
    if macs:
        yield Goal("counts of multiply-adds that the ways have", len(macs), 1)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    results = Results(None if options.quick else RESULTS)
    if not options.table:
        size, cache = (QUICK, Path(mkdtemp())) if options.quick else (Size(), CACHE)
        bench = Bench(size, results, cache, options.data)
        bench.run(options.ways.split(","), [int(seed) for seed in options.seeds.split(",")])
    records = results.read("rows")
    packages = ["torch", "attar", "torch-pruning"]
    report = {"environment": environment(packages), "rows": records}
    return finish(options, report, list(judge(records)), show(records))


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the four idx files")
    parser.add_argument("--ways", default=",".join(TITLES), help="which ways")
    parser.add_argument("--seeds", default="0,1,2", help="which seeds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
