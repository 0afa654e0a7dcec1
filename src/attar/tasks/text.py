"""One class for each text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from attar.tasks.classification import Classification
from attar.tasks.task import Batch
from attar.tasks.texts import Texts, aligned, read


@dataclass(frozen=True)
class TextClassification(Texts, Classification):
    """Texts of one class each; the model gives logits [N, width].

    A batch holds ``inputs`` int64 [N, S], token ids, and ``attention`` [N, S], 1 at each real
    token, as ``attar.data.sentences`` makes it. Models of ``transformers`` with a head for
    sequences, and modules that take ``(inputs, attention)`` or ``(inputs)`` alike.

    Args:
        classes: how many, or their names; taken from the data when left out.
        label_smoothing: share of each label spread evenly over all classes.

    Example:
        >>> TextClassification(classes=("sport", "politics")).width
        2
    """

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What *model* says of the texts, with hidden states and attentions where it gives them."""
        return read(model, *aligned(batch))
