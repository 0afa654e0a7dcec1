"""Short timings: what a latency is, is tested where it is measured."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("attar.evaluation.cost"), "FILL_SECONDS", 0.0)
