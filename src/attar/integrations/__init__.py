"""Integrations: what a run records, shown by the programs of others."""

from attar.integrations.track import track

__all__ = ["track"]
