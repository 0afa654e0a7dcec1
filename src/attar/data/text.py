"""Documents as windows of tokens, for language models."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.source import Source, row_numbers
from attar.data.tokens import encoded, vocabulary_of
from attar.data.types import Batch
from attar.runtime import DataError, UsageError

IGNORED = -100  # the label where nothing is learned
_TEXTS = 1024  # that are made tokens of at a time

Document = str | Sequence[int]
Side = Literal["left", "right"]
Ids = NDArray[np.int32]
Encoder = Callable[[list[str], bool], list[Ids]]


def text(
    documents: Sequence[Document],
    tokenizer: Any = None,
    *,
    length: int,
    pack: bool = True,
    side: Side = "right",
    prompts: Sequence[Document] | None = None,
    eos: int | str | None = None,
    vocabulary: int | None = None,
    name: str = "text",
) -> TextSource:
    """Documents as windows of ``length`` tokens, each with its next token.

    Every document ends with the tokenizer's end-of-sequence token (EOS), which is learned; nothing
    is learned across documents. A document longer than a window is cut into pieces of ``length``,
    and each piece knows only itself; one that fits is never cut. Every token but the first of a
    document, and those of its prompt, is learned exactly once.

    Parameters
    ----------
    documents:
        Strings, or token ids of each document.
    tokenizer:
        One of ``transformers`` or ``tokenizers``, whose own special tokens (such as a first one)
        stay; or a function from a string to ids, with ``eos`` and ``vocabulary``. None where all
        documents are ids, with the same two.
    length:
        Tokens in a window, 2 or more.
    pack:
        Lay documents one behind another in a window, each in the fullest that it still fits into
        (Ding et al., "Fewer Truncations Improve Language Modeling", 2024); False: a window holds
        one document, or a piece of one.
    side:
        Where a window that is not full is padded. With ``pack=False`` and ``right`` the batches
        need no ``positions``, so that models that do not go by them can be trained too.
    prompts:
        What stands before each document and is not learned; it must fit into a window.
    eos, vocabulary:
        The end token, an id or a token of the tokenizer, and how many ids there are; the
        tokenizer's own when left out.

    Raises
    ------
    DataError
        No documents, an empty one, an id outside the vocabulary, a prompt that leaves no room, a
        length below 2, another number of prompts; with the document.
    UsageError
        A tokenizer that does not say its end token or its vocabulary, without these options.

    >>> words = text([[5, 6, 7], [8, 9]], length=6, eos=0, vocabulary=10)
    >>> batch = words.rows(torch.tensor([0]))
    >>> [batch[key].tolist()[0] for key in ("inputs", "labels", "positions")]
    [[5, 6, 7, 8, 9, 0], [6, 7, 0, 9, 0, -100], [0, 1, 2, 0, 1, 0]]
    """
    if length < 2:
        raise DataError(f"{name}: the length is {length}; a window has 2 or more tokens")
    if side not in ("left", "right"):
        raise UsageError(f"{name}: side is {side!r}; padding goes to the left or to the right")
    words = _words(tokenizer, eos, vocabulary, name)
    found = _tokenized(documents, prompts, words, name)
    _check(found, length, name)
    pieces = _pieces(found, length)
    sizes = [piece.size for piece in pieces]
    rows = _packed(sizes, length) if pack else [[index] for index in range(len(pieces))]
    windows = _Windows(len(rows), length, words.eos)
    for row, members in enumerate(rows):
        windows.fill(row, [pieces[index] for index in members], side)
    return TextSource(
        windows.inputs,
        windows.labels,
        windows.positions if pack or side == "left" else None,
        vocabulary=words.vocabulary,
        name=name,
    )


class TextSource(Source):
    """Windows of tokens in memory; ``text`` makes one of documents.

    Parameters
    ----------
    inputs, labels:
        int32 [N, S]: tokens, and the next one of each, -100 where nothing is learned.
    positions:
        int32 [N, S]: the place of each token in its document; None where every row is one
        document from its first position on.
    vocabulary:
        How many token ids there are.
    """

    def __init__(
        self, inputs: Ids, labels: Ids, positions: Ids | None, *, vocabulary: int, name: str
    ) -> None:
        self.name = name
        self.classes = None
        self.shape = (inputs.shape[1],)
        self.vocabulary = vocabulary
        self._columns = {"inputs": inputs, "labels": labels}
        if positions is not None:
            self._columns["positions"] = positions

    def __len__(self) -> int:
        return len(self._columns["inputs"])

    @property
    def labels(self) -> Tensor:
        """The next token of each position, int64 [N, S]; -100 where nothing is learned."""
        return torch.from_numpy(self._columns["labels"]).long()

    @property
    def outputs(self) -> int | None:
        """How many tokens a model must choose from."""
        return self.vocabulary

    def rows(self, ids: Tensor) -> Batch:
        picked = row_numbers(self, ids)
        taken = {key: values.take(picked, 0) for key, values in self._columns.items()}
        return {"ids": ids, **{k: torch.from_numpy(v).long() for k, v in taken.items()}}

    def statistics(self) -> tuple[list[float], list[float]]:
        """Refused: tokens have no mean."""
        raise UsageError(f"{self.name}: tokens have no mean and deviation; build a model of text")

    def _digest(self) -> str:
        """All of it: another tokenizer may change any row."""
        facts = {"vocabulary": self.vocabulary, "shape": [len(self), *self.shape]}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for key, values in self._columns.items():
            digest.update(key.encode() + np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Words:
    """What is needed of a tokenizer."""

    ids: Encoder | None
    eos: int
    vocabulary: int


@dataclass(frozen=True)
class _Tokens:
    """A document: its tokens with the last one, and how many of them are its prompt."""

    ids: Ids
    prompt: int


@dataclass(frozen=True)
class _Piece:
    """What is laid in a row: tokens, and the next one of each."""

    inputs: Ids
    labels: Ids

    @property
    def size(self) -> int:
        return len(self.inputs)


def _words(tokenizer: Any, eos: int | str | None, vocabulary: int | None, name: str) -> _Words:
    table = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    vocabulary = vocabulary_of(tokenizer) if vocabulary is None else vocabulary
    if isinstance(eos, str) and eos not in table:
        raise DataError(f"{name}: the tokenizer has no token {eos!r}; name its end token")
    end: Any = table[eos] if isinstance(eos, str) else eos
    end = getattr(tokenizer, "eos_token_id", None) if end is None else end
    for what, value in (("eos", end), ("vocabulary", vocabulary)):
        if value is None:
            raise UsageError(f"{name}: the tokenizer does not say its {what}; give {what}=")
    last = int(vocabulary or 0) - 1
    if not 0 <= end <= last:
        raise DataError(
            f"{name}: the end token is {end}, but with a vocabulary of {last + 1:,} ids go from "
            f"0 to {last:,}"
        )
    return _Words(_encoder(tokenizer, name), int(end), last + 1)


def _encoder(tokenizer: Any, name: str) -> Encoder | None:
    """Strings to ids, with or without the tokenizer's own special tokens."""
    if tokenizer is None:
        return None

    def encode(texts: list[str], special: bool) -> list[Ids]:
        found = encoded(texts, tokenizer, special=special, name=name)
        return np.split(found.flat, found.offsets[1:-1])

    return encode


