"""Image classifiers of the library transformers, built from a config with random weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from attar.models.faces import Face, Preprocess, check_channels, give_face
from attar.models.layers import image_shape
from attar.models.types import Labels, Numbers, Pair, Shape, Size
from attar.runtime import UsageError, suggest

INSTALL = 'pip install "attar[transformers]"'


@dataclass(frozen=True)
class Kind:
    """What a model of transformers is for.

    Attributes:
        family: that of attar, for messages.
        called: in words, for messages.
        listed: where transformers lists the classes by architecture.
        left_out: architectures that attar does not read.
        pretrained: the family of attar that starts from trained weights.
        projects: whether a teacher of other classes can be projected onto the data's.
        within: another such list; only its architectures are read.
    """

    family: str
    called: str
    listed: str
    left_out: frozenset[str] = frozenset()
    pretrained: str = "pretrained"
    projects: bool = False
    within: str | None = None

    def architectures(self) -> dict[str, str]:
        """Names of the architectures, each with the name of its class."""
        library()
        from transformers.models.auto import modeling_auto

        kinds = dict(getattr(modeling_auto, self.listed))
        # Where there are several, the first is the one whose answer is logits alone.
        first = {name: kind if isinstance(kind, str) else kind[0] for name, kind in kinds.items()}
        others = first if self.within is None else getattr(modeling_auto, self.within)
        return {
            name: kind
            for name, kind in first.items()
            if name not in self.left_out and name in others
        }

    def class_of(self, config: Any) -> Any:
        """The class of the models of this config."""
        return getattr(library(), self.architectures()[config.model_type])

    def config_class(self, architecture: str) -> Any:
        """The class of an architecture's config; a UsageError where there is none."""
        known = self.architectures()
        if architecture not in known:
            raise UsageError(
                f"{self.family}: there is no {self.called} '{architecture:.80}'; "
                f"{suggest(architecture, known)}"
            )
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[architecture]

    def config_values(self, architecture: str) -> list[str]:
        """The values of an architecture's own config, without those that every config has."""
        base = {field.name for field in dataclasses.fields(library().PreTrainedConfig)}
        fields = dataclasses.fields(self.config_class(architecture))
        return [f.name for f in fields if f.name not in base | {"num_labels"} and f.init]

    def config(self, architecture: str, values: Mapping[str, Any]) -> Any:
        """A config of *values*."""
        try:
            made = self.config_class(architecture)(**values)
        except Exception as error:  # each config has checks and errors of its own
            raise self.refused(architecture, error) from None
        made.architectures = [self.architectures()[architecture]]
        return made

    def network(self, config: Any) -> Any:
        """The model of *config*, with random weights."""
        try:
            return self.class_of(config)(config)
        except Exception as error:
            raise self.refused(config.model_type, error) from None

    def classifier(
        self, architecture: str, values: Mapping[str, Any], outputs: int, labels: Any
    ) -> Any:
        """A config of *values* for *outputs* classes."""
        names = dict(enumerate(labels or (f"LABEL_{index}" for index in range(outputs))))
        indices = {name: index for index, name in names.items()}
        counted = {"num_labels": outputs} if _has_count(self.config_class(architecture)) else {}
        return self.config(
            architecture, {**values, **counted, "id2label": names, "label2id": indices}
        )

    def refused(self, architecture: str, error: Exception) -> UsageError:
        """What a config or a model raised when it was built, as one sentence."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines) or type(error).__name__
        return UsageError(f"{self.family}: {architecture} cannot be built so: {said:.300}")

    def check_values(
        self, architecture: str, values: Mapping[str, Any], known: Sequence[str]
    ) -> None:
        """Refuse a value that the config does not have, and numbers no model has."""
        for key, value in values.items():
            if key not in known:
                raise UsageError(
                    f"{self.family}: the config of {architecture} has no '{key:.80}'; "
                    f"{suggest(key, known)}"
                )
            parts = any(word in key for word in ("block", "depth", "layers", "repeats", "stages"))
            for number in _numbers(value):
                if abs(number) > (_MOST_PARTS if parts else _MOST):
                    raise UsageError(
                        f"{self.family}: {key} of {architecture} may be "
                        f"{_MOST_PARTS if parts else _MOST} at most, not {number}"
                    )


IMAGES = Kind(
    "transformers",
    "image classifier",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    # They read more than pixels, are configured by nested configs, or are another library's.
    frozenset({
        "clip", "imagegpt", "metaclip_2", "perceiver", "shieldgemma2", "siglip", "siglip2",
        "timm_wrapper",
    }),
    projects=True,
)  # fmt: skip
_MOST = 2**24  # of any whole number in a config
_MOST_PARTS = 1000  # of layers, blocks and the like, each of which is a Python object


class TransformersFace(Face):
    """A model of transformers that `attar.models.save` also writes as transformers would."""

    config: Any
    attar_build: dict[str, Any]

    def attar_files(self) -> dict[str, bytes]:
        """What else belongs into the model's folder, by name."""
        return {
            "config.json": self.config.to_json_string(use_diff=True).encode(),
            "preprocessor_config.json": _preprocessor(self.attar_build["options"], self.config),
        }


