"""When a stage is saved, and whether a saved stage may go on."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import attar
from attar.models.adapters import check_mergeable
from attar.runtime import (
    DataError,
    PreflightError,
    Run,
    Snapshot,
    Snapshots,
    Stop,
    described,
)
from attar.teachers import Filling, Function
from attar.training.plan import Plan
from attar.training.state import Session, give_back, taken, tensors_of
from attar.training.term import Term

SECONDS = 60.0  # between two checkpoints, where the plan does not count steps
SHARE = 0.02  # of the time, at most, that saving by the clock may take
ROOM = 3  # checkpoints that must fit on the disk: two are kept while a third is written

if TYPE_CHECKING:
    from attar.training.stage import Stage

# These change how far or how often, not what a step is.
FREE = ("epochs", "log_every", "checkpoint_every", "ranks", "parallel")
# These say where in an epoch a run stands; with others there is no such place.
FIXED = ("batch_size", "accumulate", "seed")


@dataclass(frozen=True)
class Home:
    """Where a stage keeps its log and its checkpoints.

    Attributes:
        run: the run folder.
        mark: whose stage it is; stands in every record of the log.
        resume: go on from the newest sound checkpoint, where there is one.
        allow: names of differences that a resumed stage may have, such as ``torch``.
        tell: is told, in a sentence each, of damaged checkpoints and of allowed differences.
    """

    run: Run
    mark: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    allow: tuple[str, ...] = ()
    tell: Callable[[str], None] = lambda line: None

    @property
    def folder(self) -> Path:
        """Where the checkpoints of this stage lie."""
        name = "-".join(str(part) for part in self.mark.values())
        return self.run.folder / "checkpoints" / (name or "stage")

    def log(self, record: dict[str, Any]) -> None:
        """Append a record that says whose it is."""
        self.run.log({**self.mark, **record})


class Keeper:
    """Saves a stage at step boundaries: when it is due, when it is asked to stop, at the end."""

    def __init__(
        self, home: Home, session: Session, plan: Plan, made_with: dict[str, Any], stop: Stop
    ) -> None:
        self._home = home
        self._session = session
        self._ranks = session.loop.ranks
        self._every = plan.checkpoint_every
        self._made_with = made_with
        self._stop = stop
        self._snapshots = Snapshots(home.folder)
        self._saved_at: tuple[int, int, int] | None = None
        self._next = 0.0

    def begin(self, expected_bytes: int) -> None:
        """Go on from a checkpoint, or write the first: what cannot be saved is not begun."""
        found = self._found() if self._home.resume else None
        if found is None:
            self._home.run.rewind(self._home.mark, epoch=0, step=0)
            with self._ranks.together():
                self._check_room(expected_bytes)
            self._first_save()
            return
        with self._ranks.together():
            self._check_drift(found)
        give_back(self._session, found.parts, found.facts["state"])
        loop = self._session.loop
        self._home.run.rewind(self._home.mark, epoch=loop.number, step=loop.record.since)
        self._saved(0.0)

    def wishes(self) -> tuple[int, int]:
        """What this rank wants after the next step: to stop, to save. One that asks is enough."""
        due = self._every is None and self._ranks.main and monotonic() >= self._next
        return self._stop.asked is not None, due

    def after(self, stop: int, due: int) -> None:
        """At a step boundary, with the wishes of all ranks: stop, or save where it is due."""
        if stop:
            self._stop.obey()
        if due or (self._every is not None and self._session.loop.done % self._every == 0):
            self.save()

    def end(self) -> None:
        """Save the finished stage, and stop if that was asked meanwhile."""
        self.save()
        if self._ranks.any(self._stop.asked is not None):
            self._stop.obey()

    def save(self) -> None:
        """Save now, unless this very state is saved already."""
        loop = self._session.loop
        place = (loop.done, loop.number, loop.taken)
        if place == self._saved_at:
            return
        begun = monotonic()
        parts, state = taken(self._session)  # every rank: some hold parts of a tensor
        if self._ranks.main:
            self._home.run.sync()
            self._snapshots.save(loop.done, parts, {"state": state, "made_with": self._made_with})
        self._saved(monotonic() - begun)

    def _saved(self, took: float) -> None:
        loop = self._session.loop
        self._saved_at = (loop.done, loop.number, loop.taken)
        self._next = monotonic() + max(SECONDS, took / SHARE)

    def _found(self) -> Snapshot | None:
        """The newest sound checkpoint, the same on every rank."""
        if self._ranks.main:
            found = self._snapshots.latest(tell=self._home.tell)  # also clears what a crash left
        self._ranks.barrier()
        if not self._ranks.main:
            found = self._snapshots.latest()
        self._ranks.same("the checkpoint to go on from", None if found is None else found.step)
        return found

    def _check_room(self, expected: int) -> None:
        folder = self._home.folder
        if not self._ranks.main:
            return
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        if free < ROOM * expected:
            raise PreflightError(
                f"{folder}: {ROOM} checkpoints of {expected:,} bytes do not fit into the "
                f"{free:,} bytes that are free; make room or choose another folder with --run"
            )

    def _first_save(self) -> None:
        with _explained(self._home.folder):
            self.save()

    def _check_drift(self, found: Snapshot) -> None:
        """Refuse to go on as another run than the one that was saved."""
        before = found.facts["made_with"]
        for name, (then, now) in differences(before, self._made_with, FREE).items():
            what = f"{name} was {then} when {found.folder} was saved and is {now} now"
            if name in FIXED:
                raise PreflightError(
                    f"{what}; it says where in an epoch the run stands and cannot change: put it "
                    "back, or start a new run"
                )
            if name not in self._home.allow:
                raise PreflightError(
                    f"{what}; put it back, or go on with the difference by --allow-drift {name}"
                )
            self._home.tell(f"{what}; allowed")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreflightError(
            f"{error.filename or folder}: a checkpoint cannot be written "
            f"({error.strerror or error}); choose another folder with --run"
        ) from error


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What is not equal, by name: (then, now)."""
    names = [*then, *(name for name in now if name not in then)]
    return {
        name: (then.get(name), now.get(name))
        for name in names
        if name not in free and then.get(name) != now.get(name)
    }


