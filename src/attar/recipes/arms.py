"""The models of a run, trained one after the other: teachers, and the student in each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from attar.data import Source
from attar.evaluation import collect
from attar.models import Group, save
from attar.recipes.caching import remembering
from attar.recipes.chain import Step, Steps, scored
from attar.recipes.changes import made_from
from attar.recipes.job import Job, Seeing, copied, judged, learned, rows_of_stage, stage_of, unseen
from attar.recipes.preflight import check_floor
from attar.recipes.teachers import Member, lost_by
from attar.recipes.turns import Turn
from attar.runtime import Ranks, Run
from attar.tasks.task import Rows
from attar.teachers import Filling
from attar.training import Fit, Home, copy_of_state, fit

Say = Callable[[str], None]


@dataclass
class Arm:
    """What came of one way to train a model, a row a seed: the chosen epoch's and the last's.

    ``kept`` are the models that taught the student and are no longer trained, by their folders.
    ``steps`` are what stages that change the student, and those between them, made of it.
    """

    finals: list[Fit] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    last: list[Rows] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: list[dict[str, nn.Module]] = field(default_factory=list)
    teacher_seconds: float = 0.0
    caches: dict[Path, int] = field(default_factory=dict)  # and how many rows were asked about
    steps: list[list[Step]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)  # the plan of a start made from the teacher

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


def students(desk: Desk) -> dict[str, Arm]:
    """Train the student of each seed: without the teacher, and with it."""
    arms = {"start": Arm(), "baseline": Arm(), "distilled": Arm()}
    job = desk.job
    for number in range(job.recipe.seeds):
        start = job.student(number)
        arms["distilled"].made = arms["distilled"].made or made_from(start)
        for name in ("baseline", "distilled"):
            if name == "baseline" and not job.labelled:
                arms["start"].rows.append(desk.rows(start))
                continue
            student = train_arm(desk, arms[name], name, number, copied(start))
            _evaluate(desk, arms[name])
            of = f" {number + 1}/{job.recipe.seeds}" if job.recipe.seeds > 1 else ""
            took = _took(arms[name].seconds[-1])
            called = job.called if name == "distilled" else name
            desk.say(f"{called + of:<16}{_score(desk, student)} on validation{took}")
    for cache, count in arms["distilled"].caches.items():
        desk.say(f"cache      {cache}: the teacher was asked about {count:,} rows")
    return arms


def train_arm(desk: Desk, arm: Arm, name: str, number: int, start: nn.Module) -> nn.Module:
    """Go through every stage and return the student; the test split is not looked at."""
    job = desk.job
    seed = job.recipe.seed + number
    fits: list[Fit] = []
    kept: dict[str, nn.Module] = {}
    taught = name == "distilled"
    steps = Steps(start, desk.say) if taught and job.recipe.changes else None
    seen = unseen if steps is None else steps.changed
    for turn, learner, before in job.learners(number, start, with_teacher=taught, seen=seen):
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
        if steps is not None:
            steps.trained(turn.stage, learner)
        if taught:
            _leave(kept, turn, learner)
            _say_of_stage(desk, turn, learner, number)
        arm.teacher_seconds += done.teacher_seconds
        if isinstance(teacher, Filling):
            arm.caches[teacher.folder] = arm.caches.get(teacher.folder, 0) + teacher.count
    arm.finals.append(_ended(desk, fits[-1], number, seen))
    arm.seconds.append(sum(done.seconds for done in fits))
    arm.kept.append(_teachers(kept, fits[-1].student))
    if steps is not None:
        arm.steps.append(steps.done)
    return judged(arm.finals[-1].student)


def _ended(desk: Desk, done: Fit, number: int, seen: Seeing) -> Fit:
    """What the last stages make of the student without training it, validated again."""
    job = desk.job
    if not job.recipe.ending:
        return done
    student = job.changed(done.student, job.recipe.ending, number, seen)
    found = {job.task.metric: job.task.primary(desk.rows(student, job.validation))}
    return replace(
        done,
        student=student,
        last=copy_of_state(student),
        history=[*done.history, found],
        kept_epoch=len(done.history),
    )


def _evaluate(desk: Desk, arm: Arm) -> None:
    """Ask the student that was trained last about the test split, and its last epoch too."""
    final = arm.finals[-1]
    learner, student = final.student, judged(final.student)
    arm.rows.append(desk.rows(student))
    chosen = copy_of_state(learner)
    learner.load_state_dict(final.last)
    arm.last.append(desk.rows(student))
    learner.load_state_dict(chosen)
    if arm.steps:
        task = desk.job.task
        first = len(arm.steps) == 1  # whose models are timed
        scored(arm.steps[-1], lambda model: float(task.primary(desk.rows(model))), keep=first)


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


def best_of(desk: Desk, arm: Arm) -> int:
    """The number of the seed that validation likes best."""
    task = desk.job.task
    sign = 1 if task.higher_is_better else -1
    scores = [sign * f.history[f.kept_epoch][task.metric] for f in arm.finals]
    return scores.index(max(scores))


def _score(desk: Desk, model: nn.Module) -> str:
    """The metric on validation, in words."""
    job = desk.job
    value = job.task.primary(desk.rows(model, job.validation))
    shown = f"{100 * value:.2f} %" if job.task.metric == "accuracy" else f"{value:.4g}"
    return f"{job.task.metric} {shown}"


def _took(seconds: float | None) -> str:
    return f", trained in {seconds:.1f} s" if seconds else ""
