"""The page: one HTML file that a run folder is read by. Computes nothing but layout."""

from attar.reporting.page import page

__all__ = ["page"]
