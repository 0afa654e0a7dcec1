"""Signals: the address of a tensor in one pass, and what hears it."""

from attar.signals.address import Address, module_at, parameters_at, parse
from attar.signals.hearing import Hearing, Signal
from attar.signals.pairing import Pair, pairs
from attar.signals.tap import Tap

__all__ = [
    "Address",
    "Hearing",
    "Pair",
    "Signal",
    "Tap",
    "module_at",
    "pairs",
    "parameters_at",
    "parse",
]
