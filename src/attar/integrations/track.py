"""Sends a run's log to a tracker, while the run writes it or afterwards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from attar.integrations.log import Log, Point
from attar.integrations.sink import Opening, Sink
from attar.runtime import DataError, RunExistsError, UsageError, read_json, suggest, write_json
from attar.runtime.lock import Lock
from attar.runtime.run import LOG

# Each in a file of its own, which alone imports the library: (file, class, package).
_TRACKERS = {
    "tensorboard": ("tensorboard", "TensorBoard", "tensorboard"),
    "mlflow": ("mlflow", "MLflow", "mlflow"),
    "wandb": ("wandb", "WandB", "wandb"),
}
_BATCH = 1_000
_PAUSE = 1.0


def track(
    run: str | Path,
    to: Literal["tensorboard", "mlflow", "wandb"] = "tensorboard",
    *,
    into: str | Path | None = None,
    follow: bool = False,
    say: Callable[[str], None] | None = None,
) -> int:
    """Send what a run has logged to a tracker; the number of records that were sent.

    Each record of ``metrics.jsonl`` is sent once, over any number of calls, restarts of this
    process and resumptions of the run: what a resumed run writes a second time is not sent again.
    What was sent is kept in the folder ``.track`` of the run. The run itself knows nothing of it.

    Args:
        run: the run folder.
        to: the tracker, whose package must be installed.
        into: the folder to write to; for MLflow also a tracking URI. By default
            ``RUN/tensorboard``, or what the tracker's own environment variables say.
        follow: go on until the run has its verdict, or until interrupted.
        say: is told, in a sentence, where to look.

    Raises:
        UsageError: there is no such tracker, or its package is not installed.
        DataError: there is no log in the folder, or a line of it is damaged.
        RunExistsError: another process sends this run to the same place.
    """
    folder = Path(run)
    make = _tracker(to)
    if not folder.is_dir() or not (follow or (folder / LOG).is_file()):
        raise DataError(f"{folder / LOG}: there is no such file; name the folder of a run")
    place = None if into is None else str(into)
    key = hashlib.sha256((place or "").encode()).hexdigest()[:8]
    state = folder / ".track" / f"{to}-{key}.json"
    state.parent.mkdir(exist_ok=True)
    with _alone(state.with_suffix(".lock"), folder, to):
        known = read_json(state) if state.is_file() else {"ids": {}, "sent": {}}
        recipe = folder / "recipe.json"
        told = read_json(recipe) if recipe.is_file() else {}
        sink = make(Opening(folder, place, told, known["ids"], known["sent"]))
        return _sent(sink, folder, state, known, follow, say or (lambda line: None))


def _tracker(to: str) -> Callable[[Opening], Sink]:
    if to not in _TRACKERS:
        raise UsageError(f"there is no tracker '{to}'; {suggest(to, _TRACKERS)}")
    file, name, package = _TRACKERS[to]
    try:
        module = import_module(f"attar.integrations.{file}")
    except ImportError:
        raise UsageError(
            f'{to} needs the package {package}; install it: pip install "attar[{to}]"'
        ) from None
    made: Callable[[Opening], Sink] = getattr(module, name)
    return made


def _alone(path: Path, folder: Path, to: str) -> Lock:
    try:
        return Lock(path)
    except RunExistsError:
        raise RunExistsError(
            f"{folder}: another process sends this run to {to}; stop it first, or give another "
            "place with --into"
        ) from None


def _sent(
    sink: Sink, folder: Path, state: Path, known: dict[str, Any], follow: bool, say: Any
) -> int:
    log, count, finished = Log(folder / LOG), 0, False
    asked: set[str] = set()
    say(sink.place)
    try:
        while True:
            finished = _finished(folder)  # before the reading: its last records are in the log
            for points in _batches(_new(log.read(), sink, known["sent"], asked)):
                sink.send(points)
                known["sent"].update({point.stream: point.step for point in points})
                write_json(state, known)
                count += len(points)
            if finished or not follow:
                return count
            time.sleep(_PAUSE)
    finally:
        sink.close(finished=finished)
        write_json(state, known)


def _new(
    points: Iterable[Point], sink: Sink, sent: dict[str, int], asked: set[str]
) -> Iterator[Point]:
    """Those that have not arrived; of each stream the tracker is asked once for its last."""
    reached = dict(sent)
    for point in points:
        stream = point.stream
        if stream not in asked:
            asked.add(stream)
            sent[stream] = reached[stream] = sink.last(point)
        if point.step > reached[stream]:
            reached[stream] = point.step
            yield point


def _batches(points: Iterator[Point]) -> Iterator[list[Point]]:
    while batch := list(islice(points, _BATCH)):
        yield batch


def _finished(folder: Path) -> bool:
    """Whether the run has its verdict, and has not gone on since: for more seeds, say."""
    verdict, log = folder / "verdict.json", folder / LOG
    if not verdict.is_file() or not log.is_file():
        return False
    return verdict.stat().st_mtime_ns >= log.stat().st_mtime_ns
