"""Causal language models: built from a config, read from a folder, and saved so that both agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attar.models import build, load, save
from attar.runtime import DataError, UsageError

pytest.importorskip("transformers")

TOKENS = 100
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "num_key_value_heads": 2, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3": {**BASE, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64},
    "gemma2": {**BASE, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64},
}


def made(architecture: str = "llama", outputs: int = TOKENS, length: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return build(
        "language_model",
        shape=(length,),
        outputs=outputs,
        architecture=architecture,
        config=SMALL[architecture],
    ).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(32).view(2, 16) * 3
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("architecture", SMALL)
def test_a_saved_model_is_read_by_attar_and_by_transformers(
    architecture: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = made(architecture)
    save(model, tmp_path / "model")
    expected = logits(model)
    assert torch.equal(logits(load(tmp_path / "model").eval()), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(theirs).__name__ == type(model).__name__
    assert torch.equal(logits(theirs), expected)


def test_a_folder_of_transformers_is_read_and_needed_no_more_once_it_is_saved(
    tmp_path: Path,
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SMALL["llama"])).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build(
        "pretrained_language_model", shape=(16,), outputs=TOKENS, path=str(tmp_path / "theirs")
    )
    assert not ours.training
    assert torch.equal(logits(ours), logits(theirs))
    save(ours, tmp_path / "ours")
    (tmp_path / "theirs" / "config.json").unlink()
    assert torch.equal(logits(load(tmp_path / "ours").eval()), logits(theirs))


def test_a_vocabulary_may_be_padded_and_not_too_small(tmp_path: Path) -> None:
    save(made(outputs=TOKENS), tmp_path)
    with pytest.raises(DataError, match="knows 100 tokens, and the data have 101"):
        build("pretrained_language_model", shape=(16,), outputs=101, path=str(tmp_path))
    wide = build(
        "language_model",
        shape=(16,),
        outputs=TOKENS,
        architecture="llama",
        config={**SMALL["llama"], "vocab_size": 128},
    )
    assert logits(wide.eval()).shape[-1] == 128


def test_what_cannot_be_built_is_said() -> None:
    common = {"shape": (16,), "outputs": TOKENS}
    with pytest.raises(UsageError, match="no causal language model 'lama'; did you mean 'llama'"):
        build("language_model", architecture="lama", **common)
    with pytest.raises(UsageError, match="has no 'hiden_size'; did you mean 'hidden_size'"):
        build("language_model", architecture="llama", config={"hiden_size": 8}, **common)
    with pytest.raises(UsageError, match=r"gpt2 cannot be built so: .*divisible"):
        build("language_model", architecture="gpt2", config={"n_embd": 33, "n_head": 4}, **common)
    with pytest.raises(UsageError, match="4,096 tokens, and this gpt2 reads at most 1,024"):
        made("gpt2", length=4096)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    small = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    ResNetForImageClassification(small).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="is a resnet, which is no causal language model"):
        build("pretrained_language_model", shape=(16,), outputs=TOKENS, path=str(tmp_path))


ENCODER: dict[str, Any] = {**BASE, "intermediate_size": 64, "vocab_size": TOKENS}
NAMES = ["warm", "cold", "mild"]


def encoder(outputs: int = 3, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(
        "text_classifier", shape=(16,), outputs=outputs, architecture="bert", config=ENCODER, **more
    ).eval()


def test_a_text_classifier_is_saved_and_read_by_both(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = encoder(labels=NAMES)
    save(model, tmp_path / "model")
    expected = logits(model)
    assert expected.shape == (2, 3)
    assert torch.equal(logits(load(tmp_path / "model").eval()), expected)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(theirs), expected)
    assert list(theirs.config.id2label.values()) == NAMES


def test_a_trained_classifier_answers_in_the_order_of_the_data(tmp_path: Path) -> None:
    model = encoder(labels=NAMES)
    save(model, tmp_path / "model")
    how: dict[str, Any] = {"shape": (16,), "path": str(tmp_path / "model"), "head": "keep"}
    turned = build("pretrained_text_classifier", outputs=3, labels=NAMES[::-1], **how)
    assert torch.equal(logits(turned), logits(model).flip(1))
    save(turned, tmp_path / "turned")
    assert torch.equal(logits(load(tmp_path / "turned").eval()), logits(turned))
    with pytest.raises(DataError, match="knows 3 classes, but the data have 4"):
        build("pretrained_text_classifier", outputs=4, **how)


def test_a_model_without_a_head_gets_a_new_one_and_keeps_its_body(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    body = BertModel(BertConfig(**ENCODER))
    body.save_pretrained(tmp_path)
    how: dict[str, Any] = {"shape": (16,), "outputs": 5, "path": str(tmp_path)}
    made: Any = build("pretrained_text_classifier", **how)
    assert logits(made).shape == (2, 5)
    assert torch.equal(
        made.bert.embeddings.word_embeddings.weight, body.get_input_embeddings().weight
    )
    with pytest.raises(DataError, match="has no trained head"):
        build("pretrained_text_classifier", head="keep", **how)


@torch.no_grad()
def states(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(32).view(2, 16) * 3).last_hidden_state


def test_a_text_encoder_is_saved_and_read_by_both_and_starts_from_a_folder(tmp_path: Path) -> None:
    from transformers import AutoModel

    torch.manual_seed(0)
    how: dict[str, Any] = {"shape": (16,), "outputs": 1}
    model = build("text_encoder", architecture="bert", config=ENCODER, **how).eval()
    save(model, tmp_path / "ours")
    assert torch.equal(states(load(tmp_path / "ours")), states(model))
    theirs = AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(states(theirs), states(model))
    theirs.save_pretrained(tmp_path / "theirs")
    again = build("pretrained_text_encoder", path=str(tmp_path / "theirs"), **how)
    assert torch.equal(states(again), states(model))
    with pytest.raises(UsageError, match="there is no text encoder 't5'"):
        build("text_encoder", architecture="t5", **how)
    with pytest.raises(UsageError, match="there is no text encoder 'vit'"):
        build("text_encoder", architecture="vit", **how)


def test_the_advice_about_a_classifier_names_its_own_family(tmp_path: Path) -> None:
    save(encoder(labels=NAMES), tmp_path)
    how: dict[str, Any] = {"shape": (16,), "path": str(tmp_path), "head": "keep"}
    for outputs, labels in ((4, None), (3, ["a", "b", "c"])):
        with pytest.raises(DataError, match="name: pretrained_text_classifier, path:") as caught:
            build("pretrained_text_classifier", outputs=outputs, labels=labels, **how)
        assert "project" not in str(caught.value)