def _tokenized(
    documents: Sequence[Document], prompts: Sequence[Document] | None, words: _Words, name: str
) -> list[_Tokens]:
    if isinstance(documents, str) or not len(documents):
        raise DataError(f"{name}: holds no documents; give a list of strings or of token ids")
    if prompts is not None and len(prompts) != len(documents):
        raise DataError(
            f"{name}: {len(documents)} documents but {len(prompts)} prompts; give one for each, in "
            "order"
        )
    if prompts is None:
        bodies = _ids(documents, words, True, "document", name)
        none = np.empty(0, np.int32)
        return [_ended(none, body, words.eos) for body in bodies]
    # What begins a text begins the prompt, and what ends one ends the document alone.
    before = _ids(prompts, words, True, "prompt", name)
    before = [ids[:-1] if len(ids) and ids[-1] == words.eos else ids for ids in before]
    bodies = _ids(documents, words, False, "document", name)
    return [_ended(p, body, words.eos) for p, body in zip(before, bodies, strict=True)]


def _ids(
    texts: Sequence[Document], words: _Words, special: bool, what: str, name: str
) -> list[Ids]:
    found: list[Ids] = []
    for start in range(0, len(texts), _TEXTS):
        part: list[Any] = list(texts[start : start + _TEXTS])
        strings = [place for place, document in enumerate(part) if isinstance(document, str)]
        if strings and words.ids is None:
            raise UsageError(f"{name}: {what} {start + strings[0]} is a string; give a tokenizer")
        if strings and words.ids is not None:
            empty = {place for place in strings if not part[place]}
            made = words.ids([part[place] for place in strings], special)
            for place, ids in zip(strings, made, strict=True):
                part[place] = [] if place in empty and what == "document" else ids
        for place, ids in enumerate(part):
            where = f"{name}: {what} {start + place}"
            if not len(ids) and what == "document":
                raise DataError(f"{where} is empty; leave it out")
            found.append(_checked(ids, words.vocabulary, where))
    return found


