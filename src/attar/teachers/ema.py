"""A teacher that follows the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from attar.runtime import DataError, PreflightError, UsageError
from attar.tasks import Task
from attar.teachers.live import Teacher


class EMA(Teacher):
    """Mean teacher: the exponential moving average of the student's own weights.

    After step n = 0, 1, ... of the optimiser ``teacher <- m teacher + (1 - m) student`` with
    ``m = min(momentum, (1 + n) / (10 + n))``, so that the student's random start is soon
    forgotten. Buffers, such as the statistics of batch norm, are the student's. It answers in
    eval mode, shares nothing with the student, and starts each stage as its copy. A stage calls
    ``begin`` and ``follow``; a loop of one's own calls ``follow(student)`` after each step.

    Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017: momentum 0.99
    while the student improves quickly and 0.999 after.

    Args:
        student: the module that is trained; it is copied.
        task: what its output means.
        momentum: share of the old average that a step keeps.
        precision: autocast dtype, None for the model's own.
    """

    def __init__(
        self,
        student: nn.Module,
        task: Task,
        *,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.999,
        precision: torch.dtype | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise UsageError(f"momentum is {momentum}; it must be in [0, 1)")
        try:
            model = copy.deepcopy(student).requires_grad_(False)
        except Exception as error:
            raise PreflightError(
                f"the student cannot be copied, which a moving average starts from: {error}"
            ) from error
        super().__init__(model, task, precision=precision)
        self.momentum = momentum
        self.steps = 0

    @torch.no_grad()
    def begin(self, student: nn.Module) -> None:
        """Be the student's copy, as at the start of a stage."""
        self.steps = 0
        for mean, live in _pairs(self.model, student):
            mean.copy_(live)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move toward the student, which has taken a step."""
        momentum = min(self.momentum, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        count = sum(1 for _ in self.model.parameters())
        pairs = _pairs(self.model, student)
        if count:
            means, lives = map(list, zip(*pairs[:count], strict=True))
            torch._foreach_lerp_(means, lives, 1 - momentum)
        for mean, live in pairs[count:]:
            mean.copy_(live)

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, and how many steps it has followed."""
        own = {f"model.{name}": tensor.detach() for name, tensor in self._tensors().items()}
        return {**own, "steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; DataError where it is of another model."""
        own = self._tensors()
        theirs = {n.removeprefix("model."): t for n, t in state.items() if n != "steps"}
        odd = [n for n in own.keys() | theirs.keys() if _shape(own, n) != _shape(theirs, n)]
        if odd or "steps" not in state:
            what = min(odd, default="steps")
            raise DataError(f"the moving average is of another model: it differs in '{what}'")
        for name, tensor in own.items():
            tensor.copy_(theirs[name])
        self.steps = int(state["steps"])

    def settings(self) -> str:
        """What it is made of beside its state: the student is what it learns from."""
        return f"EMA of the student, momentum {self.momentum}"

    def fingerprint(self) -> dict[str, str]:
        """Refused: what it answers now it will not answer after the next step."""
        raise UsageError(
            "an average of the student moves with every step, so its answers cannot be kept; ask "
            "it as it goes"
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _versions(self) -> dict[str, int]:
        return {}  # its weights are meant to change


def _pairs(mean: nn.Module, student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(own, the student's): parameters, then buffers. Found anew: to move a module remakes them."""
    own = [*mean.parameters(), *mean.buffers()]
    theirs = [*student.parameters(), *student.buffers()]
    # Of a tensor that ranks hold parts of, the whole.
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t.detach() for t in theirs]
    return list(zip(own, whole, strict=True))


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None
