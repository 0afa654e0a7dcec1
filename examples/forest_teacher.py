# A forest of scikit-learn teaches a net: it learns from 100 labelled digits and says what it sees
# in 1,078. The baseline is the same net on the 100 labels; three seeds of each. Needs nothing else.
# python examples/forest_teacher.py
"""Distil from an estimator: probabilities of trees become what a net learns."""

from __future__ import annotations

import copy
from functools import partial

import torch
from sklearn.ensemble import ExtraTreesClassifier

import attar
from attar.evaluation import collect, judge

LABELS, TREES = 100, 100


def main(epochs: int = 20, seeds: int = 3) -> attar.evaluation.Verdict:
    """Fit the forest, train baselines and students; print and return the verdict."""
    train, test = attar.data.digits()
    _, few = attar.data.split(train, LABELS / len(train), seed=0)  # as many of each class
    everything = attar.data.TensorSource(train.rows(torch.arange(len(train)))["inputs"])
    task = attar.tasks.ImageClassification(classes=10)

    known = few.rows(torch.arange(len(few)))
    forest = ExtraTreesClassifier(TREES, random_state=0)
    forest.fit(known["inputs"].flatten(1).numpy(), known["labels"].numpy())
    # Half a vote: what no tree says is not impossible.
    teacher = attar.teachers.from_sklearn(forest, task, floor=0.5 / TREES)

    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    steps = -(-len(everything) // 20) * epochs  # of 20 rows; the same for both
    students, baselines = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        student = attar.models.build("mlp", data=few, widths=[32])
        baseline = copy.deepcopy(student)
        options = {"batch_size": 20, "seed": seed}
        attar.train(baseline, few, task, epochs=steps // 5, **options)
        options |= {"label_weight": 0, "epochs": epochs}
        attar.distill(student, teacher, everything, task, [soft], **options)
        students.append(collect(student, test, task))
        baselines.append(collect(baseline, test, task))

    rows = collect(teacher, test, task)
    verdict = judge(task, distilled=students, baseline=baselines, teacher=rows)
    print(f"teacher: accuracy {100 * task.primary(rows):.1f} %; {teacher.lost}\n{verdict}")
    return verdict


if __name__ == "__main__":
    main()
