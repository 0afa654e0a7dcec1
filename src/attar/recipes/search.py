"""The search: many students of one recipe are tried, and the smallest that is good enough wins."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from attar.evaluation import Verdict
from attar.recipes import document as documents
from attar.recipes import search_words as words
from attar.recipes.arms import Arm, Desk, Say, teach
from attar.recipes.document import Document
from attar.recipes.job import Job
from attar.recipes.preflight import check_job
from attar.recipes.recipe import Goal, Loaded, Recipe, Search, resolve
from attar.recipes.run import allowed, begun, checked, elder, finish, measured
from attar.recipes.search_space import Space, changed, check_space, override, space_of
from attar.recipes.search_study import Aims, Study, check_installed, same_values, searched
from attar.recipes.search_trials import (
    Trial,
    Unfit,
    closest_of,
    epochs_of,
    fronts_of,
    share,
    told_cost,
    tried,
    tried_once,
    winner_of,
)
from attar.recipes.told import described, environment
from attar.reporting import page
from attar.runtime import PreflightError, UsageError, connect, write_atomic
from attar.training.checkpoint import teacher_digest


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        folder: the run folder; the winner's run is ``winner`` in it.
        trials: every student that was tried.
        winner: the smallest that meets the goal on the validation rows; without a goal the best.
        closest: where none meets it, the one that misses it by least.
        verdict: the winner's on the test rows; None without a winner, and where another machine
            asks for it.
        headline, goal_line: the same in a line each; no goal line without a goal.
    """

    folder: Path
    trials: tuple[Trial, ...]
    winner: Trial | None
    closest: Trial | None
    verdict: Verdict | None
    headline: str
    goal_line: str | None

    @property
    def met(self) -> bool | None:
        """Whether the winner meets the goal on the test rows too; None where that is not known."""
        if self.goal_line is None or (self.winner is not None and self.verdict is None):
            return None
        goal = self.verdict.goal if self.verdict is not None else None
        return goal is not None and goal.met

    def __str__(self) -> str:
        return "\n".join(line for line in (self.headline, self.goal_line) if line)


@dataclass(frozen=True)
class _Table:
    """All that a search needs at hand."""

    document: Document
    loaded: Loaded
    overrides: tuple[str, ...]
    plugins: tuple[str, ...]
    space: Space
    count: int
    desk: Desk  # of a job whose test rows are the validation's
    taught: Arm
    aim: float | None  # the teacher's metric on them
    teacher: dict[str, Any] | None
    study: Study

    @property
    def goal(self) -> Goal | None:
        return self.loaded.recipe.goal

    @property
    def higher(self) -> bool:
        return self.desk.job.task.higher_is_better


def search(
    recipe: str | Path | Document,
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    resume: bool = False,
    allow: Sequence[str] = (),
    trials: int | None = None,
    storage: str | None = None,
    say: Say | None = None,
    progress: bool | None = None,
) -> Found:
    """Try the students that a recipe's ``search`` describes, and judge the one that wins.

    The teacher is trained or loaded once. Each trial trains one student and is measured on the
    validation rows. The smallest that meets the goal, or without a goal the best, is the winner:
    its recipe is run as ``attar.run`` would, and it alone is asked about the test rows.

    Args:
        recipe: a file, or a document of ``attar.recipes.parse``.
        folder: the run folder; ``runs/NAME-search`` of the recipe when left out.
        overrides, plugins: as in ``load_recipe``.
        resume: go on with the search that the folder holds; start it where there is none.
        allow: names of differences to the search so far that are known and wanted.
        trials: how many students; the recipe's own number when left out.
        storage: a URL of Optuna's that several machines share; the recipe's when left out.
        say: is told each step in a line.
        progress: draw bars; by default where standard error is a terminal.

    Raises:
        AttarError: whatever is wrong, in one sentence, before any training where it can be
            known by then.
        Interrupted: Ctrl-C or SIGTERM; ``resume`` goes on, and no finished trial is lost.
    """
    check_installed()
    document, loaded, plan, space = _read(recipe, overrides, plugins)
    count = _count(trials, plan, space)
    place = Path(folder) if folder is not None else Path("runs") / f"{loaded.name}-search"
    with connect(loaded.recipe.parallel, loaded.recipe.device) as ranks:
        if ranks.world > 1:
            raise PreflightError(
                f"a search is one process, and torchrun started {ranks.world}; start attar search "
                "once on each machine, with the same --storage URL"
            )
        say = say or (lambda line: None)
        own = Loaded(loaded.recipe, searched(loaded), loaded.name, loaded.plugins)
        resume = allowed(ranks, place, own, resume, allow)
        job, plans = checked(loaded)
        blind = replace(job, parts=replace(job.parts, test=job.parts.validation))
        open_study = partial(Study, place, loaded, plan, _aims(loaded, job))
        url = storage or plan.storage
        study = None if url is None and not resume else open_study(url)
        if study is not None:  # what is refused is so before anything is tried
            _check_unfinished(study, space, count)
        say(f"data       {described(job)}")
        say(f"space      {words.space(space, count)}")
        if study is None or not study.trials():
            _check_space(document, space, plugins, blind)
        with begun(ranks, place, own, plans, resume=resume) as home:
            study = study or open_study(None)
            desk = Desk(blind, home, place, ranks, resume, tuple(allow), say, progress)
            desk, taught = teach(desk)
            aim = float(desk.job.task.primary(taught.rows[0])) if taught.rows else None
            study.same(_facts(desk.job))
            told = _teacher(desk, aim)
            table = _Table(
                document,
                loaded,
                tuple(overrides),
                tuple(plugins),
                space,
                count,
                desk,
                taught,
                aim,
                told,
                study,
            )
            return _searched(table, job)


