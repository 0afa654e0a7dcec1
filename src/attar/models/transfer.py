"""Weights of one model as the start of another: by name, with a new head, to other input sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.runtime import UsageError

MOST_NAMED = 4


@dataclass(frozen=True)
class Transfer:
    """What a source can give a student.

    Attributes:
        tensors: the student's tensors by name, with the values they are to start from.
        fresh: why each other parameter of the student keeps its own start, by name.
    """

    tensors: dict[str, Tensor]
    fresh: dict[str, str]

    def told(self) -> str:
        """One line for people."""
        some = list(self.fresh)
        named = ", ".join(some[:MOST_NAMED])
        more = f" and {len(some) - MOST_NAMED} more" if len(some) > MOST_NAMED else ""
        return f"{len(self.tensors)} tensors taken" + (f", fresh: {named}{more}" if some else "")


def head_of(module: nn.Module) -> list[str]:
    """Names of the parameters of the last layer, in the order of registration.

    >>> head_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    ['2.weight', '2.bias']
    """
    last: list[str] = []
    for path, part in module.named_modules():
        own = [name for name, _ in part.named_parameters(recurse=False)]
        if own and not any(True for _ in part.children()):
            last = [f"{path}.{name}" if path else name for name in own]
    return last


def transferable(student: nn.Module, source: nn.Module, *, head: bool = False) -> Transfer:
    """What *source* can give *student*; changes nothing.

    Parameters and buffers are taken by name. One of another size is fitted where that keeps its
    meaning: the first layer of images with another number of channels (grey to colour: each
    channel a share; colour to grey: the sum), and positions of a grid of patches (bicubic, as in
    arXiv:2010.11929, section 3.2). The head starts anew, and so does what has no partner.

    Args:
        head: take the last layer as well, where the classes are the same.

    Errors: nothing fits, so it is another architecture (UsageError).
    """
    theirs = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    ours = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    trained = dict(student.named_parameters())
    skipped = set() if head else set(head_of(student))
    first = next((n for n, p in trained.items() if p.ndim == 4), None)
    tensors: dict[str, Tensor] = {}
    fresh: dict[str, str] = {}
    for name, own in ours.items():
        # How inputs are normalised belongs to the data of the one who reads them.
        if _normalises(student, name):
            continue
        value = None if name in skipped else _fitted(theirs.get(name), own, name == first)
        if value is not None:
            tensors[name] = value
        elif name in trained:
            fresh[name] = "the head" if name in skipped else _why(theirs.get(name), own)
    if not tensors.keys() & trained.keys():
        name, why = next(iter(fresh.items()))
        raise UsageError(
            f"nothing of the source fits the student: its '{name}' {why}; give a source of the "
            "same architecture"
        )
    return Transfer(tensors, fresh)


@torch.no_grad()
def transfer(student: nn.Module, source: nn.Module, *, head: bool = False) -> Transfer:
    """Start *student*, in place, from the weights of *source*; says what was taken.

    Args and errors are those of ``transferable``. With a source that was trained on other data
    this is transfer learning; ``attar.train(..., init=source)`` does it first.
    """
    found = transferable(student, source, head=head)
    state = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for name, value in found.tensors.items():
        state[name].copy_(value)
    return found


def _normalises(student: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last in ("mean", "std") and "ormalize" in type(student.get_submodule(path)).__name__


def _fitted(theirs: Tensor | None, own: Tensor, first: bool) -> Tensor | None:
    if theirs is None:
        return None
    theirs = theirs.detach()
    if theirs.shape == own.shape:
        return theirs
    if first and theirs.ndim == 4 and own.ndim == 4 and theirs.shape[2:] == own.shape[2:]:
        return _other_channels(theirs, own)
    grids = theirs.ndim == own.ndim == 3 and theirs.shape[0] == own.shape[0] == 1
    if grids and theirs.shape[2] == own.shape[2]:
        return _other_grid(theirs, own.shape[1])
    return None


def _other_channels(theirs: Tensor, own: Tensor) -> Tensor | None:
    """A kernel whose answer to a grey image is the same in one channel and in several."""
    if theirs.shape[0] != own.shape[0]:
        return None
    grey = theirs.sum(1, keepdim=True)
    return grey.expand(-1, own.shape[1], -1, -1) / own.shape[1]


def _other_grid(theirs: Tensor, length: int) -> Tensor | None:
    """Positions [1, 1 + side * side, width] for another side; the first is the class token's."""
    side, other = isqrt(theirs.shape[1] - 1), isqrt(length - 1)
    if side * side != theirs.shape[1] - 1 or other * other != length - 1 or not side * other:
        return None
    grid = theirs[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(other, other), mode="bicubic", antialias=True)
    return torch.cat([theirs[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _why(theirs: Tensor | None, own: Tensor) -> str:
    if theirs is None:
        return "has no partner there"
    return f"is {list(own.shape)} and {list(theirs.shape)} there"
