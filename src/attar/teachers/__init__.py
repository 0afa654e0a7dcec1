"""Teachers: whatever answers a batch with signals."""

from attar.teachers.live import Teacher

__all__ = ["Teacher"]
