"""What a method on features costs in attar: a step beside the same step written by hand.

Both run a small pair of residual networks on 64 images of 32 x 32: the teacher without gradient,
the student forward and backward, an optimiser step. By hand means forward hooks, a projector and
the loss as one writes them in plain PyTorch. Their gradients are compared before anything is timed.

Goal: attar's step takes at most 1.05 of the one by hand. The null, a second copy of the step by
hand beside the first, says what the machine cannot tell apart; it is shown and not subtracted.

    python benchmarks/features.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from time import thread_time_ns

import numpy as np
import torch
import torch.nn.functional as F
from _table import Goal, environment, finish, flags, table
from torch import Tensor, nn

import attar
from attar import losses
from attar.models.projectors import linear

MOST = 1.05
SAME = 1e-4  # of the largest gradient
IMAGES, CLASSES, HARD = 64, 10, 0.1
HAND, AGAIN, OURS = "by hand", "by hand, again", "attar"

Step = Callable[[], None]


def fitnets(s: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(s, t)


def attention(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (s, t))
    return (a - b).pow(2).mean()


def similarity(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (s, t))
    return (a - b).pow(2).mean()


def distances(s: Tensor, t: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        x = x.flatten(1)
        square = x.pow(2).sum(1)
        d = (square[:, None] + square[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d.masked_fill(torch.eye(len(x), dtype=torch.bool), 0)
        return d / d[d > 0].mean()

    with torch.no_grad():
        told = relative(t)
    return F.smooth_l1_loss(relative(s), told)


def pearson(s: Tensor, t: Tensor) -> Tensor:
    def standard(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)

    return F.mse_loss(standard(s), standard(t)) / 2


def channels(s: Tensor, t: Tensor) -> Tensor:
    q, p = (F.log_softmax(x.flatten(2) / 4, 2) for x in (s, t))
    return F.kl_div(q, p, reduction="sum", log_target=True) * 16 / (s.shape[0] * s.shape[1])


def alignment(s: Tensor, t: Tensor) -> Tensor:
    def products(x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x - x.mean(0)
        return x @ x.T

    a, b = products(s), products(t)
    return 1 - (a * b).sum() / (a.norm() * b.norm())


def normalised(s: Tensor, t: Tensor) -> Tensor:
    return F.smooth_l1_loss(s, F.layer_norm(t, t.shape[1:]))


def channel_products(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(x.flatten(2) @ x.flatten(2).transpose(1, 2), dim=2) for x in (s, t))
    return (a - b).pow(2).sum() / (s.shape[0] * s.shape[1])


def selectivity(s: Tensor, t: Tensor) -> Tensor:
    a, b = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    kernels = [(x @ y.transpose(1, 2)).pow(2).mean() for x, y in ((a, a), (b, b), (a, b))]
    return kernels[0] + kernels[1] - 2 * kernels[2]


@dataclass(frozen=True)
class Method:
    """The loss in attar and by hand, its weight, where it listens, whether it is projected."""

    ours: Callable[..., Tensor]
    hand: Callable[[Tensor, Tensor], Tensor]
    weight: float
    projected: bool = False
    address: str = "feature:stage3"


METHODS = {
    "FitNets": Method(losses.mse, fitnets, 100.0, projected=True),
    "AT": Method(losses.attention_transfer, attention, 1000.0),
    "SP": Method(losses.similarity_preserving, similarity, 3000.0),
    "RKD-D": Method(losses.relation_distance, distances, 25.0),
    "PKD": Method(losses.channel_correlation, pearson, 6.0, projected=True),
    "CWD": Method(losses.channel_kl, channels, 50.0, projected=True),
    "CKA": Method(losses.kernel_alignment, alignment, 1.0),
    "VkD": Method(losses.normalized_smooth_l1, normalised, 1.0, True, "input:head"),
    "ICKD": Method(losses.channel_similarity, channel_products, 2.5, projected=True),
    "NST": Method(losses.neuron_selectivity, selectivity, 50.0),
}

NOTES = """\
ms a step: median CPU time of the thread, which other work on the machine moves less than wall time,
in a step by hand. null: the ratio of two copies of it. attar: its step over the one by hand in the
same round. loss alone: attar's loss over the one by hand, forward and backward on signals that are
there already, in the same way. All medians; one thread."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    rounds = 4 if options.quick else 20
    rows = {name: measure(method, rounds) for name, method in METHODS.items()}
    goals = [
        Goal(f"{name}: attar / by hand (null {row['null']:.3f})", row["step"], MOST)
        for name, row in rows.items()
    ]
    report = {"environment": environment(["torch", "attar"]), "methods": rows}
    lines = [
        [name, f"{row['ms']:.1f}", *(f"{row[key]:.3f}" for key in ("null", "step", "loss"))]
        for name, row in rows.items()
    ]
    shown = table(["method", "ms a step", "null", "attar", "loss alone"], lines)
    return finish(options, report, goals, f"{shown}\n\n{NOTES}")


