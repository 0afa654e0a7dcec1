"""Proposes which features of a student to match to which of a teacher."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attar.runtime import PreflightError, UsageError, eval_mode, to_device
from attar.runtime.blocks import blocks
from attar.signals.tap import Tap
from attar.tasks import Task

MOST = 4  # pairs, where nobody says how many
PROBE = 3  # rows that find the shapes
LEAST = 4  # rows below which the unbiased alignment is not defined
CHUNK = 32  # rows in one pass, so that a large net's maps fit into memory
GRID = 4  # larger maps are averaged to 4x4, longer sequences to 16 runs, before they are compared

# Depth decides. One halving of the map weighs a quarter of the depth, so that nets of other
# numbers of stages meet at equal resolutions; pairs spread evenly over the student; alignment, in
# 0..1 and on an untrained student nearly the same everywhere, is left to break ties.
RESOLUTION = 0.25
SPREAD = 0.5
ALIGNMENT = 0.1


@dataclass(frozen=True)
class Pair:
    """A proposal: match this feature of the student to that of the teacher.

    Attributes:
        student: address, ``feature:PATH``.
        teacher: address, ``feature:PATH``.
        student_shape: of one example: [C, H, W], [T, C] or [C].
        teacher_shape: of one example.
        alignment: linear CKA of the two on the batch, 0 to 1, by the unbiased estimator.
        projector: name in ``attar.models.projectors`` of what brings the student's to the
            teacher's shape; None where none is needed.
        teacher_projector: the same for what averages the teacher's, where that is larger.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    alignment: float
    projector: str | None
    teacher_projector: str | None = None


class Candidate(NamedTuple):
    """A feature that could be matched; *depth* is the share of the blocks that are done."""

    address: str
    shape: tuple[int, ...]
    depth: float


class Heard(NamedTuple):
    """What a module returned in the trace, in the order of returning."""

    path: str
    module: nn.Module
    tensor: Tensor
    key: str


def pairs(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    batch: dict[str, Tensor],
    *,
    count: int | None = None,
) -> list[Pair]:
    """Propose pairs of features by depth, resolution and alignment, from first to last.

    Candidates are what the repeated blocks of a net return (residual blocks, encoder layers) and
    the stages around them; where resolution changes, the last of each resolution. A net without
    blocks offers what its layers with weights read. Of all pairs in the order of both nets those
    are chosen that agree best in relative depth, then in resolution (halvings between the two,
    where both nets have more than one), and that spread evenly; CKA on the
    batch breaks ties, as on an untrained student it says little.

    Both nets run in eval mode, where they are; nothing of them changes and no hook stays.

    Args:
        task: runs the nets.
        batch: 64 to 256 rows make a steady CKA; at least 4.
        count: how many pairs; one a resolution, at most 4, and 4 where there is but one.

    Errors: no candidates or fewer than *count*, a batch that is too small (UsageError); inputs
    that a net cannot read (DataError).

    CKA: Kornblith et al., ICML 2019 (arXiv:1905.00414), with the unbiased HSIC of Song et al.,
    JMLR 2012, as in Nguyen et al., ICLR 2021 (arXiv:2010.15327): the plain estimate is near 1 for
    any two wide features of few examples.

    Example:
        >>> import attar
        >>> train, _ = attar.data.digits()
        >>> task = attar.tasks.ImageClassification(classes=10)
        >>> big = attar.models.build("resnet", data=train, depth=14)
        >>> small = attar.models.build("mobilenet", data=train)
        >>> found = pairs(small, big, task, train.rows(torch.arange(64)))
        >>> [(pair.student, pair.teacher) for pair in found][-1]
        ('feature:stage3', 'feature:stage3')
    """
    if len(batch["inputs"]) < LEAST:
        raise UsageError(
            f"pairs are proposed on a batch of {LEAST} rows or more, not {len(batch['inputs'])}; "
            "give 64 to 256"
        )
    mine = candidates(student, task, batch, "student")
    theirs = candidates(teacher, task, batch, "teacher")
    mine, theirs, count = _counted(mine, theirs, count)
    kernels = [
        _kernels(model, task, batch, found, whose)
        for model, found, whose in ((student, mine, "student"), (teacher, theirs, "teacher"))
    ]
    aligned = (kernels[0] @ kernels[1].T).clamp(0, 1)
    return [
        _pair(mine[i], theirs[j], float(aligned[i, j]))
        for i, j in matched(mine, theirs, aligned.tolist(), count)
    ]


