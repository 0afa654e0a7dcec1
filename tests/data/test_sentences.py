"""Sentences as token ids: padding that costs nothing and means nothing, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import attar
from attar.data import sentences
from attar.data.contents import contents
from attar.data.tokens import encoded, padding_of
from attar.runtime import DataError, UsageError

TEXTS = ["the cat sat", "a", "dogs do not sit on the mat at all", "the mat", "no"]
WORDS = {word: number for number, word in enumerate(sorted({w for t in TEXTS for w in t.split()}))}
TABLE = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2} | {word: 3 + i for word, i in WORDS.items()}


def plain(text: str) -> list[int]:
    return [TABLE[word] for word in text.split()]


def of_tokenizers(pad: str = "[PAD]") -> Any:
    """A word tokenizer with [CLS] and [SEP] that was saved with padding and a cut at 4 tokens."""
    hf = pytest.importorskip("tokenizers")
    made = hf.Tokenizer(
        hf.models.WordLevel({pad if k == "[PAD]" else k: v for k, v in TABLE.items()})
    )
    made.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    made.post_processor = hf.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.enable_padding(length=12, pad_id=TABLE["[PAD]"], pad_token=pad)
    made.enable_truncation(4)
    return made


def of_transformers() -> Any:
    hf = pytest.importorskip("transformers")
    return hf.PreTrainedTokenizerFast(tokenizer_object=of_tokenizers(), pad_token="[PAD]")


TOKENIZERS: list[Callable[[], Any]] = [of_tokenizers, of_transformers]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("most", [6, 100])
def test_a_text_is_cut_before_its_last_special_token(make: Callable[[], Any], most: int) -> None:
    found = encoded(TEXTS, make(), most=most)
    for row, text in enumerate(TEXTS):
        ids = found.flat[found.offsets[row] : found.offsets[row + 1]].tolist()
        assert ids == [1, *plain(text)[: most - 2], 2]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_tokenizer_comes_back_as_it_was(make: Callable[[], Any]) -> None:
    tokenizer = make()
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if inner is tokenizer:
        before = inner.to_str()
        encoded(TEXTS, tokenizer, most=6)
        assert inner.to_str() == before
    assert encoded(["a", "the cat"], tokenizer, special=False).flat.tolist() == plain("a the cat")


def test_many_texts_are_the_same_as_few() -> None:
    many = [TEXTS[i % len(TEXTS)] for i in range(2_500)]
    found = encoded(many, plain)
    assert found.flat.tolist() == [token for text in many for token in plain(text)]
    assert found.lengths.tolist() == [len(text.split()) for text in many]


def test_padding_is_the_tokenizers_own() -> None:
    assert padding_of(plain) == 0
    assert padding_of(of_tokenizers()) == 0
    other = of_tokenizers()
    other.enable_padding(pad_id=7, pad_token="no")
    assert padding_of(other) == 7
    other.no_padding()
    assert padding_of(other) == TABLE["[PAD]"]
    assert padding_of(of_transformers()) == 0
    batch = sentences(TEXTS, plain, pad=9).rows(torch.tensor([0, 1]))
    assert batch["inputs"][1].tolist() == [*plain("a"), 9, 9]


def test_a_batch_is_as_wide_as_its_longest_text_and_says_what_is_real() -> None:
    source = sentences(TEXTS, plain, torch.tensor([0, 1, 0, 1, 0]), classes=2, length=6)
    batch = source.rows(torch.tensor([3, 1, 0]))
    assert batch["inputs"].dtype == batch["attention"].dtype == torch.int64
    assert batch["inputs"].tolist() == [[*plain("the mat"), 0], [*plain("a"), 0, 0],
                                        plain("the cat sat")]  # fmt: skip
    assert batch["attention"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 1, 0]
    assert batch["ids"].tolist() == [3, 1, 0]
    assert source.rows(torch.tensor([2]))["inputs"].tolist() == [plain(TEXTS[2])[:6]]
    assert source.shape == (6,)
    assert source.rows(torch.tensor([], dtype=torch.int64))["inputs"].shape == (0, 0)


def test_an_epoch_has_every_row_once_in_the_order_of_other_sources() -> None:
    source = sentences(TEXTS, plain)
    other = attar.data.TensorSource(torch.zeros(5, 1))
    for mine, theirs in zip(
        source.epoch(3, batch_size=2, seed=1), other.epoch(3, batch_size=2, seed=1), strict=True
    ):
        assert mine["ids"].tolist() == theirs["ids"].tolist()
        for row, real, identity in zip(
            mine["inputs"], mine["attention"], mine["ids"].tolist(), strict=True
        ):
            assert row[real.bool()].tolist() == plain(TEXTS[identity])


def test_pairs_are_trimmed_each_on_its_own() -> None:
    source = sentences(TEXTS, plain, torch.zeros(5), others=TEXTS[::-1])
    batch = source.rows(torch.tensor([1, 3]))
    assert batch["inputs"].shape == (2, 2)
    assert batch["other"].tolist() == [plain("the mat"), [*plain("a"), 0]]
    assert batch["other_attention"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].shape == (2, 1)


def test_another_tokenizer_text_label_or_padding_has_another_fingerprint() -> None:
    labels = torch.linspace(0, 1, 5)
    base = {"texts": TEXTS, "tokenizer": plain, "labels": labels}
    changes: list[dict[str, Any]] = [
        {"tokenizer": lambda text: [*plain(text)[:-1], 1 + plain(text)[-1]]},
        {"texts": [*TEXTS[:-1], "a"]},
        # The same ids one after the other, but in other rows.
        {"texts": ["the cat", "sat a", *TEXTS[2:]]},
        {"labels": labels.flip(0)},
        {"labels": None},
        {"pad": 5},
        {"others": TEXTS},
        {"length": 2},
    ]
    prints = [sentences(**(base | change)).fingerprint() for change in [{}, *changes]]
    assert len(set(prints)) == len(prints)
    assert sentences(**base, name="another").fingerprint() == prints[0]
    assert sentences(**base, length=60).fingerprint() == prints[0]


def test_what_a_row_holds_does_not_depend_on_its_batch() -> None:
    source = sentences(TEXTS, plain, others=TEXTS[::-1], pad=4)
    whole = contents(source.rows(torch.arange(5)))
    alone = [contents(source.rows(torch.tensor([row])))[0] for row in range(5)]
    assert whole.tolist() == alone
    assert len(set(alone)) == 5
    batch = source.rows(torch.arange(5))
    for name in ("inputs", "attention", "other"):
        changed = {**batch, name: batch[name].clone()}
        changed[name][1, 0] += 1 if name != "attention" else -1
        assert (contents(changed) != whole).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"length": 0}, UsageError, "length must be at least 1"),
        ({"texts": "one text"}, UsageError, "put it in a list"),
        ({"texts": ["a", None]}, DataError, "row 1 is a NoneType"),
        ({"texts": ["a", " "]}, DataError, "row 1 has no tokens"),
        ({"texts": []}, DataError, "empty data set"),
        ({"tokenizer": 5}, UsageError, "not a int"),
        ({"tokenizer": lambda text: text}, UsageError, "gave a str for a text"),
        ({"tokenizer": lambda text: [1.5]}, UsageError, "list of integers"),
        ({"tokenizer": lambda text: [-1]}, UsageError, "token id -1"),
        ({"tokenizer": lambda text: [2**31]}, UsageError, "token id 2147483648"),
        ({"others": ["a"]}, DataError, "5 texts but 1 others"),
        ({"others": ["a", "a", "", "a", "a"]}, DataError, "others: the text of row 2"),
        ({"labels": torch.zeros(4)}, DataError, "5 inputs but 4 labels"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        sentences(**({"texts": TEXTS, "tokenizer": plain} | change))


def test_token_ids_have_no_statistics() -> None:
    with pytest.raises(UsageError, match="token ids, which have no mean"):
        attar.models.build("mlp", data=sentences(TEXTS, plain, torch.zeros(5, 2)))


def test_a_tokenizer_may_give_arrays() -> None:
    found = encoded(TEXTS, lambda text: np.array(plain(text)))
    assert found.flat.tolist() == encoded(TEXTS, plain).flat.tolist()
