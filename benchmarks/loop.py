"""What a training step costs beyond its arithmetic: attar.distill, a loop by hand, the others.

Goals: attar.distill with its log, its validation and its guard on costs at most 20 us a step more
than a loop by hand that computes the same losses and the same guard, beyond what two copies of
that loop differ by; and it is ahead of every other framework that is installed.

    python benchmarks/loop.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _loops import OWN_DATA, POOL, READY_DATA, Loop, Own, Problem, attar_distill, hand, hand_slicing
from _pace import TURN, interleave
from _table import Goal, environment, finish, flags, table

PACKAGES = ["torch", "attar", "torchdistill", "accelerate", "transformers", "lightning"]
MOST = 20  # microseconds
SAME = 1e-6
PROBLEMS = [
    Problem("64-32-10 from 64-128-10, batch 64", (64, 32, 10), (64, 128, 10), 64),
    Problem("784-128-10 from 784-512-512-10, batch 128", (784, 128, 10), (784, 512, 512, 10), 128),
]
HAND, AGAIN, OURS = "by hand", "by hand, again (the null)", "attar"
HAND_DATA, OURS_DATA = "by hand, own batches", "attar, own batches"
NOTES = f"""\
us a step: median wall time. over hand: median of the differences within a round, to the loop by
hand of the same block. mean: the same of thread CPU time as a mean, which contains what happens
every few steps, such as a log record. x hand: ratio of the medians.
First block: every loop is handed batches that are ready in memory; data costs nothing. Second
block: a loop makes its own batches and their time counts: by hand and attar index a tensor, the
others have a DataLoader over single examples, as in their tutorials.
Guard: by hand, attar: loss and gradient norm are finite. torchdistill: the loss, as in its
examples. HF default: clips the norm to 1. Accelerate, Lightning and all bare: none.
One thread; {TURN} steps a turn, the first not counted; garbage is collected between turns only."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    rounds = 20 if options.quick else 400
    peers, absent = installed()
    measured = {}
    for problem in PROBLEMS:
        with quiet():
            verify(problem, peers)
            measured[problem.name] = measure(problem, peers, rounds)
    goals = [goal for name, rows in measured.items() for goal in judge(name, rows)]
    tables = [show(name, rows) for name, rows in measured.items()]
    tables += [NOTES, *(f"absent: {name}: {why}" for name, why in absent.items())]
    report = {"environment": environment(PACKAGES), "absent": absent, "loops": measured}
    return finish(options, report, goals, "\n\n".join(tables))


def installed() -> tuple[dict[str, Loop], dict[str, str]]:
    """The loops of the frameworks that can be imported, and why the others cannot."""
    loops, absent = {}, {}
    for name, make in (READY_DATA | OWN_DATA).items():
        try:
            loops[name] = make()
        except ImportError as error:
            absent[name] = str(error)
    return loops, absent


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the frameworks draw their bars and tables, as they do by default, into nowhere."""
    logging.disable(logging.WARNING)
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
    logging.disable(logging.NOTSET)


def verify(problem: Problem, peers: Mapping[str, Loop]) -> None:
    """The loops compute the same thing: after an epoch on equal batches, the same student."""
    loops = {HAND: hand, OURS: attar_distill}
    loops |= {name: loop for name, loop in peers.items() if name in READY_DATA}
    problem = replace(problem, steps=POOL)
    students, _ = interleave({name: partial(loop, problem) for name, loop in loops.items()}, 0)
    for name, student in students.items():
        for ours, theirs in zip(student.parameters(), students[HAND].parameters(), strict=True):
            far = (ours - theirs).abs().max().item()
            assert far <= SAME, f"{problem.name}: {name} is {far:.1e} from the loop by hand"


def measure(problem: Problem, peers: Mapping[str, Loop], rounds: int) -> dict[str, Any]:
    """Numbers of every loop by name, in microseconds."""
    loops: dict[str, Callable[..., Any]] = {HAND: hand, AGAIN: hand, OURS: attar_distill}
    loops |= {HAND_DATA: hand_slicing, OURS_DATA: partial(attar_distill, source=Own), **peers}
    warmup = rounds // 10
    # A few epochs more than are timed, for loops that fetch ahead.
    steps = (rounds * TURN // POOL + 3) * POOL
    problem = replace(problem, steps=steps)
    _, laps = interleave({name: partial(loop, problem) for name, loop in loops.items()}, rounds)
    own_data = {HAND_DATA, OURS_DATA, *OWN_DATA}
    return {
        name: compared(found[warmup:], laps[HAND_DATA if name in own_data else HAND][warmup:])
        for name, found in laps.items()
    }


def compared(laps: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """What a loop takes, and how far that is from *base*: pairs are of the same round."""
    apart = np.median(laps[..., 0], 1) - np.median(base[..., 0], 1)
    step, base_step = np.median(laps[..., 0]), np.median(base[..., 0])
    return {
        "us": float(step),
        "over_hand": float(np.median(apart)),
        "over_hand_mean": blockwise(laps[..., 1] - base[..., 1]),
        "ratio": float(step / base_step),
    }


def blockwise(apart: np.ndarray) -> float:
    """A mean that contains rare work but not the machine's rare stalls: the median of ten."""
    return float(np.median([block.mean() for block in np.array_split(apart, 10)]))


def judge(name: str, rows: Mapping[str, Any]) -> list[Goal]:
    """The goals, on one problem."""
    null = abs(rows[AGAIN]["over_hand"])
    beyond = rows[OURS]["over_hand"] - null
    goals = [Goal(f"{name}: {OURS} over hand beyond the null, us", beyond, MOST)]
    for names, ours in ((READY_DATA, OURS), (OWN_DATA, OURS_DATA)):
        goals += [
            Goal(f"{name}: {ours} / {peer}", rows[ours]["us"] / rows[peer]["us"], 1.0)
            for peer in names
            if peer in rows
        ]
    return goals


def show(name: str, rows: Mapping[str, Any]) -> str:
    """The table of one problem, fastest first within each block."""
    blocks = [[HAND, AGAIN, OURS, *READY_DATA], [HAND_DATA, OURS_DATA, *OWN_DATA]]
    lines = []
    for block in blocks:
        for loop in sorted((n for n in block if n in rows), key=lambda n: rows[n]["us"]):
            row = rows[loop]
            gaps = [f"{row[key]:+.1f}" for key in ("over_hand", "over_hand_mean")]
            lines.append([loop, f"{row['us']:.0f}", *gaps, f"{row['ratio']:.2f}"])
    return table([name, "us a step", "over hand", "mean", "x hand"], lines)


if __name__ == "__main__":
    sys.exit(main())
