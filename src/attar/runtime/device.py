"""Where tensors live and in which precision a student runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from attar.runtime.errors import UsageError, suggest

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` is the first CUDA device, else Apple's, else the CPU."""
    if device == "gpu":
        device = "cuda"
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        known = ["auto", "cpu", "cuda", "mps"]
        raise UsageError(f"device '{device}' is unknown; {suggest(str(device), known)}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device '{device}' is not on this machine, which has "
            f"{torch.cuda.device_count()} CUDA devices; use device: auto"
        )
    return found


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on *device*; on the CPU it is the batch itself."""
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def resolve_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for plain float32.

    ``auto`` is bf16 on a CUDA device that has it and float32 everywhere else: half precision on
    a CPU without the instructions for it was measured 6 times slower than float32.
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision '{precision}' is unknown; {suggest(precision, ['auto', *PRECISIONS])}"
        )
    return PRECISIONS[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Run a forward pass in *dtype*; None is a context that does nothing and costs nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
