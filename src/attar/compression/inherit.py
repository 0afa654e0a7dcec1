"""Weights of a large model as those of a smaller one: which layers and which indices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from attar.compression.axes import GATES, Axis, axes_of, transposed
from attar.compression.importance import ranked_layers, ranked_members
from attar.runtime import UsageError, suggest

Choice = Literal["spaced", "first", "importance"]
Layers = Literal["spaced", "first", "published", "importance"] | Sequence[int]
Share = Annotated[float, Gt(0), Le(1)]
Count = Annotated[int, Ge(1)]

# Which layers of 6, 12 or 16 start a student of fewer: Shleifer & Rush 2020 (arXiv:2010.13002); of
# 12 to 6 also DistilBERT's (arXiv:1910.01108).
PUBLISHED: dict[int, dict[int, tuple[int, ...]]] = {
    6: {1: (0,), 2: (0, 5), 3: (0, 2, 5), 4: (0, 1, 3, 5)},
    12: {
        1: (0,),
        2: (0, 6),
        3: (0, 6, 11),
        4: (0, 4, 8, 11),
        6: (0, 2, 4, 7, 9, 11),
        9: (0, 1, 2, 4, 5, 7, 9, 10, 11),
    },
    16: {
        1: (0,),
        2: (0, 15),
        3: (0, 8, 15),
        4: (0, 5, 10, 15),
        6: (0, 3, 6, 9, 12, 15),
        8: (0, 2, 4, 6, 8, 10, 12, 15),
        9: (0, 1, 3, 5, 7, 9, 11, 13, 15),
        12: (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15),
    },
}


@dataclass(frozen=True)
class Row:
    """Where one tensor of the smaller model comes from.

    Attributes:
        source: the tensor's name in the large one; None where it keeps its own start.
        axes: what each dimension counts where it becomes smaller.
        why: of a tensor without a source.
        matrix: it is the weight of a linear or convolutional layer.
    """

    name: str
    source: str | None
    axes: tuple[Axis | None, ...] = ()
    why: str = ""
    matrix: bool = False


@dataclass(frozen=True)
class Inheritance:
    """What a model gives a smaller one of its kind; a plan, which changes nothing.

    Attributes:
        rows: where each tensor of the smaller one comes from.
        layers: by the path of a list of layers, which of the large model's are kept.
        kept: by space, which members are kept.
        scale: of the weights of linear and convolutional layers.
        blend: the share of what is inherited; the rest is the smaller model's own start.
    """

    rows: tuple[Row, ...]
    layers: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, tuple[int, ...]]
    scale: float = 1.0
    blend: float = 1.0

    @property
    def fresh(self) -> dict[str, str]:
        """Why each tensor without a source has none."""
        return {row.name: row.why for row in self.rows if row.source is None}

    def describe(self) -> dict[str, Any]:
        """JSON values: what is kept, and what nothing covers."""
        return {
            "layers": {path: list(chosen) for path, chosen in self.layers.items()},
            "kept": {space: list(chosen) for space, chosen in self.kept.items()},
            "sources": {row.name: row.source for row in self.rows if row.source is not None},
            "fresh": self.fresh,
            "scale": self.scale,
            "blend": self.blend,
        }

    def told(self) -> str:
        """A few lines for people."""
        lines = [
            f"{path}: layers {', '.join(map(str, chosen))}" for path, chosen in self.layers.items()
        ]
        plain = {space: chosen for space, chosen in self.kept.items() if " of " not in space}
        lines += [f"width {space}" for space in plain]
        inner = len(self.kept) - len(plain)
        lines += [f"{inner} widths inside of layers"] * bool(inner)
        fresh = self.fresh
        lines.append(f"{len(self.rows) - len(fresh)} of {len(self.rows)} tensors inherited")
        lines += [f"fresh: {name} ({why})" for name, why in list(fresh.items())[:8]]
        return "\n".join(lines)

    @torch.no_grad()
    def apply(self, student: nn.Module, teacher: nn.Module) -> nn.Module:
        """Put the teacher's weights into *student*, in place, and return it."""
        theirs, ours = _tensors(teacher), _tensors(student)
        for row in self.rows:
            if row.source is None:
                continue
            value = theirs[row.source].detach()
            for dim, axis in enumerate(row.axes):
                if axis is not None:
                    value = value.index_select(dim, self._index(axis).to(value.device))
            own = ours[row.name]
            if row.matrix and self.scale != 1:
                value = value * self.scale
            if self.blend != 1 and own.is_floating_point():
                value = torch.lerp(own, value.to(own), self.blend)
            own.copy_(value)
        return student

    def _index(self, axis: Axis) -> Tensor:
        """The entries of a dimension that are kept."""
        members = torch.tensor(self.kept[axis.space])
        inside = _inside(axis.unit)
        one = (members[:, None] * axis.unit[0] + inside).flatten()
        starts = torch.arange(axis.blocks) * (axis.size[0] // axis.blocks)
        return (starts[:, None] + one).flatten()


def spaced(of: int, count: int) -> tuple[int, ...]:
    """*count* of *of* indices, as evenly as whole numbers allow (arXiv:2311.18823).

    >>> spaced(8, 4), spaced(6, 4)
    ((0, 2, 4, 6), (0, 2, 3, 5))
    """
    if of % count == 0:
        return tuple(range(0, of, of // count))
    return _between(of, count)


def _between(of: int, count: int) -> tuple[int, ...]:
    """Evenly from the first to the last."""
    if count == 1:
        return (0,)
    return tuple(round(i * (of - 1) / (count - 1)) for i in range(count))


def _inside(unit: tuple[int, int]) -> Tensor:
    """Which entries of a head are kept: pairs that rotate together stay together."""
    of, count = unit
    if of == count:
        return torch.arange(of)
    # Rotary positions turn entry i with entry i + size / 2, by an angle that is a function of
    # i / size: every n-th pair of the wider head turns as that of the narrower one.
    if of % count or count % 2:
        raise UsageError(
            f"a head of {of} cannot become one of {count}: only a whole part of it, of even size, "
            "keeps its positions"
        )
    half = torch.arange(count // 2) * (of // count)
    return torch.cat([half, half + of // 2])


def plan_inheritance(
    student: nn.Module,
    teacher: nn.Module,
    *,
    layers: Layers | Mapping[str, Layers] = "spaced",
    select: Choice = "spaced",
    data: Any = None,
    task: Any = None,
    rows: Count = 256,
    scale: float = 1.0,
    blend: Share = 1.0,
) -> Inheritance:
    """What *teacher* can give *student*, a model of the same kind that has less of everything.

    Each tensor of the student is paired by name with one of the teacher, of the layer that its own
    layer stands for. Dimensions that are smaller keep some of the teacher's indices: the same ones
    wherever the same thing is counted, so that what is kept still fits together. Heads are kept
    whole, with the keys and values that they read; batch statistics go with their channels.

    Args:
        student: has the same names, fewer layers or narrower ones.
        layers: which layers are kept: ``spaced`` evenly from the first to the last, the ``first``
            ones, as ``published`` for 6, 12 and 16 layers (Shleifer & Rush 2020), by
            ``importance``, their numbers, or one of these for each path of a list of layers.
        select: which channels, heads and inner features are kept: ``spaced`` evenly
            (arXiv:2311.18823), the ``first``, or by ``importance``.
        data, task, rows: examples for importance: the norm over examples of the mean activation
            of each, and for layers how far each turns what goes through it (arXiv:2407.14679).
        scale: of inherited weights of linear and convolutional layers; nothing else.
        blend: the share of what is inherited in the weights; the rest is the student's own.

    Errors: nothing fits; layers that there are not; heads of which no whole part can be kept; a
    tensor that holds several things in an order that is not known (UsageError).
    """
    if "importance" in (select, *_choices(layers)) and (data is None or task is None):
        raise UsageError("importance is measured on examples: give data= and task=")
    theirs, ours = _tensors(teacher), _tensors(student)
    stacks = _stacks(student, teacher)
    examples = (data, task, rows)
    chosen = {
        path: _chosen_layers(path, sizes, layers, teacher, examples)
        for path, sizes in stacks.items()
    }
    if isinstance(layers, Mapping) and (unknown := layers.keys() - stacks.keys()):
        raise UsageError(
            f"layers: there is no list of layers that becomes shorter at '{min(unknown)}'; "
            f"{suggest(min(unknown), stacks)}"
        )
    paired = tuple(
        _row(name, own, theirs, (teacher, student), chosen) for name, own in ours.items()
    )
    paired = _with_gates(paired)
    if not any(row.source is not None and row.matrix for row in paired):
        raise UsageError(
            "nothing of the teacher fits the student: no layer has the same name and at least the "
            "same size; give a student of the same architecture"
        )
    spaces = {axis.space: axis for row in paired for axis in row.axes if axis is not None}
    for axis in spaces.values():
        _inside(axis.unit)  # refuses here what cannot be done
    scores = ranked_members(teacher, paired, *examples) if spaces and select == "importance" else {}
    unread = [space for space in spaces if space.replace("groups", "heads", 1) not in scores]
    if select == "importance" and unread:
        raise UsageError(
            f"importance of '{unread[0]}' is not known: no linear or convolutional layer that "
            "reads it was run on the examples; choose select: spaced"
        )
    kept = _kept(spaces, select, scores)
    return Inheritance(paired, chosen, kept, scale, blend)


def transfer(student: nn.Module, teacher: nn.Module, **options: Any) -> nn.Module:
    """A copy of *student* that starts from the weights of a larger model of its kind.

    `plan_inheritance` says what is taken, with the same arguments; `attar.shrink` makes the student
    as well, and a stage's ``init`` starts from a model of the same size.
    """
    return plan_inheritance(student, teacher, **options).apply(copy.deepcopy(student), teacher)


def _choices(layers: Any) -> list[Any]:
    several = layers.values() if isinstance(layers, Mapping) else [layers]
    return [each for each in several if isinstance(each, str)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones under their first."""
    kept = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _stacks(student: nn.Module, teacher: nn.Module) -> dict[str, tuple[int, int]]:
    """Lists of layers that have fewer in the student: how many there are in each model."""
    theirs = dict(teacher.named_modules())
    found = {}
    for path, part in student.named_modules():
        other = theirs.get(path)
        if isinstance(part, nn.ModuleList | nn.Sequential) and isinstance(
            other, nn.ModuleList | nn.Sequential
        ):
            numbered = all(name.isdigit() for name, _ in other.named_children())
            if numbered and 0 < len(part) < len(other):
                found[path] = len(other), len(part)
    return found


def _chosen_layers(
    path: str, sizes: tuple[int, int], how: Any, teacher: nn.Module, examples: tuple[Any, ...]
) -> tuple[int, ...]:
    of, count = sizes
    if isinstance(how, Mapping):
        how = how.get(path, "spaced")
    if how == "spaced":
        return _between(of, count)
    if how == "first":
        return tuple(range(count))
    if how == "importance":
        return ranked_layers(teacher, path, count, *examples)
    if how == "published":
        if count not in PUBLISHED.get(of, {}):
            raise UsageError(
                f"{path}: no table of {count} of {of} layers was published; choose spaced"
            )
        return PUBLISHED[of][count]
    if isinstance(how, str):
        known = ("spaced", "first", "published", "importance")
        raise UsageError(f"layers: there is no '{how:.80}'; {suggest(how, known)}")
    numbers = tuple(how)
    if len(numbers) != count or not all(isinstance(n, int) and 0 <= n < of for n in numbers):
        raise UsageError(
            f"{path}: layers must be {count} numbers from 0 to {of - 1}, not {list(numbers)}"
        )
    return numbers


def _row(
    name: str,
    own: Tensor,
    theirs: Mapping[str, Tensor],
    models: tuple[nn.Module, nn.Module],
    layers: Mapping[str, tuple[int, ...]],
) -> Row:
    source = _partner(name, layers)
    if source not in theirs:
        source = name  # what one layer alone has, such as T5's table of distances
    path = name.rpartition(".")[0]
    matrix = own.ndim > 1 and _multiplies(models[1].get_submodule(path))
    if source not in theirs:
        return Row(name, None, why="has no partner there", matrix=matrix)
    shapes = tuple(theirs[source].shape), tuple(own.shape)
    if len(shapes[0]) != len(shapes[1]) or any(
        of < count for of, count in zip(*shapes, strict=True)
    ):
        why = f"is {list(shapes[1])}, and only {list(shapes[0])} there"
        return Row(name, None, why=why, matrix=matrix)
    if matrix and own.ndim > 2 and shapes[0][2:] != shapes[1][2:]:
        why = f"has another kernel: {list(shapes[1][2:])}, and {list(shapes[0][2:])} there"
        return Row(name, None, why=why, matrix=matrix)
    axes = axes_of(name, shapes, models, (source.rpartition(".")[0], path))
    return Row(name, source, axes, matrix=matrix)


def _partner(name: str, layers: Mapping[str, tuple[int, ...]]) -> str:
    """The name with the number of each layer replaced by that of the one it stands for."""
    for path, chosen in layers.items():
        start = f"{path}." if path else ""
        if name.startswith(start):
            number, _, rest = name[len(start) :].partition(".")
            if number.isdigit():
                name = f"{start}{chosen[int(number)]}.{rest}"
    return name


def _multiplies(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | nn.modules.conv._ConvNd) or transposed(part)


def _with_gates(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """What reads both directions of an LSTM has the channels of each, one behind the other."""
    every = [axis for row in rows for axis in row.axes if axis is not None]
    both: dict[tuple[int, int], Axis] = {}
    for axis in every:
        if axis.blocks == GATES:
            size = 2 * axis.size[0] // GATES, 2 * axis.size[1] // GATES
            both[size] = Axis(axis.space, size, blocks=2)
    return tuple(
        replace(row, axes=tuple(_doubled(axis, both) for axis in row.axes)) for row in rows
    )


def _doubled(axis: Axis | None, both: Mapping[tuple[int, int], Axis]) -> Axis | None:
    plain = axis is not None and axis.blocks == 1 and axis.unit == (1, 1)
    return both.get(axis.size, axis) if axis is not None and plain else axis


def _kept(
    spaces: Mapping[str, Axis], select: Choice, scores: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """The members of each space that are kept; heads stay with the keys and values they read."""
    kept: dict[str, tuple[int, ...]] = {}
    for space, axis in spaces.items():
        kind, _, where = space.partition(" of ")
        of, count = axis.members
        score = scores.get(f"heads of {where}" if kind == "groups" else space)
        if kind == "groups":
            if f"heads of {where}" not in spaces:
                raise UsageError(
                    f"{where}: {count} sets of keys and values in the place of {of} for as many "
                    "heads; take heads away with them"
                )
            score = None if score is None else score.reshape(of, -1).sum(1)
        if axis.groups is not None:
            kept[space] = _heads(axis, select, score)
        else:
            kept[space] = _members(of, count, select, score)
    return kept


def _heads(axis: Axis, select: Choice, score: Tensor | None) -> tuple[int, ...]:
    """Which heads are kept: first which keys and values, then of their heads an equal number."""
    assert axis.groups is not None
    (heads, count), (groups, left) = axis.members, axis.groups
    each, some = heads // groups, count // left
    if some > each:
        raise UsageError(
            f"{axis.space}: {some} heads for each set of keys and values, where there are {each}"
        )
    table = None if score is None else score.reshape(groups, each)
    chosen = _members(groups, left, select, None if table is None else table.sum(1))
    return tuple(
        group * each + head
        for group in chosen
        for head in _members(each, some, select, None if table is None else table[group])
    )


def _members(of: int, count: int, select: Choice, score: Tensor | None) -> tuple[int, ...]:
    if select == "first" or of == count:
        return tuple(range(count))
    if select == "importance" and score is not None:
        return tuple(sorted(score.topk(count).indices.tolist()))
    return spaced(of, count)