def _checked(ids: Sequence[int], vocabulary: int, where: str) -> Ids:
    array = np.asarray(ids if len(ids) else np.empty(0, np.int32))
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise DataError(f"{where} does not hold whole numbers; give strings, or token ids")
    wrong = array[(array < 0) | (array >= vocabulary)]
    if len(wrong):
        raise DataError(
            f"{where} has the token {wrong[0]}, but with a vocabulary of {vocabulary:,} ids go "
            f"from 0 to {vocabulary - 1:,}; use the tokenizer's own"
        )
    return array.astype(np.int32)


def _ended(prompt: Ids, body: Ids, eos: int) -> _Tokens:
    end = body[:0] if body[-1] == eos else np.array([eos], np.int32)
    return _Tokens(np.concatenate([prompt, body, end]), len(prompt))


def _check(found: Sequence[_Tokens], length: int, name: str) -> None:
    for index, document in enumerate(found):
        if len(document.ids) < 2:
            raise DataError(f"{name}: document {index} is nothing but its end; leave it out")
        if document.prompt > length:
            raise DataError(
                f"{name}: the prompt of document {index} has {document.prompt} tokens, so a window "
                f"of {length} has no room for what it asks for; give a larger length, or leave the "
                "document out"
            )


def _pieces(found: Sequence[_Tokens], length: int) -> list[_Piece]:
    """Each document as one piece, or as several where it is longer than a window."""
    pieces: list[_Piece] = []
    for document in found:
        inputs, labels = document.ids[:-1], document.ids[1:].copy()
        labels[: max(document.prompt - 1, 0)] = IGNORED
        pieces += [
            _Piece(inputs[start : start + length], labels[start : start + length])
            for start in range(0, len(inputs), length)
        ]
    return pieces


def _packed(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Which pieces share a row: best fit, the longest first; rows and pieces in order of number."""
    rows: list[list[int]] = []
    having: dict[int, list[int]] = defaultdict(list)  # rows by the room that is left in them
    rooms: list[int] = []  # that some row has, ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = bisect_left(rooms, size)
        if place < len(rooms):
            left = rooms[place]
            row = having[left].pop()
            if not having[left]:
                del rooms[place]
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(index)
        left -= size
        if left:
            if not having[left]:
                insort(rooms, left)
            having[left].append(row)
    return sorted(sorted(row) for row in rows)


class _Windows:
    """The rows while they are filled. Padding is a document of its own, of which nothing counts."""

    def __init__(self, count: int, length: int, pad: int) -> None:
        self.inputs = np.full((count, length), pad, np.int32)
        self.labels = np.full((count, length), IGNORED, np.int32)
        self.positions = np.zeros((count, length), np.int32)

    def fill(self, row: int, pieces: Sequence[_Piece], side: Side) -> None:
        """Lay the pieces in a row, one behind another."""
        length = self.inputs.shape[1]
        padding = length - sum(piece.size for piece in pieces)
        at = padding if side == "left" else 0
        for piece in pieces:
            here = slice(at, at + piece.size)
            self.inputs[row, here], self.labels[row, here] = piece.inputs, piece.labels
            self.positions[row, here] = np.arange(piece.size)
            at += piece.size
        rest = slice(0, padding) if side == "left" else slice(length - padding, length)
        self.positions[row, rest] = np.arange(padding)
