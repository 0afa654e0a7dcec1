"""Runs a model as its task says, and gives the signals of the pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from attar.runtime import Closing, PreflightError
from attar.signals.address import KINDS, Address, parameters_at, parse
from attar.signals.gradient import Gradients, differentiable
from attar.signals.tap import Tap
from attar.tasks import Task

Signal = Tensor | tuple[Tensor, ...]


class Hearing(Closing):
    """``hearing(batch) -> (what task.forward returned, {address: signal})``.

    Args:
        model: is run by ``task.forward``.
        task: reads its outputs and its loss.
        addresses: what is wanted; without any the model is only run.
        whose: for messages.
    """

    def __init__(
        self, model: nn.Module, task: Task, addresses: Sequence[str], whose: str = "model"
    ) -> None:
        asked: dict[str, list[Address]] = {kind: [] for kind in KINDS}
        for address in map(parse, dict.fromkeys(addresses)):
            asked[address.kind].append(address)
        self._model = model
        self._task = task
        self._whose = whose
        self._outputs = asked["output"]
        self._parameters = {a.text: parameters_at(model, a, whose) for a in asked["param"]}
        self._gradients = Gradients(model, asked["grad"], whose) if asked["grad"] else None
        features = [a.text for a in asked["feature"] + asked["input"]]
        if self._gradients is not None:
            features += self._gradients.features
        self._tap = Tap(model, list(dict.fromkeys(features)), whose)

    @property
    def parameters(self) -> dict[str, Signal]:
        """The parameters that are signals themselves, by address."""
        return self._parameters

    def open(self) -> Self:
        """Place the hooks; once a stage, before the model is compiled."""
        self._tap.open()
        return self

    def close(self) -> None:
        """Take every hook away."""
        self._tap.close()

    def __enter__(self) -> Self:
        return self.open()

    def __call__(
        self, batch: dict[str, Tensor], told: dict[str, Any] | None = None, *, keep: bool = True
    ) -> tuple[Any, dict[str, Any]]:
        """Run the model on the batch.

        Args:
            told: the teacher's signals, for gradients that are taken of what it chose.
            keep: whether gradients among the signals can be differentiated themselves.
        """
        if self._gradients is not None:
            return self._differentiated(self._gradients, batch, told or {}, keep)
        out, heard = self._tap(self._task.forward, self._model, batch)
        self._read(out, heard, keep)
        return out, heard

    def _read(self, out: Any, heard: dict[str, Any], keep: bool) -> None:
        for address in self._outputs:
            if address.key is None:
                heard[address.text] = self._task.output(out, address.path)
            else:
                heard[address.text] = self._part(out, address)
        for text, parameter in self._parameters.items():
            heard[text] = parameter if keep else _detached(parameter)

    def _part(self, out: Any, address: Address) -> Tensor:
        """One of several tensors that an output holds, such as ``hidden_states[3]``."""
        try:
            whole = out[address.path] if isinstance(out, Mapping) else getattr(out, address.path)
            part = whole[address.key]
        except (AttributeError, KeyError, IndexError, TypeError):
            part = None
        if not isinstance(part, Tensor):
            raise PreflightError(
                f"'{address.text}': what the {self._whose} returns has no such part (a "
                f"{type(out).__name__}); a model of transformers gives hidden_states and "
                "attentions where its config says output_hidden_states or output_attentions"
            )
        return part

    def _differentiated(
        self, gradients: Gradients, batch: dict[str, Tensor], told: dict[str, Any], keep: bool
    ) -> tuple[Any, dict[str, Any]]:
        task = self._task
        with differentiable():
            batch = gradients.ready(batch)
            out, heard = self._tap(task.forward, self._model, batch)
            taken = gradients.take(
                batch,
                heard,
                told,
                lambda: task.output(out, task.outputs[0]),
                lambda: task.loss(out, batch),
                keep=keep,
            )
        self._read(out, heard, keep)
        heard |= taken
        if not keep:  # what was differentiated for was heard with its graph
            return out, {address: _detached(signal) for address, signal in heard.items()}
        return out, heard


def _detached(signal: Any) -> Any:
    """Without its graph: a tensor, what stands for one, or a tuple of them."""
    return tuple(s.detach() for s in signal) if isinstance(signal, tuple) else signal.detach()
