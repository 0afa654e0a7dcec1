"""A teacher that is a module, asked batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from attar.runtime import PreflightError, autocast, modes_of, restore_modes
from attar.signals import Hearing
from attar.tasks import Task
from attar.teachers.fingerprint import fingerprint_of


class Teacher:
    """Answers ``teacher(batch) -> {address: tensor}`` in eval mode and without gradient.

    ``open`` says which signals are wanted; a teacher that was not opened answers the task's
    main output. The module is left as it was found when the teacher is closed.

    Args:
        model: the teacher; any module that ``task.forward`` can run.
        task: what its output means.
        precision: autocast dtype, None for the model's own.
    """

    def __init__(
        self, model: nn.Module, task: Task, *, precision: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.task = task
        self.precision = precision
        self._hearing: Hearing | None = None
        self._modes = modes_of(model)
        self._found: dict[str, int] = {}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def open(self, addresses: Sequence[str] = (), device: torch.device | None = None) -> Self:
        """Make ready to answer *addresses* (none = the task's main output)."""
        if self._hearing is not None:
            self.close()
        wanted = addresses or [f"output:{self.task.outputs[0]}"]
        self._modes = modes_of(self.model)
        self._hearing = Hearing(self.model, self.task, wanted, "teacher").open()
        self.model.eval()
        if device is not None:
            self.model.to(device)
        self._found = self._versions()
        return self

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The signals of this batch, detached."""
        if self._hearing is None:
            self.open()
        assert self._hearing is not None
        if self.precision is None:
            return self._hearing(batch, keep=False)[1]
        with autocast(batch["inputs"].device, self.precision):
            return self._hearing(batch, keep=False)[1]

    def check(self) -> None:
        """Refuse a teacher that was switched to training or whose weights have moved."""
        moved = [name for name, version in self._versions().items() if version != self._found[name]]
        if any(module.training for module in self.model.modules()):
            raise PreflightError("the teacher was switched to training mode; leave it in eval mode")
        if moved:
            raise PreflightError(
                f"the teacher changed while it was teaching: {moved[0]} was written to; "
                "give the student its own copy of whatever they share"
            )

    def fingerprint(self) -> dict[str, str]:
        """What its answers depend on, to tell kept ones apart: model, weights, precision, task."""
        return fingerprint_of(self.model, self.task, self.precision)

    def close(self) -> None:
        """Take the hooks away and put modes and device back."""
        if self._hearing is None:
            return
        self._hearing.close()
        self._hearing = None
        restore_modes(self._modes)
        self.model.to(self._device)

    def _versions(self) -> dict[str, int]:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        # A tensor made under inference_mode counts no versions; it cannot be trained either.
        return {name: tensor._version for name, tensor in named if not tensor.is_inference()}
