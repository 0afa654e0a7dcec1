"""Causal language models of the library transformers: token ids in, logits of the next token."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attar.models.architectures import check_values, library, refused
from attar.models.faces import faced
from attar.models.hub import check_folder, explained, quiet, reached
from attar.models.record import printable
from attar.models.types import Shape, Size
from attar.runtime import DataError, UsageError, suggest

FAMILY = "language_model"
# They read more than tokens, or remember what went before in a state that packing would mix up.
_LEFT_OUT = {"git", "musicgen", "musicgen_melody", "xlnet", "xlm", "reformer", "rwkv", "speecht5"}
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")


class LanguageFace(nn.Module):
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
    check_values("language_model", architecture, values, _values(architecture))
    values["vocab_size"] = max(outputs, values.get("vocab_size", 0))
    made = _made(architecture, values)
    _check_length(made, shape)
    kind = getattr(library(), language_models()[architecture])
    with quiet():
        try:
            model = kind(made)
        except Exception as error:
            raise refused("language_model", architecture, error) from None
    return _recorded(model, shape, outputs)


def pretrained_language_model(shape: Shape, outputs: Size, *, path: str) -> nn.Module:
    """A trained causal language model of transformers: Llama, Qwen, SmolLM, GPT-2, Gemma, ...

    Only safetensors are read, no code of a repository is run, and the result is float32.
    `attar.models.save` writes all of it, so that `load` needs neither the folder nor the hub.

    Args:
        shape: [S] or [S, ...], of which S is the most tokens that it reads at once.
        outputs: how many token ids the data have. The model may have more columns, as of a
            vocabulary that was padded, but not fewer.
        path: a folder with ``config.json`` and safetensors, or ``owner/name`` on the hub.

    Errors: transformers is not installed, windows longer than the model reads (UsageError); no
    such folder or model, no safetensors, tensors that are missing, fewer columns than there are
    token ids (DataError).
    """
    with quiet():
        how = reached(path)
        check_folder(path)
        with explained(path):
            config = library().AutoConfig.from_pretrained(path, trust_remote_code=False, **how)
        if config.model_type not in language_models():
            raise DataError(
                f"{path}: is a {printable(str(config.model_type))[:80]}, which is no causal "
                f"language model that attar reads; it reads {', '.join(sorted(language_models()))}"
            )
        if config.vocab_size < outputs:
            raise DataError(
                f"{path}: knows {config.vocab_size:,} tokens, and the data have {outputs:,}; use "
                "the tokenizer that the model was trained with"
            )
        _check_length(config, shape)
        kind = getattr(library(), language_models()[config.model_type])
        with explained(path):
            model, info = kind.from_pretrained(
                path,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **how,
            )
    if lost := sorted(info["missing_keys"]):
        raise DataError(
            f"{path}: its weights lack {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}, so they "
            f"are not those of a {config.model_type}; use another copy"
        )
    return _recorded(model.eval(), shape, outputs)


def language_models() -> dict[str, str]:
    """Names of the architectures, each with the name of its class."""
    library()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {name: kind for name, kind in NAMES.items() if name not in _LEFT_OUT}


def _config_class(architecture: str) -> Any:
    known = language_models()
    if architecture not in known:
        raise UsageError(
            f"language_model: there is no causal language model '{architecture:.80}'; "
            f"{suggest(architecture, known)}"
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[architecture]


def _values(architecture: str) -> list[str]:
    """The values of an architecture's config, without those of the library's own machinery."""
    base = {field.name for field in dataclasses.fields(library().PreTrainedConfig)}
    kind = _config_class(architecture)
    own = [f.name for f in dataclasses.fields(kind) if f.name not in base and f.init]
    return [*own, *(name for name in ("vocab_size", "tie_word_embeddings") if name not in own)]


def _made(architecture: str, values: Mapping[str, Any]) -> Any:
    with quiet():
        try:
            made = _config_class(architecture)(**values)
        except Exception as error:  # each config has checks and errors of its own
            raise refused("language_model", architecture, error) from None
    made.architectures = [language_models()[architecture]]
    return made


def _check_length(config: Any, shape: Sequence[int]) -> None:
    most = next((n for n in (getattr(config, name, None) for name in _LENGTHS) if n), None)
    if most is not None and shape[0] > most:
        raise UsageError(
            f"the windows have {shape[0]:,} tokens, and this {config.model_type} reads at most "
            f"{most:,}; cut the text into shorter windows"
        )


def _recorded(model: Any, shape: Sequence[int], outputs: int) -> nn.Module:
    """*model* with what builds it again without a file or a network."""
    config = model.config
    values = {name: getattr(config, name) for name in _values(config.model_type)}
    options = {
        "shape": list(shape),
        "outputs": outputs,
        "architecture": config.model_type,
        "config": {name: value for name, value in values.items() if _is_json(value)},
    }
    model.__class__ = faced(LanguageFace, type(model))
    model.built_as = {"family": FAMILY, "options": json.loads(json.dumps(options))}
    return model


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
