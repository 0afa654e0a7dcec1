"""A recipe's data, task and models, and who learns from whom; nothing is trained here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from attar.data import Source
from attar.evaluation import Seen, collect
from attar.models import Group, reuse_head
from attar.recipes.changes import changed, ending_of
from attar.recipes.parts import Parts, parted
from attar.recipes.recipe import Recipe, Stage, TeacherPlan, verb
from attar.recipes.rooms import SUPPLIED
from attar.recipes.teachers import (
    Member,
    asked_of,
    judged_by,
    made_model,
    members_of,
    seeded,
    taught_task,
)
from attar.recipes.turns import Turn, reuses_head
from attar.runtime import PreflightError
from attar.tasks import Regression, SentenceEmbedding, Task
from attar.tasks.task import Rows
from attar.teachers import EMA, Ensemble, Teacher, learned_weights
from attar.training import Term, distill, train
from attar.training.peers import between, labels_of

# What is said of a student that knows something; one that starts at random has no use for it.
INHERITED = {"init", "freeze", "unfreeze_every", "layer_decay", "frozen_batch_norm", "l2_sp"}


# Keeps the starts of one seed's students apart from those of other seeds; a generator of the CPU
# reads the lower 32 bits of a seed.
GENERATION = 0x9E3779B1


Seeing = Callable[[Stage, nn.Module], None]


def unseen(stage: Stage, model: nn.Module) -> None:
    """Nobody looks at what a change has made."""


@dataclass(frozen=True)
class Job:
    """A recipe whose data, task and models exist: ready to be checked and run."""

    recipe: Recipe
    parts: Parts
    task: Task
    members: tuple[Member, ...]
    common: dict[str, Any]
    weights: tuple[float, ...] | None = None  # of several teachers, once they are learned

    @property
    def train(self) -> Source:
        """The rows of which the student asks the teacher."""
        return self.parts.student

    @property
    def validation(self) -> Source:
        """The rows that choose epochs."""
        return self.parts.validation

    @property
    def test(self) -> Source:
        """The rows that only report."""
        return self.parts.test

    @property
    def asked(self) -> Teacher | Ensemble:
        """The teacher, ready to be opened by a stage."""
        assert self.members, "a teacher that follows the student is made for each stage"
        return asked_of(self.recipe.teacher, self.members, self.task, self.weights)

    @property
    def teacher(self) -> nn.Module:
        """The teacher as one module, which is what a verdict judges."""
        model = self.asked.model
        assert model is not None
        return model

    @property
    def momentum(self) -> float | None:
        """Of the student's moving average, where that is the teacher."""
        plan = self.recipe.teacher
        return plan.ema if isinstance(plan, TeacherPlan) else None

    @property
    def peers(self) -> int:
        """How many other students teach the one that is judged, and learn from it."""
        plan = self.recipe.teacher
        return (plan.mutual or 1) - 1 if isinstance(plan, TeacherPlan) else 0

    @property
    def moving(self) -> str | None:
        """What teaches, in words, where it is no fixed model."""
        plan = self.recipe.teacher
        return plan.moving if isinstance(plan, TeacherPlan) else None

    @property
    def reuses_head(self) -> bool:
        """Whether the student that is judged ends in its teacher's classifier."""
        return reuses_head(self.recipe.turns)

    @property
    def teaches_first(self) -> bool:
        """Whether a model that teaches is trained here, on labels."""
        return any(member.training is not None for member in self.members)

    @property
    def distils(self) -> bool:
        """Whether a stage asks the teacher; else the student only inherits weights."""
        return any(verb(stage) is distill for stage in self.recipe.stages)

    @property
    def chooses(self) -> bool:
        """Whether validation chose the epoch of the student that is judged."""
        if self.recipe.ending:
            return False
        stage = self.recipe.trainings[-1]
        options = stage.keywords if isinstance(stage, partial) else {}
        return options.get("keep", "best") == "best"

    @property
    def called(self) -> str:
        """What the student is called when it is done."""
        return "distilled" if self.distils else "transferred"

    @property
    def elder(self) -> str:
        """What the recipe's teacher is called: where none is asked, it is a source of weights."""
        return "teacher" if self.distils else "source"

    @property
    def called_data(self) -> str:
        """The name of the data without that of a part: "photos train" and "photos test"."""
        names = [source.name.split() for source in (self.train, self.test)]
        return " ".join(w for w in names[0] if w in names[1]) or self.train.name

    @property
    def labelled(self) -> bool:
        """Whether there can be a baseline: the same student on labels alone."""
        return self.parts.alone.labels is not None

    @property
    def saw(self) -> dict[str, Seen]:
        """How many rows each arm learns from, and how many of them have labels."""
        alone, shown = _seen(self.parts.labelled), _seen(self.train)
        # What a stage on labels alone adds.
        more = alone.labelled if any(verb(s) is not distill for s in self.recipe.trainings) else 0
        found = {self.elder: _seen(self.parts.teacher)} if self.teaches_first else {}
        found["distilled"] = Seen(shown.rows, max(shown.labelled, more))
        return found | ({"baseline": alone} if self.labelled else {})

    def student(self, number: int, later: int = 0) -> nn.Module:
        """The student before training, for the seed of this *number*.

        Args:
            later: how many students start anew after it; each has another start.
        """
        made = self.recipe.students[0]
        if isinstance(made, nn.Module):
            return copied(made)
        return self.made(made, number, later)

    def made(self, make: Callable[..., nn.Module], number: int, later: int) -> nn.Module:
        """A model for the data, its random start of the seed of this *number*."""
        seed = self.recipe.seed + number + later * GENERATION
        giver = self.members[0].model if len(self.members) == 1 else None
        return seeded(seed, partial(made_model, make, self.train, self.task, giver))

    def learners(
        self, number: int, start: nn.Module, *, with_teacher: bool, seen: Seeing = unseen
    ) -> Iterator[tuple[Turn, nn.Module, nn.Module | None]]:
        """Who learns in each stage, and whom the stage before left behind.

        The student that starts last starts as *start*; the baseline is one student throughout.
        Students that teach each other are one module, a ``Group``, of which *start* is the first.
        Of a stage that is taught by the unchanged student, that is who was left behind.

        Args:
            seen: is told each stage that changes the student, and what came of it.
        """
        own, last = start, None
        for index, turn in enumerate(self.recipe.turns):
            learner = own
            if with_teacher and turn.assistant is not None:
                learner = self.made(turn.assistant, number, index)
            elif with_teacher and turn.later is not None:
                learner = own = self.student(number, turn.later) if turn.later else start
                if self.peers:
                    learner = own = self._group(number, start)
            if turn.changes:
                first = turn.place - len(turn.changes)
                last, learner = learner, self.changed(learner, turn.changes, number, seen, first)
                own = learner
            if with_teacher and turn.reuse_head:
                learner = self._reusing(learner, last if turn.previous else None, number)
                own = learner if turn.assistant is None else own
            yield turn, learner, last
            last = learner

    def changed(
        self,
        learner: nn.Module,
        stages: Sequence[Stage],
        number: int,
        seen: Seeing = unseen,
        first: int | None = None,
    ) -> nn.Module:
        """A copy of who learns, its structure changed by each of the *stages*.

        Args:
            first: the place of the first of them in the recipe; None where they are its ending.
        """
        if first is None:
            first = ending_of(self.recipe.stages)
        for index, stage in enumerate(stages, 1):
            where = f"stage {first + index - 1}"
            if isinstance(learner, Group):
                raise PreflightError(
                    f"{where}: {verb(stage).__name__} changes one student, and students that teach "
                    "each other learn as a whole; give the recipe a teacher that does not learn"
                )
            make = partial(changed, learner, stage, self.parts.labelled, self.task, where)
            learner = seeded(self.recipe.seed + number + index, make)
            seen(stage, learner)
        return learner

    def _group(self, number: int, start: nn.Module) -> Group:
        if isinstance(self.recipe.students[0], nn.Module):
            raise PreflightError(
                "students that teach each other start from different weights, and copies of one "
                "module do not; give a function that makes it: student=lambda: MyNet()"
            )
        others = [self.student(number, peer) for peer in range(1, self.peers + 1)]
        return Group([start, *others], self.task)

    def _reusing(self, learner: nn.Module, before: nn.Module | None, number: int) -> nn.Module:
        """The student with a new projector and the classifier of its teacher."""
        teacher = self.teacher if before is None else before
        inputs = self.train.rows(torch.arange(min(4, len(self.train))))["inputs"]
        # Another start than any student's of this seed.
        seed = self.recipe.seed + number + len(self.recipe.turns) * GENERATION
        return seeded(seed, lambda: reuse_head(learner.cpu(), teacher.cpu(), inputs))


