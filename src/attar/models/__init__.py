"""Models: families to build from, and folders of safetensors and JSON to keep them in."""

from attar.models import projectors
from attar.models.adapters import merged
from attar.models.architectures import transformers
from attar.models.build import build, families
from attar.models.convolutional import mobilenet, resnet
from attar.models.dense import mlp
from attar.models.group import Group
from attar.models.hub import is_foreign, own_classes, pretrained
from attar.models.language import (
    language_model,
    pretrained_language_model,
    pretrained_text_classifier,
    pretrained_text_encoder,
    text_classifier,
    text_encoder,
)
from attar.models.reuse import reuse_head
from attar.models.store import load, load_weights, read_extra, save
from attar.models.text import bilstm
from attar.models.timm_models import timm
from attar.models.transfer import Transfer, head_of, transfer, transferable
from attar.models.transformer import vit

__all__ = [
    "Group",
    "Transfer",
    "bilstm",
    "build",
    "families",
    "head_of",
    "is_foreign",
    "language_model",
    "load",
    "load_weights",
    "merged",
    "mlp",
    "mobilenet",
    "own_classes",
    "pretrained",
    "pretrained_language_model",
    "pretrained_text_classifier",
    "pretrained_text_encoder",
    "projectors",
    "read_extra",
    "resnet",
    "reuse_head",
    "save",
    "text_classifier",
    "text_encoder",
    "timm",
    "transfer",
    "transferable",
    "transformers",
    "vit",
]
