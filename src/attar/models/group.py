"""Several students that are trained together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attar.runtime import UsageError

if TYPE_CHECKING:
    from attar.tasks import Task


class Group(nn.ModuleList):
    """Students 0, 1, ... as one module, for mutual learning.

    All read the same inputs. The group's main output is its first member's, which is therefore
    the one that a validation and a verdict judge; ``output:1`` is member 1's, ``feature:1.stage3``
    its feature of that path. Terms: ``attar.mutual``. The members are trained in place, and are
    the very modules that were given: ``group[1]`` after training is the second student.

    Args:
        members: modules, at least two, each once.
        task: what their outputs mean.

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.TabularClassification(classes=3)
        >>> group = Group([nn.Linear(4, 3), nn.Linear(4, 3)], task)
        >>> sorted(group(torch.rand(5, 4)))
        ['0', '1', 'logits']
    """

    def __init__(self, members: Sequence[nn.Module], task: Task) -> None:
        if len(members) < 2 or len({id(member) for member in members}) < len(members):
            raise UsageError("a group needs at least two students, each a module of its own")
        super().__init__(members)
        # A new module is in training mode; in a group that were, students in eval mode would
        # look as if they were meant to stay in it.
        self.training = all(member.training for member in members)
        self._task = task

    @property
    def main(self) -> str:
        """The output that is compared: the task's main one."""
        return self._task.outputs[0]

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Each member's main output by its number, and the first's by the task's name."""
        main = self.main
        outputs = [self._task.output(member(*args, **kwargs), main) for member in self]
        return {main: outputs[0]} | {str(index): out for index, out in enumerate(outputs)}
