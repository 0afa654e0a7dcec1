"""The command: the only code that knows flags."""

from attar.cli.main import main

__all__ = ["main"]
