"""Models of the library transformers that read tokens: causal language models, text classifiers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attar.models.adapters import with_lora
from attar.models.architectures import Kind
from attar.models.faces import faced
from attar.models.hub import Head, config_of, fitted_model, lacking, quiet, weighted
from attar.models.state import shape_differences, shapes_of
from attar.models.types import Labels, Shape, Size
from attar.runtime import DataError, UsageError
from attar.runtime.hub import reached

CAUSAL = Kind(
    "language_model",
    "causal language model",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    # They read more than tokens, or not from left to right.
    frozenset({"git", "musicgen", "musicgen_melody", "reformer", "speecht5", "xlm", "xlnet"}),
    pretrained="pretrained_language_model",
)
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")
TEXTS = Kind(
    "text_classifier",
    "text classifier",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    # They read more than tokens, or as many of them as they were made for.
    frozenset({"layoutlm", "layoutlmv2", "layoutlmv3", "perceiver", "reformer"}),
    pretrained="pretrained_text_classifier",
)
ENCODERS = Kind(
    "text_encoder",
    "text encoder",
    "MODEL_MAPPING_NAMES",
    # They read more than tokens, as many of them as they were made for, or a second text.
    TEXTS.left_out
    | {
        "bart", "bigbird_pegasus", "led", "mbart", "mt5", "mvp", "plbart", "t5", "t5gemma",
        "t5gemma2", "umt5",
    },
    pretrained="pretrained_text_encoder",
    within="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip
KINDS = (CAUSAL, TEXTS, ENCODERS)


class TokensFace(nn.Module):
    """A model of transformers that `attar.models.save` also writes as transformers would."""

    config: Any
    built_as: dict[str, Any]

    def attar_files(self) -> dict[str, bytes]:
        """What else belongs into the model's folder, by name."""
        return {"config.json": self.config.to_json_string(use_diff=True).encode()}


def language_model(
    shape: Shape, outputs: Size, *, architecture: str, config: dict[str, Any] | None = None
) -> nn.Module:
    """A causal language model of the library transformers, with random weights.

    Args:
        shape: [S] or [S, ...], of which S is the most tokens that it reads at once.
        outputs: how many token ids there are; the last layer has at least as many columns.
        architecture: what transformers calls it: ``llama``, ``qwen3``, ``gpt2``, ``gemma2``, ...
        config: values of its config class, such as ``{"hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 128}``. Left out, everything is the
            library's default, which is large.

    Tap addresses are the names of transformers, for example ``model.layers.0`` and ``lm_head``.

    Errors: transformers is not installed; an architecture or a config value that it does not
    have; windows longer than the model reads (UsageError).
    """
    values = dict(config or {})
    CAUSAL.check_values(architecture, values, _values(CAUSAL, architecture))
    values["vocab_size"] = max(outputs, values.get("vocab_size", 0))
    with quiet():
        made = CAUSAL.config(architecture, values)
        check_length(made, shape)
        return recorded(CAUSAL.network(made), shape, outputs, CAUSAL)


def pretrained_language_model(
    shape: Shape, outputs: Size, *, path: str, lora: dict[str, Any] | None = None
) -> nn.Module:
    """A trained causal language model of transformers: Llama, Qwen, SmolLM, GPT-2, Gemma, ...

    Only safetensors are read, no code of a repository is run, and the result is float32.
    `attar.models.save` writes all of it, so that `load` needs neither the folder nor the hub.

    Args:
        shape: [S] or [S, ...], of which S is the most tokens that it reads at once.
        outputs: how many token ids the data have. The model may have more columns, as of a
            vocabulary that was padded, but not fewer.
        path: a folder with ``config.json`` and safetensors, or ``owner/name`` on the hub.
        lora: low-rank adapters of the library peft, which then alone learn: values of its
            ``LoraConfig``, such as ``{"r": 8, "target_modules": ["q_proj", "v_proj"]}``. What is
            saved and exported has them merged into the weights. Tap addresses begin with
            ``base_model.model.`` then.

    Errors: transformers is not installed, windows longer than the model reads, adapters that do
    not fit (UsageError); no such folder or model, no safetensors, tensors that are missing, fewer
    columns than there are token ids (DataError).
    """
    with quiet():
        how = reached(path)
        config = config_of(path, how, CAUSAL)
        if config.vocab_size < outputs:
            raise DataError(
                f"{path}: knows {config.vocab_size:,} tokens, and the data have {outputs:,}; use "
                "the tokenizer that the model was trained with"
            )
        check_length(config, shape)
        model, absent = weighted(path, config, how, CAUSAL)
    if absent:
        raise lacking(path, config, sorted(absent))
    return with_lora(recorded(model.eval(), shape, outputs, CAUSAL), lora, "CAUSAL_LM")