def measure(method: Method, rounds: int) -> dict[str, float]:
    """The ratios of one method."""
    verify(method)
    steps = {HAND: by_hand(method)[0], AGAIN: by_hand(method)[0], OURS: by_attar(method)[0]}
    whole = interleave(steps, rounds, turn=3)
    alone = interleave({HAND: alone_of(method, hand=True), OURS: alone_of(method)}, rounds, turn=10)
    return {
        "ms": float(np.median(whole[HAND])) / 1e6,
        "null": ratio(whole[AGAIN], whole[HAND]),
        "step": ratio(whole[OURS], whole[HAND]),
        "loss": ratio(alone[OURS], alone[HAND]),
    }


def ratio(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.median(np.median(one, 1) / np.median(other, 1)))


def interleave(steps: Mapping[str, Step], rounds: int, turn: int) -> dict[str, np.ndarray]:
    """CPU nanoseconds a step, [rounds, turn]; drawn order, the first round is not kept."""
    laps: dict[str, list[list[int]]] = {name: [] for name in steps}
    order, shuffle = list(steps), Random(0).shuffle
    for _ in range(rounds + 1):
        gc.collect()
        gc.disable()
        shuffle(order)
        for name in order:
            steps[name]()  # pays for the caches that the others have emptied
            laps[name].append([lap(steps[name]) for _ in range(turn)])
        gc.enable()
    return {name: np.array(found[1:], dtype=float) for name, found in laps.items()}


def lap(step: Step) -> int:
    begun = thread_time_ns()
    step()
    return thread_time_ns() - begun


def networks() -> tuple[nn.Module, nn.Module]:
    """A student of width 8 and a teacher of width 16; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = (
            attar.models.resnet((3, 32, 32), CLASSES, depth=8, width=width) for width in (8, 16)
        )
        for module in teacher.modules():  # a trained teacher's statistics are not those of noise
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return student.train(), teacher.eval().requires_grad_(False)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.rand(IMAGES, 3, 32, 32, generator=generator),
        "labels": torch.randint(CLASSES, (IMAGES,), generator=generator),
    }


def projector(method: Method, student: Tensor, teacher: Tensor) -> nn.Module | None:
    if not method.projected:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return linear(student, teacher)


def by_hand(method: Method) -> tuple[Step, nn.Module]:
    """A step with hooks by hand, and the student."""
    student, teacher = networks()
    data = batch()
    heard: dict[str, Tensor] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        listen(model, method.address, heard, name)
    with torch.no_grad():
        teacher(data["inputs"])
        copy.deepcopy(student).eval()(data["inputs"])
    adapt = projector(method, heard["student"], heard["teacher"])
    trained = [*student.parameters(), *(adapt.parameters() if adapt else ())]
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def step() -> None:
        with torch.no_grad():
            teacher(data["inputs"])
        logits = student(data["inputs"])
        signal = adapt(heard["student"]) if adapt else heard["student"]
        loss = method.weight * method.hand(signal, heard["teacher"])
        loss = loss + HARD * F.cross_entropy(logits, data["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, student


def listen(model: nn.Module, address: str, heard: dict[str, Tensor], name: str) -> None:
    kind, _, path = address.partition(":")
    module = model.get_submodule(path)

    def output(_module: nn.Module, _args: object, out: Tensor) -> None:
        heard[name] = out

    def first(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        heard[name] = args[0]

    if kind == "feature":
        module.register_forward_hook(output)
    else:
        module.register_forward_pre_hook(first)


def by_attar(method: Method) -> tuple[Step, nn.Module]:
    """The same step with attar's teacher and objective, and the student."""
    student, model = networks()
    data = batch()
    task = attar.tasks.ImageClassification(classes=CLASSES)
    teacher = attar.Teacher(model, task).open([method.address])
    make = partial(projector, method) if method.projected else None
    term = attar.Term(method.ours, method.address, weight=method.weight, projector=make)
    example = (data, teacher(data))
    objective = attar.Objective(student, task, [term], label_weight=HARD, example=example)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        loss = objective(data, teacher(data)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, student


def alone_of(method: Method, *, hand: bool = False) -> Step:
    """The loss alone, forward and backward, on signals of the networks."""
    student, teacher = networks()
    heard: dict[str, Tensor] = {}
    listen(student, method.address, heard, "student")
    listen(teacher, method.address, heard, "teacher")
    with torch.no_grad():
        student(batch()["inputs"])
        teacher(batch()["inputs"])
        adapt = projector(method, heard["student"], heard["teacher"])
        signal = adapt(heard["student"]) if adapt else heard["student"]
    signal = signal.clone().requires_grad_()
    told = heard["teacher"]
    # What the objective does with a value a row: a product with a vector that is kept.
    share = torch.full((IMAGES,), 1 / IMAGES)

    def step() -> None:
        signal.grad = None
        value = (method.hand if hand else method.ours)(signal, told)
        (value.dot(share) if value.ndim else value).backward()

    return step


def verify(method: Method) -> None:
    """Both steps give the student the same gradient."""
    grads = []
    for make in (by_hand, by_attar):
        step, student = make(method)
        step()
        grads.append([p.grad for p in student.parameters()])
    most = max(float(g.abs().max()) for g in grads[0])
    far = max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))
    assert math.isfinite(most)
    assert far <= SAME * most, f"{method.ours.__name__}: gradients are {far / most:.1e} apart"


if __name__ == "__main__":
    sys.exit(main())
