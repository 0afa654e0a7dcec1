"""Models of tokens as modules of plain tensors: token ids in, one tensor out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime import UsageError
from attar.tasks import Task
from attar.tasks.texts import Texts, read

INPUTS = ("inputs", "attention")  # what an example may hold, in order
MOST = 256  # examples that a file is checked on
_NUMBERS = 2**26  # that a model may answer to a batch of 64, where it answers at every token
_LEAST = 16  # tokens of a text that are kept at any rate
_BATCH = 64

Example = Tensor | Mapping[str, Tensor]


class Answering(nn.Module):
    """A model of tokens [n, S], called with them and where it needs it with what is real of them.

    It gives what the task calls its output: logits of the classes, logits of the next token at
    each position, or an embedding.
    """

    def __init__(self, model: nn.Module, task: Task | None) -> None:
        super().__init__()
        self.model = model
        self.held = (task,)

    def forward(self, inputs: Tensor, attention: Tensor | None = None) -> Any:
        task = self.held[0]
        if isinstance(task, Texts):
            batch = {"inputs": inputs}
            batch |= {} if attention is None else {"attention": attention}
            return task.output(task.forward(self.model, batch), task.outputs[0])
        if attention is not None or "use_cache" not in _names(self.model):
            out = read(self.model, inputs, attention)
        else:
            out = self.model(inputs, use_cache=False)
        return getattr(out, "logits", out)


def asked(module: nn.Module, examples: tuple[Tensor, ...], task: Task | None) -> nn.Module:
    """*module* as it is called with *examples*."""
    return Answering(module, task) if reads_tokens(examples) else module


def reads_tokens(examples: tuple[Tensor, ...]) -> bool:
    """Whether the examples are token ids [n, S], whose length is free."""
    return examples[0].ndim == 2 and not examples[0].is_floating_point()


def examples_of(example: Example, called: str = "example") -> tuple[Tensor, ...]:
    """The first examples, on the CPU: inputs, and for texts what is real of them."""
    given = example if isinstance(example, Mapping) else {"inputs": example}
    found = [given[name] for name in INPUTS if name in given]
    known = all(isinstance(each, Tensor) and each.ndim for each in found)
    if "inputs" not in given or not known or len(found[0]) == 0:
        raise UsageError(f"{called} must be a tensor of real inputs [n, ...] with n at least 1")
    if any(each.shape != found[0].shape for each in found):
        raise UsageError(f"the {called}'s attention must have the shape of its inputs, [n, S]")
    return tuple(each[:MOST].detach().cpu().contiguous() for each in found)


def fewer(examples: tuple[Tensor, ...], outputs: Tensor) -> tuple[Tensor, ...]:
    """As many and as long ones as can be answered at once, by what one of them is answered with."""
    if not reads_tokens(examples) or outputs.ndim != 3:
        return examples
    width = outputs.shape[-1]
    length = min(examples[0].shape[1], max(_LEAST, _NUMBERS // (_BATCH * width)))
    count = max(1, _NUMBERS // (length * width))
    return tuple(each[:count, :length].contiguous() for each in examples)


def _names(model: nn.Module) -> frozenset[str]:
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    return frozenset(inspect.signature(type(inner).forward).parameters)


def zeros_like(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What is traced in their place: two examples of zeros, every token of them real."""
    shape = list(examples[0].shape[1:])
    if reads_tokens(examples):
        shape = [max(3, min(7, shape[0]))]
    first = torch.zeros(2, *shape, dtype=examples[0].dtype)
    return (first, *(torch.ones(2, *shape, dtype=each.dtype) for each in examples[1:]))
