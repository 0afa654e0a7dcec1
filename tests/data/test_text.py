"""Documents as windows of tokens: what is learned, once, and from which context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attar.data import Subset, TextSource, split, text
from attar.runtime import DataError, UsageError

EOS = 256
IGNORED = -100


def bytes_of(string: str) -> list[int]:
    """A tokenizer without a library: the bytes."""
    return list(string.encode())


def whole(source: TextSource) -> dict[str, torch.Tensor]:
    return source.rows(torch.arange(len(source)))


def learned(source: TextSource) -> Counter[tuple[tuple[int, ...], int]]:
    """Every (context, next token) that is counted, as a model with positions sees it."""
    batch, found = whole(source), Counter[tuple[tuple[int, ...], int]]()
    inputs, labels = batch["inputs"].tolist(), batch["labels"].tolist()
    usual = torch.arange(source.shape[0]).expand(len(source), -1)
    positions = batch.get("positions", usual).tolist()
    for row, (tokens, nexts) in enumerate(zip(inputs, labels, strict=True)):
        for place, label in enumerate(nexts):
            if label != IGNORED:
                context = tokens[place - positions[row][place] : place + 1]
                found[tuple(context), label] += 1
    return found


def by_hand(documents: Sequence[Sequence[int]], prompts: Sequence[int]) -> Counter[Any]:
    """The same from the documents: all that follow a first token and lie behind the prompt."""
    found: Counter[Any] = Counter()
    for document, prompt in zip(documents, prompts, strict=True):
        ended = [*document] if document[-1] == EOS else [*document, EOS]
        for place in range(max(prompt, 1), len(ended)):
            found[tuple(ended[:place]), ended[place]] += 1
    return found


words = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=12)
layouts = st.tuples(st.booleans(), st.sampled_from(["left", "right"]), st.integers(9, 30))


@given(documents=words, layout=layouts)
def test_what_is_learned_from_which_context_does_not_depend_on_the_layout(
    documents: list[list[int]], layout: tuple[bool, Any, int]
) -> None:
    pack, side, length = layout
    made = text(documents, length=length, pack=pack, side=side, eos=EOS, vocabulary=257)
    assert learned(made) == by_hand(documents, [0] * len(documents))


@given(documents=words, layout=layouts, data=st.data())
def test_a_prompt_is_context_and_is_not_learned(
    documents: list[list[int]], layout: tuple[bool, Any, int], data: st.DataObject
) -> None:
    pack, side, length = layout
    sizes = st.lists(st.integers(0, 5), min_size=len(documents), max_size=len(documents))
    prompts = [[7] * size for size in data.draw(sizes)]
    made = text(
        documents, length=length + 5, pack=pack, side=side, prompts=prompts, eos=EOS, vocabulary=257
    )
    joined = [[*p, *d] for p, d in zip(prompts, documents, strict=True)]
    assert learned(made) == by_hand(joined, [len(prompt) for prompt in prompts])


@given(documents=words, length=st.integers(2, 6), pack=st.booleans())
def test_a_document_longer_than_a_window_loses_no_token_and_counts_none_twice(
    documents: list[list[int]], length: int, pack: bool
) -> None:
    made = text(documents, length=length, pack=pack, eos=EOS, vocabulary=257)
    found = Counter[int]()
    for (_, label), count in learned(made).items():
        found[label] += count
    expected = Counter(token for document in documents for token in [*document[1:], EOS])
    assert found == expected
    assert max(len(context) for context, _ in learned(made)) <= length


@given(documents=words, length=st.integers(9, 20))
def test_packing_takes_at_most_as_many_windows_and_leaves_little_room(
    documents: list[list[int]], length: int
) -> None:
    made = text(documents, length=length, eos=EOS, vocabulary=257)
    assert len(made) <= len(documents)
    used = (whole(made)["labels"] != IGNORED).sum(1)
    # Best fit never leaves two windows whose tokens would fit into one.
    assert len(made) < 2 or int(used.sort().values[:2].sum()) > length


def test_the_longest_are_packed_first() -> None:
    sizes = [3, 3, 5, 5]  # in this order three windows would be needed
    made = text([[1] * size for size in sizes], length=8, eos=EOS, vocabulary=257)
    assert (whole(made)["labels"] != IGNORED).sum(1).tolist() == [8, 8]


def test_rows_keep_the_order_of_the_documents() -> None:
    documents = [[i] * (1 + i % 4) for i in range(1, 20)]
    made = text(documents, length=5, eos=EOS, vocabulary=257)
    firsts = [row[0] for row in whole(made)["inputs"].tolist()]
    assert firsts == sorted(firsts)
    for row in whole(made)["inputs"].tolist():
        kept = [token for token in row if token != EOS]
        assert kept == sorted(kept)


def test_a_window_by_hand() -> None:
    made = text(["ab", "c"], bytes_of, length=5, side="left", eos=EOS, vocabulary=257)
    batch = whole(made)
    assert batch["inputs"].tolist() == [[EOS, EOS, 97, 98, 99]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 98, EOS, EOS]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_row_that_is_one_document_needs_no_positions() -> None:
    made = text(["ab", "c"], bytes_of, length=3, pack=False, eos=EOS, vocabulary=257)
    assert "positions" not in whole(made)
    assert whole(made)["labels"].tolist() == [[98, EOS, IGNORED], [EOS, IGNORED, IGNORED]]
    left = text(["ab", "c"], bytes_of, length=3, pack=False, side="left", eos=EOS, vocabulary=257)
    assert whole(left)["positions"].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_an_end_that_is_there_is_not_put_again() -> None:
    made = text([[5, EOS], [5]], length=4, pack=False, eos=EOS, vocabulary=257)
    assert whole(made)["labels"].tolist() == [[EOS] + [IGNORED] * 3] * 2


def test_a_tokenizer_of_tokenizers_brings_its_vocabulary_and_its_first_token() -> None:
    made, tokens = _trained()
    source = text(["the cat sat", "a dog"], made, length=16, pack=False, eos="</s>")
    assert source.vocabulary == made.get_vocab_size() == source.outputs
    batch = whole(source)
    assert batch["inputs"][:, 0].tolist() == [tokens["<s>"]] * 2  # its post-processor puts it
    expected = made.encode("the cat sat").ids
    assert batch["inputs"][0, : len(expected)].tolist() == expected
    assert batch["labels"][0, len(expected) - 1] == tokens["</s>"]


def test_a_prompt_and_its_document_begin_and_end_once() -> None:
    made, tokens = _trained()
    source = text(["sat"], made, length=16, pack=False, prompts=["the cat"], eos="</s>")
    row = whole(source)["inputs"][0].tolist()
    prompt, rest = made.encode("the cat").ids, made.encode("sat", add_special_tokens=False).ids
    assert row[: len(prompt) + len(rest)] == prompt + rest
    assert (whole(source)["labels"][0] != IGNORED).sum() == len(rest) + 1
    assert row.count(tokens["<s>"]) == 1


def test_a_prompt_does_not_end_though_the_tokenizer_ends_every_text() -> None:
    made, tokens = _trained("$A </s>")
    source = text(["sat"], made, length=16, pack=False, prompts=["the cat"], eos="</s>")
    batch = whole(source)
    learned_labels = batch["labels"][batch["labels"] != IGNORED].tolist()
    assert learned_labels == made.encode("sat").ids
    prompt = made.encode("the cat", add_special_tokens=False).ids
    size = len(prompt) + len(learned_labels) - 1
    assert batch["inputs"][0, :size].tolist() == prompt + learned_labels[:-1]
    assert learned_labels[-1] == tokens["</s>"]


def test_a_tokenizer_of_transformers_says_its_end_itself() -> None:
    transformers = pytest.importorskip("transformers")
    made, tokens = _trained()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    one = text(["the cat sat", "a dog"], fast, length=8)
    other = text(["the cat sat", "a dog"], made, length=8, eos="</s>")
    assert one.vocabulary == other.vocabulary
    for key, value in whole(one).items():
        assert torch.equal(value, whole(other)[key]), key
    assert tokens["</s>"] in whole(one)["labels"]


def _trained(form: str = "<s> $A") -> tuple[Any, dict[str, int]]:
    """A small tokenizer by byte pairs, which puts a first token, or what *form* says."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(["the cat sat on a mat", "a dog sat on the cat"], trainer)
    tokens = made.get_vocab()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=form, special_tokens=[(name, tokens[name]) for name in ("<s>", "</s>")]
    )
    return made, tokens


