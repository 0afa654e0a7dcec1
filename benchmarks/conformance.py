"""How exact the losses are: attar and other libraries beside their papers' formulas in float64.

Every loss is given the same values: ordinary ones, ones of size 1e4, ones that are absent (a class
that is -inf on both sides; an example of zeros), bfloat16, and a batch of one. Each library is
brought to attar's scale by the factor that its table names. An error is the distance from the
formula over the size of what the formula gives: of the value, and of the largest gradient.

Goals: attar's value is within 1e-5 and its gradient within 1e-4 of the formula on every input, in
bfloat16 within half a step of that type.

    python benchmarks/conformance.py [--check] [--json FILE] [--quick]
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial

import _formulas as paper
import torch
from _peers import LIBRARIES, Compare, Peer, installed
from _table import Goal, environment, finish, flags, table
from torch import Tensor

from attar import losses

VALUE, GRADIENT, BRAIN = 1e-5, 1e-4, 2**-8
TINY = 1e-12  # a formula that gives less gives zero, and the error is the value itself
EXAMPLES, CLASSES = 32, 10
INPUTS = ("ordinary", "1e4", "absent", "bf16", "one")


@dataclass(frozen=True)
class Method:
    """One method: the shape of an example, attar's loss, the formula, and attar's name for it."""

    shape: tuple[int, ...]
    ours: Compare
    formula: Compare
    called: str

    @property
    def on_logits(self) -> bool:
        return self.shape == (CLASSES,)


def soft(loss: Callable[..., Tensor], **options: float) -> Compare:
    return lambda s, t: loss(s, t, **options).mean()


def labelled(s: Tensor, t: Tensor) -> Tensor:
    return losses.decoupled_kl(s, t, torch.zeros(len(s), dtype=torch.long)).mean()


LOGITS, VECTORS, MAPS = (CLASSES,), (16,), (6, 8, 8)
METHODS = {
    "KD, T = 1": Method(
        LOGITS,
        soft(losses.kl_divergence, temperature=1.0),
        partial(paper.forward_kl, temperature=1.0),
        "kl_divergence",
    ),
    "KD, T = 4": Method(
        LOGITS,
        soft(losses.kl_divergence),
        partial(paper.forward_kl, temperature=4.0),
        "kl_divergence",
    ),
    "reverse KL": Method(LOGITS, soft(losses.reverse_kl), paper.reverse_kl, "reverse_kl"),
    "JSD": Method(LOGITS, soft(losses.jensen_shannon), paper.jensen_shannon, "jensen_shannon"),
    "LS-KD, T = 2": Method(
        LOGITS,
        soft(losses.standardized_kl),
        partial(paper.standardized, temperature=2.0),
        "standardized_kl",
    ),
    "DKD": Method(
        LOGITS,
        labelled,
        partial(paper.decoupled, alpha=1.0, beta=8.0, temperature=4.0),
        "decoupled_kl",
    ),
    "DIST": Method(LOGITS, losses.correlation, paper.correlation, "correlation"),
    "FitNets": Method(MAPS, soft(losses.mse), paper.mean_square, "mse"),
    "AT": Method(MAPS, soft(losses.attention_transfer), paper.attention, "attention_transfer"),
    "HCL": Method(MAPS, soft(losses.hierarchical_context), paper.context, "hierarchical_context"),
    "ICKD": Method(MAPS, soft(losses.channel_similarity), paper.channels, "channel_similarity"),
    "SP": Method(VECTORS, losses.similarity_preserving, paper.products, "similarity_preserving"),
    "RKD-D": Method(VECTORS, losses.relation_distance, paper.distances, "relation_distance"),
    "RKD-A": Method(VECTORS, losses.relation_angle, paper.angles, "relation_angle"),
    "PKT": Method(
        VECTORS, losses.probabilistic_transfer, paper.neighbours, "probabilistic_transfer"
    ),
    "CC": Method(
        VECTORS, losses.correlation_congruence, paper.congruence, "correlation_congruence"
    ),
}

Errors = dict[str, tuple[float, float]]
NOTES = f"""\
Each cell: error of the value, error of the gradient. `nan` and `inf` are what came out, `none` a
value without a gradient, `refused` an error. ordinary: {EXAMPLES} examples of normal values of
deviation 3. 1e4: the same times 1e4. absent: the last class is -inf on both sides, or the first
example is zero. bf16: the same values as bfloat16 tensors, and the formula on these; a gradient in
bfloat16 is rounded by up to {BRAIN:.1e}. one: a batch of one. Where the formula gives 0 (relations
of one example) the error is the number itself."""


def main() -> int:
    options = flags(__doc__ or "")
    torch.set_num_threads(1)
    libraries, absent = installed()
    seeds = range(1 if options.quick else 5)
    rows = dict(measure(libraries, seeds))
    report = {
        "environment": environment(["torch", "attar", *(p for p, _ in LIBRARIES.values())]),
        "date": date.today().isoformat(),
        "absent": absent,
        "errors": {" | ".join(key): errors for key, errors in rows.items()},
    }
    tables = [show(rows, libraries), NOTES, versions(libraries)]
    tables += [f"absent: {name}: {why}" for name, why in absent.items()]
    return finish(options, report, list(goals(rows)), "\n\n".join(tables))


def versions(libraries: Mapping[str, object]) -> str:
    names = ["torch", *(LIBRARIES[name][0] for name in libraries)]
    found = environment(names)["packages"]
    said = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{date.today().isoformat()}: {said}"


def measure(
    libraries: Mapping[str, Mapping[str, Peer]], seeds: range
) -> Iterator[tuple[tuple[str, str], Errors]]:
    """(method, library) and its errors on each kind of input, the worst of the seeds."""
    for name, method in METHODS.items():
        sides = {"attar": method.ours}
        sides |= {lib: peers[name].loss for lib, peers in libraries.items() if name in peers}
        for library, loss in sides.items():
            found = {kind: [compare(method, loss, kind, s) for s in seeds] for kind in INPUTS}
            yield (name, library), {kind: worst(errors) for kind, errors in found.items()}


def worst(errors: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest of each; NaN is larger than any."""

    def rank(value: float) -> float:
        return math.inf if math.isnan(value) else value

    value, gradient = (max(column, key=rank) for column in zip(*errors, strict=True))
    return value, gradient