def candidates(
    model: nn.Module, task: Task, batch: dict[str, Tensor], whose: str = "model"
) -> list[Candidate]:
    """The features of a net that could be matched, in the order in which it makes them.

    Left out are modules that are called more than once, whose output is overwritten in place, or
    that give anything but one tensor of an entry an example (or a tuple that begins with one).
    """
    heard = _trace(model, task, _cut(batch, 0, PROBE), whose)
    for wanted in ((3, 4), (2,)):  # vectors only where nothing has positions
        found = _of_blocks(model, heard, wanted) or _of_layers(heard, wanted)
        if found:
            return found
    raise PreflightError(
        f"the {whose} offers no feature to pair: no layer with weights inside it is called once "
        "and gives [N, C, H, W], [N, T, C] or [N, C]; name the signals with student: and teacher:"
    )


def _trace(model: nn.Module, task: Task, rows: dict[str, Tensor], whose: str) -> list[Heard]:
    """Every usable output of one pass, but for the net's own."""
    calls: Counter[str] = Counter()
    heard: list[tuple[Heard, int]] = []

    def listen(path: str, module: nn.Module) -> RemovableHandle:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls[path] += 1
            tensor, key = (
                (output[0], "[0]") if isinstance(output, tuple) and output else (output, "")
            )
            if isinstance(tensor, Tensor):
                heard.append((Heard(path, module, tensor, key), tensor._version))

        return module.register_forward_hook(hook)

    rows = to_device(rows, _place(model))
    with torch.no_grad(), eval_mode(model):
        task.try_forward(model, rows, whose)  # which may run the model more than once
    handles = [listen(path, module) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad(), eval_mode(model):
            out = task.forward(model, rows)
            final = task.output(out, task.outputs[0])
    finally:
        for handle in handles:
            handle.remove()
    return [
        one
        for one, version in heard
        if calls[one.path] == 1
        and one.tensor._version == version
        and one.tensor is not final
        and one.tensor.is_floating_point()
        and one.tensor.ndim in (2, 3, 4)
        and len(one.tensor) == len(rows["inputs"])
    ]


def _of_blocks(model: nn.Module, heard: Sequence[Heard], wanted: Sequence[int]) -> list[Candidate]:
    """What blocks return, and the stages around them; nothing where no two blocks are heard."""
    heard = [h for h in heard if h.tensor.ndim in wanted]
    paths = _repeated(heard)
    if len(paths) < 2:
        plain = {id(block) for block in blocks(model)}
        paths = {h.path for h in heard if id(h.module) in plain}
    if len(paths) < 2:
        return []
    chosen: dict[int, tuple[Heard, float]] = {}
    done = 0
    for one in heard:
        done += one.path in paths
        inside = sum(path.startswith(f"{one.path}.") for path in paths)
        if one.path in paths or 0 < inside < len(paths):
            # A stage that returns its last block's tensor takes its place: it is heard later.
            chosen[id(one.tensor)] = one, done / len(paths)
    return [_candidate(one, depth) for one, depth in chosen.values()]


def _repeated(heard: Sequence[Heard]) -> set[str]:
    """The outermost compound modules of a class that stands more than once among them.

    A sequence is no class of block: it is a stage, a stem or a neck. Nor is what other blocks are
    made of, such as a convolution with its normalisation that is also the stem.
    """
    compound = [
        h
        for h in heard
        if not isinstance(h.module, nn.Sequential)
        and any(True for _ in h.module.children())
        and any(True for _ in h.module.parameters())
    ]
    kinds = Counter(type(h.module) for h in compound)
    several = {h.path: h for h in compound if kinds[type(h.module)] > 1}
    outer, material = [], set()
    for path, one in several.items():
        around = {type(several[other].module) for other in _around(path) if other in several}
        if not around:
            outer.append(one)
        elif type(one.module) not in around:
            material.add(type(one.module))
    outer = [h for h in outer if type(h.module) not in material]
    kinds = Counter(type(h.module) for h in outer)
    return {h.path for h in outer if kinds[type(h.module)] > 1}


def _around(path: str) -> list[str]:
    """The paths of the modules that hold this one."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _of_layers(heard: Sequence[Heard], wanted: Sequence[int]) -> list[Candidate]:
    """Of a net without blocks, what each layer with weights reads from the layers before it."""
    leaves = [
        h for h in heard if h.tensor.ndim in wanted and not any(True for _ in h.module.children())
    ]
    weighs = [any(p.ndim > 1 for p in h.module.parameters()) for h in leaves]
    last = len(leaves) - 1
    ends = [
        one
        for index, one in enumerate(leaves)
        if any(weighs[: index + 1]) and (index == last or weighs[index + 1])
    ]
    return [_candidate(one, (index + 1) / len(ends)) for index, one in enumerate(ends)]


def _candidate(one: Heard, depth: float) -> Candidate:
    return Candidate(f"feature:{one.path}{one.key}", tuple(one.tensor.shape[1:]), depth)


def _counted(
    mine: list[Candidate], theirs: list[Candidate], count: int | None
) -> tuple[list[Candidate], list[Candidate], int]:
    """The candidates among which *count* pairs are sought."""
    own, other = _ends(mine), _ends(theirs)
    fewest = min(len(own), len(other))
    if count is None:
        return own, other, min(MOST, fewest)
    if not 1 <= count <= min(len(mine), len(theirs)):
        raise UsageError(
            f"{count} pairs are not to be had: the student has {len(mine)} features to pair and "
            f"the teacher {len(theirs)}; choose 1 to {min(len(mine), len(theirs))}"
        )
    return (own, other, count) if count <= fewest else (mine, theirs, count)


def _ends(found: list[Candidate]) -> list[Candidate]:
    """The last candidate of each resolution; all where there is one resolution."""
    sizes = [_positions(one.shape) for one in found]
    if len(set(sizes)) == 1:
        return found
    following = [*sizes[1:], None]
    return [one for one, size, then in zip(found, sizes, following, strict=True) if size != then]


def _positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, W] of a map, [T] of tokens, [] of a vector."""
    return shape[1:] if len(shape) == 3 else shape[:-1]


def _octaves(mine: Sequence[Candidate], theirs: Sequence[Candidate]) -> list[list[float]]:
    """Between each two candidates, how often the larger is halved to be the smaller.

    Zero where either net has one resolution, which says nothing of depth.
    """
    fine, other = (
        [math.log2(math.prod(_positions(one.shape))) / 2 for one in side] for side in (mine, theirs)
    )
    tells = len(set(fine)) > 1 and len(set(other)) > 1
    return [[abs(a - b) * tells for b in other] for a in fine]


def matched(
    mine: Sequence[Candidate],
    theirs: Sequence[Candidate],
    alignment: Sequence[Sequence[float]],
    count: int,
) -> list[tuple[int, int]]:
    """The *count* pairs, in the order of both sides, of the least disagreement.

    A dynamic programme: the best k pairs that end in (i, j) are the best k - 1 that end before
    both, and (i, j).
    """
    octaves = _octaves(mine, theirs)
    lost = -math.inf
    before = [[(0.0, ())] * (len(theirs) + 1) for _ in range(len(mine) + 1)]
    for k in range(1, count + 1):
        best: list[list[Any]] = [[(lost, ())] * (len(theirs) + 1) for _ in range(len(mine) + 1)]
        for i, one in enumerate(mine):
            spread = SPREAD * abs(one.depth - k / count)
            for j, two in enumerate(theirs):
                agrees = (
                    ALIGNMENT * alignment[i][j]
                    - abs(one.depth - two.depth)
                    - RESOLUTION * octaves[i][j]
                    - spread
                )
                score, path = before[i][j]
                found = score + agrees, (*path, (i, j))
                best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], found, key=_score)
        before = best
    return list(before[-1][-1][1])


