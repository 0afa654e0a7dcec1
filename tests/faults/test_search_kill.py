"""A search that is killed in a trial keeps the finished ones and does that one again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attar.runtime import read_json

pytest.importorskip("optuna")

RECIPE = """\
task: image-classification
data: digits
teacher: {model: {name: mlp, widths: [32]}, train: {epochs: 2}, cache: true}
student: {name: mlp, widths: [4]}
stages:
  - do: distill
    epochs: 8
    batch_size: 32
    terms: [{loss: kl_divergence}]
search:
  trials: 5
  pruner: none
  space: {student.widths.0: {low: 2, high: 64}}
"""


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "attar", "search", "recipe.yaml", "--run", str(folder), *more]


def seen(path: Path, what: str) -> bool:
    return path.is_file() and what in path.read_text()


def told(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / "search.json")["trials"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("shared", [False, True])
def test_a_killed_search_keeps_what_is_finished_and_does_the_rest(
    tmp_path: Path, shared: bool
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folder = tmp_path / "runs" / "search"
    more = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}"] if shared else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(folder, *more), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    ) as life:
        log = folder / "trials" / "2" / "metrics.jsonl"
        until = time.monotonic() + 240
        while not seen(log, '"validation"') and life.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        life.send_signal(signal.SIGKILL)
    assert life.returncode == -signal.SIGKILL  # else it had ended before
    before = told(folder)
    assert [trial["number"] for trial in before] == [0, 1]
    assert (folder / "trials" / "2").exists()

    done = subprocess.run(
        command(folder, *more, "--resume"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    after = told(folder)
    assert after[:2] == before
    assert [trial["number"] for trial in after] == [0, 1, 3, 4, 5]
    assert not (folder / "trials" / "2").exists()  # what was cut off is done again, as trial 3
    notes = json.dumps(read_json(folder / "search.json")["notes"])
    assert "1 trial cut off on the way, and done again" in notes
    assert (folder / "winner" / "verdict.json").is_file()
