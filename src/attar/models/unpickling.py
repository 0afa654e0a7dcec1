"""Run as a process of its own: reads a pickled weights file, writes safetensors.

Called as ``python unpickling.py SOURCE DRAFT`` by `attar.models.importing`; prints one JSON table.
torch reads the file with ``weights_only=True``: only tensors and plain containers are made of
it, and anything else that it names is refused by that name. This process holds no more memory,
time and disk than the file can need, so that a file that lies about its size harms nobody.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "params")
PREFIXES = ("module.", "_orig_mod.")
SPARE = 1 << 30  # bytes of memory beside the tensors
MARGIN = 1 << 20
SHOWN = 64
LONGEST = 120


class Refused(Exception):
    """The file is not converted; the text says why."""


def main(source: Path, draft: Path) -> dict[str, Any]:
    """Convert *source*; what was done, or ``{"error": sentence}``."""
    size = source.stat().st_size
    try:
        _check_archive(source, size)
        import torch
        from safetensors.torch import save_file

        _limit(size)
        tensors, told = _chosen(_loaded(torch, source), torch)
        kept, tied = _apart(tensors, size)
        told["left_out"] = told["left_out"][:SHOWN]
        save_file(kept, draft, metadata={"format": "pt", **tied})
    except Refused as refused:
        return {"error": str(refused)}
    except (MemoryError, RuntimeError) as error:
        return {"error": f"cannot be read ({_short(error)}); use another copy"}
    return told | {"tied": tied, "parameters": sum(t.numel() for t in kept.values())}


def _check_archive(source: Path, size: int) -> None:
    """Refuse a compressed archive before anything inflates it: torch writes none."""
    if not zipfile.is_zipfile(source):
        return
    try:
        with zipfile.ZipFile(source) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Refused(f"is a damaged archive ({_short(error)}); use another copy") from None
    unpacked = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or unpacked > size:
        raise Refused(
            f"is an archive that unpacks to {unpacked:,} bytes from {size:,}, and torch writes no "
            "compressed one; it was not opened"
        )


def _limit(size: int) -> None:
    """No more memory and disk than a file of *size* bytes can need."""
    import resource

    held = _held()
    if held is not None:
        most = held + 4 * size + SPARE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    most = 2 * size + SPARE
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def _held() -> int | None:
    """Bytes of address space that this process has; None where the system does not tell."""
    import resource

    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()


def _loaded(torch: Any, source: Path) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (MemoryError, RuntimeError) as error:
        if "allocate" in str(error) or isinstance(error, MemoryError):
            raise Refused(
                "asks for far more memory than a file of its size can fill, so it is damaged or "
                "hostile; nothing was written"
            ) from None
        raise Refused(f"cannot be read ({_short(error)}); use another copy") from None
    except Exception as error:  # of the unpickler: whatever a broken stream leads to
        # Of torch's advice, to read it without care, nothing is passed on.
        said = str(error).split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
        named = re.search(r"GLOBAL ([\w.]+)", said)
        if named:
            raise Refused(
                f"asks for {named[1][:LONGEST]}, which is no tensor and may run code; none of it "
                "was run and nothing was written; where the file was made, write it again with "
                "torch.save(model.state_dict(), FILE) if you trust who made it"
            ) from None
        raise Refused(
            f"is no weights file that torch wrote, or a damaged one ({_short(said)}); "
            "use another copy"
        ) from None


def _chosen(content: Any, torch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors by name, and what was done to get them."""
    path: list[str] = []
    left_out: list[str] = []
    while True:
        if not isinstance(content, dict):
            raise Refused(f"holds a {type(content).__name__}, not a state dict of tensors")
        tensors = {str(k): v for k, v in content.items() if _stored(v, torch)}
        inner = next((n for n in NESTS if _nests(content.get(n), torch)), None)
        rest = {k: v for k, v in content.items() if str(k) not in tensors and k != inner}
        left_out += [f"{'.'.join([*path, str(k)])[:LONGEST]} ({_kind(v)})" for k, v in rest.items()]
        if tensors or inner is None:
            break
        path.append(inner)
        content = content[inner]
    if not tensors:
        held = ", ".join(left_out[:4]) or "nothing"
        raise Refused(f"holds no tensors that safetensors can keep, but {held}")
    if inner is not None:
        left_out.append(f"{inner} (dict)")
    tensors, taken = _without_prefix(tensors)
    return tensors, {
        "nest": ".".join(path),
        "prefix": taken,
        "tensors": len(tensors),
        "left_out": left_out,
        "left_out_count": len(left_out),
    }


def _nests(value: Any, torch: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(item, torch.Tensor | dict) for item in value.values()
    )


def _stored(value: Any, torch: Any) -> bool:
    """Whether safetensors can hold *value*."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.dtype in (torch.complex32,))


def _kind(value: Any) -> str:
    return type(value).__name__ if not hasattr(value, "dtype") else str(value.dtype)


def _without_prefix(tensors: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Take off what torch's wrappers put before every name."""
    taken = ""
    while found := next((p for p in PREFIXES if all(n.startswith(p) for n in tensors)), None):
        tensors = {name.removeprefix(found): tensor for name, tensor in tensors.items()}
        taken += found
    return tensors, taken


def _apart(tensors: dict[str, Any], size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Each tensor once and whole, and the other names of those that are tied."""
    claimed = 0
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
        else:
            claimed += tensor.numel() * tensor.element_size()
    if claimed > 2 * size + MARGIN:  # before a view with stride 0 is written out
        raise Refused(
            f"claims {claimed:,} bytes of tensors in a file of {size:,}, so it is damaged or "
            "hostile; nothing was written"
        )
    kept = {n: t.detach().contiguous().clone() for n, t in tensors.items() if n not in tied}
    return kept, tied


def _short(said: object) -> str:
    return " ".join(str(said).split())[:LONGEST] or type(said).__name__


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