def check_search(
    recipe: str | Path | Document, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> dict[str, Any]:
    """The plan of a recipe that searches: its own student's, after every value was tried."""
    document, loaded, plan, space = _read(recipe, overrides, plugins)
    count = _count(None, plan, space)
    job, plans = checked(loaded)
    _check_space(document, space, plugins, job)
    return plans | {"search": {"trials": count, "told": words.space(space, count)}}


def _check_space(document: Document, space: Space, plugins: Sequence[str], job: Job) -> None:
    check_space(document, space, plugins, lambda one: check_job(_of(job, one)))


def _read(
    recipe: str | Path | Document, overrides: Sequence[str], plugins: Sequence[str]
) -> tuple[Document, Loaded, Search, Space]:
    if isinstance(recipe, Recipe):
        raise UsageError(
            "the space of a search is of paths in a recipe's text; give the file, or "
            "attar.recipes.parse(text)"
        )
    document = recipe if isinstance(recipe, Document) else documents.read(recipe)
    loaded = resolve(document, overrides=overrides, plugins=plugins)
    plan = loaded.recipe.search
    if plan is None:
        raise PreflightError(
            f"{document.name}: says nothing of a search; add search: {{space: {{PATH: [VALUE, "
            "VALUE]}}, such as student.widths: [[8], [16]]"
        )
    if loaded.recipe.many:
        raise PreflightError(
            f"{document.at(('student',))}: student is a list, and a search tries one at a time; "
            "give one here, and the list in search.space as student: [...]"
        )
    if plan.pruner == "goal" and loaded.recipe.goal is None:
        raise PreflightError(
            f"{document.at(('search', 'pruner'))}: pruner is goal, and the recipe has none; add "
            "goal: {retain: 0.99}, or take the pruner median"
        )
    return document, loaded, plan, _space(document, loaded, plan)


def _space(document: Document, loaded: Loaded, plan: Search) -> Space:
    cached = bool(getattr(loaded.recipe.teacher, "cache", False))
    space = space_of(document, plan, cached=cached)
    if plan.sampler == "grid" and space.size is None:
        raise PreflightError(
            f"{document.at(('search', 'sampler'))}: a grid needs values that can be counted; give "
            "each range a step, or a list in its place"
        )
    return space


def _count(trials: int | None, plan: Search, space: Space) -> int:
    count = plan.trials if trials is None else trials
    if count < 1:
        raise UsageError(f"trials is {count}; it must be 1 or more")
    return count if space.size is None else min(count, space.size)


def _aims(loaded: Loaded, job: Job) -> Aims:
    return Aims(loaded.recipe.goal is not None, job.task.higher_is_better)


def _of(job: Job, loaded: Loaded) -> Job:
    return replace(job, recipe=loaded.recipe)


def _facts(job: Job) -> dict[str, str]:
    """What all machines of a search must have in common."""
    told = {"data": job.train.fingerprint(), "validation": job.validation.fingerprint()}
    if job.members:
        told["teacher"] = str(teacher_digest(job.asked))
    return {name: str(value) for name, value in told.items()}


def _check_unfinished(study: Study, space: Space, count: int) -> None:
    claim, trials = study.claimed(), study.trials()
    if claim is not None and count > len(trials if space.size is None else tried_once(trials)):
        raise PreflightError(
            f"this search is done: the test split was asked about its winner, trial "
            f"{claim['trial']}, and a second winner would be one too many; for more trials start a "
            "new search, with --run FOLDER"
        )


def _searched(table: _Table, job: Job) -> Found:
    table.study.revive()
    while table.study.next(table.space, table.count, lambda trial: _objective(table, trial)):
        _tell(table)
    found = table.study.trials()
    winner = winner_of(found, goal=table.goal is not None, higher_is_better=table.higher)
    closest = closest_of(found) if winner is None else None
    verdict = None
    if (busy := table.study.running()) > 0:
        table.desk.say(f"waiting    {words.elsewhere(busy)}")
    elif winner is not None:
        where = table.study.claim(winner.number)
        if where is None:
            verdict = _judged(table, job, winner)
        else:
            table.desk.say(f"winner     trial {winner.number}, which is judged at {where}")
    return _tell(table, winner=winner, closest=closest, verdict=verdict)


def _objective(table: _Table, trial: Any) -> Any:
    """One trial, as Optuna calls it: its values, or why there are none."""
    from optuna import TrialPruned

    chosen = table.space.suggested(trial)
    before = same_values(table.study.trials(), chosen)
    try:
        if before is not None:
            told = {**before.to_json(), "same_as": before.number}
            told.pop("number")
            if not before.finished:
                raise _Stopped(told)
        else:
            told = _told(table, trial, chosen)
    except _Stopped as stopped:
        trial.set_user_attr("told", stopped.told)
        _say(table, Trial(number=trial.number, **stopped.told))
        raise TrialPruned from None
    for name, miss in told["misses"].items():
        trial.set_constraint(name, miss)
    trial.set_user_attr("told", told)
    _say(table, Trial(number=trial.number, **told))
    return table.study.aims.values(_sampler(table), told)


class _Stopped(Exception):
    """A trial that has no values, and what is known of it."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__()
        self.told = told


def _told(table: _Table, trial: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    folder = table.desk.root / "trials" / str(trial.number)
    try:
        loaded = _fitting(table, chosen)
        watch = _Watch(table, trial, chosen, epochs_of(loaded))
        told = tried(table.desk, loaded, folder, table.aim, watch)
    except Unfit as error:
        raise _Stopped({"chosen": chosen, "state": "failed", "why": str(error)}) from error
    return {"chosen": chosen, "state": "finished", **told}


def _fitting(table: _Table, chosen: dict[str, Any]) -> Loaded:
    try:
        return changed(table.document, chosen, table.plugins)
    except PreflightError as error:  # values that only together make no recipe
        raise Unfit(str(error)) from error


class _Watch:
    """Reports the metric after each epoch of a trial to its pruner, which may stop it."""

    def __init__(self, table: _Table, trial: Any, chosen: dict[str, Any], epochs: int) -> None:
        self._table = table
        self._trial = trial
        self._chosen = chosen
        self._epochs = epochs
        self._done = 0

    def __call__(self, score: float) -> None:
        """The metric of one more epoch; those of all stages are counted on."""
        self._done += 1
        if _sampler(self._table) == "nsga":  # Optuna's pruners go by one value
            return
        self._trial.report(self._table.study.aims.reported(score), self._done - 1)
        if self._done == self._epochs or self._keeps_enough(score):
            return
        if self._trial.should_prune():
            why = words.stopped(self._done, self._epochs)
            told = {"chosen": self._chosen, "state": "stopped", "score": score, "why": why}
            raise _Stopped(told)

    def _keeps_enough(self, score: float) -> bool:
        """Whether the student is as good as the goal asks already: then it is not hopeless."""
        goal, aim = self._table.goal, self._table.aim
        kept = share(aim, score, self._table.higher)
        return goal is not None and kept is not None and kept >= goal.retain


def _sampler(table: _Table) -> str:
    assert table.loaded.recipe.search is not None
    return table.loaded.recipe.search.sampler


def _say(table: _Table, trial: Trial) -> None:
    line = words.trial(table.desk.job.task.metric, trial, table.goal is not None)
    table.desk.say(f"{f'trial {trial.number}':<10} {line}")


def _judged(table: _Table, job: Job, winner: Trial) -> Verdict:
    """Run the winner's recipe as any other, and ask the test split about it alone."""
    desk, place = table.desk, table.desk.root / "winner"
    loaded = changed(table.document, winner.chosen, table.plugins)
    desk.say(f"winner     trial {winner.number}; its recipe is run, and asked about the test rows")
    whole = replace(job, weights=desk.job.weights, recipe=loaded.recipe)
    resume = allowed(desk.ranks, place, loaded, desk.resume, desk.allow)
    with begun(desk.ranks, place, loaded, check_job(whole), resume=resume) as home:
        inner = replace(desk, job=whole, run=home, resume=resume)
        taught = table.taught
        if taught.rows:
            taught = replace(taught, rows=[inner.rows(whole.teacher)])
        verdict, arms = finish(inner, taught, loaded)
        _write_recipe(place / "recipe.yaml", loaded.full)
    fit = arms["distilled"].finals[0]
    again = float(fit.history[fit.kept_epoch][whole.task.metric])
    if winner.score is not None and abs(again - winner.score) > 1e-6 * max(1.0, abs(again)):
        desk.say(f"note       {words.unlike(whole.task.metric, winner.score, again)}")
    return verdict


def _write_recipe(path: Path, full: Mapping[str, Any]) -> None:
    from io import StringIO

    from ruamel.yaml import YAML

    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = True
    text = StringIO()
    writer.dump(dict(full), text)
    write_atomic(path, text.getvalue().encode("utf-8"))


def _tell(
    table: _Table,
    *,
    winner: Trial | None = None,
    closest: Trial | None = None,
    verdict: Verdict | None = None,
) -> Found:
    """Write what is known so far, in words and numbers, and the page."""
    desk, trials = table.desk, table.study.trials()
    task, place = desk.job.task, desk.root
    fronts = fronts_of(trials, higher_is_better=table.higher)
    _keep_fronts(place, trials, {number for front in fronts.values() for number in front})
    line = words.goal_line(table.goal, trials, winner, closest, verdict)
    found = Found(
        place,
        tuple(trials),
        winner,
        closest,
        verdict,
        words.headline(task.metric, trials),
        line,
    )
    told = {
        "format": words.FORMAT,
        "headline": found.headline,
        "goal_line": line,
        "met": found.met,
        "sure": bool(verdict is not None and verdict.goal is not None and verdict.goal.sure),
        "notes": words.notes(table.goal, trials, len(desk.job.validation), table.study.cut()),
        "front": fronts,
        "trials": [trial.to_json() for trial in trials],
        "teacher": table.teacher,
        "goal": _goal(table),
        "winner": None if winner is None else _winner(table, winner, verdict),
        "environment": environment(table.loaded, desk.job, desk.ranks),
    }
    told |= words.facts(task, trials, winner, closest)
    desk.run.write("search.json", told)
    page(place)
    return found


def _keep_fronts(place: Path, trials: Sequence[Trial], kept: set[int]) -> None:
    """Remove the weights of students that others beat."""
    for trial in trials:
        if trial.number not in kept:
            shutil.rmtree(place / "trials" / str(trial.number) / "student", ignore_errors=True)


def _teacher(desk: Desk, aim: float | None) -> dict[str, Any] | None:
    """What the teacher scores on the validation rows, and what it costs."""
    models, folders = elder(desk)
    if not models or aim is None:
        return None
    return {"score": aim, "cost": told_cost(next(iter(measured(desk, models, folders).values())))}


def _goal(table: _Table) -> dict[str, float] | None:
    """The goal as lines of the figure: the least metric, and the most bytes and milliseconds."""
    if table.goal is None or table.aim is None:
        return None
    share = table.goal.retain if table.higher else 1 / table.goal.retain
    limits = table.goal.limits
    told = {"score": share * table.aim}
    if "size_mb" in limits:
        told["size"] = limits["size_mb"] * 1e6
    if "latency_ms" in limits:
        told["latency"] = limits["latency_ms"]
    return told


def _winner(table: _Table, winner: Trial, verdict: Verdict | None) -> dict[str, Any]:
    lines = [override(path, value) for path, value in winner.chosen.items()]
    given = [each for each in table.overrides if not each.startswith("search")]
    plugins = [word for plugin in table.plugins for word in ("--plugin", plugin)]
    command = ["attar", "run", table.document.name, *given, *lines, *plugins]
    return {
        "number": winner.number,
        "overrides": lines,
        "command": shlex.join(command),
        "verdict": None if verdict is None else verdict.headline,
        "goal_line": None if verdict is None else verdict.goal_line,
    }
