"""Data: sources of batches, readers of files, and augmentations keyed by row."""

from attar.data.arrays import tensors
from attar.data.augment import crop, cutmix, flip, mixup
from attar.data.dataset import DatasetSource
from attar.data.digits import digits
from attar.data.draw import Draw
from attar.data.fashion_mnist import fashion_mnist
from attar.data.garments import garments
from attar.data.huggingface import dataset
from attar.data.images import images
from attar.data.sentences import SentenceSource, sentences
from attar.data.source import Source, Subset, TensorSource
from attar.data.splits import Data, Splits, ThreeSplits, split
from attar.data.tables import csv
from attar.data.text import TextSource, text
from attar.data.text_files import documents, texts
from attar.data.types import Augmentation, Batch
from attar.data.yeast import yeast

__all__ = [
    "Augmentation",
    "Batch",
    "Data",
    "DatasetSource",
    "Draw",
    "SentenceSource",
    "Source",
    "Splits",
    "Subset",
    "TensorSource",
    "TextSource",
    "ThreeSplits",
    "crop",
    "csv",
    "cutmix",
    "dataset",
    "digits",
    "documents",
    "fashion_mnist",
    "flip",
    "garments",
    "images",
    "mixup",
    "sentences",
    "split",
    "tensors",
    "text",
    "texts",
    "yeast",
]
