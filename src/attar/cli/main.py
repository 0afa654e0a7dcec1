"""`attar`: run, check, distill, search, cache, evaluate, export, list, report, track, demo.

Rooms are imported inside the commands: `attar --help` must not wait for torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attar.cli.caching import app as caching
from attar.cli.demo import app as demo
from attar.cli.importing import import_
from attar.cli.searching import search

EPILOG = (
    "Exit codes: 0 done; 1 the goal was missed; 3 training diverged; 64 wrong usage; 65 wrong "
    "data; 70 a fault in attar; 73 the run folder is taken; 74 input or output failed; 78 wrong "
    "recipe or plan; 130 interrupted; 143 terminated."
)

app = typer.Typer(
    name="attar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Knowledge distillation: a small model that keeps what a large one knows.",
)

app.add_typer(demo)
app.add_typer(caching)
app.command(name="import")(import_)
app.command()(search)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PATH=VALUE]...", help="Overrides, such as stages.0.epochs=5."),
]
Folder = Annotated[
    Path | None,
    typer.Option("--run", metavar="FOLDER", help="Where the run goes; runs/NAME by default."),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE_OR_PACKAGE",
        help="Python code of yours whose __all__ a recipe may name. It is run: trust it.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the folder; start it if none is.")
]
AllowDrift = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-drift",
        metavar="NAME",
        help="With --resume: a difference to the run so far that you want, such as torch.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits, fashion_mnist, a CSV file, a folder of images by class or of idx files, or "
        "a data set of Hugging Face's datasets: a folder, a .parquet file, or owner/name."
    ),
]
Target = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The label's column, of a table or data set.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="A column of the inputs of a data set; may be repeated."),
]
Size = Annotated[
    int | None, typer.Option(min=1, metavar="PIXELS", help="Resize and crop images to a square.")
]
Regression = Annotated[bool, typer.Option(help="The label is a number.")]
Licence = Annotated[str | None, typer.Option(metavar="TEXT", help="Told in the model card.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict's line alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    folder: Folder = None,
    plugin: Plugins = None,
    resume: Resume = False,
    allow_drift: AllowDrift = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Teacher, baseline, student, verdict and report, from one recipe."""
    from attar.recipes import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), plugins=plugin or ())
    place = folder or Path("runs") / loaded.name
    _run(loaded, place, quiet, as_json, resume=resume, allow=allow_drift or ())


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Resolve a recipe, try every stage on one batch, print the plan; trains nothing."""
    from attar.recipes import check as check_recipe

    plan = check_recipe(recipe, overrides=overrides or (), plugins=plugin or ())
    if as_json:
        print(json.dumps(plan, indent=2))
    else:
        from attar.cli.tables import print_plan

        print_plan(plan)


@app.command()
def distill(
    teacher: Annotated[
        str, typer.Option(help="A saved model's folder, owner/name on the hub, or a family.")
    ],
    student: Annotated[str, typer.Option(help="A family of models: mlp, resnet, ...")],
    data: Data,
    overrides: Overrides = None,
    target: Target = None,
    inputs: Inputs = None,
    size: Size = None,
    regression: Regression = False,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of teacher and student.")] = 30,
    folder: Folder = None,
    plugin: Plugins = None,
    resume: Resume = False,
    allow_drift: AllowDrift = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a recipe from a few choices, then run it."""
    from attar.cli.write import Choices, check_names, write_recipe
    from attar.recipes import parse, resolve

    if not plugin:
        check_names(teacher, student)
    said = Choices(target, inputs or (), size, regression)
    text = write_recipe(teacher, student, data, said, epochs=epochs)
    loaded = resolve(parse(text, "distill"), overrides=overrides or (), plugins=plugin or ())
    place = folder or Path("runs") / f"{Path(data).stem}-{student}"
    if not (quiet or as_json):
        print(f"the recipe, which will lie at {place / 'recipe.json'}:\n\n{text}")
    _run(loaded, place, quiet, as_json, resume=resume, allow=allow_drift or ())


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    data: Data,
    target: Target = None,
    inputs: Inputs = None,
    size: Size = None,
    regression: Regression = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Score a saved model on the test split of some data."""
    from attar.cli.write import Choices, evaluate_model

    said = Choices(target, inputs or (), size, regression)
    found = evaluate_model(model, data, said, plugins=plugin or ())
    print(json.dumps(found.scores, indent=2) if as_json else found)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a saved model.")],
    data: Data,
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder for the files.")],
    formats: Annotated[
        str, typer.Option(help="safetensors, onnx, onnx_int8, torch_export, with commas.")
    ] = "safetensors",
    target: Target = None,
    inputs: Inputs = None,
    size: Size = None,
    regression: Regression = False,
    licence: Licence = None,
    teacher_licence: Licence = None,
    data_licence: Licence = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Write a saved model in formats that others read, each checked on the test split."""
    from attar.cli.tables import print_exports
    from attar.cli.write import Choices, export_model

    made = export_model(
        model,
        data,
        Choices(target, inputs or (), size, regression),
        into,
        [name.strip() for name in formats.split(",")],
        plugins=plugin or (),
        licence=licence,
        teacher_licence=teacher_licence,
        data_licence=data_licence,
    )
    told = [artefact.to_json() for artefact in made]
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        print_exports(told)
        print(f"card       {into / 'README.md'}")