def text_classifier(
    shape: Shape,
    outputs: Size,
    *,
    architecture: str,
    config: dict[str, Any] | None = None,
    vocabulary: Size | None = None,
    labels: Labels = None,
) -> nn.Module:
    """A text classifier of the library transformers, with random weights.

    Args:
        shape: [S], of which S is the most tokens that it reads at once.
        outputs: number of classes.
        architecture: what transformers calls it: ``bert``, ``distilbert``, ``roberta``, ...
        config: values of its config class, such as ``{"hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 128}``. Left out, everything is the
            library's default, which is large.
        vocabulary: how many token ids there are; the data's own where they tell, and the
            library's default for the architecture where they do not.
        labels: names of the classes, for ``config.json``.

    Tap addresses are the names of transformers, for example ``bert.encoder.layer.0`` and
    ``classifier``.

    Errors: transformers is not installed; an architecture or a config value that it does not
    have; texts longer than the model reads (UsageError).
    """
    values = dict(config or {})
    TEXTS.check_values(architecture, values, _values(TEXTS, architecture))
    if vocabulary is not None:
        values.setdefault("vocab_size", vocabulary)
    with quiet():
        made = TEXTS.classifier(architecture, values, outputs, labels)
        check_length(made, shape)
        return recorded(TEXTS.network(made), shape, outputs, TEXTS, labels=labels)


def pretrained_text_classifier(
    shape: Shape,
    outputs: Size,
    *,
    path: str,
    head: Head = "auto",
    lora: dict[str, Any] | None = None,
    labels: Labels = None,
) -> nn.Module:
    """A trained model of transformers as a text classifier: BERT, DistilBERT, RoBERTa, MiniLM, ...

    Only safetensors are read, no code of a repository is run, and the result is float32.
    `attar.models.save` writes all of it, so that `load` needs neither the folder nor the hub.

    Args:
        shape: [S], of which S is the most tokens that it reads at once.
        outputs: number of classes.
        path: a folder with ``config.json`` and safetensors, or ``owner/name`` on the hub.
        head: ``auto`` keeps the folder's classes where they are the data's, in whatever order,
            and starts a new, random head where they are not, or where the folder has none;
            ``keep`` refuses instead.
        lora: as in `pretrained_language_model`; beside the adapters the head learns.
        labels: names of the data's classes. The head's rows are put into their order; a folder
            without names of its own (``LABEL_0``, ...) is taken to have that order.

    Errors: transformers is not installed, texts longer than the model reads, adapters that do not
    fit (UsageError); no such folder or model, no safetensors, tensors that are missing, ``keep``
    and other classes (DataError).
    """
    with quiet():
        how = reached(path)
        config = config_of(path, how, TEXTS)
        check_length(config, shape)
        model = fitted_model(path, config, how, outputs, labels, head, TEXTS)
    names = list(model.config.id2label.values())
    made = recorded(model.eval(), shape, outputs, TEXTS, labels=names)
    return with_lora(made, lora, "SEQ_CLS")


def text_encoder(
    shape: Shape,
    outputs: Size,
    *,
    architecture: str,
    config: dict[str, Any] | None = None,
    vocabulary: Size | None = None,
) -> nn.Module:
    """An encoder of the library transformers, with random weights: a student for embeddings.

    Args:
        shape: [S], of which S is the most tokens that it reads at once.
        outputs: not used; an embedding has as many numbers as a hidden state.
        architecture: what transformers calls it: ``bert``, ``distilbert``, ``roberta``, ...
        config: values of its config class, such as ``{"hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "intermediate_size": 128}``. Left out, everything is the
            library's default, which is large.
        vocabulary: how many token ids there are; the data's own where they tell, and the
            library's default for the architecture where they do not.

    Tap addresses are the names of transformers, for example ``encoder.layer.0``.

    Errors: transformers is not installed; an architecture or a config value that it does not
    have; texts longer than the model reads (UsageError).
    """
    values = dict(config or {})
    ENCODERS.check_values(architecture, values, _values(ENCODERS, architecture))
    if vocabulary is not None:
        values.setdefault("vocab_size", vocabulary)
    with quiet():
        made = ENCODERS.config(architecture, values)
        check_length(made, shape)
        return recorded(ENCODERS.network(made), shape, outputs, ENCODERS)