def test_the_fingerprint_is_that_of_the_tokens() -> None:
    def made(document: str, vocabulary: int = 257, **options: Any) -> TextSource:
        many = ["x" * 3] * 3001 + [document] + ["x" * 3] * 2000
        return text(many, bytes_of, length=4, eos=EOS, vocabulary=vocabulary, **options)

    first = made("abc", pack=False)
    assert first.fingerprint() == made("abc", pack=False).fingerprint()
    # One token of one of five thousand rows, which a sample of them would not show.
    others = [made("abd", pack=False), made("abc", 300, pack=False), made("abc")]
    assert len({source.fingerprint() for source in [first, *others]}) == 4


def test_a_part_of_a_text_is_a_text() -> None:
    made = text([[1, 2, 3]] * 10, length=4, pack=False, eos=EOS, vocabulary=257)
    assert Subset(made, torch.arange(3)).vocabulary == 257
    rest, part = split(made, 0.3)
    assert (len(rest), len(part), part.outputs) == (7, 3, 257)


def test_an_epoch_gives_every_window_once() -> None:
    made = text(
        [[i, i + 1, i + 2] for i in range(9)], length=4, pack=False, eos=EOS, vocabulary=257
    )
    batches = list(made.epoch(0, batch_size=4, seed=3))
    ids = torch.cat([batch["ids"] for batch in batches])
    inputs = torch.cat([batch["inputs"] for batch in batches])
    assert sorted(ids.tolist()) == list(range(9))
    assert torch.equal(inputs, whole(made)["inputs"][ids])


