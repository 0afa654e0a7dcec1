"""The hub is asked once, for a few seconds, and that is said; then comes what was downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attar.models import own_classes
from attar.runtime import DataError

hub = pytest.importorskip("huggingface_hub")
hf = pytest.importorskip("transformers")


class Session:
    """A hub that answers, or whose network is down."""

    def __init__(self, *, up: bool) -> None:
        self.up = up
        self.asked: list[tuple[str, float]] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append((url, timeout))
        if not self.up:
            raise ConnectionError("no route\x1b to host")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that transformers was called with; it knows no model."""
    told: list[dict[str, Any]] = []

    def from_pretrained(path: str, **options: Any) -> None:
        told.append(options)
        raise OSError("no such model")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", from_pretrained)
    return told


@pytest.mark.parametrize("up", [True, False])
def test_an_answer_is_awaited_once_and_told(
    up: bool,
    given: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = Session(up=up)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    with pytest.raises(DataError, match="the hub did not give such a model"):
        own_classes("owner/name")
    assert session.asked == [(hub.constants.ENDPOINT, 5.0)]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"attar: asking the hub, {hub.constants.ENDPOINT}, for owner/name"
    assert given[0].get("local_files_only", False) is not up
    assert len(said) == (1 if up else 2)
    if not up:
        assert "looking for an earlier download of owner/name" in said[1]
        assert "\x1b" not in said[1]


def test_a_folder_or_a_forbidden_hub_is_not_asked(
    given: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = Session(up=True)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError):
        own_classes(str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError):
        own_classes("owner/name")
    assert session.asked == []
    assert len(given) == 2
    assert capsys.readouterr().err == ""
