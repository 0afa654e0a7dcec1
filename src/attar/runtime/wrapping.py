"""A module on several ranks, by DDP or by FSDP2, and the way back.

Losses are divided by the counts of the whole step over all ranks, so gradients are *summed* over
the ranks, not averaged as torch does by default: exact for any number of ranks.

Running statistics (BatchNorm) are each rank's own within a step; ``settle`` then gives all ranks
their mean, weighted by examples. Of equal shares the mean is that of one process; a variance is
without what the ranks' means differ by. All ranks hold the same state after every step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from attar.runtime.blocks import blocks
from attar.runtime.errors import AttarError, DivergedError, PreflightError
from attar.runtime.ranks import Group, Wrap, gradient_norm
from attar.runtime.stop import Interrupted

# Ranks that summed hold the same bits; devices of two kinds may differ in the norm's last digits.
_SAME_NORM = 1e-5


def wrap(
    ranks: Group, module: nn.Module, example: Sequence[Any], precision: torch.dtype | None
) -> Wrap:
    """Share *module* by the kind of *ranks*; the contract is that of ``Ranks.wrap``."""
    if ranks.kind == "fsdp" and precision is torch.float16:
        raise PreflightError(
            "fp16 cannot be shared by fsdp: its scaler sees one rank's part of the gradient; use "
            "precision: bf16, or ddp"
        )
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    ranks.same("the model", shapes)
    ranks.spread([*module.parameters(), *module.buffers()])
    seen = _dry_run(module, example)
    kind = Sharded if ranks.kind == "fsdp" else Replicated
    return kind(ranks, module, seen)


class _Seen:
    """What a dry run has shown of a module."""

    def __init__(self) -> None:
        self.called: set[nn.Module] = set()
        self.moving: list[Tensor] = []
        self.unused = False


def _dry_run(module: nn.Module, example: Sequence[Any]) -> _Seen:
    """Run once and put back what moved: which parts run, which buffers move, what has no gradient.

    Raises:
        PreflightError: the loss does not depend on any parameter.
    """
    seen = _Seen()
    # A buffer is compared by value: batch normalisation does not count its own writes.
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    trained = [p for p in module.parameters() if p.requires_grad]
    devices = {t.device for t in trained if t.device.type == "cuda"}
    with ExitStack() as stack:
        for part in module.modules():
            # A leaf is never wrapped by itself, and a last layer that is listened to is run whole.
            if not any(part.children()):
                continue
            handle = part.register_forward_pre_hook(lambda part, _: seen.called.add(part))
            stack.callback(handle.remove)
        stack.enter_context(torch.random.fork_rng(devices))
        if any(part.__dict__.get("_compiled_call_impl") for part in module.modules()):
            # These hooks are gone at the first step, which would be compiled once more.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        loss = module(*example).loss
        if not loss.requires_grad:
            raise PreflightError("the loss depends on no parameter that is trained")
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
    seen.unused = any(grad is None for grad in grads)
    with torch.no_grad():
        for buffer, known in before:
            if buffer.is_floating_point() and not _equal(buffer, known):
                seen.moving.append(buffer)
            buffer.copy_(known)
    return seen


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


class _Shared(Wrap):
    """What both kinds have in common."""

    def __init__(self, ranks: Group, module: nn.Module, seen: _Seen) -> None:
        super().__init__(module)
        self._ranks = ranks
        # Ranks that see other rows may see another buffer move; all must send the same.
        flags = [any(buffer is moved for moved in seen.moving) for buffer in module.buffers()]
        flags = [count > 0 for count in ranks.total([*map(int, flags), int(seen.unused)])]
        self._moving = [b for b, moves in zip(module.buffers(), flags, strict=False) if moves]
        self._unused = flags[-1]

    @torch.no_grad()
    def settle(self, own: int, total: int) -> None:
        if not self._moving or total == 0:
            return
        # A rank without examples may hold a statistic that is not finite; it has no say.
        flat = torch.cat([buffer.reshape(-1) for buffer in self._moving])
        flat = flat * (own / total) if own else torch.zeros_like(flat)
        self._ranks._dist.all_reduce(flat)
        parts = flat.split([buffer.numel() for buffer in self._moving])
        for buffer, part in zip(self._moving, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


class Replicated(_Shared):
    """``DistributedDataParallel``: every rank holds the whole module and its gradient."""

    def __init__(self, ranks: Group, module: nn.Module, seen: _Seen) -> None:
        super().__init__(ranks, module, seen)
        from torch.nn.parallel import DistributedDataParallel

        self.module = DistributedDataParallel(
            module,
            find_unused_parameters=self._unused,
            gradient_as_bucket_view=True,
        )
        self.module.broadcast_buffers = False  # settle does better, and once a step
        self.module.register_comm_hook(None, lambda state, bucket: _sum(bucket))
        self._inner: nn.Module | None = module

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        return super().micro(last) if last else self.module.no_sync()  # type: ignore[operator]

    def measured(self, loss: float, grads: Sequence[Tensor]) -> tuple[float, float]:
        norm = gradient_norm(grads)
        losses, norms = self._ranks.each(loss, norm)
        if max(norms) - min(norms) > _SAME_NORM * max(norms):  # false where one is not a number
            raise AttarError(
                f"the ranks hold different gradients (their norms go from {min(norms):.6g} to "
                f"{max(norms):.6g}): a part of the module is called around its wrapper; call the "
                "objective alone"
            )
        return sum(losses), norms[0]

    def close(self) -> None:
        """Give the module back; the hooks on its gradients go with the wrapper."""
        if self._inner is not None:
            self.module, self._inner = self._inner, None


def _sum(bucket: Any) -> torch.futures.Future[Tensor]:
    import torch.distributed as dist

    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


class Sharded(_Shared):
    """FSDP2: every rank holds a part of each tensor, and of its gradient and optimiser state.

    The whole of a block is on a rank only while the block runs. Gradients are summed after every
    batch of a step: to keep them whole until the last would cost the memory that is saved.
    """

    def __init__(self, ranks: Group, module: nn.Module, seen: _Seen) -> None:
        super().__init__(ranks, module, seen)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0:
                raise PreflightError(
                    f"fsdp cannot cut '{name}', which is a single number; use ddp, or give it "
                    "shape [1]"
                )
        self._open = True
        self._parts = list(module.modules())
        self._classes = [type(part) for part in self._parts]
        self._fields = [set(part.__dict__) for part in self._parts]
        self._parameters = [
            (part, name, parameter)
            for part in self._parts
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        try:
            self._shard(seen)
            self._check()
        except BaseException:
            self.close()
            raise
        for parameter in {id(p): p for _, _, p in self._parameters}.values():
            parameter.data = parameter.data.new_empty(0)  # its memory; the object comes back

    def _shard(self, seen: _Seen) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self._ranks.device.type, (self._ranks.world,))
        # A part that is not called by itself would never be made whole: it goes to its parent.
        # The children are for callers of a child alone, as a validation calls the student.
        children = [c for c in self.module.children() if c in seen.called]
        inner = [
            part for part in blocks(self.module) if part in seen.called and part not in children
        ]
        for part in [*inner, *children, self.module]:
            if part is self.module or (not _tied(part, self._parameters)):
                fully_shard(part, mesh=mesh)
        for part in self._parts:
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)
        # The whole must be made ready before a child is called by itself, and a run that goes on
        # at the end of an epoch validates first.
        self.module._get_fsdp_state()._lazy_init()  # type: ignore[operator]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Make whole what belongs to no part of its own: a part that is called may need it."""
        self.module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            self.module.reshard()  # type: ignore[operator]

    def _check(self) -> None:
        from torch.distributed.tensor import DTensor, Shard

        for name, parameter in self.module.named_parameters():
            if not isinstance(parameter, DTensor) or not isinstance(parameter.placements[0], Shard):
                raise PreflightError(f"fsdp was asked for, and '{name}' is whole on every rank")

    def measured(self, loss: float, grads: Sequence[Tensor]) -> tuple[float, float]:
        own = gradient_norm([grad.to_local() for grad in grads])  # type: ignore[attr-defined]
        losses, norms = self._ranks.each(loss, own)
        return sum(losses), float(torch.linalg.vector_norm(torch.tensor(norms)))

    @torch.no_grad()
    def close(self) -> None:
        """Make every tensor whole again on every rank, which all must do, and leave no trace."""
        if not self._open:
            return
        self._open = False
        from torch.distributed.fsdp import FSDPModule

        for part in self._parts:
            if isinstance(part, FSDPModule):
                part.reshard()
        done: set[int] = set()
        for part, name, parameter in self._parameters:
            if id(parameter) not in done:
                done.add(id(parameter))
                parameter.data = self._ranks.full(part._parameters[name].detach())  # type: ignore[union-attr]
        for part, name, parameter in self._parameters:
            part._parameters[name] = parameter
        for part, kind, fields in zip(self._parts, self._classes, self._fields, strict=True):
            _forget(part, kind, fields)
        gc.collect()  # what held the parts is in a cycle

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # Those come to all ranks at once. Others may be this rank's alone: to gather then would
        # wait for ranks that never come. The process ends, and the launcher ends the others.
        if error is None or isinstance(error, DivergedError | Interrupted):
            self.close()


