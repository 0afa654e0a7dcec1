"""Devices, files and errors: what every other room stands on."""

from attar.runtime.closing import Closing
from attar.runtime.compiling import compiled, recomputed
from attar.runtime.describing import described
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
    first_line,
    suggest,
)
from attar.runtime.files import read_json, write_atomic, write_json
from attar.runtime.generators import (
    generators_seeded,
    other_generators,
    set_other_generators,
    set_torch_generators,
    torch_generators,
)
from attar.runtime.modes import eval_mode, modes_of, restore_modes
from attar.runtime.progress import Bar
from attar.runtime.quiet import quiet
from attar.runtime.ranks import Ranks, Wrap, connect, gradient_norm
from attar.runtime.run import Run, check_free, opened
from attar.runtime.snapshots import Snapshot, Snapshots
from attar.runtime.stop import Interrupted, Stop

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
    "Interrupted",
    "PreflightError",
    "Ranks",
    "Run",
    "RunExistsError",
    "Snapshot",
    "Snapshots",
    "Stop",
    "UsageError",
    "Wrap",
    "autocast",
    "check_free",
    "compiled",
    "connect",
    "described",
    "eval_mode",
    "first_line",
    "generators_seeded",
    "gradient_norm",
    "modes_of",
    "opened",
    "other_generators",
    "quiet",
    "read_json",
    "recomputed",
    "resolve_device",
    "resolve_precision",
    "restore_modes",
    "set_other_generators",
    "set_torch_generators",
    "suggest",
    "to_device",
    "torch_generators",
    "write_atomic",
    "write_json",
]
