"""A search's memory: which trials there are, kept where one machine or many find them."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, Literal

from attar.recipes.recipe import Loaded, Search
from attar.recipes.resume import flat, shown
from attar.recipes.search_space import Space, stored
from attar.recipes.search_trials import Trial, epochs_of
from attar.runtime import PreflightError, read_json, write_json
from attar.training import differences

if TYPE_CHECKING:
    import optuna

INSTALL = 'pip install "attar[search]"'
DATABASE = "search.db"
BEAT, SILENCE = 30, 120  # seconds between two signs of life, and after which a machine is dead
STARTUP = 4  # trials that a pruner compares with, at least
EARLY = 4  # the share of the epochs in which nothing is stopped: a quarter
GENERATION = 10  # students of one, with nsga


@dataclass(frozen=True)
class Aims:
    """What a study goes for.

    Attributes:
        goal: whether the recipe has one; then the smallest student that meets it is looked for.
        higher_is_better: of the metric.
    """

    goal: bool
    higher_is_better: bool

    def directions(self, sampler: str) -> list[Literal["minimize", "maximize"]]:
        """As Optuna names them."""
        metric: Literal["minimize", "maximize"]
        metric = "maximize" if self.higher_is_better else "minimize"
        if sampler == "nsga":
            return [metric, "minimize", "minimize"]
        return ["minimize"] if self.goal else [metric]

    def values(self, sampler: str, told: Mapping[str, Any]) -> Any:
        """What a finished trial is worth."""
        cost = told["cost"]
        if sampler == "nsga":
            return told["score"], cost["bytes"], cost["latency_ms"]
        return cost["bytes"] if self.goal else told["score"]

    def reported(self, score: float) -> float:
        """A metric turned the way in which the study's own value goes."""
        return -score if self.goal and self.higher_is_better else score


