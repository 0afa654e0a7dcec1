"""Texts as models read them: token ids, and which of them are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attar.runtime import DataError, first_line
from attar.tasks.task import Batch, Task


class Texts(Task):
    """A task whose examples are texts.

    A batch holds ``inputs`` int64 [N, S], token ids, and ``attention`` [N, S], 1 at each real
    token, where texts are padded. The model is an encoder of ``transformers``, or a module that is
    called as ``model(inputs, attention)``, or ``model(inputs)`` if it takes but one. Texts that
    are padded on the left are moved to the left before a model reads them: positions count
    from the first real token, and what stands on the right is padding.
    """

    def tokens(self, batch: Batch) -> Tensor | None:
        """Which tokens of each example are real, bool [N, S]; None where all are."""
        attention = aligned(batch)[1]
        return None if attention is None else attention.bool()

    def try_forward(self, model: nn.Module, batch: Batch, whose: str) -> Any:
        """``forward`` for the first time: what torch says of a wrong input becomes a DataError."""
        try:
            return super().try_forward(model, batch, whose)
        except IndexError as error:
            raise DataError(
                f"the {whose} cannot read texts of {batch['inputs'].shape[1]} tokens with ids up "
                f"to {int(batch['inputs'].max()):,} ({first_line(error)}); use its own tokenizer, "
                "and a smaller length if it reads fewer tokens"
            ) from error


def aligned(
    batch: Batch, text: str = "inputs", mask: str = "attention"
) -> tuple[Tensor, Tensor | None]:
    """Token ids and mask, each text from the first place on, whichever side is padded.

    Raises:
        DataError: what is no token ids.
    """
    inputs, attention = batch[text], batch.get(mask)
    if inputs.ndim != 2 or inputs.is_floating_point():
        raise DataError(
            f"the {text} are {inputs.dtype} {list(inputs.shape)}, and this task reads token ids, "
            "int64 [N, S]; make the data with attar.data.sentences"
        )
    if attention is None:
        return inputs, None
    if attention.shape != inputs.shape:
        raise DataError(
            f"the {mask} is {list(attention.shape)} where the {text} are {list(inputs.shape)}; "
            "give 1 for each real token and 0 for padding"
        )
    # Gaps inside a text stay; no test for whether a batch needs it, which a GPU would wait for.
    first = attention.ne(0).long().argmax(1, keepdim=True)
    places = torch.arange(inputs.shape[1], device=inputs.device)
    order = places + first
    order = torch.where(order < inputs.shape[1], order, order - inputs.shape[1])  # % has no ONNX
    return inputs.gather(1, order), attention.gather(1, order)


def read(model: nn.Module, inputs: Tensor, attention: Tensor | None) -> Any:
    """What *model* says of the tokens; it is given the mask where it takes one."""
    form = _form(type(model).forward)
    if "input_ids" in form.names:
        named = {"input_ids": inputs}
        if attention is not None and "attention_mask" in form.names:
            named["attention_mask"] = attention
        return model(**named)
    return model(inputs) if attention is None or not _takes_two(model) else model(inputs, attention)


class _Form(NamedTuple):
    names: tuple[str, ...]  # of what can be given by place, without self
    any: bool  # takes whatever it is given, as wrappers do


@lru_cache(maxsize=256)
def _form(forward: Callable[..., Any]) -> _Form:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in parameters if p.kind in by_place)
    return _Form(names, any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters))


def _takes_two(model: nn.Module) -> bool:
    form = _form(type(model).forward)
    if not form.any:
        return len(form.names) > 1
    inner = next(model.children(), None)  # a wrapper hands on what it is given
    return inner is None or _takes_two(inner) or "input_ids" in _form(type(inner).forward).names
