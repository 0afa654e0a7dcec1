"""`attar cache`: ask a recipe's teacher once, and look at what was kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

MAKE = "make"


class _Group(TyperGroup):
    """`attar cache RECIPE` is `attar cache make RECIPE`: what is no command is a recipe."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [MAKE, *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="cache",
    cls=_Group,
    no_args_is_help=True,
    help="Ask a teacher once, and keep what it says: attar cache RECIPE.",
)

CacheFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A teacher's cache.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command(MAKE)
def make(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="Overrides, such as teacher.load=PATH."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where to; runs/cache/FINGERPRINT by default."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows asked about at a time.")] = 256,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE_OR_PACKAGE", help="As in attar run. It is run."),
    ] = None,
) -> None:
    """Ask the recipe's teacher about every training row; a run of the recipe finds the answers."""
    from attar.recipes import cache_recipe

    loaded = _loaded(recipe, overrides, plugin)
    for folder in cache_recipe(loaded, into=into, batch_size=batch_size):
        print(_lines(folder))


@app.command()
def inspect(folder: CacheFolder, as_json: Json = False) -> None:
    """Rows, bytes a row and who was asked what."""
    from attar.teachers import inspect_cache

    if as_json:
        print(json.dumps(inspect_cache(folder), indent=2))
    else:
        print(_lines(folder))


@app.command()
def verify(
    folder: CacheFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="Overrides of the recipe."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="Ask its teacher again about a sample of the rows."),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE_OR_PACKAGE", help="As in attar run. It is run."),
    ] = None,
) -> None:
    """Read all again and compare it with its hashes; with a recipe, ask a sample again."""
    from attar.recipes import ask_again
    from attar.teachers import verify_cache

    print(f"hashes     {verify_cache(folder):,} rows agree with what was written")
    if recipe is not None:
        told = ask_again(folder, _loaded(recipe, overrides, plugin))
        print(
            f"asked      {told.rows} rows again: at most {told.difference:.2g} away, and "
            f"{told.allowed:.2g} is rounding"
        )


@app.command()
def join(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="A folder, new or a cache.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Caches of one teacher.")],
) -> None:
    """Bring together what different machines asked of the same teacher."""
    from attar.teachers import join as join_caches

    join_caches(into, parts)
    print(_lines(into))


def _loaded(recipe: Path, overrides: list[str] | None, plugins: list[str] | None) -> Any:
    from attar.recipes import load_recipe

    return load_recipe(recipe, overrides=overrides or (), plugins=plugins or ())


def _lines(folder: Path) -> str:
    from attar.teachers import inspect_cache

    told = inspect_cache(folder)
    missing = told["slots"] - told["filled"]
    lines = [
        f"cache      {folder}",
        f"rows       {told['rows']:,}"
        + (f" in {told['views']} views" if told["views"] > 1 else "")
        + (f"; {missing:,} of {told['slots']:,} answers are missing" if missing else ""),
        f"bytes      {told['bytes_per_row']:,} a row, {told['bytes']:,} in {told['shards']} files",
    ]
    for address, form in told["signals"].items():
        lines.append(f"kept       {address}: {_form(form)}")
        if (mass := told["tail_mass"].get(address)) is not None:
            lines.append(f"           {mass:.2%} of the probability is in the rest, in the mean")
    lines += [f"teacher    {name} {_plain(value)}" for name, value in told["teacher"].items()]
    if told["augment"]:
        lines.append(f"augmented  {_plain(told['augment'])}")
    lines.append(f"data       {told['data']['rows']:,} rows, SHA-256 {told['data']['sha256']}")
    return "\n".join(lines)


def _form(form: dict[str, Any]) -> str:
    """How a signal is kept, in words."""
    size = f" {form['shape']}" if form["shape"] else ""
    if form["kept"] == "top":
        drawn = f" and {form['draws']} drawn from the rest" if form["draws"] else ""
        return f"the {form['k']} largest of {form['width']:,}{drawn}, {form['logits']}{size}"
    if form["kept"] == "head":
        return f"what the last layer reads, {form['dtype']}{size}, and that layer"
    return f"whole, {form['dtype']}{size}"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
