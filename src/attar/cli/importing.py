"""`attar import`: pickled weights become safetensors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attar.models.importing import Imported

SHOWN = 8


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Weights: .pt, .pth, .bin, .ckpt or .pkl.")
    ],
    into: Annotated[
        Path,
        typer.Option(metavar="FOLDER_OR_FILE", help="A new .safetensors file, or a folder for it."),
    ],
) -> None:
    """Convert pickled weights to safetensors; no code in the file is run."""
    from attar.models.importing import convert

    for line in _told(convert(file, into)):
        print(line)


def _told(done: Imported) -> list[str]:
    """What was written, what was changed on the way, and what to type next."""
    size = done.path.stat().st_size / 1e6
    lines = [
        f"wrote      {done.path}: {done.tensors:,} tensors, {done.parameters:,} numbers, "
        f"{size:.2f} MB"
    ]
    if done.beside:
        lines.append(f"copied     {', '.join(done.beside)}")
    if done.nest:
        lines.append(f"taken from {_plain(done.nest)}")
    if done.prefix:
        lines.append(f"renamed    '{done.prefix}' was taken off the names")
    if done.tied:
        pairs = [f"{_plain(name)} is {_plain(other)}" for name, other in done.tied.items()]
        lines.append(f"tied       {_some(pairs, len(pairs))} (held once)")
    if done.left_out_count:
        kinds = [_plain(entry) for entry in done.left_out]
        lines.append(f"left out   {_some(kinds, done.left_out_count)}")
    return [*lines, f"next       {_next(done)}"]


def _next(done: Imported) -> str:
    if "config.json" in done.beside:
        folder = shlex.quote(str(done.path.parent))
        return f"attar distill --teacher {folder} --student resnet --data DATA"
    return (
        "attar check RECIPE "
        + shlex.quote(f"teacher={{model: FAMILY, load: {done.path}}}")
        + ", with the family whose names these are"
    )


def _some(entries: list[str], count: int) -> str:
    more = count - SHOWN
    return ", ".join(entries[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _plain(text: str) -> str:
    """*text* without what a terminal might obey."""
    return text if text.isprintable() else ascii(text)
