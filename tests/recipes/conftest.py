"""A recipe that runs in a second, and a way to change one thing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from attar.training.loop import Loop

RECIPE = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [64]}
  train: {epochs: 4, batch_size: 32}
student: {name: mlp, widths: [8]}
stages:
  - do: distill
    epochs: 2
    batch_size: 64
    terms:
      - {loss: {name: kl_divergence, temperature: 4.0}, weight: 0.9}
    label_weight: 0.1
"""


WORDS = ["<eos>", *(f"w{number}" for number in range(1, 40))]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, with ``tokenizer.json`` of 40 words and a ``corpus`` of 60 texts."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    table = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<eos>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save("tokenizer.json")
    Path("corpus").mkdir()
    for number in range(60):
        text = (f"w{1 + (number + step) % 39}" for step in range(5 + number % 9))
        Path(f"corpus/{number:02}.txt").write_text(" ".join(text))


class Crash(Exception):
    """A process that dies."""


@pytest.fixture
def dies_after() -> Callable[[int], AbstractContextManager[None]]:
    """``with dies_after(steps):`` a run inside takes so many optimiser steps and dies."""

    @contextmanager
    def after(steps: int) -> Iterator[None]:
        step, left = Loop.step, iter(range(steps))

        def counted(self: Loop, window: Any) -> float:
            if next(left, None) is None:
                raise Crash
            return step(self, window)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):  # noqa: PT012
            patch.setattr(Loop, "step", counted)
            yield

    return after


@pytest.fixture
def no_more_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After ``no_more_steps()`` nothing may be trained."""

    def step(self: Loop, window: Any) -> float:
        raise AssertionError("a step was taken")

    return lambda: monkeypatch.setattr(Loop, "step", step)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(old, new, ...)`` writes the recipe with each *old* replaced; returns its path."""

    def written(*changes: str, text: str = RECIPE) -> Path:
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return written
