"""Tasks: what a batch, an output and a number mean."""

from attar.tasks.classification import ImageClassification, TabularClassification
from attar.tasks.embedding import SentenceEmbedding
from attar.tasks.language import LanguageModelling
from attar.tasks.multilabel import MultiLabelClassification
from attar.tasks.regression import Regression
from attar.tasks.similarity import similarity_agreement
from attar.tasks.task import Task, restore
from attar.tasks.text import TextClassification

__all__ = [
    "ImageClassification",
    "LanguageModelling",
    "MultiLabelClassification",
    "Regression",
    "SentenceEmbedding",
    "TabularClassification",
    "Task",
    "TextClassification",
    "restore",
    "similarity_agreement",
]
