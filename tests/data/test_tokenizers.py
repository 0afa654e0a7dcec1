"""A tokenizer that is not there: one sentence that says what to do, and no long wait for a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attar.data.tokens import read_tokenizer
from attar.runtime import DataError

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


class Down:
    """A hub whose network is down."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(timeout)
        raise ConnectionError("name not known")


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Down:
    monkeypatch.chdir(tmp_path)
    session = Down()
    monkeypatch.setattr(hub, "get_session", lambda: session)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return session


def test_a_file_or_folder_that_is_not_there_is_not_asked_of_the_hub(down: Down) -> None:
    Path("models/teacher").mkdir(parents=True)
    for path in (
        "tokenizr.json",
        "nofolder",
        "models/nothing",
        "deep/er/folder",
        "some/where.json",
    ):
        with pytest.raises(DataError, match="there is no such file or folder; give the folder of"):
            read_tokenizer(path)
    with pytest.raises(DataError, match="did you mean 'models/teacher'"):
        read_tokenizer("models/teachr")
    Path("tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"did you mean 'tokenizer\.json'\? Else give"):
        read_tokenizer("tokenizr.json")
    assert down.asked == []


def test_a_folder_without_a_tokenizer_and_a_damaged_one_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer \(tokenizer\.json\); give the folder"):
        read_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=r"no tokenizer can be read there .*another copy"):
            read_tokenizer(str(path))


def test_a_hub_that_does_not_answer_is_asked_once_for_a_few_seconds(
    down: Down, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    given: list[dict[str, Any]] = []

    def absent(path: str, **how: Any) -> None:
        given.append(how)
        raise OSError("no such file in the cache")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    with pytest.raises(DataError, match="does not answer, and there is no earlier download"):
        read_tokenizer("some/where")
    assert down.asked == [5.0]
    assert given == [{"trust_remote_code": False, "local_files_only": True}]
    assert "it does not answer (name not known)" in capsys.readouterr().err