def _score(found: tuple[float, Any]) -> float:
    return found[0]


def _pair(mine: Candidate, theirs: Candidate, alignment: float) -> Pair:
    own, other = joining(mine.shape, theirs.shape)
    return Pair(mine.address, theirs.address, mine.shape, theirs.shape, alignment, own, other)


def joining(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[str, str | None]:
    """The projectors of both sides that bring two shapes of one example together."""
    if len(theirs) == 1:
        return "linear", None
    if len(mine) == 1:
        return "linear", "pool"
    if len(mine) == len(theirs) == 3:
        larger = any(a < b for a, b in zip(mine[1:], theirs[1:], strict=True))
        return "linear", "pool" if larger else None
    alike = len(mine) == len(theirs) and mine[0] == theirs[0]
    return ("linear" if alike else "tokens"), None


@torch.no_grad()
def _kernels(
    model: nn.Module,
    task: Task,
    batch: dict[str, Tensor],
    found: Sequence[Candidate],
    whose: str,
) -> Tensor:
    """A row for each candidate: its centred table of products, of norm 1; their product is CKA."""
    addresses = [one.address for one in found]
    parts: list[list[Tensor]] = [[] for _ in found]
    place, total = _place(model), len(batch["inputs"])
    with eval_mode(model), Tap(model, addresses, whose) as tap:
        for start in range(0, total, CHUNK):
            rows = to_device(_cut(batch, start, start + CHUNK, total), place)
            _, heard = tap(task.forward, model, rows)
            for part, address in zip(parts, addresses, strict=True):
                part.append(_condensed(heard[address]).cpu())
    return torch.stack([_kernel(torch.cat(part)) for part in parts])


def _condensed(signal: Tensor) -> Tensor:
    """A signal as float rows of at most 16 positions."""
    signal = signal.float()
    if signal.ndim == 4:
        height, width = signal.shape[2:]
        signal = F.adaptive_avg_pool2d(signal, (min(height, GRID), min(width, GRID)))
    elif signal.ndim == 3 and signal.shape[1] > GRID**2:
        signal = F.adaptive_avg_pool1d(signal.transpose(1, 2), GRID**2)
    return signal.flatten(1)


def _kernel(rows: Tensor) -> Tensor:
    """The U-centred products of all pairs of rows, flat and of norm 1; zeros of constant rows."""
    rows = rows.double()
    rows = rows - rows.mean(0)
    count = len(rows)
    table = (rows @ rows.T).fill_diagonal_(0)
    sums = table.sum(1) / (count - 2)
    table = table - sums - sums[:, None] + sums.sum() / (count - 1)
    flat = table.fill_diagonal_(0).flatten()
    norm = torch.linalg.vector_norm(flat)
    return flat / norm.masked_fill(norm == 0, math.inf)


def _cut(
    batch: dict[str, Tensor], start: int, end: int, total: int | None = None
) -> dict[str, Tensor]:
    """Some rows of a batch; what has no entry a row stays whole."""
    total = total or len(batch["inputs"])
    return {
        name: value[start:end] if value.ndim and len(value) == total else value
        for name, value in batch.items()
    }


def _place(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
