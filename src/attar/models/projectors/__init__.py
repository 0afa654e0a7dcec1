"""Projectors: small adapters between a student's signal and a teacher's, sized from examples."""

from attar.models.projectors.conv import conv
from attar.models.projectors.fusion import fusion
from attar.models.projectors.linear import linear, mlp
from attar.models.projectors.normalize import layer_norm, whiten
from attar.models.projectors.orthogonal import orthogonal
from attar.models.projectors.pool import pool
from attar.models.projectors.select import select
from attar.models.projectors.through import through
from attar.models.projectors.tokens import tokens

__all__ = [
    "conv",
    "fusion",
    "layer_norm",
    "linear",
    "mlp",
    "orthogonal",
    "pool",
    "select",
    "through",
    "tokens",
    "whiten",
]