@app.command(name="list")
def list_(
    room: Annotated[str | None, typer.Argument(help="losses, models, readers, ...")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List what a recipe can name: losses, models, readers, optimizers, ..."""
    from attar.cli.tables import describe_rooms, print_rooms

    rooms = describe_rooms(room, plugin or ())
    if as_json:
        print(json.dumps(rooms, indent=2))
    else:
        print_rooms(rooms, whole=room is not None)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Write a run's report.html again from what the run recorded."""
    from attar.reporting import page

    print(page(run))


@app.command()
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[str, typer.Option(help="tensorboard, mlflow or wandb.")] = "tensorboard",
    into: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where to; for mlflow also a tracking URI."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on while the run runs, until its verdict.")
    ] = False,
) -> None:
    """Send what a run logs to TensorBoard, MLflow or Weights & Biases."""
    from attar.integrations import track as send

    count = send(run, to, into=into, follow=follow, say=_say)  # type: ignore[arg-type]
    print(f"sent {count:,} records")


def _run(loaded: Any, folder: Path, quiet: bool, as_json: bool, **resuming: Any) -> None:
    from attar.cli.tables import print_chain, print_exports, print_verdict, print_verdicts
    from attar.evaluation import Verdicts
    from attar.recipes import run as run_recipe
    from attar.recipes.exports import missed_in
    from attar.runtime import EXIT_GOAL_MISSED, read_json

    silent = quiet or as_json
    say = None if silent else _say
    progress = False if silent else None
    verdict = run_recipe(loaded, folder=folder, say=say, progress=progress, **resuming)
    if _rank() != "0":
        pass  # rank 0 says it
    elif as_json:
        print((folder / "verdict.json").read_text(encoding="utf-8"), end="")
    else:
        if isinstance(verdict, Verdicts):
            print_verdicts(verdict, whole=not quiet)
        else:
            print_verdict(verdict, whole=not quiet)
            if not quiet:
                kept = read_json(folder / "verdict.json")
                print_chain(kept.get("chain"))
                print_exports(kept["exports"])
        if not quiet:
            print(f"report     {folder / 'report.html'}")
    if several := isinstance(verdict, Verdicts):
        missed = verdict.met is False
    else:
        missed = verdict.goal is not None and not verdict.goal.met
    runs = sorted(folder.glob("student-*")) if several else [folder]
    if missed or (_rank() == "0" and missed_in(runs)):
        raise typer.Exit(EXIT_GOAL_MISSED)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run the command; every error is one sentence on standard error and a documented code."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_guarded(_command))


def _command() -> Any:
    # Not app(): typer answers every interrupt with 130 and says nothing.
    group = typer.main.get_command(app)
    with group.make_context("attar", sys.argv[1:]) as context:
        return group.invoke(context)


def _guarded(command: Callable[[], Any]) -> int:
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort) as stopped:
        return _refuse(f"interrupted{_how_to_go_on()}", getattr(stopped, "exit_code", 130))
    except BrokenPipeError:
        return 0
    except OSError as error:
        what = f"{_meant(error.filename)}: {error.strerror or error}"
        return _refuse(f"{what}{_how_to_go_on()}", 74)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line itself is wrong
            return _refuse(error.format_message(), 64)
        if hasattr(error, "exit_code"):
            return _refuse(str(error), error.exit_code)
        traceback.print_exc()
        return _refuse(f"a fault in attar: {type(error).__name__}: {error}", 70)


def _meant(path: Any) -> str:
    """The path that a temporary one stands for, until it is whole."""
    return re.sub(r"(?<![^/])\.?([^/]+)\.tmp-[0-9]+(?![^/])", r"\1", str(path or "a file"))


def _how_to_go_on() -> str:
    trains = sys.argv[1:2] in (["run"], ["distill"], ["search"])
    return "; go on with the same command and --resume" if trains else ""


class Terminated(KeyboardInterrupt):
    """SIGTERM outside training: what is on disk is whole at any moment, so stop here."""

    exit_code = 143


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def _refuse(message: str, code: int) -> int:
    if _rank() == "0":
        print(f"attar: {message}", file=sys.stderr)
    elif not message.startswith("rank 0: "):  # which rank 0 says itself
        print(f"attar, rank {_rank()}: {message}", file=sys.stderr)
    return code


def _rank() -> str:
    """The number of this process among those of ``torchrun``."""
    return os.environ.get("RANK", "0")