def pretrained_text_encoder(shape: Shape, outputs: Size, *, path: str) -> nn.Module:
    """A trained encoder of transformers: MiniLM, BERT, RoBERTa, and other models of embeddings.

    Only safetensors are read, no code of a repository is run, and the result is float32. Of what
    stands beside it for another library, such as a second layer of its own, nothing is read.
    `attar.models.save` writes all of it, so that `load` needs neither the folder nor the hub.

    Args:
        shape: [S], of which S is the most tokens that it reads at once.
        outputs: not used; an embedding has as many numbers as a hidden state.
        path: a folder with ``config.json`` and safetensors, or ``owner/name`` on the hub. Where it
            has no pooler, a new one is random, and only ``pooling: none`` reads it.

    Errors: transformers is not installed, texts longer than the model reads (UsageError); no such
    folder or model, no safetensors, tensors that are missing (DataError).
    """
    with quiet():
        how = reached(path)
        config = config_of(path, how, ENCODERS)
        check_length(config, shape)
        model, absent = weighted(path, config, how, ENCODERS)
    if lost := sorted(name for name in absent if not name.startswith("pooler.")):
        raise lacking(path, config, lost)
    return recorded(model.eval(), shape, outputs, ENCODERS)


def _values(kind: Kind, architecture: str) -> list[str]:
    """The values of an architecture's config, with two that every config of tokens has."""
    own = kind.config_values(architecture)
    return [*own, *(name for name in ("vocab_size", "tie_word_embeddings") if name not in own)]


def most_tokens(config: Any) -> int | None:
    """How many tokens a model of this config reads at once; None where any number."""
    return next((n for n in (getattr(config, name, None) for name in _LENGTHS) if n), None)


def check_length(config: Any, shape: Sequence[int]) -> None:
    """Refuse windows that are longer than the model reads."""
    most = most_tokens(config)
    if most is not None and shape[0] > most:
        raise UsageError(
            f"the windows have {shape[0]:,} tokens, and this {config.model_type} reads at most "
            f"{most:,}; cut the text into shorter windows"
        )


def recorded(
    model: Any, shape: Sequence[int], outputs: int, kind: Kind, **options: Any
) -> nn.Module:
    """*model* with what builds it again without a file or a network."""
    config = model.config
    values = {name: getattr(config, name) for name in _values(kind, config.model_type)}
    told = {
        "shape": list(shape),
        "outputs": outputs,
        "architecture": config.model_type,
        "config": {name: value for name, value in values.items() if _is_json(value)},
        **options,
    }
    model.__class__ = faced(TokensFace, type(model))
    model.built_as = {"family": kind.family, "options": json.loads(json.dumps(told))}
    return model


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """How a model of tokens that transformers made is built again; None where that is not known.

    It is known where the model is one of the classes that attar builds, and its config is no more
    than the values that are kept.
    """
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return None
    for kind in KINDS:
        known = kind.architectures().get(config.model_type)
        if known != type(model).__name__:
            continue
        names = _values(kind, config.model_type)
        values = {name: value for name in names if _is_json(value := getattr(config, name))}
        told: dict[str, Any] = {
            "shape": [most_tokens(config) or 1],
            "outputs": config.vocab_size if kind is CAUSAL else 1,
            "architecture": config.model_type,
            "config": json.loads(json.dumps(values)),
        }
        if kind is TEXTS:
            labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
            told |= {"outputs": len(labels), "labels": labels, "vocabulary": None}
        return {"family": kind.family, "options": told}
    return None


def files_of(model: nn.Module) -> dict[str, bytes]:
    """What makes the folder of *model* one that transformers reads, by name.

    Nothing where its parts have other sizes than its config says, as after pruning.
    """
    if not _as_configured(model):
        return {}
    if callable(told := getattr(model, "attar_files", None)):
        return dict(told())
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return {}
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    return {"config.json": config.to_json_string(use_diff=True).encode()}


def _as_configured(model: nn.Module) -> bool:
    """Whether a model of transformers is what its own config builds."""
    config = getattr(model, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return True
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        again = type(model)(config)
    return not shape_differences(shapes_of(again.state_dict()), shapes_of(model.state_dict()))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
