"""The main job: from a recipe to a verdict."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import attar
from attar.data import Source
from attar.evaluation import Cost, Verdict, collect, costs, judge
from attar.evaluation.curves import figures
from attar.models import save
from attar.recipes import exports
from attar.recipes.job import (
    Job,
    check_floor,
    check_job,
    copied,
    learned,
    prepare,
    rows_of_stage,
    stage_of,
)
from attar.recipes.recipe import Loaded, Recipe, load_recipe
from attar.recipes.resume import check_resumable
from attar.recipes.teachers import Member
from attar.recipes.turns import Turn
from attar.reporting import page
from attar.runtime import (
    PreflightError,
    Ranks,
    Run,
    UsageError,
    check_free,
    connect,
    opened,
    resolve_device,
)
from attar.tasks.task import Rows
from attar.training import Fit, Home, copy_of_state, fit

Say = Callable[[str], None]


@dataclass
class Arm:
    """What came of one way to train a model, a row a seed: the chosen epoch's and the last's."""

    finals: list[Fit] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    last: list[Rows] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    teacher_seconds: float = 0.0

    def mean_seconds(self) -> float | None:
        """Training time of one run; None where nothing was trained."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Desk:
    """A job and what is at hand while it is done."""

    job: Job
    run: Run
    ranks: Ranks
    resume: bool
    allow: tuple[str, ...]
    say: Say
    progress: bool | None

    def home(self, **mark: Any) -> Home:
        """Where one stage keeps its log and its checkpoints."""
        return Home(self.run, mark, self.resume, self.allow, self.say)

    def rows(self, model: nn.Module, source: Source | None = None) -> Rows:
        """What a model says of each example, of the test split by default; asked by all ranks."""
        job = self.job
        return collect(
            model, source or job.test, job.task, device=job.recipe.device, ranks=self.ranks
        )

    def save(self, model: nn.Module, folder: str, **extra: Any) -> None:
        """Save a model into this run."""
        if self.ranks.main:
            save(model, self.run.folder / folder, extra=extra)


def run(
    recipe: Recipe | Loaded | str | Path,
    *,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    resume: bool = False,
    allow: Sequence[str] = (),
    say: Say | None = None,
    progress: bool | None = None,
) -> Verdict:
    """Do what a recipe says and judge the result on the test split.

    Trains the teacher (or loads it), then for each seed the student without a teacher and the
    student with it, from the same start, on the same data, for the same steps. The validation
    split chooses epochs; the test split only reports.

    Args:
        recipe: a file, or a ``Recipe`` built in Python.
        folder: the run folder; ``runs/NAME`` of the recipe when left out.
        overrides, plugins: as in ``load_recipe``.
        resume: go on with the run that the folder holds; start it where there is none.
        allow: names of differences to the run so far that are known and wanted, such as ``torch``.
        say: is told each step in a line.
        progress: draw bars; by default where standard error is a terminal.

    Raises:
        AttarError: whatever is wrong, in one sentence, before any training where it can be
            known by then.
        Interrupted: Ctrl-C or SIGTERM came while a model was trained; ``resume`` goes on.
    """
    loaded = _loaded(recipe, overrides, plugins)
    place = Path(folder) if folder is not None else Path("runs") / loaded.name
    with connect(loaded.recipe.parallel, loaded.recipe.device) as ranks:
        say = say if say and ranks.main else (lambda line: None)
        resume = _allowed(ranks, place, loaded, resume, allow)
        job, plans = _checked(loaded)
        with opened(ranks, place, resume=resume) as home:
            home.write("recipe.json", loaded.full)
            home.write("plan.json", plans)
            if loaded.plugins:
                home.write("plugins.json", loaded.plugins)
            say(f"data       {_described(job)}")
            for warning in (w for stage in plans["stages"] if (w := stage["lopsided"])):
                say(f"warning    {warning}")
            desk = Desk(job, home, ranks, resume, tuple(allow), say, progress)
            desk, taught = _teach(desk)
            arms = _students(desk, loaded)
            verdict = _judged(desk, taught, arms)
            made = {
                "environment": _environment(loaded, desk.job, ranks),
                "exports": _exported(desk, loaded, arms["distilled"], verdict),
            }
            home.write("verdict.json", verdict.to_json() | made)
            if ranks.main:
                home.write("figures.json", _figures(desk, taught, arms))
                page(place)
    return verdict


