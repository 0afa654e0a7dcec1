"""The trained network that inherited.py and prune_distill.py start from, and its data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import attar
from attar.data import Source, Subset
from attar.evaluation import collect
from attar.training import sgd

CACHE = Path.home() / ".cache" / "attar" / "compressed"


@dataclass(frozen=True)
class Size:
    """How much of everything; the default is the benchmark, the other shows that it runs."""

    images: int = 60_000
    tested: int = 10_000
    depth: int = 14
    width: int = 16
    epochs: int = 6
    batch_size: int = 128
    rate: float = 0.1


QUICK = Size(images=640, tested=200, width=8, epochs=1, batch_size=32)


class Images:
    """Fashion-MNIST in three parts, and the network that was trained on the first."""

    def __init__(self, size: Size, cache: Path, folder: str | None = None) -> None:
        self.size, self.cache = size, cache
        whole, test = attar.data.fashion_mnist(folder=folder)
        whole, self.test = first(whole, size.images), first(test, size.tested)
        self.train, self.validation = attar.data.split(whole, 0.1, seed=0)
        self.task = attar.tasks.ImageClassification().fitted(self.train)

    def network(self) -> nn.Module:
        """The trained network, from the cache where it is there."""
        size = self.size
        folder = self.cache / f"resnet-{size.depth}-{size.width}-{size.epochs}-{len(self.train)}"
        if not (folder / "model").exists():
            model = self.fresh(size.depth, size.width, 0)
            options = self.options(size.epochs, size.rate, 0)
            attar.train(
                model,
                self.train,
                self.task,
                run=folder,
                resume=True,
                augment=[attar.data.flip],
                **options,
            )
        return attar.models.load(folder / "model")

    def fresh(self, depth: int, width: int, seed: int) -> nn.Module:
        """A network of this size whose start is of the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return attar.models.build(
                "resnet", data=self.train, depth=depth, width=width, stem_stride=2
            )

    def options(self, epochs: int, rate: float, seed: int) -> dict[str, Any]:
        """What every training shares."""
        return {
            "epochs": epochs,
            "batch_size": self.size.batch_size,
            "optimizer": partial(sgd, lr=rate),
            "seed": seed,
            "device": "cpu",
            "progress": False,
        }

    def accuracy(self, model: nn.Module, source: Source) -> float:
        """Percent of *source* that *model* tells."""
        return 100 * self.task.primary(collect(model, source, self.task, device="cpu"))


def first(source: Source, count: int) -> Source:
    """The first *count* rows."""
    if count >= len(source):
        return source
    return Subset(source, torch.arange(count), name=source.name)


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return ""
    told = f"{mean(values):.{digits}f}"
    return told + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
