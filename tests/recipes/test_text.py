"""Recipes of text: language models and text classifiers, from files to a verdict."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.recipes import run
from attar.runtime import DataError, PreflightError

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES["intermediate_size"] = 24
LLAMA = {**SIZES, "num_key_value_heads": 1}
OPTIMIZER: dict[str, Any] = {"name": "adamw", "lr": 0.02}
TRAIN = {"epochs": 8, "batch_size": 4, "optimizer": OPTIMIZER}
SOFT = {"loss": {"name": "kl_divergence", "temperature": 1.0}, "weight": 0.9}

LANGUAGE: dict[str, Any] = {
    "task": "language-modelling",
    "data": {
        "name": "documents", "train": "corpus", "tokenizer": "tokenizer.json", "eos": "<eos>",
        "length": 16,
    },
    "teacher": {
        "model": {"name": "language_model", "architecture": "llama", "config": LLAMA},
        "train": TRAIN,
    },
    "student": {
        "name": "language_model", "architecture": "gpt2",
        "config": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    },
    "stages": [{"do": "distill", **TRAIN, "terms": [SOFT]}],
}  # fmt: skip

TEXTS: dict[str, Any] = {
    "task": "text-classification",
    "data": {"name": "texts", "train": "texts.csv", "tokenizer": "tokenizer.json", "length": 12},
    "teacher": {
        "model": {"name": "text_classifier", "architecture": "bert", "config": SIZES},
        "train": TRAIN,
    },
    "student": {"name": "bilstm", "width": 8, "hidden": 4},
    "stages": [{"do": "distill", **TRAIN, "terms": [SOFT]}],
}


@pytest.fixture(autouse=True)
def _files(words: None) -> None:
    rows = [f"w{1 + n % 19 + 20 * (n % 2)} w{1 + n % 7},{'ab'[n % 2]}" for n in range(80)]
    Path("texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")


def ran(recipe: dict[str, Any], folder: str = "runs/one", **changes: Any) -> Any:
    Path("recipe.yaml").write_text(json.dumps({**recipe, **changes}))
    return run("recipe.yaml", folder=folder)


@pytest.mark.parametrize("cache", [False, {"top": 8}, {"head": True}])
def test_a_language_model_is_judged_by_its_perplexity(cache: Any) -> None:
    verdict = ran(LANGUAGE, teacher={**LANGUAGE["teacher"], "cache": cache})
    found = verdict.models["distilled"].scores["perplexity"]
    assert verdict.metric == "perplexity"
    assert 1 < found < 20
    judged = attar.models.load("runs/one/student")
    _, test = attar.data.documents(
        train="corpus", tokenizer="tokenizer.json", eos="<eos>", length=16
    )
    again = attar.evaluate(judged, test, attar.tasks.LanguageModelling(vocabulary=40))
    assert again["perplexity"] == pytest.approx(found, rel=1e-5)


def test_wide_logits_are_not_cached_whole() -> None:
    with pytest.raises(PreflightError, match="40 logits a position are not kept whole"):
        ran(LANGUAGE, teacher={**LANGUAGE["teacher"], "cache": True})


def test_a_teacher_of_transformers_teaches_the_language_it_knows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **LLAMA))
    train, test = attar.data.documents(
        train="corpus", tokenizer="tokenizer.json", eos="<eos>", length=16
    )
    task = attar.tasks.LanguageModelling().fitted(train)
    attar.train(
        model, train, task, epochs=8, batch_size=4, optimizer=partial(attar.training.adamw, lr=0.02)
    )
    model.save_pretrained("theirs")
    verdict = ran(LANGUAGE, teacher={"load": "theirs"})
    expected = attar.evaluate(model, test, task)["perplexity"]
    assert verdict.models["teacher"].scores["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_fewer_tokens_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(vocab_size=20, **LLAMA)).save_pretrained("small")
    with pytest.raises(DataError, match="knows 20 tokens, and the data have 40"):
        ran(LANGUAGE, teacher={"load": "small"})


def test_texts_are_classified_by_a_small_student() -> None:
    verdict = ran(TEXTS)
    assert verdict.metric == "accuracy"
    assert verdict.models["distilled"].scores["accuracy"] > 0.7


def test_a_trained_classifier_of_transformers_is_a_teacher() -> None:
    names = ("b", "a")  # in another order than the data's
    train, test = attar.data.texts(train="texts.csv", tokenizer="tokenizer.json", length=12)
    assert train.classes == ("a", "b")
    model = attar.models.build(
        "text_classifier", data=train, architecture="bert", config=SIZES, labels=["a", "b"]
    )
    task = attar.tasks.TextClassification().fitted(train)
    attar.train(
        model, train, task, epochs=4, batch_size=4, optimizer=partial(attar.training.adamw, lr=0.02)
    )
    expected = attar.evaluate(model, test, task)["accuracy"]
    attar.models.save(model, "ours")
    turned = attar.models.build(
        "pretrained_text_classifier", data=train, path="ours", labels=list(names)
    )
    attar.models.save(turned, "theirs")
    Path("theirs/model.json").unlink()  # as transformers itself leaves a folder
    verdict = ran(TEXTS, teacher={"load": "theirs"})
    assert verdict.models["teacher"].scores["accuracy"] == pytest.approx(expected)
    assert expected > 0.7