def _allowed(ranks: Ranks, place: Path, loaded: Loaded, resume: bool, allow: Sequence[str]) -> bool:
    """Whether the folder's run is gone on with; refuses a folder that cannot be used."""
    with ranks.together():
        if ranks.main:  # before any rank writes
            resume = resume and check_resumable(place, loaded, allow)
            if not resume:
                check_free(place)
    return ranks.first(resume)


def check(
    recipe: Recipe | Loaded | str | Path,
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """The preflight alone: resolve the recipe, try every stage on one batch, say the plan.

    Raises:
        AttarError: what ``run`` would raise before its first step.
    """
    return _checked(_loaded(recipe, overrides, plugins))[1]


def _checked(loaded: Loaded) -> tuple[Job, dict[str, Any]]:
    """The job, tried out; what is wrong with an option is then wrong with the recipe."""
    try:
        job = prepare(loaded.recipe)
        return job, check_job(job)
    except UsageError as error:
        raise PreflightError(str(error)) from error


def _environment(loaded: Loaded, job: Job, ranks: Ranks) -> dict[str, str]:
    """What else a reader needs to repeat the run."""
    told = {f"plugin {name}": digest for name, digest in loaded.plugins.items()}
    if job.weights is not None:
        told["teachers' weights"] = ", ".join(f"{weight:.6f}" for weight in job.weights)
    return {
        "attar": attar.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "device": str(resolve_device(job.recipe.device)),
        "ranks": str(ranks.world),
        **told,
    }


def _loaded(
    recipe: Recipe | Loaded | str | Path, overrides: Sequence[str], plugins: Sequence[str]
) -> Loaded:
    if isinstance(recipe, Loaded):
        return recipe
    if isinstance(recipe, Recipe):
        if overrides or plugins:
            raise UsageError("overrides and plugins are for recipe files; change the Recipe itself")
        return Loaded(recipe, {"python": repr(recipe)}, "recipe")
    return load_recipe(recipe, overrides=overrides, plugins=plugins)


def _teach(desk: Desk) -> tuple[Desk, Arm]:
    """Train the teachers that are not loaded, and refuse what has learnt nothing."""
    arm, job = Arm(), desk.job
    if job.momentum is not None:
        desk.say(
            f"teacher    the student's own moving average, momentum {job.momentum}; as it moves, "
            "the verdict compares student and baseline alone"
        )
        return desk, arm
    done = [_fit_teacher(desk, m) for m in job.members if m.training is not None]
    if done:
        arm.seconds.append(sum(each.seconds for each in done))
    if (weights := learned(job)) is not None:
        job = replace(job, weights=tuple(desk.ranks.first(weights)))
        desk = replace(desk, job=job)
        desk.say(f"{'weights':<10} {', '.join(f'{weight:.3f}' for weight in weights)}")
    if done:
        check_floor(job)
    for member in job.members:
        if member.training is not None:
            desk.save(member.model, member.folder, task=job.task.describe())
    arm.rows.append(desk.rows(job.teacher))
    desk.say(
        f"{job.elder:<10} {_score(desk, job.teacher)} on validation{_took(arm.mean_seconds())}"
    )
    return desk, arm


def _fit_teacher(desk: Desk, member: Member) -> Fit:
    job = desk.job
    done = fit(
        member.model,
        None,
        job.parts.teacher,
        job.task,
        validation=job.validation,
        home=desk.home(arm="teacher", seed=member.seed),
        label=member.folder,
        progress=desk.progress,
        **(member.training or {}),
    )
    if len(job.members) > 1:
        score = _score(desk, member.model)
        desk.say(f"{member.folder:<10} {score} on validation{_took(done.seconds)}")
    return done


def _students(desk: Desk, loaded: Loaded) -> dict[str, Arm]:
    arms = {"start": Arm(), "baseline": Arm(), "distilled": Arm()}
    job = desk.job
    for number in range(job.recipe.seeds):
        start = job.student(number)
        for name in ("baseline", "distilled"):
            if name == "baseline" and not job.labelled:
                arms["start"].rows.append(desk.rows(start))
                continue
            student = _train_arm(desk, arms[name], name, number, copied(start))
            of = f" {number + 1}/{job.recipe.seeds}" if job.recipe.seeds > 1 else ""
            took = _took(arms[name].seconds[-1])
            called = job.called if name == "distilled" else name
            desk.say(f"{called + of:<16}{_score(desk, student)} on validation{took}")
    for name in ("baseline", "distilled"):
        if arms[name].finals:
            _save_best(desk, arms[name], "student" if name == "distilled" else name, loaded)
    return arms


def _train_arm(desk: Desk, arm: Arm, name: str, number: int, start: nn.Module) -> nn.Module:
    """Go through every stage, evaluate what comes out and return it."""
    job = desk.job
    seed = job.recipe.seed + number
    fits: list[Fit] = []
    taught = name == "distilled"
    for turn, learner, before in job.learners(number, start, with_teacher=taught):
        index = len(fits)
        teacher, options = stage_of(job, turn, learner, before, with_teacher=taught)
        done = fit(
            learner,
            teacher,
            rows_of_stage(job, turn.stage, with_teacher=teacher is not None),
            job.task,
            validation=job.validation,
            home=desk.home(arm=name, seed=seed, stage=index),
            label=f"{job.called if name == 'distilled' else name} {number + 1}/{job.recipe.seeds}",
            progress=desk.progress,
            seed=seed,
            **options,
        )
        fits.append(done)
        _say_of_stage(desk, turn, learner, number, name)
        arm.teacher_seconds += done.teacher_seconds
    arm.finals.append(fits[-1])
    arm.seconds.append(sum(done.seconds for done in fits))
    student = fits[-1].student
    arm.rows.append(desk.rows(student))
    chosen = copy_of_state(student)
    student.load_state_dict(fits[-1].last)
    arm.last.append(desk.rows(student))
    student.load_state_dict(chosen)
    return student


def _say_of_stage(desk: Desk, turn: Turn, learner: nn.Module, number: int, name: str) -> None:
    """A word on a model that will not be judged."""
    if name == "distilled" and (turn.assistant is not None or turn.later):
        called = "assistant" if turn.assistant is not None else "generation"
        of = f" {number + 1}/{desk.job.recipe.seeds}" if desk.job.recipe.seeds > 1 else ""
        desk.say(f"{called + of:<16}{_score(desk, learner)} on validation")


def _save_best(desk: Desk, arm: Arm, folder: str, loaded: Loaded) -> None:
    """Keep the seed that validation likes best; the verdict is about all of them."""
    job, best = desk.job, _best(desk, arm)
    told: dict[str, Any] = {"seed": job.recipe.seed + best, "data": loaded.full.get("data")}
    if folder == "student":
        told["card"] = _card(job, loaded, best)
    desk.save(arm.finals[best].student, folder, task=job.task.describe(), **told)


def _card(job: Job, loaded: Loaded, best: int) -> dict[str, str]:
    seed = job.recipe.seed + best
    return exports.told(job, name=loaded.name, data=_described(job), seed=seed)


def _best(desk: Desk, arm: Arm) -> int:
    task = desk.job.task
    sign = 1 if task.higher_is_better else -1
    scores = [sign * f.history[f.kept_epoch][task.metric] for f in arm.finals]
    return scores.index(max(scores))


def _figures(desk: Desk, taught: Arm, arms: dict[str, Arm]) -> dict[str, Any]:
    job = desk.job
    rows = {name: arm.rows for name, arm in {job.elder: taught, **arms}.items() if arm.rows}
    best = _best(desk, arms["distilled"])
    return figures(job.task, job.test, rows, log=desk.run.folder / "metrics.jsonl", best=best)


def _exported(desk: Desk, loaded: Loaded, arm: Arm, verdict: Verdict) -> list[dict[str, Any]]:
    """The saved student as files for others, where the recipe asks for them; by rank 0 alone."""
    job, best = desk.job, _best(desk, arm)
    if job.recipe.exporting is None:
        return []
    told: list[dict[str, Any]] = []
    with desk.ranks.together():
        if desk.ranks.main:
            made = exports.export_student(
                job,
                arm.finals[best].student,
                desk.run.folder,
                card=_card(job, loaded, best),
                verdict=verdict,
            )
            told = [artefact.to_json() for artefact in made]
            desk.say(f"export     {exports.summary(made)}")
    return desk.ranks.first(told)


def _judged(desk: Desk, taught: Arm, arms: dict[str, Arm]) -> Verdict:
    job = desk.job
    distilled, baseline = arms["distilled"], arms["baseline"]
    timed = {job.elder: taught, "baseline": baseline, "distilled": distilled}
    seconds = {name: arm.mean_seconds() for name, arm in timed.items()}
    return judge(
        job.task,
        teacher=taught.rows[0] if job.distils and taught.rows else None,
        others={} if job.distils else {job.elder: taught.rows},
        baseline=baseline.rows or None,
        distilled=distilled.rows,
        last=distilled.last if job.chooses else None,
        start=arms["start"].rows or None,
        costs=_costs(desk, arms),
        seconds={name: took for name, took in seconds.items() if took is not None},
        teacher_share=distilled.teacher_seconds / sum(distilled.seconds) if job.distils else None,
        retain=job.recipe.goal.retain if job.recipe.goal else None,
        called=job.called,
        saw=job.saw,
        seed=job.recipe.seed,
    )


def _costs(desk: Desk, arms: dict[str, Arm]) -> dict[str, Cost]:
    job = desk.job
    inputs = job.test.rows(torch.arange(min(64, len(job.test))))["inputs"]
    run = desk.run.folder
    models: dict[str, nn.Module] = {job.elder: job.teacher} if job.members else {}
    folders: dict[str, Path] = {}
    if len(job.members) == 1:
        loaded = job.members[0].loaded
        folders[job.elder] = run / "teacher" if loaded is None else Path(loaded)
    for name, folder in (("baseline", "baseline"), ("distilled", "student")):
        if arms[name].finals:
            models[name], folders[name] = arms[name].finals[-1].student, run / folder
    files = {name: folder / "model.safetensors" for name, folder in folders.items()}
    there = {name: file for name, file in files.items() if file.is_file()}
    measured: dict[str, Any] = {}
    if desk.ranks.main:  # alone, so that no other rank is in the way
        found = costs(models, inputs, device=job.recipe.device, files=there)
        measured = {name: each.to_json() for name, each in found.items()}
    return {name: Cost(**each) for name, each in desk.ranks.first(measured).items()}


def _score(desk: Desk, model: nn.Module) -> str:
    job = desk.job
    value = job.task.primary(desk.rows(model, job.validation))
    shown = f"{100 * value:.2f} %" if job.task.metric == "accuracy" else f"{value:.4g}"
    return f"{job.task.metric} {shown}"


def _took(seconds: float | None) -> str:
    return f", trained in {seconds:.1f} s" if seconds else ""


def _described(job: Job) -> str:
    train = f"{len(job.train):,} train"
    if job.recipe.labels is not None:
        train += f", {len(job.parts.labelled):,} of them labelled"
    held = f"{len(job.validation):,} validation, {len(job.test):,} test"
    return f"{job.called_data}: {train}, {held}"
