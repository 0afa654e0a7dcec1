"""Tasks: what a batch, an output and a number mean."""

from attar.tasks.classification import ImageClassification, TabularClassification
from attar.tasks.regression import Regression
from attar.tasks.task import Task, restore

__all__ = ["ImageClassification", "Regression", "TabularClassification", "Task", "restore"]
