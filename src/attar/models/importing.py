"""From a pickled weights file to safetensors, by way of a process that is held on a short lead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar.models.record import PICKLES, RECORD, WEIGHTS, printable
from attar.models.weights import header
from attar.runtime import DataError, RunExistsError, UsageError, write_atomic

SECONDS = 300  # beside what the size of the file takes
SLOWEST = 10_000_000  # bytes a second
WORKER = Path(__file__).with_name("unpickling.py")
# They would let the other process run code or read a file as a pickle may.
_KEPT_OUT = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "PYTHONSTARTUP", "PYTHONINSPECT")
_BESIDE = ("config.json", "preprocessor_config.json")
_SMALL = 1 << 20


@dataclass(frozen=True)
class Imported:
    """What `convert` did.

    Attributes:
        path: the file of safetensors.
        tensors: how many the source named, tied ones included.
        parameters: how many numbers the file holds.
        nest: the entry of the source that held them; empty for the whole.
        prefix: what was taken off all names.
        tied: names that are another name's tensor, which the file holds once.
        left_out: entries that are no tensors, each with its type; the first 64.
        left_out_count: how many there are.
        beside: files of transformers that were copied next to the weights.
    """

    path: Path
    tensors: int
    parameters: int
    nest: str
    prefix: str
    tied: dict[str, str]
    left_out: list[str]
    left_out_count: int
    beside: list[str]


def convert(source: str | Path, into: str | Path) -> Imported:
    """Write the tensors of a pickled file as safetensors.

    The file is read in a process of its own with ``torch.load(weights_only=True)`` on the CPU:
    no code of it is run. Nothing is written where it holds anything else than tensors, numbers,
    text and containers of them.

    Args:
        source: a ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` or ``.pkl`` file: a state dict, or a dict
            with one under ``state_dict``, ``model_state_dict``, ``model``, ``module``, ``net`` or
            ``params``. ``module.`` and ``_orig_mod.`` before every name are taken off.
        into: a ``.safetensors`` file, or a folder, which gets ``model.safetensors`` and, from
            beside the source, transformers' ``config.json`` and ``preprocessor_config.json``.

    Errors: another kind of file, another target (UsageError); no such file, a file that is
    damaged, hostile or without tensors (DataError); a target that exists (RunExistsError).
    """
    path, place = Path(source), Path(into)
    if path.suffix.lower() not in PICKLES:
        raise UsageError(
            f"{path}: is not converted; import reads {', '.join(sorted(PICKLES))} files"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the path of the weights file")
    target = _target(place)
    with tempfile.TemporaryDirectory(prefix="attar-import-") as folder:
        draft = Path(folder) / WEIGHTS
        told = _converted(path.resolve(), draft, path)
        header(draft)
        write_atomic(target, draft.read_bytes())
    beside = [] if target == place else _copied(path.parent, target.parent)
    known = {name: told[name] for name in Imported.__dataclass_fields__ if name in told}
    return Imported(path=target, beside=beside, **known)


def _target(into: Path) -> Path:
    target = into if into.suffix == ".safetensors" and not into.is_dir() else into / WEIGHTS
    if into.is_file() and target != into:
        raise UsageError(f"{into}: is a file; write into a folder, or a file named .safetensors")
    if target.exists() or ((target.parent / RECORD).exists() and target.name == WEIGHTS):
        raise RunExistsError(
            f"{target}: is there already, and nothing is written over; choose another --into"
        )
    return target


def _converted(source: Path, draft: Path, named: Path) -> dict[str, Any]:
    """What the other process said; an error names the file as the user did."""
    environment = {k: v for k, v in os.environ.items() if k not in _KEPT_OUT}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    seconds = SECONDS + source.stat().st_size // SLOWEST
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(WORKER), str(source), str(draft)],
            env=environment,
            cwd=draft.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"{named}: was not read within {seconds} s, so it is damaged or hostile; nothing was "
            "written"
        ) from None
    if done.returncode < 0:
        raise DataError(
            f"{named}: reading it was ended by {signal.Signals(-done.returncode).name} within the "
            "memory it may use, so it is damaged or hostile; nothing was written"
        )
    try:
        told = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise DataError(f"{named}: cannot be read ({printable(lines[-1])[:240]})") from None
    if "error" in told:
        raise DataError(f"{named}: {printable(told['error'])}")
    return told


def _copied(source: Path, folder: Path) -> list[str]:
    """Copy what transformers needs beside the weights, if it is there and small."""
    copied = []
    for name in _BESIDE:
        found = source / name
        if found.is_file() and found.stat().st_size <= _SMALL and not (folder / name).exists():
            write_atomic(folder / name, found.read_bytes())
            copied.append(name)
    return copied
