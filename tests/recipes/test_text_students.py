"""Recipes of text from end to end: adapters, exported students, embeddings without labels."""

from __future__ import annotations

import importlib
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.recipes import check, run
from attar.runtime import DataError, PreflightError

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES["intermediate_size"] = 24
LLAMA = {**SIZES, "num_key_value_heads": 1}
SMALL = {**SIZES, "hidden_size": 8}
STEP: dict[str, Any] = {"epochs": 2, "batch_size": 8, "optimizer": {"name": "adamw", "lr": 0.02}}

SOFT = {"loss": "kl_divergence"}
LANGUAGE: dict[str, Any] = {
    "task": "language-modelling",
    "data": {
        "name": "documents", "train": "corpus", "tokenizer": "tokenizer.json", "eos": "<eos>",
        "length": 16,
    },
    "teacher": {"load": "llama"},
    "student": {
        "name": "pretrained_language_model", "path": "llama",
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    },
    "stages": [
        {"do": "distill", **STEP, "terms": [{"loss": "kl_divergence"}]},
        {"do": "export", "formats": ["safetensors", "torch_export"]},
    ],
}  # fmt: skip

EMBEDDING: dict[str, Any] = {
    "task": "sentence-embedding",
    "data": {
        "name": "texts", "train": "texts.csv", "target": None, "tokenizer": "tokenizer.json",
        "length": 12,
    },
    "teacher": {"load": "bert"},
    "student": {"name": "text_encoder", "architecture": "bert", "config": SMALL},
    "stages": [
        {"do": "distill", **STEP, "epochs": 6, "terms": [{"loss": "relation_distance"}],
         "label_weight": 0}
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _files(words: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("attar.evaluation.cost"), "FILL_SECONDS", 0.0)
    rows = [f"w{1 + n % 39} w{1 + n % 7} w{1 + n % 11}" for n in range(400)]
    Path("texts.csv").write_text("text\n" + "\n".join(rows) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, initializer_range=0.3, **SIZES)
    transformers.BertModel(config).save_pretrained("bert")


@pytest.fixture
def _llama() -> None:
    """A language model that knows the corpus."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **LLAMA))
    train, _ = attar.data.documents(
        train="corpus", tokenizer="tokenizer.json", eos="<eos>", length=16
    )
    adamw = partial(attar.training.adamw, lr=0.02)
    task = attar.tasks.LanguageModelling()
    attar.train(model, train, task, epochs=8, batch_size=4, optimizer=adamw, progress=False)
    model.save_pretrained("llama")


def ran(recipe: dict[str, Any], folder: str = "runs/one", do: Any = run, **changes: Any) -> Any:
    Path("recipe.yaml").write_text(json.dumps({**recipe, **changes}))
    return do("recipe.yaml", **({"folder": folder} if do is run else {}))


@pytest.mark.usefixtures("_llama")
def test_a_student_with_adapters_is_left_merged_and_exported() -> None:
    pytest.importorskip("peft")
    verdict = ran(LANGUAGE)
    student = attar.models.load("runs/one/student")
    assert type(student).__name__ == "LlamaForCausalLM"
    _, test = attar.data.documents(
        train="corpus", tokenizer="tokenizer.json", eos="<eos>", length=16
    )
    again = attar.evaluate(student, test, attar.tasks.LanguageModelling(vocabulary=40))
    found = verdict.models["distilled"]
    assert again["perplexity"] == pytest.approx(found.scores["perplexity"], rel=1e-5)
    assert found.cost.parameters == sum(p.numel() for p in student.parameters())
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        wanted = student(tokens).logits
        theirs = transformers.AutoModelForCausalLM.from_pretrained("runs/one/export")(tokens)
        traced = torch.export.load("runs/one/export/model.pt2").module()(tokens)
    torch.testing.assert_close(theirs.logits, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(traced, wanted, rtol=0, atol=1e-5)
    start = transformers.AutoModelForCausalLM.from_pretrained("llama")
    changed = {
        name for (name, one), other in zip(
            start.state_dict().items(), student.state_dict().values(), strict=True
        ) if not torch.equal(one, other)
    }  # fmt: skip
    assert changed == {f"model.layers.0.self_attn.{part}_proj.weight" for part in "qv"}


@pytest.mark.usefixtures("_llama")
def test_a_wrong_option_of_adapters_is_known_before_training() -> None:
    pytest.importorskip("peft")
    student = {**LANGUAGE["student"], "lora": {"rank": 4}}
    with pytest.raises(PreflightError, match="lora has no 'rank'; choose from: bias, lora_alpha"):
        ran(LANGUAGE, do=check, student=student)


@pytest.mark.parametrize("student", ["encoder", "bilstm"])
def test_embeddings_without_labels_are_judged_by_the_teacher(student: str) -> None:
    changes = (
        {"student": {"name": "bilstm", "width": 8, "hidden": 4}} if student == "bilstm" else {}
    )
    verdict = ran(EMBEDDING, **changes)
    assert verdict.metric == "spearman"
    assert verdict.models["teacher"].scores["spearman"] == pytest.approx(1)
    scores = verdict.models["distilled"].scores
    assert {"spearman", "recall_at_1", "recall_at_10"} <= scores.keys()
    assert scores["spearman"] > verdict.models["start"].scores["spearman"]
    made = attar.models.load("runs/one/student")
    task = attar.tasks.SentenceEmbedding()
    _, test = attar.data.texts(
        train="texts.csv", target=None, tokenizer="tokenizer.json", length=12
    )
    embedding = attar.evaluation.collect(made, test, task)["embedding"]
    assert embedding.shape[1] == (16 if student == "bilstm" else 8)
    assert os.path.isfile("runs/one/report.html")


def test_a_teacher_of_embeddings_must_know_already() -> None:
    model = {"name": "text_encoder", "architecture": "bert", "config": SIZES}
    with pytest.raises(
        PreflightError, match=r"must be one that knows already; give teacher: {load"
    ):
        ran(EMBEDDING, do=check, teacher={"model": model, "train": STEP})


@pytest.mark.parametrize("word", [{"project": True}, {"classes": ["a", "b"]}, {"size": 8}], ids=str)
def test_what_fits_other_images_is_refused_for_texts(word: dict[str, Any]) -> None:
    (name,) = word
    for recipe, task in ((LANGUAGE, "language-modelling"), (EMBEDDING, "sentence-embedding")):
        with pytest.raises(
            PreflightError, match=rf"teacher\.{name} is for .* the task {task} reads"
        ):
            ran(recipe, do=check, teacher={"load": "bert", **word})


def test_a_text_classifier_of_other_classes_is_told_what_it_can_do() -> None:
    Path("labelled.csv").write_text(
        "text,label\n" + "".join(f"w{n},{'ab'[n % 2]}\n" for n in range(1, 39))
    )
    data = {**EMBEDDING["data"], "train": "labelled.csv", "target": "label"}
    with pytest.raises(DataError) as caught:
        ran(EMBEDDING, do=check, data=data, task="text-classification",
            student={"name": "bilstm"}, stages=[{"do": "distill", "terms": [SOFT]}])  # fmt: skip
    said = str(caught.value)
    assert "teacher: {model: {name: pretrained_text_classifier, path:" in said
    assert "project" not in said
