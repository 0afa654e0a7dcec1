"""From a few choices on the command line to data and recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attar.runtime import UsageError, suggest

BUILT_IN = ("digits", "fashion_mnist")


def reader(data: str, *, target: str | None, regression: bool) -> tuple[dict[str, Any], str]:
    """What a recipe writes for *data*, and the task that goes with it."""
    if data.replace("-", "_") in BUILT_IN:
        return {"name": data}, "image-classification"
    path = Path(data)
    if path.is_dir():
        return {"name": "fashion_mnist", "folder": data}, "image-classification"
    if path.suffix != ".csv":
        known = f"{suggest(data, BUILT_IN)}, or name a .csv file or a folder of idx files"
        raise UsageError(f"--data {data}: there is no such data; {known}")
    if not path.is_file():
        raise UsageError(f"--data {data}: there is no such file")
    if target is None:
        raise UsageError("--data is a CSV file; say which column is its label with --target")
    options = {"name": "csv", "train": data, "target": target}
    if regression:
        return options | {"regression": True}, "regression"
    return options, "tabular-classification"


def write_recipe(
    teacher: str,
    student: str,
    data: str,
    *,
    target: str | None,
    regression: bool,
    epochs: int,
) -> str:
    """The text of a recipe that distils *teacher* into *student* on *data*."""
    options, task = reader(data, target=target, regression=regression)
    taught = f"{{load: {json.dumps(teacher)}}}"
    if not Path(teacher).exists():
        taught = f"{{model: {json.dumps(teacher)}, train: {{epochs: {epochs}}}}}"
    loss = "mse" if regression else "{name: kl_divergence, temperature: 4.0}"
    return "\n".join(
        [
            f"task: {task}",
            f"data: {json.dumps(options)}",
            f"teacher: {taught}",
            f"student: {json.dumps(student)}",
            "stages:",
            "  - do: distill",
            f"    epochs: {epochs}",
            "    terms:",
            f"      - {{loss: {loss}, weight: 0.9}}",
            "    label_weight: 0.1",
            "",
        ]
    )


def evaluate_model(
    model: Path,
    data: str,
    *,
    target: str | None,
    regression: bool,
    plugins: Sequence[str] = (),
) -> Any:
    """Score a saved model on the test split of *data*, in the task it was saved with."""
    from attar.evaluation import evaluate
    from attar.models import families, load, read_extra
    from attar.recipes import parse, rooms
    from attar.recipes.resolve import Resolver
    from attar.tasks import restore

    options, _ = reader(data, target=target, regression=regression)
    extra = read_extra(model)
    saved = extra.get("data")
    if isinstance(saved, dict) and all(saved.get(k) == options.get(k) for k in ("name", "train")):
        options = saved  # split as the model's own run split it: no row it was trained on
    document = parse(json.dumps(options), "--data")
    known = rooms(plugins)
    splits = Resolver(document, known).choice(document.value, "readers", ())()
    test = splits[-1]
    task = restore(extra.get("task")).fitted(test)
    added = {name: make for name, make in known["models"].items() if name not in families()}
    return evaluate(load(model, families=added), test, task)
