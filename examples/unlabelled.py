# Few labels, many images: a teacher learns from 100 labelled digits and tells its student what it
# sees in all 1,078. The baseline is the same student on the 100 labels. Needs nothing else.
# python examples/unlabelled.py
"""Distil on rows without labels, by attar's Python verbs."""

from __future__ import annotations

import copy
from functools import partial

import torch

import attar


def main(epochs: int = 10) -> attar.evaluation.Verdict:
    """Train teacher, baseline and student; print and return the verdict."""
    train, test = attar.data.digits()
    _, few = attar.data.split(train, 100 / len(train), seed=0)  # as many of each class
    everything = attar.data.TensorSource(train.rows(torch.arange(len(train)))["inputs"])
    task = attar.tasks.ImageClassification(classes=10)

    torch.manual_seed(0)
    large = attar.models.build("resnet", data=few, depth=8, width=16)
    student = attar.models.build("resnet", data=few, depth=8, width=4)
    baseline = copy.deepcopy(student)
    shift = partial(attar.data.crop, pixels=1)
    steps = -(-len(everything) // 20) * epochs  # of 20 rows; the same for all three
    options = {"epochs": steps // 5, "batch_size": 20, "augment": [shift]}
    attar.train(large, few, task, **options)
    attar.train(baseline, few, task, **options)

    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    options["epochs"] = epochs
    attar.distill(student, attar.Teacher(large, task), everything, task, [soft],
                  label_weight=0, **options)  # fmt: skip
    models = {"teacher": large, "baseline": baseline, "student": student}
    verdict = attar.compare(models, test, task)
    for name, model in models.items():
        print(f"{name:9} {attar.evaluate(model, test, task)}")
    print(verdict)
    return verdict


if __name__ == "__main__":
    main()