def _tied(part: nn.Module, parameters: list[tuple[nn.Module, str, nn.Parameter]]) -> bool:
    """Whether a parameter of *part* also belongs to a module outside it."""
    inside = set(part.modules())
    own = {id(parameter) for parameter in part.parameters()}
    return any(id(p) in own and owner not in inside for owner, _, p in parameters)


def _forget(part: nn.Module, kind: type[nn.Module], fields: set[str]) -> None:
    """Take from a module what ``fully_shard`` has put on it: class, fields, hooks, its record."""
    from torch.distributed._composable_state import _module_state_mapping

    part.__class__ = kind
    for name in set(part.__dict__) - fields:
        if "composable" in name or "fsdp" in name:
            del part.__dict__[name]
    for name, hooks in part.__dict__.items():
        if name.endswith("_hooks") and hooks:
            for key in [key for key, hook in hooks.items() if _of_torch(hook)]:
                del hooks[key]
                for flags in (f"{name}_with_kwargs", f"{name}_always_called"):
                    part.__dict__.get(flags, {}).pop(key, None)
    _module_state_mapping.pop(part, None)


def _of_torch(hook: Any) -> bool:
    made = getattr(hook, "hook", hook)  # some are kept in a holder
    return str(getattr(made, "__module__", "")).startswith("torch.distributed.")