def test_tokens_have_no_mean() -> None:
    made = text([[1, 2]], length=4, eos=EOS, vocabulary=257)
    with pytest.raises(UsageError, match="tokens have no mean"):
        made.statistics()


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        ([], {}, "holds no documents"),
        ("abc", {}, "holds no documents"),
        ([[1], []], {}, "document 1 is empty"),
        (["a", ""], {"tokenizer": bytes_of}, "document 1 is empty"),
        (
            [[1, 257]],
            {},
            "document 0 has the token 257, but with a vocabulary of 257 ids go from 0",
        ),
        ([[1], [-1, 2]], {}, "document 1 has the token -1"),
        ([[1], [2**40, 2]], {}, "document 1 has the token 1099511627776"),
        ([[0.5, 1.0]], {}, "document 0 does not hold whole numbers"),
        ([[True, False]], {}, "document 0 does not hold whole numbers"),
        ([[1], [EOS]], {}, "document 1 is nothing but its end"),
        ([[1, 2]], {"length": 1}, "the length is 1"),
        ([[1], [2]], {"prompts": [[3]]}, "2 documents but 1 prompts"),
        ([[1]], {"prompts": [[3] * 5], "length": 4}, "the prompt of document 0 has 5 tokens"),
        ([[1]], {"eos": 257}, "the end token is 257"),
    ],
)
def test_what_is_no_text_is_refused(documents: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        text(documents, **{"length": 8, "eos": EOS, "vocabulary": 257} | options)


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        (["a"], {"tokenizer": bytes_of, "vocabulary": 257}, "does not say its eos; give eos="),
        (["a"], {"tokenizer": bytes_of, "eos": EOS}, "does not say its vocabulary"),
        ([[1], "a"], {"eos": EOS, "vocabulary": 257}, "document 1 is a string; give a tokenizer"),
        (
            ["a"],
            {"tokenizer": 7, "eos": EOS, "vocabulary": 257},
            "gives the ids of a text, not a int",
        ),
        ([[1]], {"side": "top", "eos": EOS, "vocabulary": 257}, "side is 'top'"),
    ],
)
def test_what_is_not_said_is_asked_for(documents: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        text(documents, **{"length": 8} | options)


def test_numpy_documents_are_read() -> None:
    made = text([np.array([1, 2, 3])], length=4, eos=EOS, vocabulary=257)
    assert whole(made)["labels"].tolist() == [[2, 3, EOS, IGNORED]]
