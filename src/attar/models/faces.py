"""What makes a model of another library read attar's images and answer with a tensor."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attar.models.layers import normalize
from attar.models.types import Numbers, Pair
from attar.runtime import UsageError


class Preprocess(nn.Module):
    """Images [N, C, H, W] in [0, 1] to what a network was trained on.

    In this order: resized to *size* (bilinear, antialiased; nothing is cropped) where they have
    another one, one channel repeated to *channels*, then ``(x - mean) / std`` a channel. Mean and
    deviation are not in the state dict, so that its names stay those of the network.
    """

    def __init__(self, channels: int, size: Pair, mean: Numbers, std: Numbers) -> None:
        super().__init__()
        self.channels = channels
        self.size = None if size is None else tuple(size)
        self.normalize = normalize(
            (channels, 1, 1), _spread(mean, channels), _spread(std, channels)
        )
        for name, value in list(self.normalize.named_buffers(recurse=False)):
            self.normalize.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, list(self.size), mode="bilinear", antialias=True)
        if images.shape[1] == 1 != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        return self.normalize(images)


class Face(nn.Module):
    """Goes before a network's own class: images in, logits [N, outputs] out.

    The network's modules and tensors keep their own names, so weights files and tap addresses
    are those that its library knows.
    """

    preprocess: Preprocess
    built_as: dict[str, Any]

    def forward(self, images: Tensor) -> Tensor:
        out = super().forward(self.preprocess(images))
        return out if isinstance(out, Tensor) else out.logits


def give_face(model: nn.Module, face: type[Face], preprocess: Preprocess) -> Any:
    """*model* itself, of a class that has *face* before the model's own."""
    model.preprocess = preprocess
    model.__class__ = faced(face, type(model))
    return model


# One class for each pair, so that two copies of a model are of one class.
_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def faced(face: type[nn.Module], kind: type[nn.Module]) -> Any:
    """The class *kind* with *face* before it."""
    made = type(kind.__name__, (face, kind), {"__module__": kind.__module__})
    return _CLASSES.setdefault((face, kind), made)


def check_channels(name: str, found: int, wanted: int) -> None:
    """Refuse images whose channels the network cannot read; one channel can be repeated."""
    if found not in (1, wanted):
        raise UsageError(
            f"{name}: the network reads images of {wanted} channel{'s' * (wanted != 1)}, but the "
            f"data have {found}; choose another network, or convert the images"
        )


def _spread(values: Numbers, channels: int) -> Numbers:
    """One number for all channels, where the data have one channel and the network more."""
    return values * channels if values is not None and len(values) == 1 else values


def has_unsaved_buffers(module: nn.Module) -> bool:
    """Whether the module holds a buffer that its state dict leaves out."""
    saved = module.state_dict().keys()
    return any(name not in saved for name, _ in module.named_buffers(remove_duplicate=False))
