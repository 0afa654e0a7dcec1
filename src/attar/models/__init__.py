"""Models: families to build from, and folders of safetensors and JSON to keep them in."""

from attar.models import projectors
from attar.models.build import build, families
from attar.models.convolutional import mobilenet, resnet
from attar.models.dense import mlp
from attar.models.store import load, load_weights, read_extra, save
from attar.models.transformer import vit

__all__ = [
    "build",
    "families",
    "load",
    "load_weights",
    "mlp",
    "mobilenet",
    "projectors",
    "read_extra",
    "resnet",
    "save",
    "vit",
]
