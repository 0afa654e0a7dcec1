"""What goes wrong, in one sentence each, with the exit code a shell will see.

The codes follow ``sysexits.h`` where it has one: 64 usage, 65 data, 73 cannot create,
74 input/output, 78 configuration. 1 and 3 are verdicts, not faults: a goal that was missed and
a training that diverged.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_GOAL_MISSED = 1
EXIT_INTERNAL = 70
EXIT_IO = 74
EXIT_INTERRUPTED = 130


class AttarError(ValueError):
    """The family of errors that a user can mend. ``exit_code`` is what the command returns."""

    exit_code = 64


class UsageError(AttarError):
    """An argument, an option or a name is wrong."""

    exit_code = 64


class DataError(AttarError):
    """The data cannot be used as they are."""

    exit_code = 65


class RunExistsError(AttarError):
    """The run folder already holds a run; nothing is ever written over."""

    exit_code = 73


class PreflightError(AttarError):
    """The recipe or the plan is wrong; found before the first batch of training."""

    exit_code = 78


class DivergedError(AttarError):
    """A loss or a gradient is not finite; the weights are those from before the step."""

    exit_code = 3


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Say what *wrong* was probably meant to be, or list what there is.

    >>> suggest("kl_divergense", ["mse", "kl_divergence"])
    "did you mean 'kl_divergence'?"
    >>> suggest("zebra", ["mse", "kl_divergence"])
    'choose from: kl_divergence, mse'
    """
    names = sorted(known)
    if not names:
        return "there is nothing to choose from"
    folded = {_folded(name): name for name in names}
    close = difflib.get_close_matches(_folded(wrong), folded, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{folded[close[0]]}'?"
    shown = ", ".join(names[:24])
    return f"choose from: {shown}{', ...' if len(names) > 24 else ''}"


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says; its kind where it says nothing.

    >>> first_line(ValueError("one\\ntwo")), first_line(KeyError())
    ('one', 'KeyError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]
