# A start from another task: a net that reads digits learns to tell odd from even from 20 images.
# The baseline is the same net from a random start, for the same steps. Needs nothing else.
# python examples/transfer.py
"""Transfer by ``init`` and ``freeze``: a linear probe first, then all of the net."""

from __future__ import annotations

from functools import partial

import torch

import attar
from attar.training import sgd

LABELS = 20


def parity(source: attar.data.Source) -> attar.data.Source:
    """The same images; the class is whether the digit is odd."""
    rows = source.rows(torch.arange(len(source)))
    return attar.data.TensorSource(rows["inputs"], rows["labels"] % 2, classes=("even", "odd"))


def net(data: attar.data.Source, seed: int = 0) -> torch.nn.Module:
    """A ResNet-8 of random weights."""
    torch.manual_seed(seed)
    return attar.models.build("resnet", data=data, depth=8, width=8)


def main(epochs: int = 20) -> attar.evaluation.Verdict:
    """Train source, baseline and student; print and return the verdict."""
    train, test = attar.data.digits()
    known, new = attar.data.split(train, 0.5, seed=0)  # the source never sees the new images
    ten = attar.tasks.ImageClassification(classes=10)
    source = net(known)
    attar.train(source, known, ten, epochs=epochs, batch_size=32)

    two = attar.tasks.ImageClassification(classes=("even", "odd"))
    _, few = attar.data.split(parity(new), LABELS / len(new), seed=0)
    student, baseline = net(few, seed=1), net(few, seed=1)
    options = {"batch_size": 10, "optimizer": partial(sgd, lr=0.02)}
    probe, rest = epochs // 2, epochs - epochs // 2
    attar.train(student, few, two, init=source, freeze=["*", "!head"], epochs=probe, **options)
    attar.train(student, few, two, epochs=rest, **options)
    attar.train(baseline, few, two, epochs=epochs, **options)

    verdict = attar.compare({"baseline": baseline, "student": student}, parity(test), two)
    print(verdict)
    return verdict


if __name__ == "__main__":
    main()
