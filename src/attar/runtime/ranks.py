"""The processes that share one training, and what they tell each other.

``connect()`` gives the processes that ``torchrun`` started, or the one process there is. Both
have one surface, so that a loop never asks how many there are: one process answers at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attar.runtime import errors
from attar.runtime.closing import Closing
from attar.runtime.errors import AttarError, PreflightError, UsageError

Kind = Literal["auto", "ddp", "fsdp"]

_NOTHING: AbstractContextManager[None] = nullcontext()


def gradient_norm(grads: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector; not finite where one of them is not.

    What ``torch.nn.utils.get_total_norm`` computes, in half its time on a CPU and with one wait
    on an accelerator.
    """
    if not grads:
        return 0.0
    norms = torch._foreach_norm(list(grads))
    if grads[0].device.type == "cpu":
        return math.hypot(*(norm.item() for norm in norms))
    return torch.linalg.vector_norm(torch.stack(norms)).item()


class Wrap(Closing):
    """A module as the ranks train it; of one process, the module itself.

    Attributes:
        module: what to call, with the arguments of the module that was wrapped. Nothing inside
            it may be called around it while training: its gradients would stay on one rank.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module = module

    def micro(self, last: bool) -> AbstractContextManager[Any]:
        """Stands around the forward and the backward of one batch of an optimiser step.

        Args:
            last: this is the last batch of the step, at which gradients are summed over ranks.
        """
        return _NOTHING

    def apart(self) -> AbstractContextManager[Any]:
        """Stands around passes of a part of the module, without gradient, as of a validation."""
        return _NOTHING

    def measured(self, loss: float, grads: Sequence[Tensor]) -> tuple[float, float]:
        """The loss of a whole step and the norm of its gradient, the same on every rank.

        Args:
            loss: this rank's share of the loss.
            grads: the gradients after the step's last backward.
        """
        return loss, gradient_norm(grads)

    def settle(self, own: int, total: int) -> None:
        """Make running statistics equal on all ranks: their mean, weighted by examples.

        Args:
            own: examples that this rank has seen in the step.
            total: those of all ranks.
        """


class Ranks(Closing):
    """One process, which is rank 0 of 1: every answer is at once and costs next to nothing.

    Attributes:
        rank: number of this process, from 0.
        world: how many there are.
        main: whether this is rank 0, the only one that writes files.
        kind: how a module is shared: ``one``, ``ddp`` or ``fsdp``.
        device: this rank's own, where there are several.
    """

    rank = 0
    world = 1
    main = True
    kind = "one"
    device = torch.device("cpu")

    def wrap(self, module: nn.Module, *example: Any, precision: torch.dtype | None = None) -> Wrap:
        """Make *module* ready to be trained by all ranks; ``close`` of the result undoes it.

        Args:
            module: called as ``module(*example)`` it gives an object with a ``loss``. It must be
                in the mode that it is trained in, and the same on every rank, as rank 0's tensors
                are given to the others.
            example: arguments of one call, for a dry run that changes nothing.
            precision: autocast dtype of the training, which ``fsdp`` must know.
        """
        return Wrap(module)

    def total(self, counts: Sequence[int]) -> Sequence[int]:
        """Sum whole numbers over the ranks, each by itself."""
        return counts

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        """Sum numbers over the ranks, each by itself."""
        return values

    def any(self, flag: bool) -> bool:
        """Whether *flag* is set on one rank at least."""
        return flag

    def everyone(self, value: Any) -> list[Any]:
        """Each rank's *value*, in order of rank; values are plain JSON data."""
        return [value]

    def first(self, value: Any) -> Any:
        """Rank 0's *value*, on every rank; plain JSON data."""
        return value

    def same(self, what: str, value: Any) -> None:
        """Refuse, on every rank, a *value* (plain JSON data) that is not the same on all.

        Raises:
            PreflightError: names *what* differs and two ranks' values.
        """

    def together(self) -> AbstractContextManager[None]:
        """Stands around work in which one rank may find an error: then all raise it.

        Without it the others would wait for that rank until they time out. No rank may wait for
        another inside.
        """
        return _NOTHING

    def gather(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of all ranks joined by their first dimension, in order of rank, on the CPU.

        Lengths may differ; a rank without rows may give ``{}``.
        """
        return rows

    def full(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that the ranks hold parts of; every rank must ask."""
        return tensor

    def like(self, full: Tensor, tensor: Tensor) -> Tensor:
        """The part of *full* that belongs where *tensor* is: the inverse of ``full``."""
        return full

    def barrier(self) -> None:
        """Wait until every rank is here."""


class Group(Ranks):
    """Several processes of one ``torch.distributed`` group; made by ``connect``."""

    def __init__(self, kind: str, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._owned = not dist.is_initialized()
        if self._owned:
            # Host numbers go by gloo, so that counting never waits for a device.
            cuda = device.type == "cuda"
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None
            )
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.main = self.rank == 0
        self.kind = kind
        self.device = device

    def close(self) -> None:
        """Leave the group, if ``connect`` made it."""
        if self._owned and self._dist.is_initialized():
            self._dist.destroy_process_group()
        self._owned = False

    def wrap(self, module: nn.Module, *example: Any, precision: torch.dtype | None = None) -> Wrap:
        from attar.runtime.wrapping import wrap

        return wrap(self, module, example, precision)

    def total(self, counts: Sequence[int]) -> Sequence[int]:
        numbers = torch.tensor(counts, dtype=torch.int64)
        self._dist.all_reduce(numbers)
        return numbers.tolist()

    def any(self, flag: bool) -> bool:
        return self.total([int(flag)])[0] > 0

    def sums(self, values: Sequence[float]) -> Sequence[float]:
        return [sum(own) for own in self.each(*values)]

    def each(self, *numbers: float) -> list[list[float]]:
        """Each number as the ranks have it, in order of rank."""
        own = torch.tensor(numbers, dtype=torch.float64)
        return torch.stack(self._all(own)).T.tolist()

    def everyone(self, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._texts(json.dumps(value).encode())]

    def first(self, value: Any) -> Any:
        return self.everyone(value if self.main else None)[0]

    def same(self, what: str, value: Any) -> None:
        values = self.everyone(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise PreflightError(
                    f"the ranks do not agree on {what}: rank 0 has {_short(values[0])}, rank "
                    f"{rank} has {_short(other)}; start every rank with the same recipe and data"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        error: AttarError | None = None
        try:
            yield
        except AttarError as found:
            error = found
        told = [type(error).__name__, str(error)] if error else None
        for rank, other in enumerate(self.everyone(told)):
            if error is None and other is not None:
                raise getattr(errors, other[0], AttarError)(f"rank {rank}: {other[1]}")
        if error is not None:
            raise error

    def gather(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in rows.items()}
        known = [shape for shape in self.everyone(shapes) if shape]
        out: dict[str, Tensor] = {}
        for name, (dtype, _, *rest) in (known[0] if known else {}).items():
            own = rows[name].cpu() if rows else torch.empty(0)
            parts = self._bytes(own.reshape(-1).view(torch.uint8))
            flat = torch.cat(parts).view(getattr(torch, dtype))
            count = sum(shape[name][1] for shape in known)
            out[name] = flat.reshape(count, *rest)
        return out

    def full(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def like(self, full: Tensor, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(tensor, DTensor):
            return full
        return distribute_tensor(
            full.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )

    def barrier(self) -> None:
        self.total([0])

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give rank 0's tensors to all, in place."""
        for tensor in tensors:
            self._dist.broadcast(tensor.detach(), 0)

    def _texts(self, own: bytes) -> list[bytes]:
        parts = self._bytes(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        return [bytes(part.tolist()) for part in parts]

    def _bytes(self, own: Tensor) -> list[Tensor]:
        """Each rank's bytes, which may differ in number: padded to the most, and cut again."""
        sizes = [int(size) for size in self.each(float(len(own)))[0]]
        most = max(sizes)
        if most == 0:
            return [own] * self.world
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(own)] = own
        return [row[:size] for row, size in zip(self._all(padded), sizes, strict=True)]

    def _all(self, own: Tensor) -> list[Tensor]:
        out = [torch.empty_like(own) for _ in range(self.world)]
        self._dist.all_gather(out, own)
        return out


def connect(kind: Kind = "auto", device: str | torch.device = "auto") -> Ranks:
    """The ranks of this training, as ``torchrun`` started them; without it, one process.

    Args:
        kind: ``ddp`` keeps the whole module on every rank, ``fsdp`` a share of each tensor;
            ``auto`` is ``ddp`` where there are several ranks.
        device: ``cpu``, or ``cuda`` for one device a rank; ``auto`` takes CUDA where there is.

    Raises:
        UsageError: several ranks are asked for that were not started, or there are more ranks
            than devices.
    """
    if kind not in ("auto", "ddp", "fsdp"):
        raise UsageError(
            f"kind '{kind}' is unknown; {errors.suggest(kind, ['auto', 'ddp', 'fsdp'])}"
        )
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        if kind != "auto":
            raise UsageError(
                f"'{kind}' needs several processes and this is one; start it as: torchrun "
                f"--standalone --nproc-per-node=2 {' '.join(sys.argv) or 'SCRIPT'}"
            )
        return Ranks()
    if int(os.environ["WORLD_SIZE"]) == 1:
        return Ranks()
    return Group("ddp" if kind == "auto" else kind, _place(device))


def _place(device: str | torch.device) -> torch.device:
    """This rank's device, made the current one."""
    wanted = str(device).split(":")[0]
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cuda", "gpu"):
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"rank {os.environ['RANK']} is the {local + 1}th on this machine, which has {count} "
            f"CUDA devices; start at most {count} with --nproc-per-node, or use device: cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."
