"""Projectors: small trained adapters from a student's signal to the teacher's size."""

from attar.models.projectors.linear import linear

__all__ = ["linear"]
