"""What a training step costs beyond its arithmetic: attar.distill, a loop by hand, the others.

Goals: attar.distill with its log, its validation and its guard on costs at most 20 us a step more
than a loop by hand that computes the same losses and the same guard, beyond what two copies of
that loop differ by, on a machine where that loop takes 300 us on the smaller problem; a slower
machine has as many microseconds more as that loop takes longer on it. And it is ahead of every
other framework that is installed, each run as its documentation runs it.

    python benchmarks/loop.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from _loops import (
    OWN_DATA,
    POOL,
    READY_DATA,
    Loop,
    Own,
    Problem,
    attar_distill,
    hand,
    hand_bare,
    hand_slicing,
)
from _pace import TURN, WARM, interleave
from _table import Goal, environment, finish, flags, table

PACKAGES = ["torch", "attar", "torchdistill", "accelerate", "transformers", "lightning"]
MOST = 20  # microseconds, where the loop by hand takes
PACE = 300  # microseconds on the first problem
SAME = 1e-6
PROBLEMS = [
    Problem("64-32-10 from 64-128-10, batch 64", (64, 32, 10), (64, 128, 10), 64),
    Problem("784-128-10 from 784-512-512-10, batch 128", (784, 128, 10), (784, 512, 512, 10), 128),
]
HAND, AGAIN, BARE, OURS = "by hand", "by hand, again", "by hand, bare", "attar"

Rows = dict[str, dict[str, float]]

NOTES = f"""\
us a step: median wall time. over hand: median of the differences to the loop by hand in the same
round. quiet: the difference of the 10th percentiles, which other work on the machine hardly moves.
mean: mean difference of thread CPU time, which contains what happens every few steps, such as a
log record. x hand: median of the ratios in the same round.
First half: every loop is handed batches that are ready in memory, so data costs nothing. Second
half: a loop makes its own batches and their time counts; by hand and attar index a tensor, the
others have a DataLoader over single examples, as in their tutorials.
Logs: attar, torchdistill, HF default, Lightning default. Guards: by hand, attar: the loss and the
norm of the gradient (by hand: torch's get_total_norm) are finite; torchdistill, guarded: the same;
torchdistill, loss guard: the loss alone, as in its examples; HF default: clips the norm to 1.
Accelerate and all that is bare have neither log nor guard. What is bare or guards the loss alone
does less and is not judged.
One thread; {TURN} steps a turn, the first {WARM} not counted; garbage is collected between turns
only."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    rounds = 20 if options.quick else 100
    peers, absent = installed()
    measured: dict[str, dict[str, Rows]] = {}
    for problem in PROBLEMS:
        with quiet():
            verify(problem, peers)
            measured[problem.name] = measure(problem, peers, rounds)
    pace = measured[PROBLEMS[0].name]["ready"][HAND]["us"] / PACE
    goals = [goal for name, halves in measured.items() for goal in judge(name, halves, pace)]
    tables = [show(name, halves) for name, halves in measured.items()]
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


def measure(problem: Problem, peers: Mapping[str, Loop], rounds: int) -> dict[str, Rows]:
    """The numbers of both halves of the table: batches ready, and made by each loop."""
    ready = {name: loop for name, loop in peers.items() if name in READY_DATA}
    own = {name: loop for name, loop in peers.items() if name in OWN_DATA}
    with_data = partial(attar_distill, source=Own)
    return {
        "ready": compare(
            problem,
            {HAND: hand, AGAIN: hand, BARE: hand_bare, OURS: attar_distill, **ready},
            rounds,
        ),
        "own": compare(
            problem, {HAND: hand_slicing, AGAIN: hand_slicing, OURS: with_data, **own}, rounds
        ),
    }


def compare(problem: Problem, loops: Mapping[str, Loop], rounds: int) -> Rows:
    """Interleave *loops* and put each beside the loop by hand; microseconds."""
    # A few epochs more than are timed, for loops that fetch ahead.
    problem = replace(problem, steps=(rounds * TURN // POOL + 3) * POOL)
    _, laps = interleave({name: partial(loop, problem) for name, loop in loops.items()}, rounds)
    kept = {name: found[rounds // 10 :] for name, found in laps.items()}
    return {name: beside(found, kept[HAND], kept[OURS]) for name, found in kept.items()}


def beside(laps: np.ndarray, base: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """What a loop takes and how far that is from *base*; pairs are of the same round."""
    wall, base_wall, our_wall = (np.median(found[..., 0], 1) for found in (laps, base, ours))
    quiet = np.quantile(laps[..., 0], 0.1) - np.quantile(base[..., 0], 0.1)
    return {
        "us": float(np.median(laps[..., 0])),
        "over_hand": float(np.median(wall - base_wall)),
        "quiet": float(quiet),
        "mean": steady_mean(laps[..., 1] - base[..., 1]),
        "of_hand": float(np.median(wall / base_wall)),
        "attar_of_it": float(np.median(our_wall / wall)),
    }


def steady_mean(values: np.ndarray) -> float:
    """A mean that contains rare work but not the machine's rare stalls: the median of ten."""
    return float(np.median([part.mean() for part in np.array_split(values, 10)]))


def judge(name: str, halves: Mapping[str, Rows], pace: float) -> list[Goal]:
    """The goals, on one problem, on a machine that is slower by the factor *pace*."""
    rows = halves["ready"]
    beyond = rows[OURS]["over_hand"] - abs(rows[AGAIN]["over_hand"])
    return [
        Goal(f"{name}: attar over hand beyond the null, us", beyond, MOST * pace),
        *(
            Goal(f"{name}: attar / {peer}", row["attar_of_it"], 1.0)
            for rows in halves.values()
            for peer, row in rows.items()
            if peer not in (HAND, AGAIN, OURS) and not peer.endswith(("bare", "loss guard"))
        ),
    ]


def show(name: str, halves: Mapping[str, Rows]) -> str:
    """The table of one problem, fastest first within each half."""
    lines = []
    for half, rows in halves.items():
        for loop, row in sorted(rows.items(), key=lambda item: item[1]["us"]):
            gaps = [f"{row[key]:+.1f}" for key in ("over_hand", "quiet", "mean")]
            label = f"{loop} (own batches)" if half == "own" else loop
            lines.append([label, f"{row['us']:.0f}", *gaps, f"{row['of_hand']:.2f}"])
    return table([name, "us a step", "over hand", "quiet", "mean", "x hand"], lines)


if __name__ == "__main__":
    sys.exit(main())
