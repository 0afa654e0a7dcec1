"""Tensors and arrays as a training and a test part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from attar.data.checks import Array, numbers
from attar.data.source import TensorSource
from attar.data.splits import Splits, consistent


def tensors(
    train_inputs: Tensor | Array,
    train_labels: Tensor | Array | None,
    test_inputs: Tensor | Array,
    test_labels: Tensor | Array | None,
    *,
    classes: Sequence[str] | int | None = None,
) -> Splits:
    """Two :class:`~attar.data.TensorSource`, from torch tensors or numpy arrays.

    Parameters
    ----------
    train_inputs, test_inputs:
        [N, ...]; see TensorSource.
    train_labels, test_labels:
        Integers [N] for classes, integers or bools [N, C] of 0 and 1 for multi-label, floats [N]
        or [N, K] for regression, None for none.
    classes:
        The names of the classes, or their number. None with integer labels: the classes are the
        numbers from 0 to the largest label of both parts, or of their columns.

    >>> import torch
    >>> x, y = torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> tensors(x, y, x[:2], y[:2]).test.classes
    ('0', '1', '2')
    """
    if classes is None:
        classes = _count(train_labels, test_labels)
    return consistent(
        TensorSource(train_inputs, train_labels, classes=classes, name="train tensors"),
        TensorSource(test_inputs, test_labels, classes=classes, name="test tensors"),
    )


def _count(*labels: Tensor | Array | None) -> int | None:
    given = [numbers(part, "labels") for part in labels if part is not None]
    whole = [part for part in given if part.dtype.kind != "f" and part.size]
    if whole and whole[0].ndim == 2:
        return int(whole[0].shape[1])
    return max(int(part.max()) for part in whole) + 1 if whole else None
