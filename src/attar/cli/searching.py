"""`attar search`: the smallest student that meets the goal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def search(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe with search: in it.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="Overrides, such as goal.retain=0.95."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Where to; runs/NAME-search by default."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many students; the recipe's number by default.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A database that several machines share; search.db by default."
        ),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE_OR_PACKAGE", help="As in attar run. It is run."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in the folder.")
    ] = False,
    allow_drift: Annotated[
        list[str] | None,
        typer.Option("--allow-drift", metavar="NAME", help="As in attar run, with --resume."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result alone.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Try the students of a recipe's search; the smallest that meets the goal is judged."""
    from attar.recipes import search as search_recipe
    from attar.recipes.exports import missed_in
    from attar.runtime import EXIT_GOAL_MISSED

    silent = quiet or as_json
    found = search_recipe(
        recipe,
        folder=folder,
        overrides=overrides or (),
        plugins=plugin or (),
        resume=resume,
        allow=allow_drift or (),
        trials=trials,
        storage=storage,
        say=None if silent else _say,
        progress=False if silent else None,
    )
    if as_json:
        print((found.folder / "search.json").read_text(encoding="utf-8"), end="")
    else:
        print(f"search     {found.headline}")
        if found.goal_line:
            print(f"goal       {found.goal_line}")
        if found.winner is not None and found.verdict is not None and not quiet:
            print(f"verdict    {found.verdict.headline}")
            print(f"winner     {found.folder / 'winner' / 'student'}")
        if not quiet:
            print(f"report     {found.folder / 'report.html'}")
    if found.met is False or missed_in([found.folder / "winner"] if found.verdict else []):
        raise typer.Exit(EXIT_GOAL_MISSED)


def _say(line: str) -> None:
    print(line, flush=True)
