"""Teachers: whatever answers a batch with signals."""

from attar.teachers.live import Teacher
from attar.teachers.projection import Projected, project, renamed

__all__ = ["Projected", "Teacher", "project", "renamed"]