class Study:
    """The trials of one recipe in one storage.

    Args:
        place: the run folder.
        loaded: the recipe; its full text says which study it is.
        plan: its search.
        storage: a URL; ``search.db`` in the folder when None.

    Raises:
        PreflightError: Optuna is not installed, the storage cannot be reached, or it holds a search
            of another recipe by this name.
    """

    def __init__(
        self, place: Path, loaded: Loaded, plan: Search, aims: Aims, storage: str | None
    ) -> None:
        self._place = place
        self._shared = storage is not None
        self._sampler = plan.sampler
        self._seed = loaded.recipe.seed
        self.aims = aims
        self._url = _hidden(storage) if storage is not None else str(place / DATABASE)
        self._storage = _connected(storage or _own(place), self._url, shared=self._shared)
        self._name = f"{loaded.name}-{fingerprint(loaded)}"
        warm_up = max(1, epochs_of(loaded) // EARLY)
        with quiet(), _reached(self._url):
            self._study = self._opened(loaded, _pruner(plan, aims, warm_up))

    @cached_property
    def _token(self) -> str:
        """What this run folder is known by."""
        path = self._place / "worker.json"
        if not path.is_file():
            write_json(path, {"token": uuid.uuid4().hex})
        return str(read_json(path)["token"])

    def _opened(self, loaded: Loaded, pruner: Any) -> optuna.Study:
        import optuna

        others = [
            name
            for name in optuna.get_all_study_names(self._storage)
            if re.fullmatch(re.escape(loaded.name) + "-[0-9a-f]{12}", name)
        ]
        if others and self._name not in others:
            raise PreflightError(_other(self._url, others[0], self._storage, loaded))
        study = optuna.create_study(
            storage=self._storage,
            study_name=self._name,
            directions=self.aims.directions(self._sampler),
            pruner=pruner,
            load_if_exists=True,
        )
        study.set_user_attr("recipe", searched(loaded))
        return study

    def same(self, facts: Mapping[str, str]) -> None:
        """Refuse data or a teacher that are not those of the other trials.

        Raises:
            PreflightError: with the name of what differs.
        """
        with quiet(), _reached(self._url):
            before = self._study.user_attrs.get("facts")
            if before is None:
                self._study.set_user_attr("facts", dict(facts))
                before = facts
        for name, (then, now) in differences(before, facts).items():
            way = (
                "train it once, and give its folder by teacher.load"
                if name == "teacher"
                else ("give all machines the same files")
            )
            raise PreflightError(
                f"{self._url}: its trials are of another {name} (SHA-256 {str(then)[:12]} there, "
                f"{str(now)[:12]} here), so new ones could not be compared with them; {way}, or "
                "start a new search"
            )

    def trials(self) -> list[Trial]:
        """All that are done, by number."""
        from optuna.trial import TrialState

        with quiet(), _reached(self._url):
            found = self._study.get_trials(
                deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)
            )
        done = [each for each in found if "told" in each.user_attrs]
        return [Trial(number=each.number, **each.user_attrs["told"]) for each in done]

    def cut(self) -> int:
        """How many trials were cut off, to be done again."""
        from optuna.trial import TrialState

        with quiet(), _reached(self._url):
            return len(self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))

    def revive(self) -> None:
        """Mark as failed what this folder began and did not end; it is done again."""
        from optuna.trial import TrialState

        with quiet(), _reached(self._url):
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if not self._shared or trial.user_attrs.get("by") == self._token:
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def _again(self) -> None:
        """Put what was cut off back into the queue."""
        import optuna
        from optuna.trial import TrialState

        if self._shared:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                optuna.storages.fail_stale_trials(self._study)
        every = self._study.get_trials(deepcopy=False)
        queued = {trial.user_attrs.get("again") for trial in every}
        for trial in every:
            if trial.state is TrialState.FAIL and trial.params and trial.number not in queued:
                if trial.user_attrs.get("by") == self._token:
                    shutil.rmtree(self._place / "trials" / str(trial.number), ignore_errors=True)
                self._study.enqueue_trial(trial.params, user_attrs={"again": trial.number})

    def next(self, space: Space, count: int, objective: Callable[[Any], Any]) -> bool:
        """Do one more trial; False where *count* are done or under way.

        Where a space can be counted, so are its students, each once: who proposes may name one
        again, and two machines may take the same. After a repetition an untried one is drawn.

        Args:
            objective: as Optuna has it; of an ``optuna.Trial``.
        """
        from optuna.trial import TrialState

        whole = self._sampler == "grid" or (space.size is not None and space.size <= count)
        begun = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        with quiet(), _reached(self._url):
            self._again()
            there = self._study.get_trials(deepcopy=False)
            own = [trial for trial in there if trial.state in begun]
            places = [_place(trial.params) for trial in own]
            if (len(own) if space.size is None else len({*places})) >= count:
                return False
            if not whole and space.size is not None and places and places[-1] in places[:-1]:
                self._study.enqueue_trial(_untried(space, {*places}, self._seed + len(there)))
            worker = int(self._token[:8], 16) if self._shared else 0
            seed = (self._seed * 1_000_003 + worker + len(there)) % 2**32
            self._study.sampler = (
                _grid(space, self._seed) if whole else _sampler(self._sampler, seed)
            )
            self._study.optimize(lambda trial: self._one(trial, objective), n_trials=1)
        return True

    def _one(self, trial: Any, objective: Callable[[Any], Any]) -> Any:
        trial.set_user_attr("by", self._token)
        return objective(trial)

    def running(self) -> int:
        """How many trials are under way, here or elsewhere."""
        from optuna.trial import TrialState

        with quiet(), _reached(self._url):
            return len(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def claim(self, winner: int) -> str | None:
        """Be the one who asks the test split about the winner; who it is, where it is another."""
        import optuna

        told = {"by": self._token, "trial": winner, "where": f"{platform.node()}:{self._place}"}
        with quiet(), _reached(self._url):
            name = f"{self._name}-winner"
            try:  # a name is given once, whoever else asks at the same time
                mark = optuna.create_study(storage=self._storage, study_name=name)
                mark.set_user_attr("claim", told)
            except optuna.exceptions.DuplicatedStudyError:
                pass
            found = self.claimed()
        return None if found is None or found["by"] == self._token else str(found["where"])

    def claimed(self) -> dict[str, Any] | None:
        """Who asks or has asked the test split about which trial; None where nobody has."""
        import optuna

        with quiet(), _reached(self._url):
            if f"{self._name}-winner" not in optuna.get_all_study_names(self._storage):
                return None
            mark = optuna.load_study(storage=self._storage, study_name=f"{self._name}-winner")
            return mark.user_attrs.get("claim")


def fingerprint(loaded: Loaded) -> str:
    """Which search a recipe is of: all of its text, but how many trials and where they are kept."""
    text = json.dumps([searched(loaded), loaded.plugins], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def searched(loaded: Loaded) -> dict[str, Any]:
    """The recipe's text without what may change from one machine to the next, or is secret."""
    plan = {k: v for k, v in loaded.full["search"].items() if k not in ("trials", "storage")}
    return {**loaded.full, "search": plan}


def _other(url: str, name: str, storage: Any, loaded: Loaded) -> str:
    import optuna

    before = optuna.load_study(study_name=name, storage=storage).user_attrs.get("recipe", {})
    changed = differences(flat(before), flat(searched(loaded)))
    path, (then, now) = next(iter(changed.items()), ("a plugin", ("another", "this one")))
    return (
        f"{url}: holds the trials of another recipe called {loaded.name}: {path} was "
        f"{shown(then)} there and is {shown(now)} now; put it back, or start a new search: with "
        "--run FOLDER, and where the storage is shared, under another file name"
    )


def _own(place: Path) -> str:
    from sqlalchemy import URL

    url = URL.create("sqlite", database=str((place / DATABASE).absolute()))
    # Optuna fills in {SCHEMA_VERSION}.
    return url.render_as_string().replace("{", "{{").replace("}", "}}")


def _hidden(url: str) -> str:
    """A URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        raise PreflightError(
            "storage is no URL of a database; give one such as sqlite:////shared/search.db or "
            "postgresql://USER:PASSWORD@HOST/DATABASE"
        ) from None


def check_installed() -> None:
    """Refuse, in a sentence, to search without Optuna."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise PreflightError(f"a search needs the package optuna; install it: {INSTALL}") from None


def _connected(url: str, shown_as: str, *, shared: bool) -> Any:
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    beat: dict[str, Any] = {"heartbeat_interval": BEAT, "grace_period": SILENCE} if shared else {}
    with quiet(), warnings.catch_warnings(), _reached(shown_as):
        warnings.simplefilter("ignore", ExperimentalWarning)
        for patience in (1.0, 2.0, None):
            try:
                return RDBStorage(url, engine_kwargs=engine, **beat)
            except ImportError as error:
                raise PreflightError(
                    f"{shown_as}: needs the Python package {error.name or error}; install it"
                ) from None
            except (IntegrityError, OperationalError, ProgrammingError):
                # Two machines that make the tables at the same time are in each other's way.
                if patience is None:
                    raise
                sleep(patience * random.random())
    raise AssertionError("unreachable")


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """What a database says when it cannot be used, in one sentence and without its password."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        said = str(cause).strip().splitlines()
        raise PreflightError(
            f"{url}: the trials cannot be kept there "
            f"({said[0] if said else type(cause).__name__}); see that the database is there "
            "and may be written, or give another by --storage"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says nothing of its own: what is to be said, attar says."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _grid(space: Space, seed: int) -> Any:
    """The same seed every time: by it Optuna numbers the places of a grid."""
    from optuna.samplers import GridSampler

    return GridSampler(space.grid(), seed=seed % 2**32)


def _sampler(name: str, seed: int) -> Any:
    from optuna import samplers

    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "nsga":
        return samplers.NSGAIISampler(population_size=GENERATION, seed=seed)
    return samplers.TPESampler(seed=seed)


def _pruner(plan: Search, aims: Aims, warm_up: int) -> Any:
    from optuna import pruners

    name = plan.pruner or ("none" if plan.sampler == "nsga" else "goal" if aims.goal else "median")
    if name == "goal":
        return _below_the_goal(warm_up)
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=warm_up)
    return pruners.NopPruner()


def _below_the_goal(warm_up: int) -> Any:
    from optuna.pruners import BasePruner
    from optuna.trial import TrialState

    class Below(BasePruner):
        """Stops what has always been far below those that met the goal: by more than they differ.

        The median would stop the small students, which are worse than others and good enough. So
        would the least of a few that met it, as smaller ones learn more slowly.
        """

        def prune(self, study: Any, trial: Any) -> bool:
            step = trial.last_step
            found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            met = [each for each in found if all(v <= 0 for v in each.constraints.values())]
            if step is None or step < warm_up or len(met) < STARTUP:
                return False
            best = [_best(each.intermediate_values, step) for each in met]
            return _best(trial.intermediate_values, step) > 2 * max(best) - min(best)

    return Below()


def _place(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _untried(space: Space, places: Collection[str], seed: int) -> dict[str, Any]:
    """The values of a student that is none of *places*; there must be one."""
    draw, axes = random.Random(seed), space.grid()
    while _place(found := {path: draw.choice(values) for path, values in axes.items()}) in places:
        pass
    return found


def _best(values: Mapping[int, float], step: int) -> float:
    """The lowest value so far."""
    return min((value for at, value in values.items() if at <= step), default=float("-inf"))


def same_values(trials: Sequence[Trial], chosen: Mapping[str, Any]) -> Trial | None:
    """A trial that was of these values already."""
    wanted = {path: stored(value) for path, value in chosen.items()}
    for trial in trials:
        if {path: stored(value) for path, value in trial.chosen.items()} == wanted:
            return trial
    return None
