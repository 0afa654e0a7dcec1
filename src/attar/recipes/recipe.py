"""The recipe: the typed tree that a YAML file parses into, or that Python builds."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from torch import nn

from attar.data import Data, Splits
from attar.exporting import export
from attar.models.types import Model
from attar.recipes import document as documents
from attar.recipes.changes import changes
from attar.recipes.resolve import Resolver
from attar.recipes.rooms import rooms
from attar.recipes.turns import Turn, turns_of
from attar.runtime import PreflightError, UsageError
from attar.tasks import Task
from attar.teachers import Keep
from attar.teachers.function import Gives

MOST_SEED = 2**62  # below it every seed of a run fits torch's generator

TaskChoice = Annotated[Callable[..., Task], "room:tasks"]
Stage = Annotated[Callable[..., nn.Module], "room:stages"]
TrainOptions = Annotated[Callable[..., nn.Module], "room:stages.train"]


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """Where the teacher comes from: ``load`` a folder, or build ``model`` and ``train`` it.

    ``load`` with ``model`` reads a .safetensors file into that model.

    A loaded teacher of other classes is made one of the student's: with ``project`` by what it
    says of the labelled training rows (``attar.teachers.project``), with ``classes`` by name:
    ``{class of the data: [classes of the teacher]}``, or the class of the data that each of its
    outputs stands for, in order, None for one that is none of them (``attar.teachers.adapted``).
    ``size`` is that of the images it reads, where it is another.

    ``load`` an .onnx file: onnxruntime runs it (``attar.teachers.from_onnx``), and ``gives`` says
    what it answers; logits when left out.

    ``ensemble``: several teachers that answer as one (``attar.Ensemble``), by ``weighting`` and
    ``temperature``; ``learned`` weights are found on the validation rows, once all are trained.

    ``ema``: the teacher is the moving average of each student itself (``attar.EMA``), of this
    momentum.

    ``mutual``: the teachers are other students like the recipe's, of other starts: so many in all,
    which teach each other (``attar.Group``). The first is the one that is judged.

    ``cache``: ask the teacher about each row once and keep what it says, for the other epochs,
    seeds and runs (``attar.teachers.Filling``); a table says in what form (``Keep``).
    """

    model: Model | None = None
    load: str | None = None
    train: TrainOptions | None = None
    project: bool = False
    classes: dict[str, list[str]] | list[str | int | None] | None = None
    size: Annotated[int, Ge(1)] | None = None
    gives: Gives | None = None
    ensemble: Sequence[TeacherPlan] | None = None
    weighting: Literal["mean", "entropy", "confidence", "learned"] | list[float] = "mean"
    temperature: Annotated[float, Gt(0)] = 1.0
    ema: Annotated[float, Interval(ge=0, lt=1)] | None = None
    mutual: Annotated[int, Ge(2)] | None = None
    cache: bool | Keep = False

    @property
    def moving(self) -> str | None:
        """What teaches, in words, where it moves with the student; None for a fixed model."""
        if self.ema is not None:
            return f"the student's own moving average, momentum {self.ema}"
        if self.mutual is None:
            return None
        if self.mutual == 2:
            return "another student like it, which learns beside it from another start"
        return f"{self.mutual - 1} other students like it, which learn beside it from other starts"

    @property
    def is_onnx(self) -> bool:
        """Whether the teacher is a file that onnxruntime runs."""
        return self.load is not None and self.load.lower().endswith(".onnx")

    @property
    def projects(self) -> bool:
        """Whether the teacher's own classes are others than the student's."""
        return self.project or self.classes is not None

    def __post_init__(self) -> None:
        own = (self.model, self.load, self.train, self.classes, self.size, self.gives)
        plain = not self.project and all(each is None for each in own)
        if self.cache and self.moving is not None:
            raise ValueError(
                "a teacher that moves with the student says something else every time; leave "
                "cache out"
            )
        if self.ema is not None:
            if self.ensemble is not None or self.mutual is not None or not plain:
                raise ValueError("beside ema stands nothing: the teacher is the student's average")
            return None
        if self.mutual is not None:
            if self.ensemble is not None or not plain:
                raise ValueError("beside mutual stands nothing: the students are the teachers")
            return None
        if self.ensemble is not None:
            return self._check_ensemble(self.ensemble, plain)
        if (self.weighting, self.temperature) != ("mean", 1.0):
            raise ValueError("weighting and temperature are of several teachers: add ensemble")
        if self.model is None and self.load is None:
            raise ValueError("the teacher needs a model to train, or a folder to load")
        if self.load is not None and self.train is not None:
            raise ValueError("the teacher is either loaded or trained; leave load or train out")
        if self.load is None and self.train is None:
            raise ValueError(
                "the teacher has a model but no knowledge; add train: {epochs: N}, or load: PATH"
            )
        if self.projects and (self.load is None or self.model is not None):
            raise ValueError("only a teacher of other classes is projected: one of load alone")
        if self.size is not None and (self.load is None or self.model is not None):
            raise ValueError("only a teacher of load alone reads images of another size")
        if self.project and self.classes is not None:
            raise ValueError("project learns what classes names; leave one of them out")
        if self.size is not None and (self.project or isinstance(self.classes, dict)):
            raise ValueError(
                "size stands with a list of classes or alone; where classes are projected, images "
                "are resized to what the teacher was built for"
            )

        if self.gives is not None and not self.is_onnx:
            raise ValueError("gives says what an ONNX file answers: it stands with load: FILE.onnx")
        if self.is_onnx and (self.project or isinstance(self.classes, dict)):
            raise ValueError(
                "an ONNX file does not say what its classes are called; give classes: a list of "
                "the class that each of its outputs stands for"
            )

    def _check_ensemble(self, members: Sequence[TeacherPlan], plain: bool) -> None:
        if not plain:
            raise ValueError("beside ensemble stand weighting and temperature alone")
        if len(members) < 2:
            raise ValueError(f"an ensemble needs at least two members, not {len(members)}")
        if any(member.cache for member in members):
            raise ValueError("what all members say together is cached: put cache beside ensemble")
        if any(member.ensemble is not None or member.moving is not None for member in members):
            raise ValueError("a member of an ensemble is a model that is loaded or trained")
        weighting = self.weighting
        if not isinstance(weighting, str) and len(weighting) != len(members):
            raise ValueError(
                f"there are {len(weighting)} weights for {len(members)} members; give one each"
            )


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the student has to keep of the teacher's metric, and the most that it may cost.

    Attributes:
        retain: the share of the teacher's metric.
        latency_ms: milliseconds for one example, the median.
        size_mb: millions of bytes of the weights on disk.
        macs: multiply-accumulate operations for one example.
    """

    retain: Annotated[float, Interval(gt=0, le=1)]
    latency_ms: Annotated[float, Gt(0)] | None = None
    size_mb: Annotated[float, Gt(0)] | None = None
    macs: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.retain <= 1:
            raise UsageError(f"the goal is to retain {self.retain}; it must be in (0, 1]")
        for name, most in self.limits.items():
            if not most > 0:
                raise UsageError(f"the goal for {name} is {most}; it must be above 0")

    @property
    def limits(self) -> dict[str, float]:
        """The most that the student may cost, by name; only what is asked for."""
        asked = {name: getattr(self, name) for name in ("latency_ms", "size_mb", "macs")}
        return {name: most for name, most in asked.items() if most is not None}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What ``attar search`` tries, and how.

    Attributes:
        space: by the path of an override, what it may be: a list of values, or a range,
            ``{low: 1.0, high: 8.0}``, with ``log: true`` or a ``step``.
        trials: how many students are tried.
        sampler: who proposes the next: ``tpe`` learns from those before it, as ``nsga`` does,
            which looks for the whole front of metric, size and time; ``random``; ``grid``.
        pruner: which trials are stopped early: ``goal``, those that are below each one that met
            the goal, once four have; ``median``, those below half of the others; ``none``. When
            left out, ``goal`` where the recipe has one and ``median`` where not; ``none`` with
            ``nsga``.
        storage: a URL of Optuna's that several machines share; ``search.db`` in the run folder
            when left out.
    """

    space: dict[str, Any]
    trials: Annotated[int, Ge(1)] = 30
    sampler: Literal["tpe", "random", "grid", "nsga"] = "tpe"
    pruner: Literal["goal", "median", "none"] | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space is empty; name what may change, such as student.widths")
        if self.sampler == "nsga" and self.pruner not in (None, "none"):
            raise ValueError(
                f"pruner {self.pruner} goes by one value, and nsga looks at several; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One job, from data to verdict.

    In YAML every field is a name, or a table with ``name``; in Python it is the object or the
    function itself.

    Attributes:
        task: what a batch means; what it leaves out (classes) is taken from the data.
        data: a reader of ``attar.data``, or its splits.
        teacher: a plan, or a trained module.
        student: a family of ``attar.models`` with its options, a module, or a function that
            makes one; or a list of them, each of which is distilled by the same teacher.
        stages: what is done to the student, in order. A distill stage with ``teacher="previous"``
            has the model of the stage before teach a student that starts anew; with ``student``,
            a model like the recipe's, that one learns, to teach the next stage.
            Stages such as ``prune`` change the student between them; one with
            ``teacher="unchanged"`` after them has it taught by itself as it was before.
            With ``reuse_head``, the student ends in the teacher's classifier from there on
            (``attar.models.reuse_head``).
        goal: what it has to keep, and the most that it may cost.
        search: what ``attar search`` tries; ``attar run`` runs the recipe as it stands.
        examples: how many of the training rows the student is given, the same share of each
            class; all when left out. A teacher that is trained here is given all.
        labels: how many of the training rows have labels, the same share of each class. The
            teacher and the baseline learn from them alone, the validation rows are some of them;
            the distilled student is given all rows, and what the teacher says of them.
        validation: share of the training split that chooses the epoch, where the data bring no
            split of their own; of the rows that ``labels`` leaves labelled.
        seed, seeds: the first seed, and how many the student is trained with.
        device, precision, parallel: as in ``attar.training.Plan``.
    """

    task: TaskChoice | Task
    data: Data | Splits
    teacher: TeacherPlan | nn.Module
    student: Model | nn.Module | Sequence[Model | nn.Module]
    stages: Sequence[Stage]
    goal: Goal | None = None
    search: Search | None = None
    examples: Annotated[int, Ge(2)] | None = None
    labels: Annotated[int, Ge(2)] | None = None
    validation: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    seed: Annotated[int, Interval(ge=0, lt=MOST_SEED)] = 0
    seeds: Annotated[int, Ge(1)] = 1
    device: str = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 0 <= self.seed < MOST_SEED:
            raise UsageError(
                f"seeds is {self.seeds}, seed is {self.seed}; give 1 or more, 0 or more"
            )
        if not 0 < self.validation < 1:
            raise UsageError(f"validation is {self.validation}; it must be in (0, 1)")
        if self.labels is not None and self.examples is not None:
            raise ValueError(
                "labels gives the student all rows and few labels, examples few rows; leave one of "
                "them out"
            )
        self._check_students()
        if not self.stages:
            raise ValueError("the recipe has no stages; add one, such as - do: distill")
        exports = [index for index, stage in enumerate(self.stages) if verb(stage) is export]
        if exports and exports != [len(self.stages) - 1]:
            raise ValueError(
                f"stage {exports[0]} exports, and other stages follow; export once, as the last "
                "stage, with all formats in its list"
            )
        if not self.trainings:
            raise ValueError("no stage trains; put one before the others, such as - do: distill")
        self._check_turns()

    def _check_students(self) -> None:
        if not self.students:
            raise ValueError("student is an empty list; give it one student or more")
        seen: dict[Any, int] = {}
        for index, student in enumerate(self.students):
            first = seen.setdefault(_spelling(student), index)
            if first != index:
                raise ValueError(
                    f"student.{index} is the same as student.{first}; leave one of them out (seeds "
                    "trains a student several times)"
                )

    def _check_turns(self) -> None:
        turns, plan = self.turns, self.teacher  # refuses an order in which one learns for nothing
        if not isinstance(plan, TeacherPlan):
            return
        if plan.mutual and any(turn.previous or turn.assistant for turn in turns):
            raise ValueError(
                "students that teach each other have no generations and no assistants; leave "
                "teacher: previous and student out of the stages, or mutual out of the teacher"
            )
        one = not (plan.moving or plan.ensemble or plan.projects or plan.size or plan.is_onnx)
        if not one and any(turn.reuse_head and not turn.previous for turn in turns):
            raise ValueError(
                "reuse_head takes over the classifier of one model that is trained or loaded as it "
                "is, of these classes; no other teacher has one to give"
            )

    @property
    def many(self) -> bool:
        """Whether there is a list of students."""
        return isinstance(self.student, Sequence)

    @property
    def students(self) -> Sequence[Model | nn.Module]:
        """Every student; the only one where there is no list."""
        return self.student if isinstance(self.student, Sequence) else [self.student]

    def singles(self) -> list[Recipe]:
        """The recipe of each student by itself."""
        return [replace(self, student=student) for student in self.students]

    @property
    def trainings(self) -> Sequence[Stage]:
        """The stages that train."""
        return [stage for stage in self._before_export if not changes(stage)]

    @property
    def ending(self) -> Sequence[Stage]:
        """The stages that change the student after the last that trains."""
        stages = list(self._before_export)
        last = max(index for index, stage in enumerate(stages) if not changes(stage))
        return stages[last + 1 :]

    @property
    def changes(self) -> bool:
        """Whether a stage changes the student's structure."""
        return any(map(changes, self.stages))

    @property
    def _before_export(self) -> Sequence[Stage]:
        return [stage for stage in self.stages if verb(stage) is not export]

    @property
    def turns(self) -> list[Turn]:
        """Who learns and who teaches in each of them."""
        return turns_of(self._before_export)

    @property
    def exporting(self) -> dict[str, Any] | None:
        """The options of the export stage; None where there is none."""
        last = self.stages[-1]
        if verb(last) is not export:
            return None
        return dict(last.keywords) if isinstance(last, partial) else {}


