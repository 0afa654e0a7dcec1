"""A projector that ends in a part of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from attar.models.projectors._forms import check_signal
from attar.models.projectors._parts import channelwise
from attar.models.types import Size
from attar.runtime import UsageError, suggest

SIZES = ("in_channels", "in_features", "num_features", "normalized_shape")


def through(
    student: Tensor,
    teacher: Tensor,
    *,
    path: str | Sequence[str],
    model: nn.Module | None = None,
    width: Size | None = None,
) -> nn.Module:
    """The student's feature, read by the teacher's own later layers (CrossKD, arXiv:2306.11369).

    A trained linear map of the student's channels to those that the teacher's part reads, then
    the part itself, frozen: gradients pass through it, and nothing in it is trained. So the
    student's feature is compared by what the teacher makes of it: its prediction, say::

        student: feature:stage2
        teacher: output:logits
        projector: {name: through, path: [stage3, pool, head]}

    The part is in eval mode whatever mode the student is in, shares the teacher's weights (so it
    takes no memory), and is in no state dict. Weights of the map as in `linear`.

    Args:
        path: a module of the teacher, or several that are run one after the other.
        model: the teacher's module; a stage supplies it.
        width: channels that the part reads, where its first layer does not say.

    Errors: a teacher without a module (cached, served), an unknown path, a part that cannot be
    run on the student's feature or that does not give the teacher's shape (UsageError).
    """
    for side, signal in (("student", student), ("teacher", teacher)):
        check_signal("through", side, signal)
    if model is None:
        raise UsageError(
            "projector through: the teacher has no module to take a part of; give a live teacher, "
            "or model= in Python"
        )
    paths = (path,) if isinstance(path, str) else tuple(path)
    parts = [_part(model, name) for name in paths]
    module = Through(channelwise(student, student.ndim, width or _reads(parts, paths)), parts)
    _try(module, student, teacher, paths)
    return module


class Through(nn.Module):
    """A trained adapter, then frozen parts that are kept out of parameters and state dict."""

    def __init__(self, adapter: nn.Module, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapter = adapter
        # In a list of its own: neither trained nor saved, and no mode reaches it.
        self._frozen = [_frozen(part) for part in parts]

    def forward(self, signal: Tensor) -> Tensor:
        signal = self.adapter(signal)
        for part in self._frozen:
            own = next(part.parameters(), signal).dtype
            signal = part(signal.to(own))
            if isinstance(signal, tuple | list):  # layers of transformers give their state first
                signal = signal[0]
        return signal

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for part in self._frozen:  # to another device
            part._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        names = ", ".join(type(part).__name__ for part in self._frozen)
        return f"{self.adapter!r} > frozen {names}"


def _frozen(part: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors are the part's own, without gradient."""
    own: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in part.parameters()
    }
    own |= {id(b): b.detach() for b in part.buffers()}
    return copy.deepcopy(part, own).eval()


def _part(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise UsageError(
            f"projector through: the teacher has no module '{path}'; {suggest(path, names)}"
        ) from None


def _reads(parts: Sequence[nn.Module], paths: Sequence[str]) -> int:
    """How many channels the first layer with a size reads."""
    for module in (inner for part in parts for inner in part.modules()):
        for name in SIZES:
            size = getattr(module, name, None)
            if size is not None:
                return int(size[-1] if isinstance(size, tuple) else size)
    raise UsageError(
        f"projector through: {', '.join(paths)} does not say how many channels it reads; pass width"
    )


@torch.no_grad()
def _try(module: Through, student: Tensor, teacher: Tensor, paths: Sequence[str]) -> None:
    said = (
        f"projector through: {', '.join(paths)} after a map of the student's {list(student.shape)}"
    )
    try:
        found = module(student)
    except (RuntimeError, ValueError, TypeError) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"{said} cannot be run ({first}); choose the part that reads this kind of signal"
        ) from error
    if not isinstance(found, Tensor) or found.shape != teacher.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"{said} gives {shape} and not the teacher's {list(teacher.shape)}; choose a path "
            "that ends where the teacher's signal is, and a feature of the size it reads"
        )
