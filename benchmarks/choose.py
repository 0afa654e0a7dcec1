"""Choose rate, temperature and weight on the validation split, for both arms alike.

The test split is never read. The teacher answers once for every training image, so augmentation
is off here and a distilled epoch costs what a baseline epoch costs.

    python benchmarks/choose.py RECIPE --teacher FOLDER [--epochs 5] [--rates 0.05 0.1 0.2]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from _table import table
from torch import Tensor

import attar
from attar.recipes import load_recipe
from attar.recipes.job import Job, prepare
from attar.training import fit, sgd


class Answered:
    """A teacher whose logits lie in memory, by row id."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def open(self, addresses: Any = (), device: Any = None) -> Answered:
        """Nothing to prepare."""
        return self

    def close(self) -> None:
        """Nothing to give back."""

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"output:logits": self.logits[batch["ids"]]}


def best(job: Job, teacher: Any, epochs: int, rate: float, **told: Any) -> float:
    """The student's best validation metric, in percent."""
    done = fit(
        job.student(0),
        teacher,
        job.train,
        job.task,
        validation=job.validation,
        epochs=epochs,
        optimizer=partial(sgd, lr=rate),
        **told,
    )
    return 100 * max(record[job.task.metric] for record in done.history)


def main() -> None:
    """Print the table of both arms over the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.9])
    args = parser.parse_args()
    override = f"teacher={{load: {args.teacher}}}"
    job = prepare(load_recipe(args.recipe, overrides=[override]).recipe)
    rows = attar.evaluation.collect(job.teacher, job.train, job.task)
    teacher, lines = Answered(rows["logits"]), []
    for rate in args.rates:
        value = best(job, None, args.epochs, rate, label_weight=1.0)
        lines.append(["baseline", f"{rate:g}", "", "", f"{value:.2f}"])
        print(*lines[-1], flush=True)
        for temperature in args.temperatures:
            loss = partial(attar.losses.kl_divergence, temperature=temperature)
            for weight in args.weights:
                terms = [attar.Term(loss, weight=weight)]
                value = best(job, teacher, args.epochs, rate, terms=terms, label_weight=1 - weight)
                lines.append(
                    ["distilled", f"{rate:g}", f"{temperature:g}", f"{weight:g}", f"{value:.2f}"]
                )
                print(*lines[-1], flush=True)
    print(table(["arm", "rate", "temperature", "weight", "validation, %"], lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
