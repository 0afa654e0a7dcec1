"""A recipe whose teacher is asked once, and the command that asks beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attar
from attar.recipes import ask_again, cache_recipe, check, load_recipe, run
from attar.runtime import DataError, PreflightError
from attar.teachers import Cached, inspect_cache

TEACHER = """\
teacher:
  model: {name: mlp, widths: [64]}
  train: {epochs: 4, batch_size: 32}
"""
CACHED = TEACHER + "  cache: true\n"
AUGMENTED = "    label_weight", "    augment: [crop]\n    views: 2\n    label_weight"


def scores(verdict: Any) -> dict[str, Any]:
    return {name: model.scores for name, model in verdict.models.items()}


def asked(said: list[str]) -> list[int]:
    lines = [line for line in said if line.startswith("cache ")]
    return [int(line.split()[-2].replace(",", "")) for line in lines]


@pytest.mark.parametrize("change", [(), AUGMENTED])
def test_a_run_with_a_cache_is_the_run_without_and_the_next_asks_nothing(
    write: Callable[..., Path], tmp_path: Path, change: tuple[str, ...]
) -> None:
    seeds = ["seeds=2", "stages.0.epochs=3"]
    live = run(write(*change), folder=tmp_path / "live", overrides=seeds)
    first: list[str] = []
    second: list[str] = []
    path = write(TEACHER, CACHED, *change)
    cached = run(path, folder=tmp_path / "runs" / "a", overrides=seeds, say=first.append)
    again = run(path, folder=tmp_path / "runs" / "b", overrides=seeds, say=second.append)
    rows = cached.saw["distilled"].rows * (2 if change else 1)
    assert (asked(first), asked(second)) == ([rows], [0])
    assert scores(again) == scores(cached)
    for name, own in scores(cached).items():
        assert own == pytest.approx(scores(live)[name], rel=1e-4)
    (folder,) = (tmp_path / "runs" / "cache").iterdir()
    assert inspect_cache(folder)["filled"] == rows


def test_check_keeps_nothing_and_refuses_pixels_of_which_there_is_no_end(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(write(TEACHER, CACHED))
    assert not (tmp_path / "runs").exists()
    path = write(TEACHER, CACHED, "    label_weight", "    augment: [crop]\n    label_weight")
    with pytest.raises(PreflightError, match=r"augmented .crop.: every epoch has new pixels"):
        check(path)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("teacher: {ema: 0.9, cache: true}\n", "moves with the student"),
        ("teacher: {mutual: 2, cache: true}\n", "moves with the student"),
        (TEACHER + "  cache: 3\n", "cache is 3: it must be a valid boolean"),
        (TEACHER + "  cache: {dtype: float8}\n", "dtype is 'float8'"),
        (TEACHER + "  cache: {top: 3, head: true}\n", "head keeps all logits, top some"),
        (TEACHER + "  cache: {top: 200}\n", "k is 200 and draws 0 of 10 columns"),
        (TEACHER + "  cache: {rows: 3}\n", "rows"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    write: Callable[..., Path], teacher: str, said: str
) -> None:
    with pytest.raises(PreflightError, match=said):
        check(write(TEACHER, teacher))


def test_what_was_asked_beforehand_is_found_by_the_run(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(write(TEACHER, CACHED), folder="runs/a", overrides=["stages.0.epochs=2"])
    (filled,) = (tmp_path / "runs" / "cache").iterdir()
    loaded = load_recipe(write(TEACHER, "teacher: {load: runs/a/teacher, cache: true}\n"))
    # Read from its folder, the teacher is the one that was trained: the cache is full.
    assert cache_recipe(loaded, batch_size=64) == [Path("runs/cache") / filled.name]
    told = cache_recipe(loaded, into="mine", batch_size=64)
    assert told == [Path("mine")]
    assert inspect_cache("mine")["filled"] == first.saw["distilled"].rows
    again = ask_again("mine", loaded)
    assert 0 <= again.difference <= again.allowed
    with pytest.raises(PreflightError, match="the recipe trains its teacher"):
        cache_recipe(load_recipe(write(TEACHER, CACHED)))


def test_asking_again_finds_that_the_teacher_is_another(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(write(TEACHER, CACHED), folder="runs/a", overrides=["stages.0.epochs=1"])
    run(write(TEACHER, CACHED), folder="other/b", overrides=["stages.0.epochs=1", "seed=1"])
    loaded = load_recipe(write(TEACHER, "teacher: {load: other/b/teacher, cache: true}\n"))
    (folder,) = (tmp_path / "runs" / "cache").iterdir()
    with pytest.raises(PreflightError, match=r"another teacher: teacher\.weights"):
        ask_again(folder, loaded)


def test_a_damaged_answer_is_no_lesson(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(TEACHER, CACHED)
    run(path, folder=tmp_path / "runs" / "a", overrides=["stages.0.epochs=1"])
    (shard,) = (tmp_path / "runs" / "cache").glob("*/*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DataError, match="SHA-256"):
        run(path, folder=tmp_path / "runs" / "b", overrides=["stages.0.epochs=1"])


def test_a_killed_run_goes_on_with_what_was_asked(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(TEACHER, CACHED, "    label_weight", "    checkpoint_every: 3\n    label_weight")
    whole = run(path, folder=tmp_path / "whole" / "a", overrides=["stages.0.epochs=2"])

    class Crash(Exception):
        pass

    teacher, count = attar.Teacher.__call__, iter(range(10**9))

    def once(self: Any, batch: Any) -> Any:
        if next(count) == 5:
            raise Crash
        return teacher(self, batch)

    overrides = ["stages.0.epochs=2"]
    with monkeypatch.context() as patched:
        patched.setattr(attar.Teacher, "__call__", once)
        with pytest.raises(Crash):
            run(path, folder=tmp_path / "cut" / "a", overrides=overrides)
    (folder,) = (tmp_path / "cut" / "cache").iterdir()
    known = inspect_cache(folder)["filled"]
    assert known > 0
    said: list[str] = []
    ended = run(
        path, folder=tmp_path / "cut" / "a", overrides=overrides, resume=True, say=said.append
    )
    assert asked(said) == [ended.saw["distilled"].rows - known]
    assert scores(ended) == scores(whole)
    assert len(Cached(folder)) == ended.saw["distilled"].rows


def test_the_command_says_what_it_keeps(
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from attar.cli.main import main

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["attar", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    monkeypatch.chdir(tmp_path)
    run(write(), folder="runs/a", overrides=["stages.0.epochs=1"])
    recipe = str(write(TEACHER, "teacher: {load: runs/a/teacher}\n"))
    code, out, _ = command("cache", recipe, "--into", "mine")
    assert code == 0
    assert "kept       output:logits: whole, float32 [10]" in out
    assert "teacher    weights " in out
    code, out, _ = command("cache", "verify", "mine", "--recipe", recipe)
    assert code == 0
    assert "rows agree with what was written" in out
    assert "64 rows again: at most" in out
    code, out, _ = command("cache", "inspect", "mine", "--json")
    assert code == 0
    assert json.loads(out)["views"] == 1
    code, _, err = command("cache", "inspect", "nowhere")
    assert code == 65
    assert "nowhere: is no teacher's cache" in err


VIEWED = (
    "    label_weight",
    "    augment: [{name: crop, pixels: 2}]\n    views: 2\n    label_weight",
)


@pytest.fixture
def taught(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe that loads its teacher, with something changed, as a function."""
    monkeypatch.chdir(tmp_path)
    run(write(), folder="runs/a", overrides=["stages.0.epochs=1"])
    known = TEACHER, "teacher: {load: runs/a/teacher, cache: true}\n"
    return lambda *change: load_recipe(write(*known, *change))


def test_an_option_at_its_default_finds_the_same_answers(taught: Any) -> None:
    made = cache_recipe(taught(*VIEWED))
    assert cache_recipe(taught(*AUGMENTED)) == made
    assert ask_again(made[0], taught(*AUGMENTED)).rows == 64
    assert len(list(Path("runs/cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("pixels: 2", "pixels: 3", r"augment is .*'pixels': 3.*and was .*'pixels': 2"),
        ("views: 2", "views: 3", "views is 3, and was 2"),
        ("    augment: [{name: crop, pixels: 2}]\n    views: 2\n", "", r"augment is \[\], and was"),
        ("    views: 2\n", "", r"augmented .crop.: every epoch has new pixels"),
    ],
)
def test_verify_says_what_the_recipe_has(taught: Any, old: str, new: str, said: str) -> None:
    (folder,) = cache_recipe(taught(*VIEWED))
    with pytest.raises(PreflightError, match=said):
        ask_again(folder, taught(VIEWED[0], VIEWED[1].replace(old, new)))
