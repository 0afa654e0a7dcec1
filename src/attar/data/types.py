"""What the whole room speaks of: a batch, and a function that changes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from torch import Tensor

Batch = dict[str, Tensor]
"""``inputs`` float32 [n, ...], ``labels`` (absent when there are none) and ``ids`` int64 [n].

Labels are int64 [n] for classes, float32 [n, C] of 0 and 1 for multi-label and float32 [n, K] for
regression; after ``mixup`` or ``cutmix`` the labels of classes are float32 [n, C] probabilities.
"""

Augmentation = Annotated[Callable[..., Batch], "room:augmentations"]
"""``augmentation(batch, draw, *, options) -> batch``; all its randomness comes from ``draw``."""
