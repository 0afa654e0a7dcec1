"""From a few choices on the command line to data and recipes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any

from attar.runtime import UsageError, suggest

BUILT_IN = ("digits", "fashion_mnist")

_IDX = re.compile(r".*-idx\d-ubyte(\.gz)?")
_TABLES = {".parquet", ".arrow", ".json", ".jsonl"}
_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LABELS = ("label", "labels", "target", "class")
_SAVED = {"config.json", "model.json"}  # of transformers, and of attar
_OPENED = 32  # images that are looked at to choose a size
_KNOWN = (
    "or name a CSV file, a folder of images or of idx files, or a data set of Hugging Face's "
    "datasets: a folder, a .parquet or .arrow file, or owner/name"
)


@dataclass(frozen=True)
class Choices:
    """What the command line says of the data.

    Attributes:
        target: the column of the labels, of a table or a data set.
        inputs: the columns of the inputs of a data set.
        size: pixels a side, for images.
        regression: the label is a number.
    """

    target: str | None = None
    inputs: Sequence[str] = ()
    size: int | None = None
    regression: bool = False


def reader(data: str, said: Choices) -> tuple[dict[str, Any], str]:
    """What a recipe writes for *data*, and the task that goes with it."""
    path = Path(data)
    if data.replace("-", "_") in BUILT_IN:
        found: tuple[dict[str, Any], str] = {"name": data}, "image-classification"
    elif path.is_dir():
        found = _folder(data, said)
    elif path.suffix.lower() in {".csv", *_TABLES} and not path.is_file():
        raise UsageError(f"--data {data}: there is no such file; check the path")
    elif path.suffix.lower() == ".csv" and not said.inputs:
        found = _table(data, said)
    elif path.is_file() or _HUB.fullmatch(data):
        found = _dataset(data, said)
    else:
        near = suggest(data, BUILT_IN)
        raise UsageError(f"--data {data}: there is no such data; {near}, {_KNOWN}")
    for option, allowed in (("size", {"images", "dataset"}), ("inputs", {"dataset"})):
        if getattr(said, option) and found[0]["name"] not in allowed:
            raise UsageError(f"--{option} does not go with --data {data}; leave it out")
    return found


def _folder(data: str, said: Choices) -> tuple[dict[str, Any], str]:
    """A folder of idx files, of a data set, or of images by class."""
    names = sorted(os.listdir(data))
    if any(_IDX.fullmatch(name) for name in names):
        return {"name": "fashion_mnist", "folder": data}, "image-classification"
    within = [*names, *(name for _, some in _walk(data, depth=2) for name in some)]
    saved = {"dataset_dict.json", "state.json"} & set(names)
    if saved or any(Path(name).suffix.lower() in {".csv", *_TABLES} for name in within):
        return _dataset(data, said)
    if not any(os.path.isdir(os.path.join(data, name)) for name in names):
        raise UsageError(
            f"--data {data}: holds no idx files, no data set and no folders of images by class; "
            f"put the images of each class into a folder of its name, as {data}/CLASS/1.jpg"
        )
    options: dict[str, Any] = {"name": "images", "folder": data}
    size = said.size or usual_size(data)
    task = "regression" if said.regression else "image-classification"
    return options | ({"size": size} if size else {}), task


def _walk(folder: str, depth: int) -> Iterator[tuple[str, list[str]]]:
    """The folders of so many levels below, by name, and the names of their files."""
    top = folder.rstrip(os.sep).count(os.sep)
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if root.rstrip(os.sep).count(os.sep) - top >= depth:
            folders.clear()
        yield root, sorted(name for name in files if not name.startswith("."))


def usual_size(folder: str) -> int | None:
    """A size for images of several, near their usual shorter side; None if they have one size.

    The first image of each of the first 32 folders is opened, then the second, to 32 in all.
    """
    from attar.data import decoding

    decoding.need_pillow("images")
    lists = [(root, files) for root, files in _walk(folder, depth=2) if files][:_OPENED]
    deep = max((len(files) for _, files in lists), default=0)
    paths = [os.path.join(r, files[i]) for i in range(deep) for r, files in lists if i < len(files)]
    headers = []
    for path in paths[:_OPENED]:
        try:
            headers.append(decoding.header(path))
        except Exception:
            continue  # the reader names it
    if len({found[1:] for found in headers}) < 2:
        return None
    side = median_low(min(found.height, found.width) for found in headers)
    return max(16, min(224, round(side / 8) * 8))


def _table(data: str, said: Choices) -> tuple[dict[str, Any], str]:
    if said.target is None:
        raise UsageError("--data is a CSV file; say which column is its label with --target")
    options: dict[str, Any] = {"name": "csv", "train": data, "target": said.target}
    if said.regression:
        return options | {"regression": True}, "regression"
    return options, "tabular-classification"


def _dataset(data: str, said: Choices) -> tuple[dict[str, Any], str]:
    from attar.data.huggingface import columns

    kinds = columns(data)
    named = [n for n, kind in kinds.items() if kind == "classes"]
    named = named or [n for n in _LABELS if n in kinds]
    target = said.target or (named[0] if len(named) == 1 else None)
    if target is None:
        raise UsageError(
            f"--data {data}: say which column is its label with --target; {_listed(kinds)}"
        )
    inputs = list(said.inputs) or _inputs(data, {n: k for n, k in kinds.items() if n != target})
    for column in (target, *inputs):
        if column not in kinds:
            raise UsageError(f"--data {data}: has no column '{column}'; {suggest(column, kinds)}")
    options: dict[str, Any] = {"name": "dataset", "path": data, "labels": target}
    options["inputs"] = inputs[0] if len(inputs) == 1 else inputs
    task = "image-classification" if kinds[inputs[0]] == "image" else "tabular-classification"
    size = {"size": said.size} if said.size else {}
    return options | size, "regression" if said.regression else task


def _inputs(data: str, kinds: dict[str, str]) -> list[str]:
    """The image column, or the array column, or all columns of numbers."""
    for wanted in ("image", "array", "number"):
        found = [name for name, kind in kinds.items() if kind == wanted]
        if len(found) == 1 or (found and wanted == "number"):
            return found
        if found:
            break
    raise UsageError(
        f"--data {data}: say which column is the input with --inputs; {_listed(kinds)}"
    )


def _listed(kinds: dict[str, str]) -> str:
    return "its columns are " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def check_names(teacher: str, student: str) -> None:
    """Refuse a teacher or student that is neither saved nor a family, in the command's words.

    What a plugin names, only the recipe knows: do not ask where there is one.
    """
    from attar.models import families

    known = {_folded(name): name for name in families()}
    if not _is_saved(teacher) and _folded(teacher) not in known:
        saved = (p.parent.name for p in Path().glob("*/*.json") if p.name in _SAVED)
        near = suggest(teacher, {*known.values(), *saved})
        raise UsageError(
            f"--teacher {teacher}: there is no such folder and no such family of models; {near}"
        )
    if (Path(student) / "config.json").is_file():
        raise UsageError(
            f"--student {student}: is a folder, but a student is a family of models; to start from "
            f"the folder's weights write --student pretrained student.path={student}"
        )
    if _folded(student) not in known:
        raise UsageError(
            f"--student {student}: there is no such family of models; "
            f"{suggest(student, known.values())}"
        )


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")  # as recipes read names


def _is_saved(teacher: str) -> bool:
    return Path(teacher).exists() or "/" in teacher  # as in owner/name on the hub


def write_recipe(teacher: str, student: str, data: str, said: Choices, *, epochs: int) -> str:
    """The text of a recipe that distils *teacher* into *student* on *data*."""
    options, task = reader(data, said)
    taught = f"{{load: {json.dumps(teacher)}}}"
    if not _is_saved(teacher):
        taught = f"{{model: {json.dumps(teacher)}, train: {{epochs: {epochs}}}}}"
    loss = "mse" if said.regression else "{name: kl_divergence, temperature: 4.0}"
    chosen = options.get("size") and not said.size
    note = "  # the images are of several sizes; --size N chooses another" if chosen else ""
    return "\n".join(
        [
            f"task: {task}",
            f"data: {json.dumps(options)}{note}",
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


def evaluate_model(model: Path, data: str, said: Choices, *, plugins: Sequence[str] = ()) -> Any:
    """Score a saved model on the test split of *data*, in the task it was saved with."""
    from attar.evaluation import evaluate

    module, splits, task = _read(model, data, said, plugins)
    return evaluate(module, splits[-1], task)


def export_model(
    model: Path,
    data: str,
    said: Choices,
    into: Path,
    formats: Sequence[str],
    *,
    plugins: Sequence[str] = (),
    **licences: Any,
) -> list[Any]:
    """Export a saved model into *into*, each file checked on the test split of *data*."""
    from attar.exporting import export
    from attar.models import is_foreign
    from attar.recipes.exports import examples, told_of

    module, splits, task = _read(model, data, said, plugins)
    train, test = splits[0], splits[-1]
    card: Any = {"name": model.resolve().name, "data": test.name}
    if "onnx_int8" in formats:
        licences["calibration"] = examples(train, spread=True)
    card |= {} if is_foreign(str(model)) else told_of(model)
    chosen: Any = formats  # what is misspelt, export says
    inputs = examples(test)
    made = export(module, into, example=inputs, formats=chosen, task=task, card=card, **licences)
    return list(made.values())


def _read(model: Path, data: str, said: Choices, plugins: Sequence[str]) -> tuple[Any, Any, Any]:
    """A saved model, the splits of *data*, and the task that the model was saved with."""
    from attar.models import families, is_foreign, load, read_extra
    from attar.recipes import rooms
    from attar.tasks import restore

    options, task = reader(data, said)
    known = rooms(plugins)
    if is_foreign(str(model)):
        if options.get("size") and said.size is None:
            note = f"the images are of several sizes and become {options['size']} pixels a side"
            print(f"attar: {note}; --size N chooses another", file=sys.stderr)
        return _foreign(model, _splits(options, known), task)
    added = {name: make for name, make in known["models"].items() if name not in families()}
    module, extra = load(model, families=added), read_extra(model)
    if _same(extra.get("data"), options):
        options = extra["data"]  # split as the model's own run split it: no row it was trained on
    elif task == "image-classification" and options["name"] in ("images", "dataset"):
        built: Any = getattr(module, "attar_build", {})
        shape: Sequence[int] = built.get("options", {}).get("shape") or ()
        if said.size is None and len(shape) == 3:
            options["size"] = shape[-1]  # what the model reads
    splits = _splits(options, known)
    return module, splits, restore(extra.get("task")).fitted(splits[-1])


def _foreign(model: Path, splits: Any, task: str) -> tuple[Any, Any, Any]:
    """A folder that transformers saved, with the classes of the data in their order."""
    from attar.models import build, pretrained
    from attar.tasks import ImageClassification

    if task != "image-classification":
        raise UsageError(f"{model}: classifies images, and --data brings a {task}; name other data")
    made = partial(pretrained, path=str(model), head="keep")
    return build(made, data=splits[-1]), splits, ImageClassification().fitted(splits[-1])


def _splits(options: dict[str, Any], known: Any) -> Any:
    from attar.recipes import parse
    from attar.recipes.resolve import Resolver

    document = parse(json.dumps(options), "--data")
    return Resolver(document, known).choice(document.value, "readers", ())()


def _same(saved: Any, options: dict[str, Any]) -> bool:
    """Whether both read the same files, whatever their other options."""
    if not isinstance(saved, dict) or saved.get("name") != options["name"]:
        return False
    places = [
        {k: os.path.realpath(str(o[k])) for k in ("train", "folder", "path") if o.get(k)}
        for o in (saved, options)
    ]
    return places[0] == places[1]
