"""Several teachers that answer as one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from attar.runtime import PreflightError, UsageError, resolve_device, suggest, to_device
from attar.tasks import MultiLabelClassification, Regression, Task
from attar.tasks.classification import Classification
from attar.teachers.fingerprint import fingerprint_or_refuse
from attar.teachers.fingerprint import joined as joined_prints
from attar.teachers.live import Teacher
from attar.teachers.projection import Carried
from attar.teachers.weighting import (
    confidence_weights,
    entropy_weights,
    joined,
    joined_yes_no,
    log_probabilities,
    most_likely_weights,
)

WEIGHTINGS = ("mean", "entropy", "confidence")
Weighting = Literal["mean", "entropy", "confidence"] | Sequence[float]
BATCH = 256
_OF_MEMBER = re.compile(r"(feature|input|param):(\d+)\.(.+)")


class Ensemble:
    """Teachers 0, 1, ... that answer as one: a teacher itself.

    The task's main output is the combination of the members' answers. For classes it is the
    weighted mean of their *probabilities*, given as logits: its logarithm, or where classes do not
    compete its log-odds. For numbers it is the weighted mean of the values. ``output:1`` is member
    1's own answer, ``feature:1.stage3`` its feature of that path, and so are ``input:`` and
    ``param:``.

    Args:
        members: teachers or modules. Those that read other inputs or know only some of the
            classes come from ``attar.teachers.adapted``; each class is a mean over the members
            that know it.
        task: what an answer means.
        weighting: ``mean``: all weigh the same. ``entropy``: for each example, the surer a
            member the more (Kwon et al. 2020). ``confidence``: the nearer to the label
            (CA-MKD, Zhang et al. 2022); needs labels. Or a number for each member, such as
            ``attar.teachers.learned_weights`` gives.
        temperature: at which probabilities are averaged. A loss of the same temperature then
            sees their mean as it is, so that its gradient is that of the mean of the members'
            losses; at 1 the mean of plain probabilities is what a loss softens. The
            weights are found at temperature 1.

    Errors: fewer than two members or one that stands twice, a class that none knows, weights that
    do not fit, a weighting of classes for a task without (UsageError); a batch without the labels
    that ``confidence`` needs (PreflightError).

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.TabularClassification(classes=3)
        >>> both = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], task)
        >>> both({"inputs": torch.rand(5, 4)})["output:logits"].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        members: Sequence[Any],
        task: Task,
        *,
        weighting: Weighting = "mean",
        temperature: float = 1.0,
    ) -> None:
        self.task = task
        self.members: list[Any] = [
            Teacher(m, task) if isinstance(m, nn.Module) else m for m in members
        ]
        self.main = f"output:{task.outputs[0]}"
        self.temperature = temperature
        models = [getattr(member, "model", None) for member in self.members]
        _check_members(self.members, models)
        _check_task(task, weighting, temperature)
        self.weighting = weighting if isinstance(weighting, str) else tuple(weighting)
        self._fixed = _fixed(self.weighting, len(self.members))
        self._known = _known(models, task)
        modules = [model for model in models if isinstance(model, nn.Module)]
        self.model = _Whole(self, modules) if len(modules) == len(models) else None
        self._asked: list[list[str]] | None = None
        self._wanted: dict[str, tuple[int, str] | None] = {}

    def open(self, addresses: Sequence[str] = (), device: torch.device | None = None) -> Self:
        """Make ready to answer *addresses* (none = the combination alone)."""
        self.close()
        self._wanted = {text: self._place(text) for text in addresses or [self.main]}
        asked: list[list[str]] = [[] for _ in self.members]
        for place in self._wanted.values():
            for index, inner in enumerate([self.main] * len(asked)) if place is None else [place]:
                asked[index].append(inner)
        self._asked = asked
        try:
            for member, own in zip(self.members, asked, strict=True):
                # Also one that is asked for nothing, which then stays as it is.
                member.open(list(dict.fromkeys(own)), device)
        except BaseException:
            self.close()
            raise
        return self

    def _place(self, address: str) -> tuple[int, str] | None:
        """The member that answers an address, and what it calls it; None for all of them."""
        if address == self.main:
            return None
        kind, _, name = address.partition(":")
        if kind == "output" and name.isdigit():
            index, inner = int(name), self.main
        elif form := _OF_MEMBER.fullmatch(address):
            index, inner = int(form[2]), f"{form[1]}:{form[3]}"
        else:
            raise UsageError(
                f"'{address}': an ensemble answers {self.main}, and by the number of a member "
                "output:0 or feature:0.PATH"
            )
        if index >= len(self.members):
            last = len(self.members) - 1
            raise UsageError(f"'{address}': the members of the ensemble are numbered 0 to {last}")
        return index, inner

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """The signals of this batch, detached."""
        if self._asked is None:
            self.open()
        assert self._asked is not None
        told = [
            member(batch) if own else {}
            for member, own in zip(self.members, self._asked, strict=True)
        ]
        answers: dict[str, Any] = {}
        for address, place in self._wanted.items():
            if place is None:
                outputs = [one[self.main] for one in told]
                answers[address] = self.combined(outputs, batch.get("labels"))
            else:
                index, inner = place
                answers[address] = told[index][inner]
        return answers

    def combined(
        self, outputs: Sequence[Tensor], labels: Tensor | None, *, judged: bool = False
    ) -> Tensor:
        """The members' main outputs as one.

        Args:
            labels: of the examples, for ``confidence``.
            judged: the ensemble is itself being judged, so it must not look at labels: all weigh
                the same where it would.
        """
        if len({output.shape for output in outputs}) > 1:
            shapes = " and ".join(sorted({str(list(output.shape)) for output in outputs}))
            raise UsageError(
                f"the members answer {shapes}; all must answer the student's classes: see "
                "attar.teachers.adapted"
            )
        said = torch.stack([o if o.dtype is torch.float64 else o.float() for o in outputs])
        if isinstance(self.task, Regression):
            weights = self._fixed.to(said)
            return (said * weights.reshape(-1, *[1] * (said.ndim - 1))).sum(0)
        if isinstance(self.task, MultiLabelClassification):
            return joined_yes_no(said / self.temperature, self._fixed) * self.temperature
        known = None if self._known is None else self._known.to(said.device)
        plain = log_probabilities(said, 1.0, known)
        weights = self._weights(plain, labels, known, judged)
        temperature = self.temperature
        logs = plain if temperature == 1 else log_probabilities(said, temperature, known)
        return joined(logs, weights, known) * temperature

    def _weights(
        self, logs: Tensor, labels: Tensor | None, known: Tensor | None, judged: bool
    ) -> Tensor:
        if self.weighting == "entropy":
            return entropy_weights(logs, known)
        if self.weighting != "confidence" or judged:
            return self._fixed
        if labels is None:
            raise PreflightError(
                "the data have no labels, and weighting: confidence weighs teachers by them; "
                "choose entropy or mean"
            )
        return confidence_weights(logs, labels, known)

    def check(self) -> None:
        """Let each member look for what must not change while it teaches."""
        self._each("check")

    def close(self) -> None:
        """Close every member."""
        if self._asked is not None:
            self._each("close")
            self._asked = None

    def begin(self, student: nn.Module) -> None:
        """Tell the members that move from which student they start."""
        self._each("begin", student)

    def follow(self, student: nn.Module) -> None:
        """Tell the members that move that the student has taken a step."""
        self._each("follow", student)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of the members that have one."""
        return {
            f"{index}.{name}": tensor
            for index, member in enumerate(self.members)
            if hasattr(member, "state_dict")
            for name, tensor in member.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give each member its state back."""
        for index, member in enumerate(self.members):
            own = {
                name.partition(".")[2]: tensor
                for name, tensor in state.items()
                if name.partition(".")[0] == str(index)
            }
            if own or hasattr(member, "state_dict"):
                member.load_state_dict(own)

    def settings(self) -> dict[str, Any]:
        """What the answer depends on beside the members, as JSON."""
        return {"weighting": self.weighting, "temperature": self.temperature}

    def fingerprint(self) -> dict[str, str]:
        """What its answers depend on: the members', in order, and how they are combined."""
        told = [fingerprint_or_refuse(each, f"member {k}") for k, each in enumerate(self.members)]
        return {**joined_prints(told), "combined": json.dumps(self.settings(), sort_keys=True)}

    def _each(self, method: str, *args: Any) -> None:
        for member in self.members:
            if hasattr(member, method):
                getattr(member, method)(*args)


