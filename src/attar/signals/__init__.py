"""Signals: the address of a tensor in one pass, and the tap that reads it."""

from attar.signals.address import Address, module_at, parse
from attar.signals.tap import Tap

__all__ = ["Address", "Tap", "module_at", "parse"]
