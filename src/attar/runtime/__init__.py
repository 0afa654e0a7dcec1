"""Devices, files and errors: what every other room stands on."""

from attar.runtime.closing import Closing
from attar.runtime.device import autocast, resolve_device, resolve_precision, to_device
from attar.runtime.errors import (
    EXIT_GOAL_MISSED,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_IO,
    AttarError,
    DataError,
    DivergedError,
    PreflightError,
    RunExistsError,
    UsageError,
    suggest,
)
from attar.runtime.files import read_json, write_atomic, write_json
from attar.runtime.modes import eval_mode, modes_of, restore_modes
from attar.runtime.progress import Bar
from attar.runtime.run import Run, check_free

__all__ = [
    "EXIT_GOAL_MISSED",
    "EXIT_INTERNAL",
    "EXIT_INTERRUPTED",
    "EXIT_IO",
    "AttarError",
    "Bar",
    "Closing",
    "DataError",
    "DivergedError",
    "PreflightError",
    "Run",
    "RunExistsError",
    "UsageError",
    "autocast",
    "check_free",
    "eval_mode",
    "modes_of",
    "read_json",
    "resolve_device",
    "resolve_precision",
    "restore_modes",
    "suggest",
    "to_device",
    "write_atomic",
    "write_json",
]
