"""An error names the file that was asked for, never the draft that stands for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from attar.runtime import write_atomic


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_whatever_fails_the_target_is_named(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "verdict.json"

    def fails(*args: Any, **options: Any) -> None:
        names = [str(arg) for arg in args if isinstance(arg, str | Path)]
        raise OSError(errno.EACCES, "Permission denied", *names[:1])

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(PermissionError) as told:
            write_atomic(target, b"all of it")
    assert told.value.filename == str(target)
    assert ".tmp-" not in str(told.value)


def test_an_error_of_another_file_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "bad disk", "/elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fails)
        with pytest.raises(OSError, match="elsewhere"):
            write_atomic(tmp_path / "x", b"")
