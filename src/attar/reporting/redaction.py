"""What must not leave the machine in a report: home, host, user and anything like a key."""

from __future__ import annotations

import getpass
import os
import re
import socket
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

HIDDEN = "[redacted]"
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
KEY_SHAPES = re.compile(
    r"\b(?:sk|pk|rk)-[\w-]{16,}|\bhf_\w{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]+\.[\w-]+"
)
SHORTEST_SECRET = 8
BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def redacted(value: Any) -> Any:
    """The same JSON value with every text made fit to be shown to anyone."""
    return _walk(value, partial(_hide, rules=_rules(os.environ)))


def _walk(value: Any, hide: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {hide(str(key)): _walk(item, hide) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, hide) for item in value]
    return value


def _hide(text: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, instead in rules:
        text = pattern.sub(instead, text)
    return "".join(sign for sign in text if _visible(sign))


def _visible(sign: str) -> bool:
    if sign in "\n\t":
        return True
    return unicodedata.category(sign) not in ("Cc", "Cs") and ord(sign) not in BIDI


def _rules(environment: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    secrets = [
        value
        for name, value in environment.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET
    ]
    home = re.escape(str(Path.home()))
    rules = [(re.compile(re.escape(secret)), HIDDEN) for secret in sorted(secrets, key=len)[::-1]]
    rules += [(KEY_SHAPES, HIDDEN), (re.compile(rf"{home}(?![\w.-])"), "~")]
    rules.append((re.compile(r"(?<=/home/)[^/\s]+|(?<=/Users/)[^/\s]+"), "[user]"))
    for name, instead in ((socket.gethostname(), "[host]"), (_user(), "[user]")):
        rules.append((_named(name), instead))
    return rules


def _named(name: str) -> re.Pattern[str]:
    """A name as a word; a plain word (a user "student") only where it stands in an address."""
    if not name:
        return re.compile(r"(?!)")
    word = re.escape(name)
    if name.isalpha():
        return re.compile(rf"(?<=@){word}\b|\b{word}(?=@)|(?<=//){word}\b")
    return re.compile(rf"(?<![\w-]){word}(?![\w-])")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return ""
