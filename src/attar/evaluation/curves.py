"""The numbers behind the report's figures: learning, classes, calibration, disagreements."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.runtime import DataError
from attar.tasks.classification import BINS

if TYPE_CHECKING:
    from attar.data import Source
    from attar.tasks.task import Rows, Task

FORMAT = "attar-figures/1"
MOST_POINTS = 200  # of a line, MOST_CLASSES and so on: what keeps the file small
MOST_CLASSES = 24
MOST_EXAMPLES = 12
MOST_SIDE = 64

Place = tuple[int, int]
Seeds = dict[int, dict[Place, float]]


def figures(
    task: Task,
    source: Source,
    models: Mapping[str, Sequence[Rows]],
    *,
    log: str | Path,
    best: int = 0,
) -> dict[str, Any]:
    """What a report draws and the verdict does not hold, as JSON values of bounded size.

    Args:
        source: the test examples that *models* were asked about.
        models: rows of each seed, by role.
        log: the run's ``metrics.jsonl``.
        best: the seed, counted from 0, whose student is shown beside the teacher.

    Raises:
        DataError: a line of the log is not a JSON record.
    """
    records = list(_records(Path(log)))
    return {
        "format": FORMAT,
        "validation": validation(records, task.metric),
        "loss": losses(records),
        "classes": class_changes(task, models),
        "calibration": {
            name: calibration(rows)
            for name, rows in models.items()
            if name != "start" and _has_classes(rows[0])
        },
        "disagreements": disagreements(task, source, models, best),
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of the log; a last line that was being written is not one yet."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                if not line.endswith("\n"):
                    return
                raise DataError(f"{path}:{number}: is not a JSON record; repair the log") from None
            if isinstance(record, dict) and isinstance(record.get("arm"), str):
                yield record


def validation(records: Iterable[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The metric on validation rows after each epoch: a line for each arm.

    A line is ``{"arm", "seeds", "points"}``; a point is ``[epoch, mean, lowest, highest]`` over
    the seeds, epochs counted from 1 through all stages. Only epochs that every seed has count.
    """
    arms: dict[str, Seeds] = {}
    for record in records:
        value = record.get(metric)
        if record.get("split") == "validation" and isinstance(value, int | float):
            seeds = arms.setdefault(record["arm"], {})
            seeds.setdefault(record.get("seed", 0), {})[_place(record)] = float(value)
    return [
        {"arm": arm, "seeds": len(seeds), "points": points}
        for arm, seeds in arms.items()
        if len(points := _line(seeds, _order(seeds.values()))) > 1
    ]