def options_of(student: Model | nn.Module) -> dict[str, Any]:
    """What a student is made with, defaults included; nothing of a module."""
    if isinstance(student, nn.Module):
        return {}
    parameters = inspect.signature(verb(student)).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    return defaults | (student.keywords if isinstance(student, partial) else {})


def _spelling(student: Model | nn.Module) -> tuple[int, str]:
    """The same for students that are the same."""
    return id(verb(student)), repr(sorted(options_of(student).items()))


def verb(stage: Stage) -> Any:
    """The function that a stage calls."""
    return stage.func if isinstance(stage, partial) else stage


@dataclass(frozen=True)
class Loaded:
    """A recipe read from a file.

    Attributes:
        recipe: the objects.
        full: the whole text of what they were made from, defaults included.
        name: what the run folder is called.
        plugins: the code that was run for it, by what the command line named, with SHA-256.
    """

    recipe: Recipe
    full: dict[str, Any]
    name: str
    plugins: dict[str, str] = field(default_factory=dict)

    def singles(self) -> list[Loaded]:
        """The recipe of each student of a list by itself."""
        found = []
        for index, recipe in enumerate(self.recipe.singles()):
            written = {"student": self.full["student"][index]} if "student" in self.full else None
            full = {"python": repr(recipe)} if written is None else self.full | written
            found.append(Loaded(recipe, full, f"{self.name}-{index}", self.plugins))
        return found


def load_recipe(
    path: str | Path, *, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> Loaded:
    """Read, override and resolve a recipe file.

    Args:
        path: a YAML (or JSON) file.
        overrides: ``path.to.key=value`` each, applied in order.
        plugins: Python files or packages whose ``__all__`` is added to the rooms.

    Raises:
        PreflightError: with file:line:column and the nearest valid name.
    """
    document = documents.read(path)
    return resolve(document, overrides=overrides, plugins=plugins)


def resolve(
    document: documents.Document,
    *,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Loaded:
    """Turn a document into a recipe."""
    if not isinstance(document.value, dict):
        raise PreflightError(
            f"{document.at(())}: a recipe is a table of keys: task, data, teacher, student, stages"
        )
    for override in overrides:
        documents.set_value(document, override)
    resolver = Resolver(document, rooms(plugins))
    recipe = resolver.table(document.value, Recipe, ())
    return Loaded(recipe, resolver.full, Path(document.name).stem, dict(map(_digest, plugins)))


def _digest(plugin: str) -> tuple[str, str]:
    path = Path(plugin)
    known = path.is_file()
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest() if known else "package"
