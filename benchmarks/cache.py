"""What it costs to read a teacher's answers from a cache instead of memory, and to write them.

A random batch of 256 rows, of three kinds of answers; the page cache is warm. Goals: at most 1.5
times what indexing arrays in memory costs; 5 times faster than LMDB, 40 times faster than Hugging
Face datasets, 150 times faster than MosaicML's MDS, each where it is installed; and a gigabyte
written to memory, hashed and sealed in a second on a machine that hashes 1.5 GB/s with SHA-256.

    python benchmarks/cache.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
from _stores import Gather, Rows, attar_store, installed, memory, memory_take
from _table import Goal, environment, finish, flags, table

from attar.teachers.store import Field, Store

BATCH = 256
MOST = 1.5  # of what memory costs
FASTER = {"LMDB": 5, "datasets": 40, "MDS": 150}
RAM, AGAIN, TAKE = "memory", "memory, again", "memory, np.take"
OURS, SHARDS = "attar", "attar, 8 shards"
TURN = 0.004  # seconds of one store in a row, of which the first batch is not counted
MOST_BATCHES = 40
SHA = 1.5  # GB/s
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the disk's own speed apart
PACKAGES = ["numpy", "attar", "lmdb", "datasets", "pyarrow", "mosaicml-streaming"]


@dataclass(frozen=True)
class Problem:
    """Answers of one kind: a name, how many rows, and the arrays of a row."""

    name: str
    rows: int
    fields: Mapping[str, tuple[str, int]]

    def arrays(self) -> Rows:
        draw = np.random.default_rng(0)
        return {
            name: draw.integers(0, 2000, (self.rows, width)).astype(dtype)
            for name, (dtype, width) in self.fields.items()
        }


PROBLEMS = [
    Problem("10 logits, float32, 60,000 rows", 60_000, {"x": ("float32", 10)}),
    Problem(
        "top 64, int32 and float16, 200,000 rows",
        200_000,
        {"ids": ("int32", 64), "values": ("float16", 64)},
    ),
    Problem("512 features, float16, 100,000 rows", 100_000, {"x": ("float16", 512)}),
]

NOTES = f"""\
us a batch: median wall time for a random batch of 256 rows; the batches of a store are its own, so
no store warms the rows of another. x memory: median of the ratios to array[ids] in the same round.
attar: opened anew from sealed files, filled in shuffled order; 8 shards: the same rows in eight
files. LMDB: a record a row. datasets: save_to_disk, numpy's
format, which gives int64 and float32 whatever was kept. MDS: LocalDataset. One thread.
s a GB: rows of 512 float16 in batches of 4,096; attar has a CRC-32 of each batch, SHA-256 of each
shard in a thread, fsync, and all of it done when close returns; by hand: one file, SHA-256 and
fsync. Both to {MEMORY or "the folder for temporary files"}."""


def main() -> int:
    options = flags(__doc__ or "")
    peers, absent = installed()
    rounds = 8 if options.quick else 60
    measured = {}
    for problem in PROBLEMS:
        if options.quick:
            problem = Problem(problem.name, problem.rows // 20, problem.fields)
        measured[problem.name] = compare(problem, peers, rounds)
    written = write(64 << 20 if options.quick else 512 << 20, 1 if options.quick else 5)
    goals = [goal for name, rows in measured.items() for goal in judge(name, rows)]
    pace = max(1.0, SHA * written["SHA-256 alone"])
    goals.append(Goal("s to write a GB", written[OURS], pace))
    tables = [show(name, rows) for name, rows in measured.items()]
    tables.append(table(["write", "s a GB"], [[n, f"{s:.2f}"] for n, s in written.items()]))
    tables += [NOTES, *(f"absent: {name}: {why}" for name, why in absent.items())]
    report = {"environment": environment(PACKAGES), "absent": absent}
    report |= {"read": measured, "written": written}
    return finish(options, report, goals, "\n\n".join(tables))


def compare(
    problem: Problem, peers: Mapping[str, Callable[[Rows, Path], Gather]], rounds: int
) -> dict[str, dict[str, float]]:
    """Write the rows into every store, check that all give them back, and read them in turns."""
    rows = problem.arrays()
    makers = {RAM: memory, AGAIN: memory, TAKE: memory_take, OURS: attar_store}
    makers |= {SHARDS: partial(attar_store, shards=8), **peers}
    with tempfile.TemporaryDirectory() as folder:
        stores = {}
        for number, (name, make) in enumerate(makers.items()):
            place = Path(folder) / str(number)
            place.mkdir()
            stores[name] = make(rows, place)
            verify(name, stores[name], rows)
        laps = interleave(stores, problem.rows, rounds)
    base = np.array(laps[RAM])
    return {
        name: {"us": float(np.median(found)), "of_memory": float(np.median(found / base))}
        for name, found in laps.items()
    }


def verify(name: str, gather: Gather, rows: Rows) -> None:
    """A store gives the same rows, in order, some of them twice."""
    ids = np.random.default_rng(7).integers(0, len(next(iter(rows.values()))), 300)
    for field, array in gather(ids).items():
        assert (array == rows[field][ids]).all(), name


def interleave(stores: Mapping[str, Gather], rows: int, rounds: int) -> dict[str, np.ndarray]:
    """Microseconds a batch, a median a round; the order is drawn anew in every round."""
    draw, shuffle = np.random.default_rng(3), Random(0).shuffle
    batches = {name: batches_of(gather, rows, draw) for name, gather in stores.items()}
    laps: dict[str, list[float]] = {name: [] for name in stores}
    order = list(stores)
    gc.disable()
    for number in range(rounds):
        if number % 10 == 0:
            gc.collect()
        shuffle(order)
        for name in order:
            ids = draw.integers(0, rows, (batches[name], BATCH))
            laps[name].append(turn(stores[name], ids))
    gc.enable()
    return {name: np.array(found) for name, found in laps.items()}


def batches_of(gather: Gather, rows: int, draw: np.random.Generator) -> int:
    """How many batches of a store fill a turn; two at least."""
    took = min(turn(gather, draw.integers(0, rows, (3, BATCH))) for _ in range(3))
    return int(np.clip(TURN / (took / 1e6), 2, MOST_BATCHES))


def turn(gather: Gather, ids: np.ndarray) -> float:
    """The median of some batches in a row, but for the first; microseconds."""
    laps = []
    for batch in ids:
        begun = perf_counter()
        gather(batch)
        laps.append((perf_counter() - begun) * 1e6)
    return float(np.median(laps[1:]))


def write(size: int, rounds: int) -> dict[str, float]:
    """Seconds a gigabyte; medians, in turns."""
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2000, (4096, 512)).astype(np.float16)
    kinds = {OURS: write_attar, "by hand": write_hand, "SHA-256 alone": hash_alone}
    laps: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, kind in kinds.items():
            with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
                begun = perf_counter()
                kind(Path(folder), rows, size // rows.nbytes)
                took = perf_counter() - begun
            laps[name].append(took / (size // rows.nbytes * rows.nbytes / 1e9))
    return {name: float(np.median(found)) for name, found in laps.items()}


def write_attar(folder: Path, rows: np.ndarray, batches: int) -> None:
    fields = [Field("x", "float16", (512,))]
    slots = np.arange(batches * len(rows)).reshape(batches, -1)
    # Shards a quarter of the usual size: else there are but two to hash, one of them at the end.
    with Store(folder, slots=slots.size, fields=fields, writer="w", shard_bytes=64 << 20) as store:
        for batch in slots:
            store.add(batch, {"x": rows})


def write_hand(folder: Path, rows: np.ndarray, batches: int) -> None:
    digest = hashlib.sha256()
    with (folder / "rows").open("wb") as file:
        for _ in range(batches):
            file.write(rows.data)
            digest.update(rows.data)
        file.flush()
        os.fsync(file.fileno())


def hash_alone(_folder: Path, rows: np.ndarray, batches: int) -> None:
    digest = hashlib.sha256()
    for _ in range(batches):
        digest.update(rows.data)


def judge(name: str, rows: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    """The goals for one kind of answers."""
    goals = [Goal(f"{name}: attar / memory", rows[OURS]["of_memory"], MOST)]
    for peer, times in FASTER.items():
        if peer in rows:
            share = rows[OURS]["of_memory"] / rows[peer]["of_memory"]
            goals.append(Goal(f"{name}: attar / {peer}", share, 1 / times))
    return goals


def show(name: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        [store, f"{row['us']:.1f}", f"{row['of_memory']:.2f}"]
        for store, row in sorted(rows.items(), key=lambda item: item[1]["us"])
    ]
    return table([name, "us a batch", "x memory"], lines)


if __name__ == "__main__":
    sys.exit(main())