class _Whole(nn.ModuleList):
    """An ensemble of modules as one module, to be counted, copied to a device and judged."""

    def __init__(self, ensemble: Ensemble, models: Sequence[nn.Module]) -> None:
        super().__init__(models)
        self.training = all(model.training for model in models)
        self._ensemble = ensemble

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        task = self._ensemble.task
        main = task.outputs[0]
        outputs = [task.output(model(*args, **kwargs), main) for model in self]
        return {main: self._ensemble.combined(outputs, None, judged=True)}


def learned_weights(
    members: Sequence[Any], data: Any, task: Task, *, device: str | torch.device = "auto"
) -> tuple[float, ...]:
    """The weights of members under which the labels of *data* are most likely.

    They maximise ``sum_n log sum_k w_k p_k(y_n | x_n)``, the linear opinion pool, which has one
    maximum. Found before training and kept: weights that were trained along with the student
    would move to the teacher it agrees with already.

    Args:
        members, task: as in ``Ensemble``.
        data: labelled rows that no member was trained on, such as the validation split; on its
            own training rows a teacher looks surer than it is.

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.TabularClassification(classes=3)
        >>> rows = attar.data.TensorSource(torch.rand(9, 4), torch.arange(9) % 3, classes=3)
        >>> members = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> teacher = Ensemble(members, task, weighting=learned_weights(members, rows, task))
    """
    if not isinstance(task, Classification):
        raise UsageError("weights are learned from the probabilities of classes; the task has none")
    if data.labels is None:
        raise UsageError(f"{data.name}: has no labels to learn the weights from")
    ensemble = Ensemble(members, task)
    addresses = [f"output:{index}" for index in range(len(ensemble.members))]
    place = resolve_device(device)
    parts: list[Tensor] = []
    try:
        ensemble.open(addresses, place)
        for batch in data.batches(BATCH):
            told = ensemble(to_device(batch, place))
            said = torch.stack([told[address].double() for address in addresses])
            known = None if ensemble._known is None else ensemble._known.to(said.device)
            chances = log_probabilities(said, 1.0, known).exp()
            labels = batch["labels"].to(said.device).long()
            parts.append(chances[:, torch.arange(len(labels)), labels].T.cpu())
    finally:
        ensemble.close()
    return tuple(most_likely_weights(torch.cat(parts)).tolist())


