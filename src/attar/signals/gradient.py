"""Gradients as signals: of the loss, of an answer, or along a random direction of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime import PreflightError, UsageError
from attar.signals.address import EMBEDDINGS, INPUTS, Address, module_at

Batch = dict[str, Tensor]
CHOSEN = {"top": "grad:top", "probe": "grad:probe"}  # what the student must take from the teacher


class Gradients:
    """The gradients that *addresses* name, each [N, ...] as large as what it is taken for.

    They are sums over the batch differentiated once, so each example's row is its own gradient
    where examples do not meet (batch norm in training mode makes them meet).

    Args:
        model: what is differentiated.
        addresses: those of kind ``grad``.
        whose: for messages.
    """

    def __init__(self, model: nn.Module, addresses: Sequence[Address], whose: str) -> None:
        self._whose = whose
        self._wanted: dict[str, list[tuple[str, str]]] = {}
        for address in addresses:
            of, _, wrt = address.path.partition("/")
            if wrt == EMBEDDINGS:
                wrt = _embedding_path(model, address, whose)
            elif wrt != INPUTS:
                module_at(model, address, whose)  # what is mistyped is said as it was written
            heard = wrt if wrt == INPUTS else f"feature:{wrt}{_suffix(address)}"
            self._wanted.setdefault(of, []).append((address.text, heard))

    def __bool__(self) -> bool:
        return bool(self._wanted)

    @property
    def features(self) -> list[str]:
        """Addresses of the features that gradients are taken for."""
        return [wrt for pairs in self._wanted.values() for _, wrt in pairs if wrt != INPUTS]

    def ready(self, batch: Batch) -> Batch:
        """The batch with inputs that can be differentiated for."""
        if all(wrt != INPUTS for pairs in self._wanted.values() for _, wrt in pairs):
            return batch
        if not batch["inputs"].is_floating_point():
            raise PreflightError(
                f"the {self._whose}'s inputs are {batch['inputs'].dtype}: there is no gradient for "
                "whole numbers; write grad:OF/embeddings"
            )
        return {**batch, "inputs": batch["inputs"].detach().requires_grad_()}

    def take(
        self,
        batch: Batch,
        heard: Batch,
        told: Batch,
        main: Callable[[], Tensor],
        loss: Callable[[], Tensor],
        *,
        keep: bool,
    ) -> Batch:
        """The gradients by address, and what was chosen to take them of.

        Args:
            batch: as ``ready`` gave it.
            heard: the features of this pass.
            told: what the teacher chose; what is not there is chosen here.
            main, loss: give the main output [N, C] and the task's loss of this pass.
            keep: whether the gradients can be differentiated themselves.
        """
        found: Batch = {}
        for of, pairs in self._wanted.items():
            if of == "loss":
                value = self._loss(loss, batch)
            else:
                output = main()
                key = CHOSEN[of]
                choice = told.get(key)
                choice = _chosen(of, output) if choice is None else choice
                found[key] = choice
                value = _along(of, output, choice)
            targets = [batch["inputs"] if wrt == INPUTS else heard[wrt] for _, wrt in pairs]
            grads = self._differentiate(value, targets, pairs, keep=keep)
            found |= {text: grad for (text, _), grad in zip(pairs, grads, strict=True)}
        return found

    def _loss(self, loss: Callable[[], Tensor], batch: Batch) -> Tensor:
        if "labels" not in batch:
            raise PreflightError(
                "grad:loss is the gradient of the loss on the labels, and the data have none; "
                "write grad:top or grad:probe"
            )
        return loss().sum()

    def _differentiate(
        self, value: Tensor, targets: list[Tensor], pairs: list[tuple[str, str]], *, keep: bool
    ) -> list[Tensor]:
        for target, (text, _) in zip(targets, pairs, strict=True):
            if not target.requires_grad:
                raise PreflightError(
                    f"'{text}': the {self._whose} computes that without gradient, so nothing can "
                    "be differentiated for it; choose another part"
                )
        grads = torch.autograd.grad(
            value, targets, create_graph=keep, retain_graph=True, allow_unused=True
        )
        for grad, (text, _) in zip(grads, pairs, strict=True):
            if grad is None:
                raise PreflightError(
                    f"'{text}': what the {self._whose} answers does not depend on it; choose "
                    "another part"
                )
        return list(grads)


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on, with attention in a form that can be differentiated twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _chosen(of: str, output: Tensor) -> Tensor:
    if of == "top":
        return output.detach().argmax(-1, keepdim=True)
    drawn = torch.randn_like(output, requires_grad=False)
    return drawn / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)


def _along(of: str, output: Tensor, choice: Tensor) -> Tensor:
    if of == "top":
        return output.gather(-1, choice).sum()
    return (output * choice).sum()


def _suffix(address: Address) -> str:
    call = "" if address.call is None else f"@{address.call}"
    return call + ("" if address.key is None else f"[{address.key}]")


def _embedding_path(model: nn.Module, address: Address, whose: str) -> str:
    given: Any = getattr(model, "get_input_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if module is given or (given is None and isinstance(module, nn.Embedding)):
            return path
    raise UsageError(
        f"'{address.text}': the {whose} has no embedding; write grad:OF/inputs or the path of a "
        "module"
    )
