"""From a trained module to files that run without attar, each checked against the module."""

from attar.exporting.artefact import Artefact, Lost
from attar.exporting.card import Card
from attar.exporting.export import Format, check_export, export

__all__ = ["Artefact", "Card", "Format", "Lost", "check_export", "export"]
