"""Trained image classifiers of transformers, from a folder or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attar.models.architectures import IMAGES, Kind, dressed, library
from attar.models.layers import image_shape
from attar.models.record import RECORD, WEIGHT_FILES, printable, to_convert
from attar.models.types import Labels, Pair, Shape, Size
from attar.runtime import DataError, UsageError
from attar.runtime.hub import HUB_ID, reached
from attar.runtime.hub import quiet as quiet_hub

Head = Literal["auto", "keep"]
PIXELS = "preprocessor_config.json"
_HALF = 0.5
_LIMIT = 1 << 20  # bytes


def pretrained(
    shape: Shape,
    outputs: Size,
    *,
    path: str,
    head: Head = "auto",
    size: Pair = None,
    labels: Labels = None,
) -> nn.Module:
    """A trained image classifier of transformers: ResNet, ConvNeXt, ViT, Swin, MobileNet, ...

    Only safetensors are read, no code of a repository is run, and the result is float32.
    `attar.models.save` writes all of it, so that `load` needs neither the folder nor the hub.

    Args:
        shape: [C, H, W] of one image. One channel is repeated for a network that reads three.
        outputs: number of classes.
        path: a folder with ``config.json`` and safetensors, or ``owner/name`` on the hub.
        head: ``auto`` keeps the folder's classes where they are the data's, in whatever order,
            and starts a new, random head where they are not; ``keep`` refuses instead.
        size: [H, W] that images are resized to (bilinear, antialiased). Left out, it is that of
            ``preprocessor_config.json`` (of a crop, what is left after it).
        labels: names of the data's classes. The head's rows are put into their order; a folder
            without names of its own (``LABEL_0``, ...) is taken to have that order.

    Mean and deviation are those of ``preprocessor_config.json``; without it 0.5 and 0.5, and the
    size is the config's ``image_size`` where it has one.

    Tap addresses: as for the family ``transformers``.

    Errors: transformers is not installed, images of other channels (UsageError); no such folder
    or model, no safetensors, tensors that are missing or of another shape, ``keep`` and other
    classes (DataError).
    """
    image = image_shape(shape, "pretrained")
    with quiet():
        how = reached(path)
        config = config_of(path, how, IMAGES)
        pixels = _pixels(path, getattr(config, "image_size", None), how)
        model = fitted_model(path, config, how, outputs, labels, head, IMAGES)
    mean, std = pixels["mean"], pixels["std"]
    size = pixels["size"] if size is None else size
    return dressed(model.eval(), image, labels, size=size, mean=mean, std=std)


def is_foreign(path: str) -> bool:
    """Whether *path* is for `pretrained`: a folder that attar did not save, or on the hub."""
    place = Path(path)
    if place.is_dir():
        return (place / "config.json").is_file() and not (place / RECORD).is_file()
    if place.exists() or place.parent.is_dir() or place.suffix.lower() in WEIGHT_FILES:
        return False
    return bool(HUB_ID.fullmatch(path))


def own_classes(path: str) -> list[str]:
    """What the classes of a model for `pretrained` are called, in its own order."""
    with quiet():
        names = config_of(path, reached(path), IMAGES).id2label
    return [str(names[index]) for index in range(len(names))]


def config_of(path: str, how: dict[str, Any], kind: Kind) -> Any:
    """The config of the model at *path*, of an architecture that attar reads."""
    check_folder(path)
    with explained(path):
        config = library().AutoConfig.from_pretrained(path, trust_remote_code=False, **how)
    if config.model_type not in (known := kind.architectures()):
        raise DataError(
            f"{path}: is a {printable(str(config.model_type))[:80]}, which is no {kind.called} "
            f"that attar reads; it reads {', '.join(sorted(known))}"
        )
    return config


def check_folder(path: str) -> None:
    """Refuse a path that is neither a folder with safetensors nor a name on the hub."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(path):
            raise DataError(
                f"{path}: there is no such folder; give a folder with config.json and "
                "model.safetensors, or owner/name on the hub"
            )
        return
    if not (folder / "config.json").is_file():
        raise DataError(f"{path}: holds no config.json; give a folder that transformers saved")
    pickled = sorted(folder.glob("*.bin"))
    if not any(folder.glob("*.safetensors")):
        if pickled:
            raise DataError(f"{pickled[0]}: {to_convert(pickled[0])}")
        raise DataError(f"{path}: holds no model.safetensors; save it with save_pretrained")


