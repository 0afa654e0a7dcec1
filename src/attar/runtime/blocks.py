"""The blocks of a network: what is sharded, recomputed or compiled one at a time."""

from __future__ import annotations

from torch import nn

_STACKS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The largest parts of *module* that repeat nothing: its residual blocks, encoder layers.

    A stack (``Sequential``, ``ModuleList``, ``ModuleDict``) is taken apart, and so is what holds
    a stack of compound parts; a sequence of plain layers is one block. Plain layers, and what has
    no parameters, are not blocks. No block holds another.

    >>> layer = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> len(blocks(nn.Sequential(nn.Flatten(), nn.Sequential(layer(), layer()), nn.Linear(2, 1))))
    2
    """
    found = [block for part in module.children() for block in _inside(part)]
    return list({id(block): block for block in found}.values())


def _inside(part: nn.Module) -> list[nn.Module]:
    if not _compound(part):
        return []
    deeper = [block for child in part.children() for block in _inside(child)]
    if isinstance(part, _STACKS):
        return deeper or ([part] if isinstance(part, nn.Sequential) else [])
    holds = any(
        isinstance(inner, _STACKS) and any(_compound(member) for member in inner.children())
        for inner in part.modules()
    )
    return deeper if holds else [part]


def _compound(part: nn.Module) -> bool:
    return any(True for _ in part.children()) and any(True for _ in part.parameters())