def made_with(
    stage: Stage, data: Any, validation: Any, terms: Iterable[Term], label_weight: float
) -> dict[str, Any]:
    """What has to be the same for a resumed run to be the same run; JSON values."""
    options = {f.name: described(getattr(stage.plan, f.name)) for f in fields(Plan)}
    return options | {
        "attar": attar.__version__,
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": stage.device.type,
        "ranks": stage.ranks.world,
        "student": shapes_digest(stage.objective.student),
        "teacher": teacher_digest(stage.teacher),
        "data": data.fingerprint(),
        "validation": None if validation is None else validation.fingerprint(),
        "terms": [described(term) for term in terms],
        "label_weight": label_weight,
    }


def shapes_digest(module: nn.Module) -> str:
    """SHA-256 over the names, shapes and types of a module's tensors."""
    lines = [f"{n} {list(t.shape)} {t.dtype}" for n, t in tensors_of(module).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def teacher_digest(teacher: Any) -> Any:
    """SHA-256 over everything a teacher knows; its own word where it is no module."""
    if isinstance(teacher, Filling):
        teacher = teacher.teacher
    if teacher is None:
        return None
    if hasattr(teacher, "members"):
        known = [teacher.settings(), *(teacher_digest(member) for member in teacher.members)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()
    if hasattr(teacher, "settings"):
        return teacher.settings()
    model = getattr(teacher, "model", None)
    if not isinstance(model, nn.Module):
        return teacher.fingerprint() if hasattr(teacher, "fingerprint") else type(teacher).__name__
    versions = [part.version or "" for part in model.modules() if isinstance(part, Function)]
    return "-".join([digest_of(tensors_of(model)), *versions])


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, types and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_keepable(objective: nn.Module) -> None:
    """Refuse a module that keeps state outside its tensors, which no checkpoint would hold."""
    for name, part in objective.named_modules():
        check_mergeable(part)  # as the model is saved at the end
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            raise DataError(
                f"the module '{name}' keeps extra state, which a checkpoint cannot hold; keep it "
                "in buffers, or train without a run folder"
            )
