"""Faster or smaller passes of a module that change no result: compiling and recomputing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attar.runtime.blocks import blocks
from attar.runtime.errors import PreflightError, UsageError

Places = list[tuple[dict[str, Tensor | None], str, Tensor]]

_EITHER = "compile and recompute exclude each other; leave one out"


@contextmanager
def compiled(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Iterator[None]:
    """``torch.compile`` *module* in place: its class, state and hooks stay, and so do its users.

    Hooks must stand before. A batch of another size is compiled for any size the first time.
    Sums are taken in another order, and ``inductor`` draws dropout in its own way.

    Raises:
        UsageError: the module is being recomputed, or the compiler fails, which shows at the
            first call.
    """
    from torch._dynamo.eval_frame import remove_from_cache
    from torch._dynamo.exc import TorchDynamoException

    if any(_is_recomputed(part) for part in module.modules()):
        raise UsageError(_EITHER)

    # Not module.compile(): what that compiles lies in torch's own files, where the compiler
    # looks at nothing, so that a Sequential of torch's layers stays as it was without a word.
    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    known = module.__dict__.get("_compiled_call_impl")
    module._compiled_call_impl = torch.compile(call, backend=backend)
    try:
        yield
    except TorchDynamoException as error:
        why = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")
        raise UsageError(f"the student cannot be compiled ({why}); leave compile out") from error
    finally:
        # The compiler keeps what it made, with this code; it is of no use to the next student.
        remove_from_cache(call)
        del module._compiled_call_impl
        if known is not None:
            module._compiled_call_impl = known


@contextmanager
def recomputed(module: nn.Module) -> Iterator[list[nn.Module]]:
    """Keep no activation inside *module*'s blocks: each is computed again in the backward.

    Values and gradients are the same, and so are dropout's masks. Buffers, such as running
    statistics, move once: the second pass works on copies of what the first one found. Hooks on a
    block itself run once; those inside a block run again, when a tap no longer listens.

    Yields:
        The blocks.

    Raises:
        PreflightError: the module has no blocks.
        UsageError: the module is compiled.
    """
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise UsageError(_EITHER)
    found = blocks(module)
    if not found:
        raise PreflightError(
            "recompute finds no blocks in the student: it has no ModuleList or Sequential of "
            "compound parts; leave recompute out"
        )
    known = [(block, block.__dict__.get("forward")) for block in found]
    try:
        for block in found:
            block.forward = partial(_recompute, block, block.forward)
        yield found
    finally:
        for block, forward in known:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _is_recomputed(part: nn.Module) -> bool:
    return getattr(part.__dict__.get("forward"), "func", None) is _recompute


def _recompute(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _Before(block if block.training else nn.Module())


class _Before:
    """Inside, the block's buffers are copies of what they were; it may be entered again."""

    def __init__(self, block: nn.Module) -> None:
        self._places: Places = [
            (part._buffers, name, buffer.clone())
            for part in block.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]
        self._real: list[Tensor | None] = []

    def __enter__(self) -> None:
        self._real = [buffers[name] for buffers, name, _ in self._places]
        for buffers, name, known in self._places:
            buffers[name] = known.clone()

    def __exit__(self, *error: object) -> None:
        for (buffers, name, _), real in zip(self._places, self._real, strict=True):
            buffers[name] = real
        self._real = []