def losses(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each loss term of the students, without its weight, as a mean over each epoch's steps.

    Lines are as those of ``validation``, with the name of the ``term``.
    """
    found: dict[tuple[str, str], dict[int, dict[Place, list[float]]]] = {}
    before: dict[tuple[Any, ...], int] = {}
    for record in records:
        if record.get("split") != "train" or record["arm"] == "teacher":
            continue
        mark = (record["arm"], record.get("seed", 0), record.get("stage", 0))
        steps = record["step"] - before.get(mark, 0)  # a record is a mean since the one before
        before[mark] = record["step"]
        for term, value in (record.get("terms") or {}).items():
            if isinstance(value, int | float):
                seeds = found.setdefault((record["arm"], term), {})
                total = seeds.setdefault(mark[1], {}).setdefault(_place(record), [0.0, 0.0])
                total[0] += value * steps
                total[1] += steps
    lines = {
        key: {s: {p: t[0] / t[1] for p, t in each.items() if t[1] > 0} for s, each in seeds.items()}
        for key, seeds in found.items()
    }
    return _term_lines(lines)


def _term_lines(lines: Mapping[tuple[str, str], Seeds]) -> list[dict[str, Any]]:
    drawn = []
    for (arm, term), seeds in lines.items():
        # A term of a later stage begins where that stage begins.
        whole = [each for (own, _), s in lines.items() if own == arm for each in s.values()]
        if len(points := _line(seeds, _order(whole))) > 1:
            drawn.append({"arm": arm, "term": term, "seeds": len(seeds), "points": points})
    return drawn


def _place(record: Mapping[str, Any]) -> Place:
    return record.get("stage", 0), record["epoch"]


def _order(lines: Iterable[Mapping[Place, float]]) -> dict[Place, int]:
    places = sorted({place for line in lines for place in line})
    return {place: number for number, place in enumerate(places, 1)}


def _line(seeds: Seeds, order: Mapping[Place, int]) -> list[list[float]]:
    shared = sorted(set.intersection(*(set(line) for line in seeds.values())))
    points = []
    for place in _thinned(shared):
        values = [line[place] for line in seeds.values()]
        mean = sum(values) / len(values)
        points.append([order[place], mean, min(values), max(values)])
    return points


def _thinned(places: list[Place]) -> list[Place]:
    """At most ``MOST_POINTS`` of them at even distance, the first and the last included."""
    if len(places) <= MOST_POINTS:
        return places
    stride = (len(places) - 1) / (MOST_POINTS - 1)
    return [places[round(index * stride)] for index in range(MOST_POINTS)]


def class_changes(task: Task, models: Mapping[str, Sequence[Rows]]) -> dict[str, Any] | None:
    """The classes that distillation changed most: the metric before and after, best gain first.

    ``before`` is the baseline, or the start where there is none; ``low`` and ``high`` are the
    smallest and largest change of a seed.
    """
    against = next((name for name in ("baseline", "start") if models.get(name)), None)
    if against is None or not task.per_class(models["distilled"][0]):
        return None
    before, after, teacher = (
        [task.per_class(rows) or {} for rows in models.get(name) or []]
        for name in (against, "distilled", "teacher")
    )
    before = before * len(after) if len(before) == 1 else before
    changes = [_class_change(name, before, after, teacher) for name in after[0]]
    present = [each for each in changes if each["change"] == each["change"]]
    largest = sorted(present, key=lambda each: -abs(each["change"]))[:MOST_CLASSES]
    sign = -1 if task.higher_is_better else 1
    ordered = sorted(largest, key=lambda each: sign * each["change"])
    return {"against": against, "of": len(present), "rows": ordered}


def _class_change(
    name: str,
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    teacher: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    first, second = [each[name] for each in before], [each[name] for each in after]
    gains = [b - a for a, b in zip(first, second, strict=True)]
    return {
        "name": name,
        "teacher": teacher[0][name] if teacher else None,
        "before": sum(first) / len(first),
        "after": sum(second) / len(second),
        "change": sum(gains) / len(gains),
        "low": min(gains),
        "high": max(gains),
    }


def _has_classes(rows: Rows) -> bool:
    logits, labels = rows.get("logits"), rows.get("labels")
    if logits is None or labels is None or labels.is_floating_point():
        return False
    return logits.ndim == 2 and labels.ndim == 1


def calibration(seeds: Sequence[Rows]) -> list[dict[str, float]]:
    """How often the answers of equal confidence are right, over the examples of all seeds.

    The 15 bins of the calibration error, without the empty ones: ``confidence`` and ``accuracy``
    are means over the bin, ``share`` is its part of all examples.
    """
    parts = [rows["logits"].double().softmax(1).max(1) for rows in seeds]
    confidence = torch.cat([part.values for part in parts])
    right = torch.cat(
        [part.indices == r["labels"] for part, r in zip(parts, seeds, strict=True)]
    ).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    return [
        {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "share": float(inside.double().mean()),
        }
        for inside in (bins == number for number in range(BINS))
        if inside.any()
    ]


def disagreements(
    task: Task, source: Source, models: Mapping[str, Sequence[Rows]], best: int = 0
) -> dict[str, Any] | None:
    """The test images that teacher and student see most differently; None for other data.

    Of the examples with different answers, those with the largest total variation distance
    ``1/2 sum_c |p_c - q_c|`` between both probabilities, with their pixels.
    """
    teacher, student = models.get("teacher"), models["distilled"][best]
    if not teacher or not _has_classes(student) or not _is_image(source):
        return None
    ours, theirs = (r["logits"].double().softmax(1) for r in (student, teacher[0]))
    differ = (ours.argmax(1) != theirs.argmax(1)).nonzero()[:, 0]
    distance = (ours - theirs).abs().sum(1)[differ] / 2
    ids = differ[distance.argsort(descending=True, stable=True)[:MOST_EXAMPLES]]
    names: Sequence[str] = task.names()  # type: ignore[attr-defined]  # has classes
    shown = []
    for index, image in zip(ids.tolist(), _images(source, ids), strict=True):
        said = {"teacher": theirs[index], "student": ours[index]}
        answers = {who: _answer(names, probabilities) for who, probabilities in said.items()}
        label = names[int(student["labels"][index])]
        shown.append({"id": index, "label": label, **answers, **image})
    return {"differ": len(differ), "of": len(ours), "examples": shown}


def _answer(names: Sequence[str], probabilities: Tensor) -> dict[str, Any]:
    first = int(probabilities.argmax())
    return {"answer": names[first], "probability": float(probabilities[first])}


def _is_image(source: Source) -> bool:
    return len(source.shape) == 3 and source.shape[0] in (1, 3)


def _images(source: Source, ids: Tensor) -> list[dict[str, Any]]:
    """The pixels as bytes in base64, row by row, channels last; no side above ``MOST_SIDE``."""
    if not len(ids):
        return []
    inputs = source.rows(ids)["inputs"].float()
    height, width = inputs.shape[2:]
    shrink = max(height, width) / MOST_SIDE
    if shrink > 1:
        size = max(1, round(height / shrink)), max(1, round(width / shrink))
        inputs = F.adaptive_avg_pool2d(inputs, size)
    low, high = inputs.amin((1, 2, 3)), inputs.amax((1, 2, 3))
    known = (low >= 0) & (high <= 1)  # else they were normalised: stretch what is there
    low, high = torch.where(known, 0.0, low), torch.where(known, 1.0, high)
    scaled = (inputs - low[:, None, None, None]) / (high - low).clamp_min(1e-12)[
        :, None, None, None
    ]
    pixels = (255 * scaled).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
    return [
        {
            "height": image.shape[0],
            "width": image.shape[1],
            "channels": image.shape[2],
            "pixels": base64.b64encode(image.numpy().tobytes()).decode(),
        }
        for image in pixels
    ]
