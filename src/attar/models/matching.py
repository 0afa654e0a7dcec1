"""Parts of a model by pattern."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from attar.models.transfer import head_of
from attar.runtime import UsageError, suggest


def matching(module: nn.Module, patterns: Iterable[str], told: str = "the model") -> set[str]:
    """Names of the tensors that *patterns* mean; of a tied tensor, its first name.

    A pattern is the path of a part or a parameter, with ``*`` for any letters; one that begins
    with ``!`` takes back what those before it meant. ``head`` is the last layer, whatever it is
    called.

    Errors: a pattern that means nothing (UsageError, which begins with *told*).

    >>> sorted(matching(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["*", "!1"]))
    ['0.bias', '0.weight']
    """
    first = first_names(module)
    chosen: set[str] = set()
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        hits = {own for name, own in first.items() if _matches(name, bare)}
        if not hits and bare == "head":
            hits = {first[name] for name in head_of(module)}
        if not hits:
            paths = [path for path, _ in module.named_modules() if path]
            raise UsageError(f"{told} has no '{bare}'; {suggest(bare, paths)}")
        chosen = chosen - hits if pattern.startswith("!") else chosen | hits
    return chosen


def first_names(module: nn.Module) -> dict[str, str]:
    """Each tensor's name, and the one it has in ``named_parameters``: a tied tensor has several."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(tensor), name)
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
    }


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
