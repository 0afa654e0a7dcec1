"""The hub of Hugging Face: what is a name on it, whether it answers, and no bars meanwhile."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

# An owner's name first: a bare word is a folder or a name of attar's.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATIENCE = 5.0  # seconds for a first answer


def reached(path: str) -> dict[str, Any]:
    """How to ask for *path*: of what was downloaded before alone, where the hub does not answer.

    One attempt of a few seconds, and it is said: the hub's own library tries for half a minute.
    """
    from huggingface_hub import constants, get_session

    if Path(path).exists() or not HUB_ID.fullmatch(path) or constants.HF_HUB_OFFLINE:
        return {}
    _tell(f"asking the hub, {constants.ENDPOINT}, for {path}")
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # of whichever library it asks with
        said = " ".join(str(error).split())[:120] or type(error).__name__
        said = said if said.isprintable() else ascii(said)
        _tell(f"it does not answer ({said}); looking for an earlier download of {path}")
        return {"local_files_only": True}
    return {}


def _tell(line: str) -> None:
    print(f"attar: {line}", file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no advice of transformers: what matters here is an error of attar's."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub = getLogger("huggingface_hub")  # tells each attempt to reach a network that is not there
    level = hub.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.setLevel(ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