def inputs(method: Method, kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher of one kind of input."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if kind == "one" else EXAMPLES
    shape = (count, *method.shape)
    student, teacher = (3 * torch.randn(*shape, generator=generator) for _ in range(2))
    if kind == "1e4":
        return student * 1e4, teacher * 1e4
    if kind == "bf16":
        return student.bfloat16(), teacher.bfloat16()
    if kind == "absent":
        for side in (student, teacher):
            if method.on_logits:
                side[:, -1] = -math.inf
            else:
                side[0] = 0
    return student, teacher


def compare(method: Method, loss: Compare, kind: str, seed: int) -> tuple[float, float]:
    """How far value and gradient are from the formula; -1 stands for a loss that refuses."""
    student, teacher = inputs(method, kind, seed)
    exact, wanted = truth(method, student, teacher)
    student.requires_grad_()
    try:
        with warnings.catch_warnings(action="ignore"):
            value = loss(student, teacher)
    except (ValueError, RuntimeError):
        return -1.0, -1.0
    size = abs(exact) if abs(exact) > TINY else 1.0
    off = abs(float(value.detach()) - exact) / size
    if not value.requires_grad:
        return off, -1.0
    (gradient,) = torch.autograd.grad(value, student)
    steepest = float(wanted.abs().max())
    gap = (gradient.double() - wanted).abs().max()
    return off, float(gap) / (steepest if steepest > TINY else 1.0)


def truth(method: Method, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The formula's value and gradient; a class that is absent is cut off, and its gradient 0."""
    kept = slice(None)
    if method.on_logits:
        kept = slice(int((~student.isneginf()).any(0).sum()))
    s = student[:, kept].double().requires_grad_()
    value = method.formula(s, teacher[:, kept].double())
    (gradient,) = torch.autograd.grad(value, s)
    wanted = torch.zeros(student.shape, dtype=torch.float64)
    wanted[:, kept] = gradient
    return float(value.detach()), wanted


def goals(rows: Mapping[tuple[str, str], Errors]) -> Iterator[Goal]:
    """The bounds attar is held to: one for the worst of all methods on each kind of input."""
    ours = {name: errors for (name, library), errors in rows.items() if library == "attar"}
    for kind in INPUTS:
        slope = BRAIN if kind == "bf16" else GRADIENT
        for part, limit in ((0, VALUE), (1, slope)):
            name = max(ours, key=lambda n, k=kind, i=part: _shame(ours[n][k][i]))
            what = ("value", "gradient")[part]
            yield Goal(
                f"{kind}: attar's largest error of a {what} ({name})",
                _shame(ours[name][kind][part]),
                limit,
            )


def _shame(error: float) -> float:
    return math.inf if error < 0 or math.isnan(error) else error


def show(
    rows: Mapping[tuple[str, str], Errors], libraries: Mapping[str, Mapping[str, Peer]]
) -> str:
    lines = []
    for (name, library), errors in rows.items():
        peer = libraries.get(library, {}).get(name)
        called = peer.called if peer else f"`{METHODS[name].called}`"
        cells = [cell(*errors[kind]) for kind in INPUTS]
        lines.append([name, library, called, peer.conversion if peer else "", *cells])
    return table(["method", "library", "called", "conversion", *INPUTS], lines)


def cell(value: float, gradient: float) -> str:
    if value < 0:
        return "refused"
    return f"{value:.0e}, {'none' if gradient < 0 else f'{gradient:.0e}'}"


if __name__ == "__main__":
    sys.exit(main())
