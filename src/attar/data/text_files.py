"""Files of text: documents for language models, and labelled texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt

from attar.data.sentences import sentences
from attar.data.splits import Splits, consistent, strata
from attar.data.tables import read_tables
from attar.data.text import text
from attar.data.tokens import read_tokenizer
from attar.runtime import DataError, UsageError, suggest

_Share = Annotated[float, Gt(0), Lt(1)]


def documents(
    *,
    train: str,
    test: str | None = None,
    tokenizer: str,
    length: Annotated[int, Ge(2)] = 256,
    pack: bool = True,
    eos: str | None = None,
    seed: int = 0,
    test_fraction: _Share = 0.1,
) -> Splits:
    """Documents as windows of tokens, for ``language_modelling``.

    Each of *train* and *test* is a folder, of which each ``.txt`` file is a document (folders
    within it too, in order of name); a ``.txt`` file, one document; or a ``.jsonl`` file, one
    object a line with ``text`` and, where part of it is only to be read, ``prompt``. All is UTF-8.

    Parameters
    ----------
    train, test:
        Paths. Without ``test``, ``test_fraction`` of the documents become the test part, chosen by
        ``seed``: no document is in both.
    tokenizer:
        A folder with ``tokenizer.json`` (that of the teacher), that file, or ``owner/name`` on the
        hub. Teacher and student read the same tokens.
    length:
        Tokens in a window.
    pack:
        Lay several documents in a window where they fit; they do not see each other.
    eos:
        The token that ends a document; the tokenizer's own when left out.

    Raises
    ------
    DataError
        No such path, no documents, an empty document, a line that is no such object; with the file
        (and line). What ``attar.data.text`` refuses.
    """
    words = read_tokenizer(tokenizer)
    found = {"train": _documents(train)}
    if test is not None:
        found["test"] = _documents(test)
    else:
        every = found["train"]
        if len(every) < 2:
            raise DataError(
                f"{train}: is a single document, of which no part can be held back; give test: PATH"
            )
        parts = strata(None, len(every), test_fraction, seed=seed, name=train)
        found = dict(
            zip(("train", "test"), ([every[i] for i in part] for part in parts), strict=True)
        )
    made = [
        text(
            [body for _, body in part],
            words,
            length=length,
            pack=pack,
            prompts=[prompt for prompt, _ in part] if any(prompt for prompt, _ in part) else None,
            eos=eos,
            name=f"{Path(train).name} {name}",
        )
        for name, part in found.items()
    ]
    return consistent(made[0], made[1])


def texts(
    *,
    train: str,
    test: str | None = None,
    tokenizer: str,
    column: str = "text",
    target: str | None = "label",
    length: Annotated[int, Ge(1)] = 128,
    seed: int = 0,
    test_fraction: _Share = 0.2,
) -> Splits:
    """Texts with a class each, for ``text_classification``, from a CSV file.

    The files are as those of ``csv``: UTF-8 with commas and a header row, plain or gzipped.

    Parameters
    ----------
    train, test:
        Paths. Without ``test``, ``test_fraction`` of the rows of ``train`` become the test part,
        stratified by class, chosen by ``seed``.
    tokenizer:
        A folder with ``tokenizer.json`` (that of the teacher), that file, or ``owner/name`` on the
        hub. Teacher and student read the same tokens.
    column, target:
        The column of texts and that of classes, which are sorted by name; target None for texts
        without classes.
    length:
        The largest number of tokens of a text; the rest is cut off.

    Raises
    ------
    DataError
        What ``csv`` refuses of a file, an unknown column, an empty text or class; with the line.
    """
    words = read_tokenizer(tokenizer)
    targets = () if target is None else (target,)
    tables = read_tables(train, test, targets, False, seed, test_fraction)
    for table in tables:
        if column not in table.names:
            raise DataError(f"{table.path}: no column '{column}'; {suggest(column, table.names)}")
        for name in (column, *targets):
            empty = [row for row, cell in enumerate(table.column(name)) if not cell]
            if empty:
                raise DataError(
                    f"{table.at(empty[0])}: the {name} is empty; fill it or leave it out"
                )
    classes = sorted(set(tables[0].column(target))) if target is not None else None
    made = []
    for table, part in zip(tables, ("train", "test"), strict=True):
        labels = None
        if classes is not None and target is not None:
            known = {name: number for number, name in enumerate(classes)}
            cells = table.column(target)
            for row, cell in enumerate(cells):
                if cell not in known:
                    raise DataError(
                        f"{table.at(row)}: '{cell}' is no {target} of the training rows; "
                        f"{suggest(cell, classes)}"
                    )
            labels = np.array([known[cell] for cell in cells])
        name = f"{Path(table.path).name} {part}"
        body = table.column(column)
        made.append(sentences(body, words, labels, classes=classes, length=length, name=name))
    return consistent(made[0], made[1])


def _documents(path: str) -> list[tuple[str, str]]:
    """(prompt, document) of each."""
    place = Path(path)
    if place.is_dir():
        files = sorted(place.rglob("*.txt"))
        if not files:
            raise DataError(f"{path}: holds no .txt file; give a folder of documents")
        return [("", _read(file)) for file in files]
    if place.suffix == ".jsonl":
        return _lines(place)
    if place.suffix == ".txt" or not place.exists():
        return [("", _read(place))]
    raise UsageError(f"{path}: documents are a folder of .txt files, a .txt file or a .jsonl file")


def _read(file: Path) -> str:
    try:
        found = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
    if not found.strip():
        raise DataError(f"{file}: is empty; fill it or leave it out")
    return found


def _lines(file: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for number, line in enumerate(_read(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        named = _named(row)
        if named is None:
            raise DataError(
                f'{file}:{number}: is no document; each line is {{"text": "..."}}, or with '
                '"prompt" before it'
            )
        if named[1]:  # else a teacher that was asked to go on had nothing to say
            found.append(named)
    if not found:
        raise DataError(f"{file}: holds no text; fill it")
    return found


def _named(row: Any) -> tuple[str, str] | None:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return None
    prompt = row.get("prompt", "")
    known = isinstance(prompt, str) and (prompt or row["text"])
    return (prompt, row["text"]) if known else None
