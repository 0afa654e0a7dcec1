"""Several classes at once for each example: images and table rows alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attar.losses import binary_kl
from attar.runtime import DataError
from attar.tasks.classes import ClassTask
from attar.tasks.task import Batch, Rows


@dataclass(frozen=True)
class MultiLabelClassification(ClassTask):
    """Each example has any of ``width`` classes, or none; the model gives logits [N, width].

    The sigmoid of a logit is the probability that the class holds: classes do not compete, so a
    softmax loss on the output is wrong, and ``attar.losses.binary_kl`` is the one to distil with.
    Labels are [N, width] of 0 and 1. A class is answered where its probability is above 0.5.

    Args:
        classes: how many, or their names; taken from the data when left out.

    Example:
        >>> MultiLabelClassification(classes=("shirt", "bag")).width
        2
    """

    metric: ClassVar[str] = "mean_average_precision"
    competing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width is not None and self.width < 1:
            raise DataError(f"a multi-label task needs at least 1 class, not {self.width}")

    def check_labels(self, labels: Tensor, source: Any) -> None:
        """Refuse labels that are not 0 or 1 for each class, and parts in which no class holds."""
        if list(labels.shape[1:]) != [self.width]:
            form = ", ".join(["N", *map(str, labels.shape[1:])])
            raise DataError(
                f"{source.name}: its labels are [{form}], and a multi-label task of {self.width} "
                f"classes needs [N, {self.width}] of 0 and 1; for one class a row use "
                "image-classification or tabular-classification"
            )
        wrong = ((labels != 0) & (labels != 1)).any(1).nonzero()
        if len(wrong):
            raise DataError(
                f"{source.name}: the labels of row {int(wrong[0])} are not all 0 or 1; use "
                "regression for numbers"
            )
        if not labels.any():
            raise DataError(
                f"{source.name}: no class holds in any of its rows, so there is no precision to "
                "measure; give rows with labels"
            )

    def loss(self, out: Any, batch: Batch) -> Tensor:
        """Binary cross-entropy with the labels, summed over the classes, in nats, [N].

        ``-sum_c [y_c log sigmoid(z_c) + (1 - y_c) log(1 - sigmoid(z_c))]``: the sum, as in
        ``binary_kl``, so that the weights of both mean the same for any number of classes. Codes
        that average over the classes have a rate or a weight C times as large.
        """
        logits = self.output(out, "logits").float()
        labels = batch["labels"].float()
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)

    def rows(self, out: Any, batch: Batch) -> Rows:
        """Logits [N, C] in float32 and, where there are any, labels [N, C]."""
        kept = {"logits": self.output(out, "logits").detach().float()}
        return kept | ({"labels": batch["labels"].float()} if "labels" in batch else {})

    def score(self, rows: Rows) -> dict[str, float]:
        """Mean average precision, micro and macro F1, shares of exact and of wrong answers.

        F1 is ``2 TP / (2 TP + FP + FN)``, over all answers together (micro) or the mean of each
        class's (macro), 0 where a class neither holds nor is answered. ``subset_accuracy`` is the
        share of examples with exactly the right classes, ``hamming_loss`` the share of wrong
        answers among all examples and classes, ``binary_cross_entropy`` their mean, in nats.
        """
        logits, labels = rows["logits"], rows["labels"]
        said, holds = logits > 0, labels > 0.5
        hits = (said & holds).sum(0).double()
        errors = (said != holds).sum(0).double()
        by_class = 2 * hits / (2 * hits + errors).clamp_min(1)
        total = 2 * hits.sum()
        return {
            "mean_average_precision": self.primary(rows),
            "micro_f1": float(total / (total + errors.sum()).clamp_min(1)),
            "macro_f1": float(by_class.mean()),
            "subset_accuracy": float((said == holds).all(1).double().mean()),
            "hamming_loss": float(errors.sum() / labels.numel()),
            "binary_cross_entropy": float(F.binary_cross_entropy_with_logits(logits, labels)),
        }

    def primary(self, rows: Rows) -> float:
        """The mean over the classes of the average precision, without classes that never hold.

        0 where none does, which a resample of few rows may be.
        """
        precisions = average_precision(rows["logits"], rows["labels"])
        known = precisions[~np.isnan(precisions)]
        return float(known.mean()) if known.size else 0.0

    def per_class(self, rows: Rows) -> dict[str, float]:
        """The average precision of each class; NaN for one that never holds."""
        precisions = average_precision(rows["logits"], rows["labels"])
        return dict(zip(self.names(), precisions.tolist(), strict=True))

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """Share of examples answered with the same classes, and mean KL divergence (summed over
        the classes) from the teacher in nats."""
        student, teacher = rows["logits"], teacher_rows["logits"]
        same = ((student > 0) == (teacher > 0)).all(1)
        return {
            "agreement": float(same.double().mean()),
            "kl": float(binary_kl(student, teacher).double().mean()),
        }

    def floor(self, labels: Tensor) -> float:
        """The mean share of examples in which a class holds: the precision of a constant answer."""
        shares = labels.double().mean(0)
        return float(shares[shares > 0].mean())


def average_precision(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Average precision of each class, [C]; NaN for a class without a positive label.

    ``AP = sum_k (R_k - R_(k-1)) P_k`` over the distinct logits in falling order, with precision P
    and recall R of "the logit is at least this": what scikit-learn's ``average_precision_score``
    gives. Examples with equal logits are taken together, so their order does not matter.

    Args:
        logits: [N, C], larger where the class is thought more likely.
        labels: [N, C] of 0 and 1.
    """
    # numpy sorts rows several times faster than torch, and a bootstrap asks thousands of times.
    scores = np.ascontiguousarray(-logits.detach().cpu().numpy().T)
    holds = np.ascontiguousarray(labels.detach().cpu().numpy().T > 0.5)
    order = np.argsort(scores, axis=1)
    scores = np.take_along_axis(scores, order, 1)
    hits = np.take_along_axis(holds, order, 1).cumsum(1)
    # The last of each run of equal scores is where a threshold can be.
    last = np.ones(scores.shape, bool)
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    column, place = last.nonzero()
    found = hits[column, place]
    before = np.concatenate([[0], found[:-1]])
    before[np.flatnonzero(np.diff(column, prepend=-1))] = 0
    gained = (found - before) * (found / (place + 1))
    sums = np.bincount(column, gained, minlength=len(scores))
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a class that never holds
        return sums / hits[:, -1]
