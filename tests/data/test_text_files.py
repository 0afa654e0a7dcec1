"""Files of text: documents and labelled texts, each fault with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attar
from attar.runtime import DataError, UsageError

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

WORDS = ["<eos>", *(f"w{number}" for number in range(1, 60))]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    table = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<eos>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def folder(place: Path, count: int = 20) -> str:
    for number in range(count):
        name = place / f"{number % 3}" / f"{number:02}.txt"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(" ".join(f"w{1 + (number + step) % 59}" for step in range(3 + number % 5)))
    return str(place)


def learned(source: Any) -> list[tuple[int, int]]:
    """Each (token, next token) that counts, sorted."""
    batch = source.rows(torch.arange(len(source)))
    counted = batch["labels"] != -100
    pairs = zip(batch["inputs"][counted].tolist(), batch["labels"][counted].tolist(), strict=True)
    return sorted(pairs)


def test_a_folder_becomes_windows_and_no_document_is_in_both_parts(
    tokenizer: str, tmp_path: Path
) -> None:
    corpus = folder(tmp_path / "corpus")
    how: dict[str, Any] = {"tokenizer": tokenizer, "eos": "<eos>", "length": 16}
    train, test = attar.data.documents(train=corpus, **how)
    assert (train.shape, train.vocabulary, train.name) == ((16,), 60, "corpus train")
    texts = [file.read_text() for file in sorted((tmp_path / "corpus").rglob("*.txt"))]
    ids = [[WORDS.index(word) for word in text.split()] for text in texts]
    whole = [pair for row in ids for pair in zip(row, [*row[1:], 0], strict=True)]
    assert sorted(learned(train) + learned(test)) == sorted(whole)
    ends = [sum(label == 0 for _, label in learned(part)) for part in (train, test)]
    assert ends == [18, 2]  # documents of each part
    again = attar.data.documents(train=corpus, **how)
    assert [part.fingerprint() for part in again] == [train.fingerprint(), test.fingerprint()]
    other = attar.data.documents(train=corpus, seed=1, **how)
    assert other.test.fingerprint() != test.fingerprint()


def test_a_file_of_lines_may_have_prompts_which_are_not_learned(
    tokenizer: str, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "w1 w2 w3", "text": "w4 w5"},
        {"text": "w6 w7"},
        {"prompt": "w8", "text": ""},
    ]
    file = tmp_path / "written.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    train, test = attar.data.documents(
        train=str(file), test=str(file), tokenizer=tokenizer, eos="<eos>", length=8
    )
    assert learned(train) == learned(test) == [(3, 4), (4, 5), (5, 0), (6, 7), (7, 0)]


def test_a_folder_with_a_tokenizer_says_its_end_itself(tokenizer: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<eos>").save_pretrained(
        tmp_path / "teacher"
    )
    corpus = folder(tmp_path / "corpus")
    named = attar.data.documents(train=corpus, tokenizer=tokenizer, eos="<eos>", length=16)
    own = attar.data.documents(train=corpus, tokenizer=str(tmp_path / "teacher"), length=16)
    assert own.train.fingerprint() == named.train.fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "w1"}\n{"body": "w2"}\n', r"a\.jsonl:2: is no document"),
        ("a.jsonl", '{"text": "w1"}\n[1\n', r"a\.jsonl:2: is no document"),
        ("a.jsonl", '{"text": "w1", "prompt": 3}\n', r"a\.jsonl:1: is no document"),
        ("a.jsonl", '{"text": ""}\n', r"a\.jsonl:1: is no document"),
        ("a.jsonl", '{"text": "", "prompt": "w1"}\n', r"a\.jsonl: holds no text"),
        ("a.jsonl", " \n", r"a\.jsonl: is empty"),
        ("a.txt", "w1 w2", "is a single document, of which no part can be held back"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt: is not UTF-8 text"),
        ("empty/a.md", "w1", r"empty: holds no \.txt file"),
        (None, "", r"nothing: cannot be read \(No such file"),
    ],
)
def test_a_fault_is_named_with_its_place(
    name: str | None, content: str | bytes, said: str, tokenizer: str, tmp_path: Path
) -> None:
    file = tmp_path / (name or "nothing")
    if name is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    place = file.parent if name and "/" in name else file
    with pytest.raises(DataError, match=said):
        attar.data.documents(train=str(place), tokenizer=tokenizer, eos="<eos>", length=8)


def test_what_is_no_tokenizer_or_no_text_is_said(tokenizer: str, tmp_path: Path) -> None:
    corpus = folder(tmp_path / "corpus")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match="empty: holds no tokenizer"):
        attar.data.documents(train=corpus, tokenizer=str(tmp_path / "empty"), length=8)
    with pytest.raises(DataError, match=r"broken\.json: no tokenizer can be read there"):
        attar.data.documents(train=corpus, tokenizer=str(tmp_path / "broken.json"), length=8)
    with pytest.raises(UsageError, match="does not say its eos"):
        attar.data.documents(train=corpus, tokenizer=tokenizer, length=8)
    with pytest.raises(UsageError, match=r"documents are a folder of \.txt files"):
        attar.data.documents(train=tokenizer, tokenizer=tokenizer, eos="<eos>", length=8)


def table(place: Path, rows: list[tuple[str, str]]) -> str:
    place.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(place)


def test_labelled_texts_of_a_table(tokenizer: str, tmp_path: Path) -> None:
    rows = [(f"w{1 + n % 9} w{2 + n % 7}", ["warm", "cold"][n % 2]) for n in range(40)]
    train, test = attar.data.texts(train=table(tmp_path / "t.csv", rows), tokenizer=tokenizer)
    assert (len(train), len(test)) == (32, 8)
    assert train.classes == ("cold", "warm")
    assert test.labels is not None
    assert test.labels.bincount().tolist() == [4, 4]
    batch = train.rows(torch.arange(32))
    found = sorted(
        (" ".join(WORDS[i] for i in ids), train.classes[label])
        for ids, label in zip(batch["inputs"].tolist(), batch["labels"].tolist(), strict=True)
    )
    assert all(row in rows for row in found)
    bare = attar.data.texts(train=str(tmp_path / "t.csv"), tokenizer=tokenizer, target=None)
    assert bare.train.labels is None


def test_a_fault_of_a_table_of_texts_is_named_with_its_line(tokenizer: str, tmp_path: Path) -> None:
    rows = [(f"w{1 + n}", "ab"[n % 2]) for n in range(10)]
    good = table(tmp_path / "good.csv", rows)
    strange = table(tmp_path / "strange.csv", [("w1", "a"), ("w2", "c")])
    empty = table(tmp_path / "empty.csv", [*rows, ("", "a")])
    with pytest.raises(DataError, match=r"strange\.csv:3: 'c' is no label of the training rows"):
        attar.data.texts(train=good, test=strange, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"empty\.csv:12: the text is empty"):
        attar.data.texts(train=empty, test=good, tokenizer=tokenizer)
    with pytest.raises(DataError, match="no column 'body'"):
        attar.data.texts(train=good, tokenizer=tokenizer, column="body")
