"""The main job: from a recipe to a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from attar.evaluation import Cost, Verdict, Verdicts, costs, judge
from attar.evaluation.curves import figures
from attar.models import merged, save
from attar.recipes import chain, exports
from attar.recipes.arms import Arm, Desk, Say, best_of, students, teach
from attar.recipes.caching import check_cache
from attar.recipes.changes import notes
from attar.recipes.job import Job, judged, prepare
from attar.recipes.preflight import check_job, check_teacher
from attar.recipes.recipe import Loaded, Recipe, load_recipe
from attar.recipes.resume import check_resumable
from attar.recipes.told import described, environment, warn
from attar.reporting import page
from attar.runtime import PreflightError, Ranks, Run, UsageError, check_free, connect, opened


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
        if loaded.recipe.search is not None:
            say("search     is left out: this is the recipe as it stands; attar search does it")
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
    arms = students(desk)
    for name in ("baseline", "distilled"):
        if arms[name].finals:
            _save_best(desk, arms[name], "student" if name == "distilled" else name, loaded)
    found = _costs(desk, arms)
    verdict = _judged(desk, taught, arms, found)
    made: dict[str, Any] = {
        "environment": environment(loaded, desk.job, desk.ranks, arms["distilled"].made),
        "exports": _exported(desk, loaded, arms["distilled"], verdict),
    }
    if steps := arms["distilled"].steps:
        made["chain"] = chain.told(desk.job.task, verdict, steps, found, made["exports"])
    told = verdict.to_json()
    recipe = desk.job.recipe
    limits = recipe.goal.limits if recipe.goal else {}
    told["notes"] = [
        *notes(recipe.stages),
        *exports.notes(limits, made["exports"]),
        *told["notes"],
    ]
    desk.run.write("verdict.json", told | made)
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

    Of a recipe in a file that searches, every value of its space is tried too.

    Raises:
        AttarError: what ``run`` would raise before its first step.
    """
    loaded = _loaded(recipe, overrides, plugins)
    if loaded.recipe.search is not None and isinstance(recipe, str | Path):
        from attar.recipes.search import check_search

        return check_search(recipe, overrides, plugins)
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


def _save_best(desk: Desk, arm: Arm, folder: str, loaded: Loaded) -> None:
    """Keep the seed that validation likes best; the verdict is about all of them."""
    job, best = desk.job, best_of(desk, arm)
    told: dict[str, Any] = {"seed": job.recipe.seed + best, "data": loaded.full.get("data")}
    for name, model in arm.kept[best].items():
        desk.save(model, name, task=job.task.describe(), **told)
    if folder == "student":
        told["card"] = _card(job, loaded, best)
    desk.save(judged(arm.finals[best].student), folder, task=job.task.describe(), **told)


def _card(job: Job, loaded: Loaded, best: int) -> dict[str, str]:
    seed = job.recipe.seed + best
    return exports.told(job, name=loaded.name, data=described(job), seed=seed)


def _figures(desk: Desk, taught: Arm, arms: dict[str, Arm]) -> dict[str, Any]:
    job = desk.job
    rows = {name: arm.rows for name, arm in {job.elder: taught, **arms}.items() if arm.rows}
    best = best_of(desk, arms["distilled"])
    return figures(job.task, job.test, rows, log=desk.run.folder / "metrics.jsonl", best=best)


def _exported(desk: Desk, loaded: Loaded, arm: Arm, verdict: Verdict) -> list[dict[str, Any]]:
    """The saved student as files for others, where the recipe asks for them; by rank 0 alone."""
    job, best = desk.job, best_of(desk, arm)
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


def _judged(desk: Desk, taught: Arm, arms: dict[str, Arm], found: dict[str, Cost]) -> Verdict:
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
        costs={name: each for name, each in found.items() if not name.startswith("step ")},
        seconds={name: took for name, took in seconds.items() if took is not None},
        teacher_share=distilled.teacher_seconds / sum(distilled.seconds) if asked else None,
        retain=job.recipe.goal.retain if job.recipe.goal else None,
        limits=job.recipe.goal.limits if job.recipe.goal else None,
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
    steps = arms["distilled"].steps
    between = chain.models_of(steps[0]) if steps else {}
    with TemporaryDirectory() as drafts:  # whose files tell how large they are on disk
        for name, model in between.items():
            folders[name] = Path(drafts, name)
            if desk.ranks.main:
                save(model, folders[name])
        return measured(desk, models | between, folders)


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
