"""What a model costs: parameters, multiply-adds, bytes and time."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.evaluation.rows import evaluating
from attar.runtime import UsageError, resolve_device

BATCHES = (1, 64)
FILL_SECONDS = 0.3
WARM_UP = 5


@dataclass(frozen=True)
class Cost:
    """The cost of one model.

    Attributes:
        parameters: how many numbers are trained or loaded; a tied tensor counts once.
        macs: multiply-accumulate operations of matrix products, convolutions and attention for
            one example (a multiplication and an addition are one).
        bytes: the size of the weights: of the file when it was given, else of all tensors.
        latency: milliseconds of a forward pass by batch size, {"1": {"p50_ms", "p95_ms"}, ...}.
        threads: CPU threads that torch used.
        device: the name of the processor.
    """

    parameters: int
    macs: int
    bytes: int
    latency: dict[str, dict[str, float]]
    threads: int
    device: str

    def to_json(self) -> dict[str, Any]:
        """This cost as JSON values."""
        return asdict(self)


def cost(
    model: nn.Module,
    inputs: Tensor,
    *,
    device: str | torch.device = "auto",
    file: str | Path | None = None,
) -> Cost:
    """Measure what *model* costs on *inputs*.

    Latency is a forward pass in eval mode without gradients, after a warm-up, repeated until
    about 0.3 s are filled (20 to 500 times). The model comes back as it was.

    Args:
        inputs: at least one example [n, ...]; repeated to fill a batch.
        file: the weights on disk, for their true size.

    Raises:
        UsageError: there is no example in *inputs*.
    """
    if inputs.ndim == 0 or len(inputs) == 0:
        raise UsageError("cost needs at least one example: give inputs of shape [n, ...], n >= 1")
    place = resolve_device(device)
    with evaluating(model, place):
        batches = {size: _filled(inputs, size).to(place) for size in BATCHES}
        macs = count_macs(model, batches[1])
        latency = {str(size): _latency(model, batch, place) for size, batch in batches.items()}
    size = _tensor_bytes(model) if file is None else Path(file).stat().st_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, macs, size, latency, torch.get_num_threads(), _device_name(place))


def _filled(inputs: Tensor, size: int) -> Tensor:
    repeats = -(-size // len(inputs))
    return inputs.repeat(repeats, *[1] * (inputs.ndim - 1))[:size]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Turn fused kernels off: the counter knows their parts but not all of them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention: Any = torch.backends.mha
    onednn: Any = torch.backends.mkldnn
    before = attention.get_fastpath_enabled(), onednn.enabled
    try:
        attention.set_fastpath_enabled(False)
        onednn.enabled = False  # its fused LSTM
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        attention.set_fastpath_enabled(before[0])
        onednn.enabled = before[1]


def count_macs(model: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulate operations of *model* for the first example of *inputs*, where it is.

    Counts matrix products, convolutions and attention, as papers do; a multiplication with its
    addition is one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    tensors = chain(model.parameters(), model.buffers())
    place = next((tensor.device for tensor in tensors), inputs.device)
    with evaluating(model, place), _plain_kernels(), FlopCounterMode(display=False) as counter:
        model(inputs[:1].to(place))
    return counter.get_total_flops() // 2


def _tensor_bytes(model: nn.Module) -> int:
    seen = {
        (tensor.data_ptr(), tensor.shape): tensor.numel() * tensor.element_size()
        for tensor in model.state_dict().values()
        if isinstance(tensor, Tensor)
    }
    return sum(seen.values())


def _latency(model: nn.Module, batch: Tensor, device: torch.device) -> dict[str, float]:
    wait = _synchroniser(device)
    warm = min(_timed(model, batch, wait) for _ in range(WARM_UP))
    repeats = min(500, max(20, int(FILL_SECONDS / max(warm, 1e-9))))
    taken = np.array([_timed(model, batch, wait) for _ in range(repeats)]) * 1000
    return {"p50_ms": float(np.median(taken)), "p95_ms": float(np.quantile(taken, 0.95))}


def _timed(model: nn.Module, batch: Tensor, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    model(batch)
    wait()
    return time.perf_counter() - start


def _synchroniser(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return _cpu_name() or platform.processor() or platform.machine()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""
