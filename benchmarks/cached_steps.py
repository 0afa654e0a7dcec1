"""What a step costs whose teacher is cached: attar against the bare student, and the others live.

Two students of 28 x 28 images, at batch 128: a net 784-128-10 beside a teacher 784-512-512-10, and
a small convolutional net beside a larger one. A step of attar takes its rows from memory in an
order of its own, the teacher's logits from a cache on disk, and ends with the optimiser's step; its
guard and its log are on. The bare student is its forward and backward pass alone, on batches that
are ready. The others ask the teacher at each step, as they have no cache, and are run as their own
documentation would: torchdistill handed batches that are ready, the trainers with their loaders.

Goals: at most 1.7 of the bare pass for the net and 1.15 for the convolutional one; at least 2.5
times as fast as torchdistill, and 4 times as fast as the Hugging Face and the Lightning trainer, on
the net. On the other, where the arithmetic is nearly all, they were left out. The student taught
by the cache is that of the live teacher, to rounding.

    python benchmarks/cached_steps.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _loops import (
    POOL,
    Loop,
    Own,
    Problem,
    attar_distill,
    hand_slicing,
    hugging_face_loop,
    kd_loss,
    lightning_loop,
    mlp,
    sgd,
    torchdistill_loop,
)
from _pace import TURN, Gate, interleave
from _table import Goal, environment, finish, flags, table
from loop import quiet
from torch import Tensor, nn

import attar

PACKAGES = ["torch", "attar", "torchdistill", "transformers", "lightning"]
BARE, AGAIN, HAND, OURS, LIVE = "bare", "bare, again", "by hand", "attar", "attar, live"
SAME = 1e-4
PEERS = {
    "torchdistill, live": partial(torchdistill_loop),
    "HF Trainer, live": partial(hugging_face_loop, bare=False),
    "Lightning, live": partial(lightning_loop, bare=False),
}
LEAST = {"torchdistill, live": 2.5, "HF Trainer, live": 4.0, "Lightning, live": 4.0}


@dataclass(frozen=True)
class Images(Problem):
    """A problem whose nets are convolutional: widths are those of their layers."""

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        count = POOL * self.batch
        inputs = torch.randn(count, 1, 28, 28, generator=generator)
        return inputs, torch.randint(self.student[-1], (count,), generator=generator)

    def models(self) -> tuple[nn.Module, nn.Module]:
        return (
            convolutional(self.student, seed=1),
            convolutional(self.teacher, seed=2).eval().requires_grad_(False),
        )


def convolutional(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers, *pooled, *mlp(widths[-2:], seed=seed))


# A wide problem and a deep one; the bound of each on attar's step over the bare pass.
PROBLEMS: dict[Problem, float] = {
    Problem("784-128-10 from 784-512-512-10", (784, 128, 10), (784, 512, 512, 10), 128): 1.7,
    Images(
        "conv 32-64-128 from conv 64-128-256", (1, 32, 64, 128, 10), (1, 64, 128, 256, 10), 128
    ): 1.15,
}


def bare(problem: Problem, gate: Gate) -> nn.Module:
    """The student's forward and backward pass, and nothing else."""
    student = problem.models()[0].train()
    for inputs, labels in gate(problem.batches()):
        F.cross_entropy(student(inputs), labels).backward()
        student.zero_grad()
    return student