def prepare(recipe: Recipe) -> Job:
    """Read the data, settle the task, make or load the teacher; trains nothing."""
    splits = recipe.data if isinstance(recipe.data, tuple) else recipe.data()
    parts = parted(splits, recipe)
    task = _task(recipe).fitted(parts.labelled)
    told = isinstance(task, SentenceEmbedding) and parts.test.labels is None
    for part in () if told else (parts.validation, parts.test):
        if part.labels is None:
            raise PreflightError(f"{part.name}: has no labels, which a verdict needs")
        task.fitted(part)
    common = {
        "device": recipe.device,
        "precision": recipe.precision,
        "parallel": recipe.parallel,
    }
    members = members_of(recipe, parts, task, common)
    parts = judged_by(members, parts, task, recipe.device) if told else parts
    return Job(recipe, parts, task, members, common)


def _task(recipe: Recipe) -> Task:
    """The recipe's task; a loaded teacher's regression keeps the units it was trained in."""
    task = recipe.task if isinstance(recipe.task, Task) else recipe.task()
    taught = taught_task(recipe.teacher)
    if isinstance(task, Regression) and isinstance(taught, Regression) and task.mean is None:
        return taught
    return task


def judged(learner: nn.Module) -> nn.Module:
    """The student of a stage: of several that teach each other, the first."""
    return learner[0] if isinstance(learner, Group) else learner


