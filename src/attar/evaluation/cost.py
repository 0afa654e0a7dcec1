"""What a model costs: parameters, multiply-adds, bytes, time and memory."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.evaluation.memory import peak_bytes
from attar.evaluation.rows import evaluating
from attar.models.quantized import parameters_of
from attar.runtime import UsageError, resolve_device

BATCHES = (1, 64)
FILL_SECONDS = 0.3
MOST_SECONDS = 10.0  # that a model is timed for at one batch size, where a pass is shorter
WARM_UP = 5
TURNS = 10


@dataclass(frozen=True)
class Cost:
    """The cost of one model.

    Attributes:
        parameters: how many numbers are trained or loaded; a tied tensor counts once, two of 4
            bits in a byte as two.
        macs: multiply-accumulate operations of matrix products, convolutions and attention for
            one example (a multiplication and an addition are one).
        bytes: the size of the weights: of the file when it was given, else of all tensors.
        latency: milliseconds of a forward pass by batch size, {"1": {"p50_ms", "p95_ms"}, ...}.
        threads: CPU threads that torch used.
        device: the name of the processor.
        peak_bytes: the most memory that a forward pass holds beyond the weights and the batch, by
            batch size; empty where it was not measured.
        throughput: examples a second by batch size: the batch over the median time.
        one_thread: ``latency`` on one CPU thread; empty where it is that already, or was not
            measured.
    """

    parameters: int
    macs: int
    bytes: int
    latency: dict[str, dict[str, float]]
    threads: int
    device: str
    peak_bytes: dict[str, int] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)
    one_thread: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for size, taken in self.latency.items():
            self.throughput.setdefault(size, 1000 * int(size) / max(taken["p50_ms"], 1e-9))

    def to_json(self) -> dict[str, Any]:
        """This cost as JSON values."""
        return asdict(self)


def cost(
    model: nn.Module,
    inputs: Tensor,
    *,
    device: str | torch.device = "auto",
    file: str | Path | None = None,
    one_thread: bool = True,
) -> Cost:
    """Measure what *model* costs on *inputs*: ``costs`` of one model."""
    files = {"model": file}
    found = costs({"model": model}, inputs, device=device, files=files, one_thread=one_thread)
    return found["model"]


def costs(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    *,
    device: str | torch.device = "auto",
    files: Mapping[str, str | Path | None] | None = None,
    one_thread: bool = True,
) -> dict[str, Cost]:
    """Measure what each model costs on *inputs*.

    Latency is a forward pass in eval mode without gradients, after a warm-up, repeated until
    about 0.3 s are filled (20 to 500 times; fewer, and at least once, where that takes over 10 s).
    The models take turns, so that what else the machine does falls on all of them: two copies of
    one network get the same time. Memory is that of one more pass, which is not timed. The models
    come back as they were.

    Args:
        inputs: at least one example [n, ...]; repeated to fill a batch.
        files: the weights on disk by name, for their true size.
        one_thread: where torch uses several CPU threads, measure latency with one too.

    Raises:
        UsageError: there is no example in *inputs*.
    """
    if inputs.ndim == 0 or len(inputs) == 0:
        raise UsageError("cost needs at least one example: give inputs of shape [n, ...], n >= 1")
    place = resolve_device(device)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model, place))
        batches = {size: _filled(inputs, size).to(place) for size in BATCHES}
        macs = {name: count_macs(model, batches[1]) for name, model in models.items()}
        peaks = {
            name: {str(size): peak_bytes(model, batch) for size, batch in batches.items()}
            for name, model in models.items()
        }
        taken = {str(size): _latencies(models, batch, place) for size, batch in batches.items()}
        alone: dict[str, dict[str, dict[str, float]]] = {}
        if one_thread and place.type == "cpu" and torch.get_num_threads() > 1:
            with _one_thread():
                alone = {str(n): _latencies(models, batch, place) for n, batch in batches.items()}
    return {
        name: Cost(
            parameters=parameters_of(model),
            macs=macs[name],
            bytes=_bytes(model, (files or {}).get(name)),
            latency={size: found[name] for size, found in taken.items()},
            threads=torch.get_num_threads(),
            device=_device_name(place),
            peak_bytes=peaks[name],
            one_thread={size: found[name] for size, found in alone.items()},
        )
        for name, model in models.items()
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _bytes(model: nn.Module, file: str | Path | None) -> int:
    if file is not None:
        return Path(file).stat().st_size
    seen = {
        (tensor.data_ptr(), tensor.shape): tensor.numel() * tensor.element_size()
        for tensor in model.state_dict().values()
        if isinstance(tensor, Tensor)
    }
    return sum(seen.values())


def _latencies(
    models: Mapping[str, nn.Module], batch: Tensor, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds of a pass of each model: the median and the 95th percentile over all turns."""
    wait = _synchroniser(device)
    warm = {name: _warmed(model, batch, wait) for name, model in models.items()}
    passes = {name: _passes(seconds) for name, seconds in warm.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS):
        for name, model in models.items():
            count = passes[name] * (turn + 1) // TURNS - passes[name] * turn // TURNS
            if count and warm[name] < FILL_SECONDS:
                _timed(model, batch, wait)  # the one before has filled the caches with its weights
            taken[name] += [_timed(model, batch, wait) for _ in range(count)]
    return {name: _quantiles(seconds) for name, seconds in taken.items()}


def _warmed(model: nn.Module, batch: Tensor, wait: Callable[[], None]) -> float:
    """The shortest of a few passes; of a slow model the first alone."""
    taken: list[float] = []
    while not taken or (len(taken) < WARM_UP and sum(taken) < FILL_SECONDS):
        taken.append(_timed(model, batch, wait))
    return max(min(taken), 1e-9)


def _passes(seconds: float) -> int:
    """How often a pass of so many seconds is timed."""
    wanted = min(500, max(20, int(FILL_SECONDS / seconds)))
    return max(1, min(wanted, int(MOST_SECONDS / seconds)))


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    found = np.array(seconds) * 1000
    return {"p50_ms": float(np.median(found)), "p95_ms": float(np.quantile(found, 0.95))}


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
