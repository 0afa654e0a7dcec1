"""Teachers: whatever answers a batch with signals."""

from attar.teachers.ema import EMA
from attar.teachers.ensemble import Ensemble, learned_weights
from attar.teachers.live import Teacher
from attar.teachers.projection import Projected, adapted, project, renamed

__all__ = [
    "EMA",
    "Ensemble",
    "Projected",
    "Teacher",
    "adapted",
    "learned_weights",
    "project",
    "renamed",
]
