"""The main job: from a recipe to a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attar.data import Source
from attar.evaluation import Cost, Verdict, Verdicts, collect, costs, judge
from attar.evaluation.curves import figures
from attar.models import Group, merged, save
from attar.recipes import exports
from attar.recipes.caching import check_cache, remembering
from attar.recipes.job import (
    Job,
    check_floor,
    check_job,
    check_teacher,
    copied,
    judged,
    learned,
    prepare,
    rows_of_stage,
    stage_of,
)
from attar.recipes.recipe import Loaded, Recipe, load_recipe
from attar.recipes.resume import check_resumable
from attar.recipes.teachers import Member, lost_by
from attar.recipes.told import described, environment, warn
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
)
from attar.tasks.task import Rows
from attar.teachers import Filling
from attar.training import Fit, Home, copy_of_state, fit

Say = Callable[[str], None]


@dataclass
class Arm:
    """What came of one way to train a model, a row a seed: the chosen epoch's and the last's.

    ``kept`` are the models that taught the student and are no longer trained, by their folders.
    """

    finals: list[Fit] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    last: list[Rows] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: list[dict[str, nn.Module]] = field(default_factory=list)
    teacher_seconds: float = 0.0
    caches: dict[Path, int] = field(default_factory=dict)  # and how many rows were asked about

    def mean_seconds(self) -> float | None:
        """Training time of one run; None where nothing was trained."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Desk:
    """A job and what is at hand while it is done.

    ``root`` is the folder of the whole run: the teacher lies in it, the cache beside it.
    """

    job: Job
    run: Run
    root: Path
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
) -> Verdict | Verdicts:
    """Do what a recipe says and judge the result on the test split.

    Trains the teacher (or loads it), then for each seed the student without a teacher and the
    student with it, from the same start, on the same data, for the same steps. The validation
    split chooses epochs; the test split only reports.

    Of a recipe with a list of students, one teacher teaches each, and what is returned is a
    ``Verdicts``.

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
        resume = allowed(ranks, place, loaded, resume, allow)
        if loaded.recipe.many:
            from attar.recipes.many import run_many  # which is made of what is here

            hand = partial(Desk, ranks=ranks, allow=tuple(allow), say=say, progress=progress)
            return run_many(loaded, place, resume, hand)
        job, plans = checked(loaded)
        with begun(ranks, place, loaded, plans, resume=resume) as home:
            say(f"data       {described(job)}")
            warn(plans, say)
            desk = Desk(job, home, place, ranks, resume, tuple(allow), say, progress)
            return finish(*teach(desk), loaded)[0]


@contextmanager
def begun(
    ranks: Ranks, place: Path, loaded: Loaded, plans: dict[str, Any], *, resume: bool
) -> Iterator[Run]:
    """A run folder that says what is going to be done."""
    with opened(ranks, place, resume=resume) as home:
        home.write("recipe.json", loaded.full)
        home.write("plan.json", plans)
        if loaded.plugins:
            home.write("plugins.json", loaded.plugins)
        yield home


def finish(desk: Desk, taught: Arm, loaded: Loaded) -> tuple[Verdict, dict[str, Arm]]:
    """All after the teacher: the students, the verdict and the page."""
    arms = _students(desk, loaded)
    verdict = _judged(desk, taught, arms)
    made = {
        "environment": environment(loaded, desk.job, desk.ranks),
        "exports": _exported(desk, loaded, arms["distilled"], verdict),
    }
    desk.run.write("verdict.json", verdict.to_json() | made)
    if desk.ranks.main:
        desk.run.write("figures.json", _figures(desk, taught, arms))
        page(desk.run.folder)
    return verdict, arms


def allowed(ranks: Ranks, place: Path, loaded: Loaded, resume: bool, allow: Sequence[str]) -> bool:
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
    loaded = _loaded(recipe, overrides, plugins)
    if loaded.recipe.many:
        from attar.recipes.many import check_many

        return check_many(loaded)
    return checked(loaded)[1]


def checked(loaded: Loaded) -> tuple[Job, dict[str, Any]]:
    """The job, tried out; what is wrong with an option is then wrong with the recipe."""
    try:
        job = prepare(loaded.recipe)
        check_cache(job)
        check_teacher(job)
        return job, check_job(job)
    except UsageError as error:
        raise PreflightError(str(error)) from error


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


def teach(desk: Desk) -> tuple[Desk, Arm]:
    """Train the teachers that are not loaded, and refuse what has learnt nothing."""
    arm, job = Arm(), desk.job
    if job.moving is not None:
        desk.say(
            f"teacher    {job.moving}; as it moves, the verdict compares student and baseline alone"
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
    for lost in lost_by(job.teacher):
        desk.say(f"{'note':<10} {lost}")
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
    for cache, count in arms["distilled"].caches.items():
        desk.say(f"cache      {cache}: the teacher was asked about {count:,} rows")
    for name in ("baseline", "distilled"):
        if arms[name].finals:
            _save_best(desk, arms[name], "student" if name == "distilled" else name, loaded)
    return arms


def _train_arm(desk: Desk, arm: Arm, name: str, number: int, start: nn.Module) -> nn.Module:
    """Go through every stage, evaluate what comes out and return it."""
    job = desk.job
    seed = job.recipe.seed + number
    fits: list[Fit] = []
    kept: dict[str, nn.Module] = {}
    taught = name == "distilled"
    for turn, learner, before in job.learners(number, start, with_teacher=taught):
        index = len(fits)
        teacher, options = stage_of(job, turn, learner, before, with_teacher=taught)
        teacher = remembering(job, turn, teacher, options, desk.root, desk.ranks)
        done = fit(
            learner,
            teacher,
            rows_of_stage(job, turn.stage, with_teacher=taught),
            job.task,
            validation=job.validation,
            home=desk.home(arm=name, seed=seed, stage=index),
            label=f"{job.called if name == 'distilled' else name} {number + 1}/{job.recipe.seeds}",
            progress=desk.progress,
            seed=seed,
            **options,
        )
        fits.append(done)
        if taught:
            _leave(kept, turn, learner)
            _say_of_stage(desk, turn, learner, number)
        arm.teacher_seconds += done.teacher_seconds
        if isinstance(teacher, Filling):
            arm.caches[teacher.folder] = arm.caches.get(teacher.folder, 0) + teacher.count
    arm.finals.append(fits[-1])
    arm.seconds.append(sum(done.seconds for done in fits))
    learner = fits[-1].student
    student = judged(learner)
    arm.kept.append(_teachers(kept, learner))
    arm.rows.append(desk.rows(student))
    chosen = copy_of_state(learner)
    learner.load_state_dict(fits[-1].last)
    arm.last.append(desk.rows(student))
    learner.load_state_dict(chosen)
    return student


def _leave(kept: dict[str, nn.Module], turn: Turn, learner: nn.Module) -> None:
    """Note who has learnt: a new model under a name of its own, one that goes on under its last."""
    kind = "generation" if turn.assistant is None else "assistant"
    count = sum(name.startswith(kind) for name in kept)
    goes_on = turn.assistant is None and turn.later is None
    kept[f"{kind}-{count - goes_on}"] = learner


def _teachers(kept: dict[str, nn.Module], last: nn.Module) -> dict[str, nn.Module]:
    """Who was left behind on the way to the last student, or learnt beside it."""
    found = {name: model for name, model in kept.items() if model is not last}
    peers = list(last)[1:] if isinstance(last, Group) else []
    return found | {f"peer-{number}": model for number, model in enumerate(peers, 1)}


def _say_of_stage(desk: Desk, turn: Turn, learner: nn.Module, number: int) -> None:
    """A word on a model that will not be judged."""
    if turn.assistant is not None or turn.later:
        called = "assistant" if turn.assistant is not None else "generation"
        of = f" {number + 1}/{desk.job.recipe.seeds}" if desk.job.recipe.seeds > 1 else ""
        desk.say(f"{called + of:<16}{_score(desk, learner)} on validation")


def _save_best(desk: Desk, arm: Arm, folder: str, loaded: Loaded) -> None:
    """Keep the seed that validation likes best; the verdict is about all of them."""
    job, best = desk.job, _best(desk, arm)
    told: dict[str, Any] = {"seed": job.recipe.seed + best, "data": loaded.full.get("data")}
    for name, model in arm.kept[best].items():
        desk.save(model, name, task=job.task.describe(), **told)
    if folder == "student":
        told["card"] = _card(job, loaded, best)
    desk.save(judged(arm.finals[best].student), folder, task=job.task.describe(), **told)


def _card(job: Job, loaded: Loaded, best: int) -> dict[str, str]:
    seed = job.recipe.seed + best
    return exports.told(job, name=loaded.name, data=described(job), seed=seed)


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
                judged(arm.finals[best].student),
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
    asked = job.distils and not job.peers
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
        teacher_share=distilled.teacher_seconds / sum(distilled.seconds) if asked else None,
        retain=job.recipe.goal.retain if job.recipe.goal else None,
        called=job.called,
        taught_by=job.moving,
        reuses_head=job.reuses_head,
        saw=job.saw,
        seed=job.recipe.seed,
    )


def _costs(desk: Desk, arms: dict[str, Arm]) -> dict[str, Cost]:
    models, folders = elder(desk)
    for name, folder in (("baseline", "baseline"), ("distilled", "student")):
        if arms[name].finals:
            models[name] = judged(arms[name].finals[-1].student)
            folders[name] = desk.run.folder / folder
    return measured(desk, models, folders)


def elder(desk: Desk) -> tuple[dict[str, nn.Module], dict[str, Path]]:
    """The teacher and the folder that it lies in, by its name, where its cost can be known."""
    job = desk.job
    if not job.members or not any(True for _ in job.teacher.parameters()):
        return {}, {}
    if len(job.members) > 1:
        return {job.elder: job.teacher}, {}
    loaded = job.members[0].loaded
    folder = desk.root / "teacher" if loaded is None else Path(loaded)
    return {job.elder: job.teacher}, {job.elder: folder}


def measured(desk: Desk, models: dict[str, nn.Module], folders: dict[str, Path]) -> dict[str, Cost]:
    """What each costs, timed in turns; known to all ranks."""
    job = desk.job
    inputs = job.test.rows(torch.arange(min(64, len(job.test))))["inputs"]
    files = {name: folder / "model.safetensors" for name, folder in folders.items()}
    there = {name: file for name, file in files.items() if file.is_file()}
    told: dict[str, Any] = {}
    if desk.ranks.main:  # alone, so that no other rank is in the way
        models = {name: merged(model) for name, model in models.items()}  # as they are saved
        found = costs(models, inputs, device=job.recipe.device, files=there)
        told = {name: each.to_json() for name, each in found.items()}
    return {name: Cost(**each) for name, each in desk.ranks.first(told).items()}


def _score(desk: Desk, model: nn.Module) -> str:
    job = desk.job
    value = job.task.primary(desk.rows(model, job.validation))
    shown = f"{100 * value:.2f} %" if job.task.metric == "accuracy" else f"{value:.4g}"
    return f"{job.task.metric} {shown}"


def _took(seconds: float | None) -> str:
    return f", trained in {seconds:.1f} s" if seconds else ""
