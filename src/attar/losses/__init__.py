"""Losses: plain functions of (student, teacher, what else they name), one value a row."""

from attar.losses.feature import mse
from attar.losses.response import (
    correlation,
    cross_entropy,
    decoupled_kl,
    kl_divergence,
    standardized_kl,
)

__all__ = [
    "correlation",
    "cross_entropy",
    "decoupled_kl",
    "kl_divergence",
    "mse",
    "standardized_kl",
]
