"""Image classifiers of the library timm, with random weights."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from attar.models.faces import Face, Preprocess, give_face
from attar.models.layers import image_shape
from attar.models.types import Numbers, Pair, Shape, Size
from attar.runtime import UsageError, suggest

# They would read a file or the network, or are supplied here.
_OWN = {
    "cache_dir", "checkpoint_path", "features_only", "in_chans", "num_classes", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay",
}  # fmt: skip


def timm(
    shape: Shape,
    outputs: Size,
    *,
    architecture: str,
    options: dict[str, Any] | None = None,
    size: Pair = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Module:
    """An image classifier of the library timm, with random weights.

    Args:
        shape: [C, H, W] of one image.
        outputs: number of classes.
        architecture: a name of ``timm.list_models()``, such as ``resnet18``.
        options: more for ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``.
        size: [H, W] that images are resized to (bilinear, antialiased).
        mean: subtracted from each channel.
        std: divides each channel after that.

    Modules and tensors keep timm's names, so a ``.safetensors`` file of timm's fills the model
    (`attar.models.load_weights`). Tap addresses are timm's, and ``preprocess``.

    Errors: timm is not installed; it has no such model or option (UsageError).
    """
    image = image_shape(shape, "timm")
    library = _library()
    if architecture not in (known := library.list_models()):
        raise UsageError(
            f"timm: there is no model '{architecture:.80}'; {suggest(architecture, known)}"
        )
    if taken := _OWN & (options or {}).keys():
        raise UsageError(f"timm: '{min(taken)}' is not for options; weights come from load_weights")
    try:
        model = library.create_model(
            architecture,
            pretrained=False,
            num_classes=outputs,
            in_chans=image[0],
            **(options or {}),
        )
    except Exception as error:  # every model has checks and errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"timm: {architecture} cannot be built so: {said:.300}") from None
    return give_face(model, Face, Preprocess(image[0], size, mean, std))


def _library() -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # of an unfit torchvision too, which is no ImportError
        raise UsageError(
            f"models of timm need that package and torchvision ({error}); install them: "
            'pip install "attar[timm]"'
        ) from None