def copied(model: nn.Module) -> nn.Module:
    """A copy of a student that was given as a module: each seed and arm starts from one."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise PreflightError(
            f"the student, a {type(model).__name__}, cannot be copied ({error}), but the baseline "
            "starts from a copy; give a function that makes it: student=lambda: MyNet()"
        ) from error


def rows_of_stage(job: Job, stage: Any, *, with_teacher: bool) -> Source:
    """What a stage learns from, taught or alone."""
    if verb(stage) is not distill:
        return job.parts.labelled
    return job.parts.student if with_teacher else job.parts.alone


def _seen(source: Source) -> Seen:
    return Seen(len(source), 0 if source.labels is None else len(source))


def stage_of(
    job: Job, turn: Turn, learner: nn.Module, before: nn.Module | None, *, with_teacher: bool
) -> tuple[Any, dict[str, Any]]:
    """The teacher and options of a stage; without the teacher it is the baseline's stage.

    Where no stage asks the teacher for anything, what the student inherits is what is judged: the
    baseline then starts at random, and all of it learns from the first step.
    """
    options = dict(turn.stage.keywords) if isinstance(turn.stage, partial) else {}
    function = verb(turn.stage)
    if function not in (distill, train):
        called = getattr(function, "__name__", function)
        raise PreflightError(
            f"a stage is distill, train, export or one that changes the student, not {called}"
        )
    if taken := options.keys() & SUPPLIED["stages"]:
        raise PreflightError(f"'{min(taken)}' is the recipe's own and cannot stand in a stage")
    if function is distill and not options.get("terms"):
        raise PreflightError("a distill stage has no terms: nothing would be asked of the teacher")
    if with_teacher and job.peers:
        options = _mutual(job, function, options)
    # A loss with weights of its own starts anew in every seed.
    options["terms"] = [_fresh(term) for term in options.get("terms", ())]
    if with_teacher and job.peers:
        return None, {**job.common, **options}
    if function is not distill or not with_teacher:
        left_out = {"terms", "label_weight"}
        if not with_teacher and not job.distils:
            left_out |= INHERITED
        options = {k: v for k, v in options.items() if k not in left_out}
        return None, {"label_weight": 1.0, **job.common, **options}
    return _asked(job, turn, learner, before), {**job.common, **options}


def _mutual(job: Job, function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a stage in which every student learns from labels and from the others."""
    defaults = inspect.signature(distill).parameters
    if told := {name for name in INHERITED if options.get(name)}:
        raise PreflightError(
            f"'{min(told)}' is of one student, and students that teach each other start from "
            "different weights and learn as a whole; leave it out"
        )
    count, main = job.peers + 1, job.task.outputs[0]
    weight = options.get("label_weight", defaults["label_weight"].default)
    if function is not distill:
        weight, options = 1.0, {**options, "terms": ()}
    terms = between(options["terms"], count, main)
    labels = labels_of(job.task, count, weight) if weight else []
    return {**options, "terms": terms + labels, "label_weight": weight}


def _asked(job: Job, turn: Turn, learner: nn.Module, before: nn.Module | None) -> Any:
    if (turn.previous or turn.unchanged) and before is not None:
        return Teacher(before, job.task)
    return job.asked if job.momentum is None else EMA(learner, job.task, momentum=job.momentum)


def _fresh(term: Term) -> Term:
    return (
        replace(term, loss=copy.deepcopy(term.loss)) if isinstance(term.loss, nn.Module) else term
    )


def learned(job: Job) -> tuple[float, ...] | None:
    """The weights of the members by the validation rows, where the recipe asks for them."""
    plan = job.recipe.teacher
    if not isinstance(plan, TeacherPlan) or plan.weighting != "learned":
        return None
    models = [member.model for member in job.members]
    return learned_weights(models, job.validation, job.task, device=job.recipe.device)


def rows_of(job: Job, model: nn.Module, source: Source | None = None) -> Rows:
    return collect(model, source or job.test, job.task, device=job.recipe.device)
