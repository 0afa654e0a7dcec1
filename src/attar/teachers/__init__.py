"""Teachers: whatever answers a batch with signals."""

from attar.teachers.cached import Cached, Filling
from attar.teachers.caching import cache, compare_again, fill, inspect_cache, verify_cache
from attar.teachers.columns import Keep
from attar.teachers.ema import EMA
from attar.teachers.ensemble import Ensemble, learned_weights
from attar.teachers.function import Function, from_sklearn
from attar.teachers.live import Teacher
from attar.teachers.onnx import from_onnx
from attar.teachers.projection import Carried, adapted, project, renamed
from attar.teachers.store import join
from attar.teachers.synthesize import synthesize

__all__ = [
    "EMA",
    "Cached",
    "Carried",
    "Ensemble",
    "Filling",
    "Function",
    "Keep",
    "Teacher",
    "adapted",
    "cache",
    "compare_again",
    "fill",
    "from_onnx",
    "from_sklearn",
    "inspect_cache",
    "join",
    "learned_weights",
    "project",
    "renamed",
    "synthesize",
    "verify_cache",
]
