"""How much memory a forward pass holds at once, beyond the weights and the batch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


def peak_bytes(model: nn.Module, batch: Tensor) -> int:
    """The most bytes that a pass of *model* over *batch* holds, beyond both; where they are.

    On CUDA it is what torch's allocator counts, with what kernels need while they run. Elsewhere
    the results of all operations are counted, from when they are made until nothing needs them, and
    not what a kernel needs for itself: the same number in every pass. A view has no memory of its
    own.
    """
    if batch.is_cuda:
        return _allocated(model, batch)
    with _unfused(), _Held() as held:
        model(batch)
    return held.most


def _allocated(model: nn.Module, batch: Tensor) -> int:
    place = batch.device
    model(batch)  # libraries allocate once what they keep
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    before = torch.cuda.memory_allocated(place)
    model(batch)
    torch.cuda.synchronize(place)
    return torch.cuda.max_memory_allocated(place) - before


class _Held(TorchDispatchMode):
    """Follows each storage that an operation makes until it is gone; ``most`` is their peak."""

    supports_higher_order_operators = True  # they are asked as all others

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):  # what nobody made here was there before
            self._follow(storage, 0)
        made = func(*args, **kwargs)
        for storage in _storages(made):
            self._follow(storage, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _follow(self, storage: UntypedStorage, size: int) -> None:
        key = id(storage)  # a storage has one object, for as long as any tensor is on it
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size


def _storages(values: Any) -> Iterator[UntypedStorage]:
    """The memory of all tensors among *values*; of one made of others, that of the others."""
    for value in tree_leaves(values):
        if not isinstance(value, Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        elif value.layout is torch.strided:
            yield value.untyped_storage()


@contextmanager
def _unfused() -> Iterator[None]:
    """Let torch's encoder layers run as their operations, of which one kernel would hide all."""
    attention: Any = torch.backends.mha
    before = attention.get_fastpath_enabled()
    try:
        attention.set_fastpath_enabled(False)
        yield
    finally:
        attention.set_fastpath_enabled(before)