def fitted_model(
    path: str,
    config: Any,
    how: dict[str, Any],
    outputs: int,
    labels: Sequence[str] | None,
    head: Head,
    kind: Kind,
) -> Any:
    """The classifier at *path*, its classes in the data's order; on ``auto`` maybe a new head."""
    values = {name: getattr(config, name) for name in kind.config_values(config.model_type)}
    model, absent = weighted(path, config, how, kind)
    body = f"{model.base_model_prefix}."  # what stands after it is the head, in however many parts
    lost = sorted(name for name in absent - _head_tensors(config, kind) if name.startswith(body))
    if lost:
        raise lacking(path, config, lost)
    order = _order(path, config, outputs, labels, kind, headless=bool(absent))
    if isinstance(order, str) and head == "keep":
        raise DataError(f"{path}: {order}")
    made = kind.classifier(config.model_type, values, outputs, labels or _names(config, order))
    return _with_head(model, made, order, absent, kind)


def weighted(path: str, config: Any, how: dict[str, Any], kind: Kind) -> tuple[Any, set[str]]:
    """The model with the folder's weights, and the tensors that the folder did not have."""
    with explained(path):
        model, info = kind.class_of(config).from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **how,
        )
    return model, set(info["missing_keys"])


def lacking(path: str, config: Any, lost: Sequence[str]) -> DataError:
    """What to say of weights that are not all there."""
    return DataError(
        f"{path}: its weights lack {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}, so they "
        f"are not those of a {config.model_type}; use another copy"
    )


def _head_tensors(config: Any, kind: Kind) -> set[str]:
    """The tensors whose first dimension is the number of classes, by trying one class more."""
    values = {name: getattr(config, name) for name in kind.config_values(config.model_type)}
    with torch.device("meta"):
        one, more = (
            kind.network(
                kind.classifier(config.model_type, values, config.num_labels + extra, None)
            )
            for extra in (0, 1)
        )
    other = more.state_dict()
    return {name for name, t in one.state_dict().items() if t.shape != other[name].shape}


def _order(
    path: str,
    config: Any,
    outputs: int,
    labels: Sequence[str] | None,
    kind: Kind,
    *,
    headless: bool,
) -> list[int] | str:
    """Which of the folder's classes each of the data's is, or why there is no telling."""
    own = [str(config.id2label[index]) for index in sorted(config.id2label)]
    named = json.dumps(path)
    advice = (
        "train a head for these: "
        f"teacher: {{model: {{name: {kind.pretrained}, path: {named}}}, train: {{epochs: 5}}}}"
    )
    if headless:
        return f"has no trained head; give a model that has one, or {advice}"
    project = f"project its answers onto the data's: teacher: {{load: {named}, project: true}}, "
    advice = f"give data with its classes, {project if kind.projects else ''}or {advice}"
    if len(own) != outputs:
        return f"knows {len(own)} classes, but the data have {outputs}; {advice}"
    unnamed = own == [f"LABEL_{index}" for index in range(len(own))]
    if labels is None or unnamed:
        return list(range(outputs))
    if sorted(own) != sorted(labels) or len(set(own)) != len(own):
        strange = [name for name in labels if name not in own] or own
        return (
            f"its classes ({_few(own)}) are not those of the data, which have {_few(strange)}; "
            f"{advice}"
        )
    return [own.index(name) for name in labels]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name)[:40] for name in names[:4])
    return shown + ", ..." * (len(names) > 4)


