"""Being told to stop: a signal waits for a point from which the run can go on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn, Self

from attar.runtime.closing import Closing

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. ``exit_code`` is 128 + its number, as a shell has it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stop(Closing):
    """While open, the first Ctrl-C or SIGTERM only sets ``asked``; the second is raised at once.

    Who works calls ``check()`` where stopping is safe. Outside the main thread, where Python
    hears no signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.hurried = False
        self._obeyed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def close(self) -> None:
        """Give the signals back to whoever heard them before, and one that came too late too."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self.asked is not None and not self._obeyed:
            self._obeyed = True
            signal.raise_signal(self.asked)

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self.asked is not None:
            self.obey()

    def obey(self) -> NoReturn:
        """Raise ``Interrupted``, of another rank's signal where this one has heard none."""
        self._obeyed = True
        raise Interrupted(self.asked or signal.SIGTERM)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self.hurried = True  # and nothing more is saved
            self.obey()
        self.asked = number
        if os.isatty(2):  # not print, which must not be entered twice
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
