"""A module's training modes, kept part by part: a net may hold parts in eval on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def modes_of(module: nn.Module) -> Modes:
    """The mode of every part, to be given back by ``restore_modes``."""
    return [(part, part.training) for part in module.modules()]


def restore_modes(modes: Modes) -> None:
    """Put every part into the mode it was found in."""
    for part, training in modes:
        part.training = training


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, every part's own mode after, errors included."""
    modes = modes_of(module)
    module.eval()
    try:
        yield
    finally:
        restore_modes(modes)
