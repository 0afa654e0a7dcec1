"""Training: terms, the objective, and the one loop behind every verb."""

from attar.training.checkpoint import FREE, Home, differences
from attar.training.choice import copy_of_state
from attar.training.fit import Fit, check, distill, fit, train
from attar.training.loop import Log
from attar.training.objective import Counts, Objective, Parts
from attar.training.optimization import (
    OptimizerFactory,
    Schedule,
    adamw,
    constant,
    cosine,
    linear,
    ramp,
    sgd,
)
from attar.training.pairing import paired
from attar.training.peers import mutual
from attar.training.plan import Plan
from attar.training.preflight import StagePlan
from attar.training.term import Term

__all__ = [
    "FREE",
    "Counts",
    "Fit",
    "Home",
    "Log",
    "Objective",
    "OptimizerFactory",
    "Parts",
    "Plan",
    "Schedule",
    "StagePlan",
    "Term",
    "adamw",
    "check",
    "constant",
    "copy_of_state",
    "cosine",
    "differences",
    "distill",
    "fit",
    "linear",
    "mutual",
    "paired",
    "ramp",
    "sgd",
    "train",
]
