"""Starts a script once on several ranks, as torchrun would; the ranks assert for themselves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
collect_ignore = [
    "common.py",
    "gradients.py",
    "language.py",
    "masking.py",
    "sharing.py",
    "whole.py",
    "cases.py",
]  # run on the ranks, not here
Group = Callable[..., None]


def _start(script: Path, arguments: tuple[str, ...], world: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    known |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(world), "TORCH_SHOW_CPP_STACKTRACES": "0"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.fixture
def group() -> Group:
    """``group(*cases, world=2)`` fails with what the ranks printed when one of them fails.

    One that fails ends the others, which would wait for it. Without cases all of them run, in one
    start: it is most of the time.
    """

    def run(*cases: str, world: int, limit: float = 400) -> None:
        ranks = _start(HERE / "cases.py", cases, world)
        end = time.monotonic() + limit
        try:
            while any(rank.poll() is None for rank in ranks):
                if any(rank.poll() for rank in ranks) or time.monotonic() > end:
                    break
                time.sleep(0.05)
            failed = [number for number, rank in enumerate(ranks) if rank.poll() != 0]
        finally:
            for rank in ranks:
                rank.kill()
        said = [f"rank {n}:\n{rank.communicate()[0]}" for n, rank in enumerate(ranks)]
        assert not failed, "\n".join(said)

    return run
