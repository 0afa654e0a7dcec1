"""The demonstrations show what they claim, and leave nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attar.cli import main

CALL = "from attar.cli import main; main()"


def demo(tmp_path: Path, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own: it forks, which a process with threads should not."""
    return subprocess.run(
        [sys.executable, "-c", f"{before}\n{CALL}", "demo", *words],
        env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def digests(text: str) -> list[str]:
    return re.findall(r"SHA-256 ([0-9a-f]{64})$", text, re.MULTILINE)


def test_a_training_killed_several_times_has_the_weights_of_one_left_alone(tmp_path: Path) -> None:
    done = demo(tmp_path, "crash", "--kills", "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = r"(with step \d+ saved|while .*step \d+ was being (sav|remov)ed|before the first .*)"
    assert len(re.findall(rf"^kill +\d +after +[\d.]+ s, {told}$", done.stdout, re.MULTILINE)) == 4
    one, other = digests(done.stdout)
    assert one == other
    assert list(tmp_path.glob("attar-*")) == []


def test_a_training_that_goes_on_otherwise_is_found_out(tmp_path: Path) -> None:
    broken = (
        "from attar.training import state\n"
        "lost = state.ITEMS['generators_torch']._replace(give=lambda *told: None)\n"
        "state.ITEMS['generators_torch'] = lost"
    )
    done = demo(tmp_path, "crash", "--kills", "2", before=broken)
    assert done.returncode == 1
    one, other = digests(done.stdout)
    assert one != other
    assert "DIFFERENT" in done.stdout


def test_a_flipped_bit_is_loaded_by_safetensors_and_refused_by_attar(tmp_path: Path) -> None:
    done = demo(tmp_path, "bitrot", "--run", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stderr
    was, now = re.search(r"held (\S+), holds (\S+)", done.stdout).groups()
    assert abs(float(now)) > 1e9 * abs(float(was))
    assert "step-000000060 is damaged: objective.safetensors has another SHA-256" in done.stdout
    one, other = digests(done.stdout)
    assert one == other
    assert (tmp_path / "kept" / "model" / "model.safetensors").is_file()


def test_a_folder_that_holds_something_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["attar", "demo", "bitrot", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 73
    assert "already holds a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("words", [[], ["crash"], ["bitrot"]])
def test_help_explains_without_torch(tmp_path: Path, words: list[str]) -> None:
    torchless = "import sys; sys.modules['torch'] = None"
    done = demo(tmp_path, *words, "--help", before=torchless)
    assert done.returncode == 0, done.stderr
    assert "FOLDER" in done.stdout or not words
