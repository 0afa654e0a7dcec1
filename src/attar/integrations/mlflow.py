"""To MLflow: an experiment for the run folder, in it a run for each stage."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from attar.integrations.log import Point
from attar.integrations.sink import Opening
from attar.runtime import UsageError

_MOST = 1_000  # metrics in one request
_PARAMS = 100  # parameters in one request
_LONGEST = 500


class MLflow:
    """Metrics are ``train/loss`` and so on; the parameters are the recipe's values by path."""

    def __init__(self, opening: Opening) -> None:
        for name in ("mlflow.store.db.utils", "alembic.runtime.migration"):
            logging.getLogger(name).setLevel(logging.WARNING)  # how a new file gets its tables
        self._run = opening.run
        self._uri = _uri(opening.into)
        self._recipe = dict(_leaves(opening.recipe, ""))
        self._ids = opening.ids
        try:
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._found_experiment()
        except Exception as error:
            raise UsageError(_refusal(self._uri, error)) from None

    @property
    def place(self) -> str:
        """The experiment and where it is kept."""
        where = self._client.tracking_uri
        if where.startswith("http"):
            return f"MLflow: look at {where}"
        return f"MLflow: look with mlflow ui --backend-store-uri {where}"

    def _found_experiment(self) -> str:
        name = self._run.resolve().name
        found = self._client.get_experiment_by_name(name)
        made = found.experiment_id if found else self._client.create_experiment(name)
        return str(made)

    def last(self, point: Point) -> int:
        """The server knows, even of what a killed process did not note."""
        if point.stage not in self._ids or not point.values:
            return -1
        key = _key(point, next(iter(point.values)))
        try:
            history = self._client.get_metric_history(self._ids[point.stage], key)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            del self._ids[point.stage]  # it was removed there: send the stage anew
            return -1
        return max((metric.step for metric in history), default=-1)

    def send(self, points: Sequence[Point]) -> None:
        """Log them in requests of at most 1,000 numbers."""
        now = int(time.time() * 1000)
        waiting: dict[str, list[Metric]] = {}
        for point in points:
            metrics = waiting.setdefault(self._id(point.stage), [])
            fresh = [Metric(_key(point, k), v, now, point.step) for k, v in point.values.items()]
            if len(metrics) + len(fresh) > _MOST:
                self._client.log_batch(self._id(point.stage), metrics=metrics)
                metrics.clear()
            metrics.extend(fresh)
        for run, metrics in waiting.items():
            self._client.log_batch(run, metrics=metrics)

    def _id(self, stage: str) -> str:
        if stage not in self._ids:
            made = self._client.create_run(self._experiment, run_name=stage)
            self._ids[stage] = made.info.run_id
            params = [Param(name, value) for name, value in self._recipe.items()]
            for start in range(0, len(params), _PARAMS):
                self._client.log_batch(self._ids[stage], params=params[start : start + _PARAMS])
            tags = [RunTag("attar.run", str(self._run)), RunTag("attar.stage", stage)]
            self._client.log_batch(self._ids[stage], tags=tags)
        return self._ids[stage]

    def close(self, *, finished: bool) -> None:
        """Say of the stages that they are done, where the run is."""
        if finished:
            for run in self._ids.values():
                self._client.set_terminated(run, "FINISHED")


def _uri(into: str | None) -> str | None:
    """A folder holds a database in one file; what has a scheme is MLflow's own address."""
    if into is None or "://" in into:
        return into
    folder = Path(into).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _key(point: Point, name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", f"{point.split}/{name}")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    elif value is not None:
        yield path, str(value)[:_LONGEST]
    for name, item in items:
        yield from _leaves(item, f"{path}.{name}" if path else str(name))


def _refusal(uri: str | None, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "unsupported URI" in text or "sqlalchemy" in text:
        return 'MLflow needs SQLAlchemy for a database; install it: pip install "attar[mlflow]"'
    return f"MLflow cannot open {uri or 'its tracking URI'}: {text[:300]}"
