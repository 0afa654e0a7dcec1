"""Students that teach each other."""

from __future__ import annotations

from functools import partial

from attar.losses import cross_entropy, kl_divergence
from attar.losses.types import Loss
from attar.models import Group
from attar.training.term import Term

PAPERS = partial(kl_divergence, temperature=1.0)


def mutual(group: Group, loss: Loss = PAPERS, *, labels: Loss | None = cross_entropy) -> list[Term]:
    """Terms of deep mutual learning (DML): each student learns from the labels and from the others.

    ``L_i = labels_i + 1 / (K - 1) * sum_j loss(student i, student j)``, over the other students j,
    which are detached: each is a fixed teacher to the others within a step. Train with
    ``label_weight=0``, as the terms hold every member's loss on the labels.

    Zhang et al., "Deep Mutual Learning", CVPR 2018. The authors' code leaves out the
    1 / (K - 1), and steps the students one after the other.

    Args:
        group: the students.
        loss: what a student is compared to another by; the paper's is KL at temperature 1.
        labels: the loss on labels; None for students that only learn from each other.

    Example:
        >>> import torch, attar
        >>> from torch import nn
        >>> task = attar.tasks.TabularClassification(classes=3)
        >>> rows = attar.data.TensorSource(torch.rand(9, 4), torch.arange(9) % 3, classes=3)
        >>> pair = attar.Group([nn.Linear(4, 3), nn.Linear(4, 3)], task)
        >>> pair = attar.distill(pair, None, rows, task, attar.mutual(pair), label_weight=0)
    """
    names = [f"output:{index}" for index in range(len(group))]
    own = [] if labels is None else [Term(labels, student=name) for name in names]
    share = 1 / (len(names) - 1)
    return own + [
        Term(loss, student=name, teacher=f"self:{other}", weight=share)
        for name in names
        for other in names
        if other != name
    ]
