"""Texts as token ids, by whichever tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.runtime import DataError, UsageError
from attar.runtime.hub import HUB_ID, quiet, reached

Tokenizer = Any
"""A tokenizer of ``transformers`` or of ``tokenizers``, or a function ``text -> list[int]``."""

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "vocab.json")
_PIECE = 1024  # texts that a tokenizer is given at a time
_LARGEST = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of unequal length: ``flat[offsets[i] : offsets[i + 1]]`` is row i.

    Attributes:
        flat: token ids of all rows, one row after the other.
        offsets: where each begins, and the end of the last: one more than there are rows.
    """

    flat: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def padded(self, rows: NDArray[np.int64], pad: int) -> tuple[Tensor, Tensor]:
        """Some rows, padded on the right to the longest of them: ids and 1 at each real token.

        Both are int64 [n, longest].
        """
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        places = np.arange(lengths.max(initial=0))
        real = places < lengths[:, None]
        found = np.full(real.shape, pad, dtype=np.int64)
        found[real] = self.flat[(starts[:, None] + places)[real]]
        return torch.from_numpy(found), torch.from_numpy(real.astype(np.int64))


def encoded(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    most: int | None = None,
    special: bool = True,
    name: str = "texts",
) -> Ragged:
    """The token ids of each text.

    Args:
        most: tokens of a text, its special ones among them; what is longer is cut at its end. A
            function's own special tokens are not known, so the last of them may be cut off.
        special: add the tokenizer's own tokens for beginning and end, such as ``[CLS]``; a
            function decides that itself.
        name: of the texts, for messages.

    Raises:
        UsageError: what the tokenizer is or gives.
        DataError: a text that is no text; with its row.
    """
    _check_texts(texts, name)
    encode = _encoder(tokenizer, most, special)
    lengths = np.zeros(len(texts) + 1, dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int32)]
    for start in range(0, len(texts), _PIECE):
        found = encode(list(texts[start : start + _PIECE]))
        lengths[start + 1 : start + 1 + len(found)] = [len(ids) for ids in found]
        parts.append(_ids(found))
    return Ragged(np.concatenate(parts), lengths.cumsum())


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder that transformers saved, of a ``tokenizer.json``, or of the hub.

    Raises:
        UsageError: transformers is not installed.
        DataError: there is none.
    """
    try:
        from tokenizers import Tokenizer as Whole
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"reading a tokenizer needs the package transformers ({error}); install it: "
            'pip install "attar[transformers]"'
        ) from None
    place = Path(path)
    _check_place(place, path)
    how = reached(path)
    try:
        if place.is_file():
            return Whole.from_file(path)
        with quiet():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **how)
    except Exception as error:  # every layer below has errors of its own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        said = "it does not answer, and there is no earlier download" if how else said
        if place.exists():
            raise DataError(
                f"{path}: no tokenizer can be read there ({said}); give another copy, such as that "
                "of the teacher"
            ) from None
        raise DataError(
            f"{path}: there is no such folder, and the hub did not give such a tokenizer ({said}); "
            "check the name, or download it where there is a network and give its folder"
        ) from None


def _check_place(place: Path, path: str) -> None:
    """Refuse what is neither a file, nor a folder with a tokenizer, nor a name on the hub."""
    if place.is_dir() and not any((place / name).is_file() for name in _FILES):
        raise DataError(
            f"{place}: holds no tokenizer ({_FILES[0]}); give the folder that the teacher's was "
            "saved in, or save it there: tokenizer.save_pretrained"
        )
    local = place.parent.is_dir() or place.suffix == ".json"
    if place.exists() or (HUB_ID.fullmatch(path) and not local):
        return
    beside = place.parent.iterdir() if place.parent.is_dir() else ()
    near = get_close_matches(place.name, [entry.name for entry in beside], n=1, cutoff=0.85)
    hint = f"did you mean '{place.parent / near[0]}'? Else give" if near else "give"
    raise DataError(
        f"{path}: there is no such file or folder; {hint} the folder of the teacher, its "
        "tokenizer.json, or owner/name on the hub"
    )


def vocabulary_of(tokenizer: Tokenizer) -> int | None:
    """How many token ids there are; None where the tokenizer does not say."""
    table = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(table.values()) + 1 if table else None  # there may be holes, so not their number


def padding_of(tokenizer: Tokenizer) -> int:
    """The id that the tokenizer pads with; 0 where it has none."""
    if hasattr(tokenizer, "pad_token_id"):
        found = tokenizer.pad_token_id
    elif hasattr(tokenizer, "token_to_id"):
        known = (tokenizer.token_to_id(text) for text in ("[PAD]", "<pad>"))
        padding = tokenizer.padding
        found = padding["pad_id"] if padding else next((i for i in known if i is not None), None)
    else:
        found = None
    return 0 if found is None else int(found)


def _check_texts(texts: Sequence[str], name: str) -> None:
    if isinstance(texts, str):
        raise UsageError(f"{name} must be a list of texts, not one text; put it in a list")
    wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        kind = type(texts[wrong]).__name__
        raise DataError(f"{name}: row {wrong} is a {kind}, not a text; convert or remove it")


def _encoder(
    tokenizer: Tokenizer, most: int | None, special: bool
) -> Callable[[list[str]], list[list[int]]]:
    if hasattr(tokenizer, "encode_batch"):
        return _of_tokenizers(tokenizer, most, special)
    if hasattr(tokenizer, "pad_token_id"):
        return _of_transformers(tokenizer, most, special)
    if callable(tokenizer):
        return lambda texts: [_own(tokenizer(text))[:most] for text in texts]
    raise UsageError(
        f"a tokenizer must be one of transformers or tokenizers, or a function that gives the ids "
        f"of a text, not a {type(tokenizer).__name__}"
    )


def _of_transformers(
    tokenizer: Tokenizer, most: int | None, special: bool
) -> Callable[[list[str]], list[list[int]]]:
    def encode(texts: list[str]) -> list[list[int]]:
        found = tokenizer(
            texts,
            add_special_tokens=special,
            truncation=most is not None,
            max_length=most,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = found["input_ids"]
        return ids

    return encode


def _of_tokenizers(
    tokenizer: Tokenizer, most: int | None, special: bool
) -> Callable[[list[str]], list[list[int]]]:
    # A copy: a tokenizer read from a file often pads and cuts as whoever saved it wished.
    own = type(tokenizer).from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation() if most is None else own.enable_truncation(most)

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in own.encode_batch(texts, add_special_tokens=special)]

    return encode


def _own(found: Any) -> list[int]:
    """What a function gave, after a check that it is a row of whole numbers."""
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise UsageError(
            f"the tokenizer gave a {type(found).__name__} for a text; a function must give the "
            "token ids as a list of integers"
        )
    return list(values)


def _ids(found: list[list[int]]) -> NDArray[np.int32]:
    flat = np.fromiter(chain.from_iterable(found), dtype=np.int64)
    if flat.size and not (flat.min() >= 0 and flat.max() <= _LARGEST):
        wrong = flat.min() if flat.min() < 0 else flat.max()
        raise UsageError(f"the tokenizer gave the token id {wrong}; ids go from 0 to {_LARGEST:,}")
    return flat.astype(np.int32)
