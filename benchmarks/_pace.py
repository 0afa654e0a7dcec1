"""Whole training loops, of any framework, interleaved in one process.

Each loop runs in a greenlet of its own and stops where it asks for a batch. A turn is a few steps
of one loop, a round a turn of each: what is compared ran within the same few milliseconds, on the
same core, at the same clock rate. The first step of a turn is not counted: it pays for caches that
the other loops have emptied, which nobody pays who trains one model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

TURN = 30  # steps
WARM = 5  # of them warm the caches that the others have emptied, and are not counted
COLLECT_EVERY = 10  # rounds


class Gate:
    """Where one loop waits for its turn; a lap is what it does between asking for two batches."""

    def __init__(self) -> None:
        self._hub = getcurrent()
        self._laps: list[tuple[int, int]] = []
        self._begun: tuple[int, int] | None = None
        self._between = False  # what runs between two epochs belongs to no lap

    def wait(self) -> None:
        """End the lap, let the others have their turns when this one is over, begin the next."""
        wall, cpu = perf_counter_ns(), thread_time_ns()
        if not self._between:
            if self._begun:
                self._laps.append((wall - self._begun[0], cpu - self._begun[1]))
            if len(self._laps) % TURN == 0:
                self._hub.switch()
        self._between = False
        cpu = thread_time_ns()
        self._begun = perf_counter_ns(), cpu

    def __call__(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, each when it is this loop's turn."""
        batches = iter(batches)
        try:
            self.wait()
            while (batch := next(batches, None)) is not None:
                yield batch
                self.wait()
        finally:
            self._between = True

    def laps(self, rounds: int) -> np.ndarray:
        """Wall and thread CPU microseconds, [rounds, TURN - WARM, 2]."""
        laps = np.array(self._laps[: rounds * TURN], dtype=float) / 1e3
        return laps.reshape(rounds, TURN, 2)[:, WARM:]


def interleave(
    loops: Mapping[str, Callable[[Gate], Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run all *loops* to their ends, the first *rounds* turns of each in turn.

    The order is drawn anew in every round, so that no loop always follows the same other. The
    garbage collector runs between turns only: within one it would charge a loop for the others.

    Returns:
        by name, what each loop returned, and its laps.
    """
    gates = {name: Gate() for name in loops}
    runners = {name: greenlet(loop) for name, loop in loops.items()}
    results = {name: runner.switch(gates[name]) for name, runner in runners.items()}
    order, shuffle = list(loops), Random(0).shuffle
    gc.disable()
    for number in range(rounds):
        if number % COLLECT_EVERY == 0:
            gc.collect()
        shuffle(order)
        for name in order:
            runners[name].switch()
    gc.enable()
    for name, runner in runners.items():
        while not runner.dead:
            results[name] = runner.switch()
    return results, {name: gate.laps(rounds) for name, gate in gates.items()}
