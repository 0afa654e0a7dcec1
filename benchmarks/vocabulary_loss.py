"""What a loss on a wide vocabulary costs: time, memory and exactness beside the bare products.

Student and teacher are a last layer each, with the hidden states before it. A loss on their logits
[N, V] needs four products of matrices at least: both sides' logits, and the student's gradients of
hidden states and layer. The floor is these four and nothing else, on the chunk that attar takes.
Beside it: attar (`attar.losses.wide`), the same loss on whole logits by autograd, and other
libraries where they can be imported, each by its own function. First all are compared with whole
logits, value and gradients, on a small pair; one that is elsewhere is not timed.

Goals: in one pass at most 1.20 of the floor for the forward KL, the reverse KL and JSD, with and
without cross-entropy; any other loss at most 1.45; a cached top 64 at most 0.70; at least 2.5 times
faster than TRL's chunked loss on KL, and 4 times on JSD. At V = 128,000 at least 25 times less
extra memory than TRL's GKD on JSD, and the same for four times the rows. From bfloat16 inputs the
gradient is the exact one, rounded once; and where the layer is in float32, within 1e-3.

    python benchmarks/vocabulary_loss.py [--check] [--json FILE] [--quick]

The others are trl, liger-kernel and torchtune, installed without their dependencies; what is not
there is left out, and said. A compiled Liger needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _table import Goal, environment, finish, flags, table
from torch import Tensor

from attar import losses
from attar.losses import Projected, TopK, wide

FLOOR, THREE = "the four products", "the three products without a teacher's"
HARD = 0.5
FUSED = {
    "KL": partial(losses.kl_divergence, temperature=1.0),
    "reverse KL": losses.reverse_kl,
    "JSD": losses.jensen_shannon,
}
PEERS = ["trl", "liger-kernel", "torchtune"]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """Hidden states and last layers of student and teacher, and the labels."""

    hidden: Tensor
    weight: Tensor
    told: Tensor
    told_weight: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: int, width: int, student: int, teacher: int, spread: float = 3.0) -> Pair:
        """Logits of a standard deviation of *spread*, independent of each other."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return cls(
            normal(rows, student).requires_grad_(),
            normal(width, student).mul_(spread / student**0.5).requires_grad_(),
            normal(rows, teacher),
            normal(width, teacher).mul_(spread / teacher**0.5),
            torch.randint(width, (rows,), generator=generator),
        )

    def to(self, dtype: torch.dtype) -> Pair:
        """The same numbers in another type."""
        parts = [self.hidden, self.weight, self.told, self.told_weight]
        hidden, weight, *teacher = [p.detach().to(dtype) for p in parts]
        return Pair(hidden.requires_grad_(), weight.requires_grad_(), *teacher, self.labels)

    def gradients(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden states and layer, as a training step makes them: into `.grad`, once."""
        self.hidden.grad = self.weight.grad = None
        value.backward()
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad


# A loss is (pair, temperature) -> the mean over rows. KL and JSD of others have no factor T².


def ours(pair: Pair, loss: Callable[..., Tensor], *, hard: bool = False, top: Any = None) -> Tensor:
    student = Projected(pair.hidden, pair.weight)
    teacher = top if top is not None else Projected(pair.told, pair.told_weight)
    items = [wide.Item(loss, 1.0, teacher)]
    if hard:
        items.append(wide.Item(losses.cross_entropy, HARD, supplied={"labels": pair.labels}))
    return wide.combined(student, items)[0].mean()


def whole(
    pair: Pair, loss: Callable[..., Tensor], *, hard: bool = False, top: Any = None
) -> Tensor:
    """On logits that are there as a whole, in the precision of the inputs, by autograd."""
    logits = pair.hidden @ pair.weight.T
    value = loss(logits, top if top is not None else pair.told @ pair.told_weight.T).mean()
    return value + HARD * losses.cross_entropy(logits, pair.labels).mean() if hard else value


def by_hand(pair: Pair, temperature: float = 1.0) -> Tensor:
    """The forward KL as one writes it."""
    logits, told = pair.hidden @ pair.weight.T, pair.told @ pair.told_weight.T
    said, told = F.log_softmax(logits / temperature, -1), F.log_softmax(told / temperature, -1)
    return F.kl_div(said, told, reduction="batchmean", log_target=True) * temperature**2


def trl_gkd(pair: Pair, temperature: float = 1.0, *, beta: float) -> Tensor:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    logits, told = pair.hidden @ pair.weight.T, pair.told @ pair.told_weight.T
    compare = GKDTrainer.generalized_jsd_loss
    return compare(logits, told, beta=beta, temperature=temperature) * temperature**2


def trl_chunked(pair: Pair, temperature: float = 1.0, *, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = (pair.hidden, pair.weight, None), (pair.told, pair.told_weight, None)
    value, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, temperature)
    return value.mean() * temperature**2


def liger(pair: Pair, temperature: float = 1.0, *, beta: float, compiled: bool = False) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    compare = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=temperature, compiled=compiled)
    given = (pair.hidden, pair.weight, pair.told, pair.told_weight, pair.labels)
    return compare(*given) * temperature**2


def torchtune(pair: Pair, temperature: float = 1.0, *, chunks: int = 8) -> Tensor:
    """It has no temperature, and lacks the teacher's entropy in its value."""
    assert temperature == 1
    compare = _torchtune().ForwardKLWithChunkedOutputLoss(chunks)
    hidden, told = pair.hidden.unsqueeze(0), pair.told.unsqueeze(0)
    said = [part @ pair.weight.T for part in hidden.chunk(chunks, 1)]
    heard = [part @ pair.told_weight.T for part in told.chunk(chunks, 1)]
    return compare(said, heard, pair.labels.unsqueeze(0))


def _torchtune() -> Any:
    """The file of its losses: the package asks for an older torch."""
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        raise ImportError("torchtune")
    path = Path(package.origin).parent / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("kd_losses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "TRL GKD, KL": ("KL", partial(trl_gkd, beta=0)),
    "TRL GKD, JSD": ("JSD", partial(trl_gkd, beta=0.5)),
    "TRL chunked, KL": ("KL", partial(trl_chunked, beta=0.0)),
    "TRL chunked, reverse KL": ("reverse KL", partial(trl_chunked, beta=1.0)),
    "TRL chunked, JSD": ("JSD", partial(trl_chunked, beta=0.5)),
    "Liger, KL": ("KL", partial(liger, beta=0)),
    "Liger, JSD": ("JSD", partial(liger, beta=0.5)),
    "Liger compiled, KL": ("KL", partial(liger, beta=0, compiled=True)),
    "Liger compiled, JSD": ("JSD", partial(liger, beta=0.5, compiled=True)),
    "torchtune chunked, KL": ("KL", torchtune),
}


def rows_of(pair: Pair, top: TopK) -> dict[str, Callable[[Pair], Tensor]]:
    """What is timed, by name; each gives the value that is differentiated."""
    found: dict[str, Callable[[Pair], Tensor]] = {}
    for name, loss in FUSED.items():
        found[f"attar, {name}"] = partial(ours, loss=loss)
        found[f"attar, {name} + CE"] = partial(ours, loss=loss, hard=True)
    found["attar, alpha-beta (any loss)"] = partial(ours, loss=losses.alpha_beta_divergence)
    found["attar, cached top 64, KL"] = partial(ours, loss=FUSED["KL"], top=top)
    found["attar, cached top 64, KL + CE"] = partial(ours, loss=FUSED["KL"], hard=True, top=top)
    found["whole logits, KL by hand"] = by_hand
    found["whole logits, KL + CE"] = partial(whole, loss=FUSED["KL"], hard=True)
    found["whole logits, JSD"] = partial(whole, loss=FUSED["JSD"])
    return found


def there(*, compiled: bool) -> tuple[dict[str, Callable[..., Tensor]], list[str]]:
    """The other libraries' losses that run here and agree, and why each other one does not."""
    pair = Pair.of(48, 500, 32, 48)
    found, absent = {}, []
    for name, (kind, loss) in OTHERS.items():
        if "compiled" in name and not compiled:
            continue
        try:
            agree(name, pair, loss, partial(whole, loss=FUSED[kind]))
        except ImportError as error:
            absent.append(f"{name}: {error}")
        else:
            found[name] = loss
    return found, absent


def agree(name: str, pair: Pair, one: Step | Any, other: Step | Any) -> None:
    """Both have the same gradients."""
    for mine, theirs in zip(pair.gradients(one(pair)), pair.gradients(other(pair)), strict=True):
        apart = float((mine - theirs).norm() / theirs.norm())
        assert apart < 1e-4, f"{name}: gradients are {apart:.1e} apart"


def products(pair: Pair, *, teacher: bool) -> Step:
    """The bare products, into buffers that are there already."""
    rows, width = len(pair.hidden), len(pair.weight)
    hidden, weight = pair.hidden.detach(), pair.weight.detach()
    said, told = torch.empty(rows, width), torch.empty(rows, width)
    to_hidden, to_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> Tensor:
        torch.mm(hidden, weight.T, out=said)
        if teacher:
            torch.mm(pair.told, pair.told_weight.T, out=told)
        torch.mm(said, weight, out=to_hidden)
        return torch.mm(said.T, hidden, out=to_weight)

    return step


def time(options: argparse.Namespace, others: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """CPU seconds of each, and its share of the floor in the same round; medians."""
    pair = Pair.of(*((64, 2000, 64, 128) if options.quick else (1024, 32_000, 512, 1024)))
    with torch.no_grad():
        top = TopK.of(pair.told @ pair.told_weight.T, k=64, temperatures=(1.0,))
    losses_ = {**rows_of(pair, top), **others}
    steps: dict[str, Step] = {FLOOR: products(pair, teacher=True)}
    steps[THREE] = products(pair, teacher=False)
    for name, loss in losses_.items():
        steps[name] = lambda loss=loss: pair.gradients(loss(pair))[1]
    laps: dict[str, list[float]] = {name: [] for name in steps}
    for lap in range(2 if options.quick else 4):
        for name, step in steps.items():
            begun = process_time()
            step()
            if lap or name in others:  # the first round of our own pays for first uses
                laps[name].append(process_time() - begun)
        if lap == 2:  # the others are several times slower: they have three rounds
            for name in others:
                steps.pop(name, None)
    floor = np.median(laps[FLOOR])
    return {
        name: {"seconds": float(np.median(found)), "of_floor": float(np.median(found) / floor)}
        for name, found in laps.items()
    }


def memory(options: argparse.Namespace, others: Mapping[str, Any]) -> dict[str, float]:
    """MB that a loss takes beyond its inputs, each in a process of its own."""
    small = options.quick
    ways = ["attar, KL", "attar, JSD", "attar, JSD + CE", "whole logits, KL by hand"]
    ways += [name for name in others if "compiled" not in name]  # it would be its compiler's
    found = {name: extra(name, 1024, small) for name in ways}
    for name in ("attar, JSD", "attar, JSD + CE"):
        found[f"{name}, 4096 rows"] = extra(name, 4096, small)
    return found


def extra(name: str, rows: int, small: bool) -> float:
    code = f"import vocabulary_loss as v; print(v.peak({name!r}, {rows}, {small}))"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    if out.returncode:
        raise RuntimeError(f"{name}: {out.stderr[-400:]}")
    return float(out.stdout.split()[-1])


def peak(name: str, rows: int, small: bool) -> float:
    """Extra MB of one step, the gradients of hidden states and layer among them."""
    torch.set_num_threads(1)
    pair = Pair.of(rows, 4000 if small else 128_000, 128, 256)
    top = TopK.of(torch.zeros(1, 2), k=1)
    loss = {**rows_of(pair, top), **{n: f for n, (_, f) in OTHERS.items()}}[name]
    tiny = Pair.of(64, 500, 8, 8)
    tiny.gradients(loss(tiny))  # what is loaded at the first use is not the loss's
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    pair.gradients(loss(pair))
    return (_status("VmHWM") - before) / 1e3


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def exactness(options: argparse.Namespace, others: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The error of the gradients of bfloat16 inputs, relative to those in float64."""
    found = []
    for width in (2000,) if options.quick else (32_000, 128_000):
        for temperature in (1.0, 2.0, 4.0, 10.0):
            for kind in ("KL", "JSD"):
                found.append(_errors(width, temperature, kind, others))
    return found


def _errors(width: int, temperature: float, kind: str, others: Mapping[str, Any]) -> dict[str, Any]:
    half = Pair.of(32, width, 64, 64).to(torch.bfloat16)
    loss = {"KL": losses.kl_divergence, "JSD": losses.jensen_shannon}[kind]
    loss = partial(loss, temperature=temperature)
    exact = half.to(torch.float64)
    wanted = exact.gradients(whole(exact, loss))[1]

    def error(value: Tensor) -> float:
        return float((value.double() - wanted).norm() / wanted.norm())

    layer = half.weight.detach().float().requires_grad_()
    mixed = Pair(half.hidden, layer, half.told, half.told_weight, half.labels)
    row = {"V": width, "T": temperature, "loss": kind, "rounded once": error(wanted.bfloat16())}
    row["attar"] = error(half.gradients(ours(half, loss))[1])
    row["attar, layer in float32"] = error(mixed.gradients(ours(mixed, loss))[1])
    row["whole logits"] = error(half.gradients(whole(half, loss))[1])
    for name, other in others.items():
        library, _, compares = name.rpartition(", ")
        if compares != kind or "compiled" in name or ("torchtune" in name and temperature != 1):
            continue
        row[library] = error(half.gradients(other(half, temperature))[1])
    return row


def goals_of(
    times: Mapping[str, Any], memories: Mapping[str, float], errors: list[dict[str, Any]]
) -> list[Goal]:
    share = {name: row["of_floor"] for name, row in times.items()}
    goals = []
    for kind in FUSED:
        for name in (f"attar, {kind}", f"attar, {kind} + CE"):
            goals.append(Goal(f"{name}: of the four products", share[name], 1.20))
    name = "attar, alpha-beta (any loss)"
    goals.append(Goal(f"{name}: of the four products", share[name], 1.45))
    for name in ("attar, cached top 64, KL", "attar, cached top 64, KL + CE"):
        goals.append(Goal(f"{name}: of the four products", share[name], 0.70))
    for kind, factor in (("KL", 2.5), ("JSD", 4.0)):
        if (peer := f"TRL chunked, {kind}") in share:
            ratio = share[f"attar, {kind}"] / share[peer]
            goals.append(Goal(f"attar, {kind}: time of TRL's chunked", ratio, 1 / factor))
    if "TRL GKD, JSD" in memories:
        ratio = memories["attar, JSD"] / memories["TRL GKD, JSD"]
        goals.append(Goal("attar, JSD: extra memory of TRL's GKD", ratio, 1 / 25))
    ratio = memories["attar, JSD, 4096 rows"] / memories["attar, JSD"]
    goals.append(Goal("attar, JSD: extra memory of 4096 rows, of 1024", ratio, 1.05))
    rounding = max(row["attar"] / row["rounded once"] for row in errors)
    goals.append(Goal("bfloat16: error of the gradient, of its rounding", rounding, 1.05))
    worst = max(row["attar, layer in float32"] for row in errors)
    goals.append(Goal("bfloat16, layer in float32: error of the gradient", worst, 1e-3))
    return goals


def shown(
    times: Mapping[str, Any], memories: Mapping[str, float], errors: list[dict[str, Any]]
) -> str:
    """The three tables."""
    lines = [[n, f"{r['seconds']:.2f}", f"{r['of_floor']:.2f}"] for n, r in times.items()]
    first = table(["N = 1024, V = 32,000, 512 and 1024 wide", "CPU s", "of the floor"], lines)
    lines = [[n, f"{mb:.0f}"] for n, mb in memories.items()]
    second = table(["N = 1024, V = 128,000, 128 and 256 wide", "extra MB"], lines)
    names = list({name: None for row in errors for name in row if name not in ("V", "T", "loss")})
    lines = [
        [f"{r['loss']}, V = {r['V']:,}, T = {r['T']:g}", *(_percent(r.get(n)) for n in names)]
        for r in errors
    ]
    return "\n\n".join([first, second, table(["gradient's error, %", *names], lines), NOTES])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}"


NOTES = """\
Time: medians of three interleaved rounds, CPU time of the process, one thread. A step makes the
value, its mean and the gradients of hidden states and layer. KL and JSD at T = 1, CE with weight
0.5. Memory: the most that a step takes beyond its inputs, of which 66 MB (and 0.5 to 2 MB a
thousand rows) are the gradients themselves. Error: of the layer's gradient from bfloat16 inputs,
relative to float64; `rounded once` is the exact gradient in bfloat16, the best that can be."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    others, absent = there(compiled=not options.quick)
    for line in absent:
        print("left out:", line)
    pair = Pair.of(48, 500, 32, 48)
    top = TopK.of((pair.told @ pair.told_weight.T).detach(), k=64, temperatures=(1.0,))
    for kind, loss in FUSED.items():
        for given in ({}, {"hard": True}, {"hard": True, "top": top}):
            agree(kind, pair, partial(ours, loss=loss, **given), partial(whole, loss=loss, **given))
    times = time(options, others)
    memories = memory(options, others)
    errors = exactness(options, others)
    report: dict[str, Any] = {"environment": environment(["torch", "attar", *PEERS])}
    report |= {"time": times, "memory_mb": memories, "gradient_error": errors}
    report |= {"left_out": absent}
    goals = goals_of(times, memories, errors)
    return finish(options, json.loads(json.dumps(report)), goals, shown(times, memories, errors))


if __name__ == "__main__":
    sys.exit(main())
