"""What hearing a feature costs: sixteen taps on a network that does next to nothing.

The network is thirty-two modules that return what they are given, so a forward pass is all calls
and the hooks show. attar.signals.Tap listens to every other module; by hand the same hooks only
put what they hear into a list.

Goal: at most 6 us a feature and forward beyond the same network without taps, on a machine where
the loop by hand of loop.py takes 300 us a step on its smaller problem; a slower machine has as many
microseconds more as that loop takes longer on it.

    python benchmarks/taps.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from random import Random
from time import perf_counter_ns

import numpy as np
import torch
import torch.nn.functional as F
from _table import Goal, environment, finish, flags, table
from torch import Tensor, nn

from attar.signals import Tap

MOST = 6  # microseconds a feature, where the loop by hand takes
PACE = 300  # microseconds a step
FEATURES = 16
BARE, AGAIN, HAND, OURS, PACER = "no tap", "no tap, again", "by hand", "attar", "pace"
TURN = 20  # forwards of one kind in a row, of which the first is not counted

Step = Callable[[], object]

NOTES = """\
us a forward: median wall time. us a feature: the median, over rounds, of the difference to the
forward without taps in the same round, over the sixteen features. One thread."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    rounds = 50 if options.quick else 500
    verify()
    laps = interleave(steps(), rounds)
    rows = {name: beside(found, laps[BARE]) for name, found in laps.items() if name != PACER}
    pace = float(np.median(laps[PACER])) / PACE
    beyond = rows[OURS]["us_a_feature"] - abs(rows[AGAIN]["us_a_feature"])
    claim = "attar's tap beyond the null, us a feature and forward"
    report = {"environment": environment(["torch", "attar"]), "pace": pace, "taps": rows}
    lines = [[n, f"{r['us']:.1f}", f"{r['us_a_feature']:+.2f}"] for n, r in rows.items()]
    shown = table(["forward", "us", "us a feature"], lines)
    notes = f"{NOTES} The loop by hand takes {pace * PACE:.0f} us a step here."
    return finish(options, report, [Goal(claim, beyond, MOST * pace)], f"{shown}\n\n{notes}")


def network() -> nn.Sequential:
    return nn.Sequential(*(nn.Identity() for _ in range(2 * FEATURES)))


def steps() -> dict[str, Step]:
    """One forward of each kind, and a training step by hand that says how fast the machine is."""
    values = torch.ones(4)
    bare, again, hand, ours = (network() for _ in range(4))
    heard = by_hand(hand)
    tap = Tap(ours, addresses()).open()

    def hear_by_hand() -> None:
        heard.clear()
        hand(values)

    return {
        BARE: lambda: bare(values),
        AGAIN: lambda: again(values),
        HAND: hear_by_hand,
        OURS: lambda: tap(ours, values),
        PACER: training_step(),
    }


def addresses() -> list[str]:
    return [f"feature:{2 * index}" for index in range(FEATURES)]


def by_hand(model: nn.Sequential) -> list[Tensor]:
    heard: list[Tensor] = []

    def hear(_module: nn.Module, _args: object, output: Tensor) -> None:
        heard.append(output)

    for index in range(FEATURES):
        model[2 * index].register_forward_hook(hear)
    return heard


def training_step() -> Step:
    """The smaller problem of loop.py, by hand, with its guard."""
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for width in (32, 128)
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    inputs, labels = torch.randn(64, 64), torch.randint(10, (64,))

    def step() -> None:
        with torch.no_grad():
            told = teacher(inputs)
        logits = student(inputs)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(told / 4, 1), reduction="batchmean")
        loss = 0.9 * 16 * soft + 0.1 * F.cross_entropy(logits, labels)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])
        assert loss.isfinite().item()
        assert norm.isfinite().item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def interleave(found: Mapping[str, Step], rounds: int) -> dict[str, np.ndarray]:
    """Microseconds a call, [rounds, TURN - 1]; the order is drawn anew in every round."""
    laps: dict[str, list[list[float]]] = {name: [] for name in found}
    order, shuffle = list(found), Random(0).shuffle
    gc.disable()
    for number in range(rounds):
        if number % 10 == 0:
            gc.collect()
        shuffle(order)
        for name in order:
            laps[name].append(turn(found[name]))
    gc.enable()
    return {name: np.array(taken) for name, taken in laps.items()}


def turn(step: Step) -> list[float]:
    laps = []
    for _ in range(TURN):
        begun = perf_counter_ns()
        step()
        laps.append((perf_counter_ns() - begun) / 1e3)
    return laps[1:]


def beside(laps: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """What a forward takes, and what a feature costs beyond *base* in the same round."""
    gaps = np.median(laps, 1) - np.median(base, 1)
    return {"us": float(np.median(laps)), "us_a_feature": float(np.median(gaps)) / FEATURES}


def verify() -> None:
    """Both ways hear the same sixteen tensors."""
    hand, ours, values = network(), network(), torch.ones(4)
    heard = by_hand(hand)
    hand(values)
    with Tap(ours, addresses()) as tap:
        _, told = tap(ours, values)
    assert len(heard) == len(told) == FEATURES
    assert all(torch.equal(a, b) for a, b in zip(heard, told.values(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
