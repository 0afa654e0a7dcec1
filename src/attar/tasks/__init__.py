"""Tasks: what a batch, an output and a number mean."""

from attar.tasks.classification import ImageClassification, TabularClassification
from attar.tasks.multilabel import MultiLabelClassification
from attar.tasks.regression import Regression
from attar.tasks.task import Task, restore

__all__ = [
    "ImageClassification",
    "MultiLabelClassification",
    "Regression",
    "TabularClassification",
    "Task",
    "restore",
]
