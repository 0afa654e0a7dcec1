"""What is closed when its ``with`` ends, errors included."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """``with thing:`` closes the thing at the end; the thing says what ``close`` means."""

    def close(self) -> None:
        """Give back what is held; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