def _check_members(members: Sequence[Any], models: Sequence[Any]) -> None:
    if len(members) < 2:
        raise UsageError(f"an ensemble needs at least two members, not {len(members)}")
    for member in members:
        if not (callable(member) and hasattr(member, "open") and hasattr(member, "close")):
            raise UsageError(
                f"a member of the ensemble is a {type(member).__name__}; give an attar.Teacher, a "
                "module, or an object with open(addresses, device), close() and (batch)"
            )
    known = [id(model) for model in models if model is not None]
    if len(set(known)) < len(known):
        raise UsageError("a module stands twice among the members; give it a larger weight instead")


def _check_task(task: Task, weighting: Any, temperature: float) -> None:
    if isinstance(weighting, str) and weighting not in WEIGHTINGS:
        hint = (
            "learned weights are numbers: weighting=attar.teachers.learned_weights(members, "
            "validation, task)"
        )
        said = hint if weighting == "learned" else suggest(weighting, WEIGHTINGS)
        raise UsageError(f"weighting '{weighting}' is unknown; {said}")
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature}; it must be above 0")
    if isinstance(task, Classification):
        return
    if not isinstance(task, Regression | MultiLabelClassification):
        raise UsageError(
            f"an ensemble joins classes or numbers, and {type(task).__name__} is neither; ask the "
            "members by output:0, output:1 with a task of classes, or write a teacher of your own"
        )
    name = type(task).__name__
    if weighting in WEIGHTINGS[1:]:
        raise UsageError(
            f"weighting: {weighting} is about classes that compete, which {name} has none of; "
            "choose mean, or a number for each member"
        )
    if temperature != 1 and isinstance(task, Regression):
        raise UsageError(f"temperature is about probabilities, and {name} has none; leave it out")


def _fixed(weighting: str | tuple[float, ...], count: int) -> Tensor:
    """The weights [K] that do not depend on the example."""
    if isinstance(weighting, str):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    if len(weighting) != count:
        raise UsageError(f"there are {len(weighting)} weights for {count} members; give one each")
    if not all(0 <= weight < math.inf for weight in weighting) or sum(weighting) == 0:
        raise UsageError(
            f"the weights are {list(weighting)}; they must be 0 or more, and not all 0"
        )
    weights = torch.tensor(weighting, dtype=torch.float64)
    return weights / weights.sum()


def _known(models: Sequence[Any], task: Task) -> Tensor | None:
    """Which classes each member knows, bool [K, C]; None where all know all."""
    own = [model.known if isinstance(model, Carried) else None for model in models]
    partial = [known for known in own if known is not None and not bool(known.all())]
    if not partial:
        return None
    width = len(partial[0])
    table = torch.stack(
        [torch.ones(width, dtype=torch.bool) if k is None else k.cpu() for k in own]
    )
    nobody = (~table.any(0)).nonzero()
    if len(nobody):
        assert isinstance(task, Classification)
        raise UsageError(f"no member knows the class '{task.names()[int(nobody[0])]}'")
    return table