def transformers(
    shape: Shape,
    outputs: Size,
    *,
    architecture: str,
    config: dict[str, Any] | None = None,
    size: Pair = None,
    labels: Labels = None,
    mean: Numbers = None,
    std: Numbers = None,
) -> nn.Module:
    """An image classifier of the library transformers, with random weights.

    Args:
        shape: [C, H, W] of one image.
        outputs: number of classes.
        architecture: what transformers calls it: ``resnet``, ``convnext``, ``vit``, ``swin``,
            ``mobilenet_v2``, ...
        config: values of its config class, such as ``{"hidden_sizes": [16, 32], "depths": [1, 1],
            "embedding_size": 16}``. Left out, ``num_channels`` and ``image_size`` are the data's
            and everything else is the library's default, which is large.
        size: [H, W] that images are resized to (bilinear, antialiased).
        labels: names of the classes, for ``config.json``.
        mean: subtracted from each channel.
        std: divides each channel after that.

    Tap addresses are the names of transformers, for example ``resnet.encoder.stages.0``,
    ``vit.layers.0`` and ``classifier``; ``preprocess`` gives the pixels the network reads.

    Errors: transformers is not installed; an architecture or a config value that it does not
    have; images of other channels (UsageError).
    """
    image = image_shape(shape, "transformers")
    values = dict(config or {})
    known = IMAGES.config_values(architecture)
    IMAGES.check_values(architecture, values, known)
    seen = image[1:] if size is None else size
    if "num_channels" in known:
        values.setdefault("num_channels", image[0])
    if "image_size" in known:
        values.setdefault("image_size", seen[0] if seen[0] == seen[1] else list(seen))
    made = IMAGES.classifier(architecture, values, outputs, labels)
    patch = getattr(made, "patch_size", 1)
    if isinstance(patch, int) and patch > min(seen):
        raise UsageError(
            f"transformers: the {patch}x{patch} patches of {architecture} are larger than the "
            f"images, which have {seen[0]}x{seen[1]} pixels; give config: {{patch_size: N}} or "
            "size: [H, W]"
        )
    return dressed(IMAGES.network(made), image, labels, size=size, mean=mean, std=std)


def dressed(
    model: Any, shape: tuple[int, int, int], labels: Labels, *, size: Pair, mean: Numbers,
    std: Numbers,
) -> nn.Module:  # fmt: skip
    """*model* with attar's face, and what builds it again without a file or a network."""
    config = model.config
    channels = getattr(config, "num_channels", 3)
    check_channels(config.model_type, shape[0], channels)
    give_face(model, TransformersFace, Preprocess(channels, size, mean, std))
    kept = {name: getattr(config, name) for name in IMAGES.config_values(config.model_type)}
    options = {
        "shape": shape,
        "outputs": config.num_labels,
        "architecture": config.model_type,
        "config": kept,
        "size": size,
        "labels": labels,
        "mean": mean,
        "std": std,
    }
    model.built_as = {"family": "transformers", "options": json.loads(json.dumps(options))}
    return model


def library() -> Any:
    """The module transformers; a UsageError with the line to type where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"models of transformers need that package ({error}); install it: {INSTALL}"
        ) from None
    return transformers


def _has_count(kind: Any) -> bool:
    """Whether the number of classes is a field of its own, which the names do not set."""
    return any(field.name == "num_labels" for field in dataclasses.fields(kind))


def _numbers(value: Any) -> list[int]:
    """Every whole number in *value*."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int) else []


def _preprocessor(options: Mapping[str, Any], config: Any) -> bytes:
    """What transformers' image processors read: the same pixels from the same image."""
    channels = getattr(config, "num_channels", 3)
    height, width = options["size"] or options["shape"][1:]
    spread = {
        name: list((options[name] or [other]) * (1 if len(options[name] or [0]) > 1 else channels))
        for name, other in (("mean", 0.0), ("std", 1.0))
    }
    content = {
        "image_processor_type": "ViTImageProcessor",  # the plain one: resize, rescale, normalise
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spread["mean"],
        "image_std": spread["std"],
    }
    return (json.dumps(content, indent=2) + "\n").encode()