def by_hand(problem: Problem, gate: Gate) -> nn.Module:
    """What a careful person writes: logits in memory, rows by a permutation, no guard."""
    student, teacher = problem.models()
    inputs, labels = problem.data
    with torch.no_grad():
        told = torch.cat([teacher(part) for part in inputs.split(problem.batch)])
    optimizer = sgd(student.train())

    def batches():
        for _ in range(problem.steps // POOL):
            for ids in torch.randperm(len(inputs)).split(problem.batch):
                yield inputs[ids], told[ids], labels[ids]

    for own, logits, target in gate(batches()):
        kd_loss(student(own), logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def fill(problem: Problem, folder: Path) -> Path:
    """Ask the teacher about every row."""
    task = attar.tasks.ImageClassification()
    rows = attar.data.TensorSource(*problem.data, classes=problem.student[-1])
    attar.cache(attar.Teacher(problem.models()[1], task), rows, task, into=folder, progress=False)
    return folder


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    rounds = 20 if options.quick else 60
    peers, absent = installed()
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, problem in enumerate(PROBLEMS):
            folder = fill(problem, Path(place) / str(number))
            with quiet():
                verify(problem, folder)
                asked = (
                    peers if type(problem) is Problem else {}
                )  # on the net, where they cost most
                # A step of the other is fifty times as long: a fifth of the rounds says as much.
                turns = rounds if asked else max(rounds // 5, 10)
                measured[problem.name] = measure(problem, folder, asked, turns)
    goals = [goal for problem, most in PROBLEMS.items() for goal in judge(problem, most, measured)]
    tables = [show(name, rows) for name, rows in measured.items()]
    tables += [f"absent: {name}: {why}" for name, why in absent.items()]
    report = {"environment": environment(PACKAGES), "absent": absent, "steps": measured}
    return finish(options, report, goals, "\n\n".join(tables))


def installed() -> tuple[dict[str, Loop], dict[str, str]]:
    loops, absent = {}, {}
    for name, make in PEERS.items():
        try:
            loops[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    return loops, absent


def verify(problem: Problem, folder: Path) -> None:
    """The cache teaches what the live teacher does."""
    short = replace(problem, steps=2 * POOL)
    loops = {
        OURS: partial(attar_distill, short, source=Own, cache=folder),
        LIVE: partial(attar_distill, short, source=Own),
    }
    students, _ = interleave(loops, 0)
    for own, other in zip(students[OURS].parameters(), students[LIVE].parameters(), strict=True):
        far = (own - other).abs().max().item()
        assert far <= SAME, f"{problem.name}: the cache's student is {far:.1e} from the live one"


def measure(
    problem: Problem, folder: Path, peers: Mapping[str, Loop], rounds: int
) -> dict[str, dict[str, float]]:
    """Each loop beside the bare pass and beside attar; microseconds and ratios of one round."""
    both: dict[str, Loop] = {BARE: bare, OURS: partial(attar_distill, source=Own, cache=folder)}
    own = {AGAIN: bare, HAND: by_hand, LIVE: partial(attar_distill, source=Own)}
    found = beside(problem, {**both, **own, "by hand, live": hand_slicing}, rounds)
    if peers:  # apart: a turn of theirs leaves nothing of a small net in the processor's caches
        found = beside(problem, {**both, **peers}, rounds) | found
    return found


def beside(problem: Problem, loops: Mapping[str, Loop], rounds: int) -> dict[str, dict[str, float]]:
    """These loops in turns; their microseconds and ratios."""
    problem = replace(problem, steps=(rounds * TURN // POOL + 3) * POOL)
    _, laps = interleave({name: partial(loop, problem) for name, loop in loops.items()}, rounds)
    wall = {name: np.median(found[rounds // 10 :, :, 0], 1) for name, found in laps.items()}
    return {
        name: {
            "us": float(np.median(own)),
            "of_bare": float(np.median(own / wall[BARE])),
            "of_attar": float(np.median(own / wall[OURS])),
        }
        for name, own in wall.items()
    }


def judge(
    problem: Problem, most: float, measured: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[Goal]:
    rows = measured[problem.name]
    goals = [Goal(f"{problem.name}: attar, cached / bare student", rows[OURS]["of_bare"], most)]
    if type(problem) is Problem:
        goals += [
            Goal(f"{problem.name}: attar, cached / {name}", 1 / rows[name]["of_attar"], 1 / least)
            for name, least in LEAST.items()
            if name in rows
        ]
    return goals


def show(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        [loop, f"{row['us']:.0f}", f"{row['of_bare']:.2f}", f"{row['of_attar']:.2f}"]
        for loop, row in sorted(rows.items(), key=lambda item: item[1]["us"])
    ]
    return table([name, "us a step", "x bare", "x attar"], lines)


if __name__ == "__main__":
    sys.exit(main())
