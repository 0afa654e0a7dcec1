"""Sentences, or pairs of them, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.checks import Array, class_names, label_array
from attar.data.source import Source, row_numbers
from attar.data.tokens import Ragged, Tokenizer, encoded, padding_of, vocabulary_of
from attar.data.types import Batch
from attar.runtime import DataError, UsageError


def sentences(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    labels: Tensor | Array | None = None,
    *,
    classes: Sequence[str] | int | None = None,
    length: int = 128,
    others: Sequence[str] | None = None,
    pad: int | None = None,
    name: str = "sentences",
) -> Source:
    """Texts for ``TextClassification`` and ``SentenceEmbedding``.

    A batch has ``inputs`` int64 [n, S], token ids, and ``attention`` int64 [n, S], 1 at each real
    token, and with *others* ``other`` and ``other_attention`` of the same form. S is the number
    of tokens of the batch's longest text, so that short texts cost little. Padding stands on the
    right and is not looked at: a row gives the same numbers beside a long text as beside a short
    one, up to rounding. Token ids are kept as int32, without padding.

    Parameters
    ----------
    texts:
        One a row.
    tokenizer:
        Of ``transformers`` or ``tokenizers``, or a function from a text to its ids.
    labels:
        Integers [N] for classes; floats [N] of -1 to 1, how similar ``texts`` and ``others``
        are; floats [N, D], the embedding that a teacher gives; None for none.
    classes:
        The names of the classes, or their number.
    length:
        The largest number of tokens of a text, special ones among them; the rest is cut off.
    others:
        A second text for each row.
    pad:
        The id of padding; the tokenizer's own when left out, and 0 where it has none.

    Raises
    ------
    UsageError
        A length below 1, a tokenizer that is none.
    DataError
        A row that is no text, or has no tokens; labels or others of another number of rows; what
        ``TensorSource`` refuses of labels.

    >>> words = {"a": 5, "warm": 6, "day": 7}
    >>> tokenizer = lambda text: [words[word] for word in text.split()]
    >>> batch = sentences(["a day", "a warm day"], tokenizer).rows(torch.tensor([1, 0]))
    >>> batch["inputs"].tolist(), batch["attention"].tolist()
    ([[5, 6, 7], [5, 7, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    if length < 1:
        raise UsageError(f"length must be at least 1, not {length}")
    tokens = {"inputs": _tokens(texts, tokenizer, length, name)}
    if others is not None:
        if len(others) != len(texts):
            raise DataError(
                f"{name}: {len(texts)} texts but {len(others)} others; give one for each text"
            )
        tokens["other"] = _tokens(others, tokenizer, length, f"{name}: others")
    names = class_names(classes, name)
    found = None if labels is None else label_array(labels, len(texts), names, name)
    padding = padding_of(tokenizer) if pad is None else pad
    made = SentenceSource(tokens, found, classes=names, length=length, pad=padding, name=name)
    made.vocabulary = vocabulary_of(tokenizer)
    return made


class SentenceSource(Source):
    """Rows of token ids, padded to the longest of a batch; ``sentences`` makes it."""

    def __init__(
        self,
        tokens: dict[str, Ragged],
        labels: Array | None,
        *,
        classes: tuple[str, ...] | None,
        length: int,
        pad: int,
        name: str,
    ) -> None:
        self.name = name
        self.classes = classes
        self.shape = (length,)
        self.pad = pad
        self._tokens = tokens
        # torch wants what it may write
        self._labels = None if labels is None else np.require(labels, requirements="W")

    def __len__(self) -> int:
        return len(self._tokens["inputs"])

    @property
    def labels(self) -> Tensor | None:
        return None if self._labels is None else torch.from_numpy(self._labels)

    def rows(self, ids: Tensor) -> Batch:
        picked = row_numbers(self, ids)
        batch: Batch = {"ids": ids}
        for text, mask in (("inputs", "attention"), ("other", "other_attention")):
            if text in self._tokens:
                batch[text], batch[mask] = self._tokens[text].padded(picked, self.pad)
        if self._labels is not None:
            batch["labels"] = torch.from_numpy(self._labels.take(picked, 0))
        return batch

    def statistics(self) -> tuple[list[float], list[float]]:
        """Refused: token ids are names, and have no mean."""
        raise UsageError(
            f"{self.name}: its inputs are token ids, which have no mean; build a model that reads "
            "tokens, such as one of transformers"
        )

    def _digest(self) -> str:
        """Of every token, so that another tokenizer is noticed wherever it differs."""
        digest = hashlib.sha256()
        for text, tokens in sorted(self._tokens.items()):
            digest.update(text.encode())
            digest.update(tokens.offsets.tobytes())
            digest.update(tokens.flat.tobytes())
        facts: dict[str, object] = {"length": len(self), "classes": self.classes, "pad": self.pad}
        if self._labels is not None:
            facts["labels"] = f"{self._labels.dtype} {list(self._labels.shape)}"
            digest.update(np.ascontiguousarray(self._labels).tobytes())
        digest.update(json.dumps(facts, sort_keys=True).encode())
        return digest.hexdigest()


def _tokens(texts: Sequence[str], tokenizer: Tokenizer, length: int, name: str) -> Ragged:
    found = encoded(texts, tokenizer, most=length, name=name)
    if not len(found):
        raise DataError(f"{name} is an empty data set; give at least one text")
    empty: NDArray[np.int64] = np.flatnonzero(found.lengths == 0)
    if empty.size:
        raise DataError(f"{name}: the text of row {empty[0]} has no tokens; remove the row")
    return found