def _names(config: Any, order: list[int] | str) -> list[str] | None:
    return None if isinstance(order, str) else [config.id2label[index] for index in order]


def _with_head(
    model: Any, config: Any, order: list[int] | str, absent: set[str], kind: Kind
) -> Any:
    """The model with its head in the data's order, or with a new one of random weights."""
    heads = _head_tensors(model.config, kind)
    if isinstance(order, list):
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in heads:
                    tensor.copy_(tensor[order].clone())
        model.config = config
        return model
    fresh = kind.network(config)
    body: dict[str, Tensor] = {
        name: tensor for name, tensor in model.state_dict().items() if name not in heads | absent
    }
    fresh.load_state_dict(fresh.state_dict() | body)
    return fresh


def _pixels(path: str, image_size: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Size, mean and deviation that the folder's image processor makes of pixels in [0, 1]."""
    found = _read_pixels(path, how)
    if found is None:
        size = _size(image_size)
        return {"size": size, "mean": (_HALF,), "std": (_HALF,)}
    if found.get("do_flip_channel_order"):
        raise DataError(
            f"{path}: was trained on images whose channels are in the order blue, green, red, "
            "which attar does not make; use another model"
        )
    try:
        return _normalisation(found) | {"size": _target(found)}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: its {PIXELS} cannot be understood ({type(error).__name__}: {error}); "
            "use another copy"
        ) from None


def _read_pixels(path: str, how: dict[str, Any]) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    # A file that is not there is one thing; a network that fails must not pass for it.
    with explained(path):
        file = cached_file(path, PIXELS, _raise_exceptions_for_missing_entries=False, **how)
    if file is None:
        return None
    with open(file, "rb") as opened:
        data = opened.read(_LIMIT)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: its {PIXELS} is no JSON table; use another copy")
    return found


def _normalisation(found: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation for pixels in [0, 1], whatever they are rescaled to before."""
    scale = 255 * float(found.get("rescale_factor", 1 / 255)) if _does(found, "rescale") else 255.0
    scale = round(scale, 9)  # 0.00392156862745098 times 255 is 1
    mean, std = [0.0], [1.0]
    if _does(found, "normalize"):
        mean = [float(value) for value in found.get("image_mean", [_HALF])]
        std = [float(value) for value in found.get("image_std", [_HALF])]
    shift = 1.0 if found.get("rescale_offset") else 0.0
    return {
        "mean": tuple((value + shift) / scale for value in mean),
        "std": tuple(value / scale for value in std),
    }


def _target(found: dict[str, Any]) -> Pair:
    """[H, W] after resizing and cropping; None where images stay as they are."""
    if found.get("do_center_crop") and "crop_size" in found:
        return _size(found["crop_size"])
    return _size(found.get("size")) if _does(found, "resize") else None


def _does(found: dict[str, Any], what: str) -> bool:
    return bool(found.get(f"do_{what}", True))


def _size(value: Any) -> Pair:
    if isinstance(value, dict):
        edge = value.get("shortest_edge")
        height, width = value.get("height", edge), value.get("width", edge)
    else:
        height, width = value if isinstance(value, list | tuple) else (value, value)
    return None if height is None or width is None else (int(height), int(width))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no advice of transformers; a UsageError where it is not installed."""
    library()
    with quiet_hub():
        yield


@contextmanager
def explained(path: str) -> Iterator[None]:
    """What transformers raises as one sentence."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:  # every layer below has errors of its own
        said = " ".join(str(error).split()) or type(error).__name__
        said = printable(said)[:240]
        if Path(path).is_dir():
            raise DataError(f"{path}: cannot be loaded ({said}); use another copy") from None
        raise DataError(
            f"{path}: there is no such folder, and the hub did not give such a model ({said}); "
            "check the name, or download the model where there is a network and give its folder"
        ) from None
