"""The teacher writes the text: what it is asked to, the same however it is cut, safe to stop."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.models import build
from attar.runtime import DataError, UsageError

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<eos>", *(f"w{number}" for number in range(1, 30))]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1", "w2 w2"]


@pytest.fixture(scope="module")
def words() -> Any:
    table = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<eos>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return made


def model(seed: int = 0, columns: int = len(WORDS)) -> nn.Module:
    torch.manual_seed(seed)
    config = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "initializer_range": 0.5,
        "vocab_size": columns,
    }  # fmt: skip
    return build(
        "language_model", shape=(64,), outputs=len(WORDS), architecture="llama", config=config
    ).eval()


class Always(nn.Module):
    """Says the same of every position."""

    def __init__(self, chances: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(chances).log())

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=())


def lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_most_likely_text_is_that_of_transformers(words: Any, tmp_path: Path) -> None:
    teacher: Any = model()
    file = attar.synthesize(
        teacher, PROMPTS, words, into=tmp_path / "w.jsonl", tokens=12, temperature=0, eos=0
    )
    for prompt, line in zip(PROMPTS, lines(file), strict=True):
        asked = torch.tensor([words.encode(prompt).ids])
        theirs = teacher.generate(
            asked, max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        new = theirs[0, asked.shape[1] :].tolist()
        new = new[: new.index(0)] if 0 in new else new
        assert line == {"prompt": prompt, "text": words.decode(new)}


def test_neither_the_batch_nor_a_stop_changes_what_is_written(words: Any, tmp_path: Path) -> None:
    how: dict[str, Any] = {"tokens": 10, "temperature": 1.3, "eos": 0, "seed": 4}
    teacher = model()
    whole = attar.synthesize(teacher, PROMPTS, words, into=tmp_path / "a.jsonl", **how)
    ones = attar.synthesize(teacher, PROMPTS, words, into=tmp_path / "b.jsonl", batch_size=1, **how)
    assert ones.read_bytes() == whole.read_bytes()
    kept = whole.read_bytes().splitlines(keepends=True)
    ones.write_bytes(b"".join(kept[:2]) + kept[2][:7])  # killed while it wrote the third
    attar.synthesize(teacher, PROMPTS, words, into=ones, batch_size=2, **how)
    assert ones.read_bytes() == whole.read_bytes()
    other = attar.synthesize(
        teacher, PROMPTS, words, into=tmp_path / "c.jsonl", **{**how, "seed": 5}
    )
    assert other.read_bytes() != whole.read_bytes()


def test_what_is_there_is_not_written_again(words: Any, tmp_path: Path) -> None:
    asked: list[int] = []

    class Counting(Always):
        def forward(self, input_ids: Tensor, **given: Any) -> Any:
            asked.append(len(input_ids))
            return super().forward(input_ids, **given)

    teacher = Counting([1.0, *[0.0] * 29])  # ends at once
    for _ in range(2):
        attar.synthesize(teacher, PROMPTS, words, into=tmp_path / "w.jsonl", eos=0)
    assert asked == [5]


@pytest.mark.parametrize("field", ["teacher.weights", "how.temperature", "prompts"])
def test_a_file_of_another_command_is_refused_with_the_field(
    field: str, words: Any, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"tokens": 2, "eos": 0, "into": tmp_path / "w.jsonl"}
    attar.synthesize(model(), PROMPTS, words, **how)
    teacher = model(seed=int(field == "teacher.weights"))
    prompts = PROMPTS[: 4 if field == "prompts" else 5]
    if field == "how.temperature":
        how["temperature"] = 0.5
    with pytest.raises(DataError, match=rf"written by another command: {field} is"):
        attar.synthesize(teacher, prompts, words, **how)


def test_tokens_are_drawn_with_the_teachers_chances(words: Any, tmp_path: Path) -> None:
    chances = [0.0, 0.5, 0.3, 0.15, 0.05, *[0.0] * 25]
    how: dict[str, Any] = {"tokens": 40, "eos": 0}
    prompts = [f"w{1 + row % 29}" for row in range(100)]

    def shares(name: str, **more: Any) -> list[float]:
        file = attar.synthesize(
            Always(chances), prompts, words, into=tmp_path / name, **how, **more
        )
        found = Counter(word for line in lines(file) for word in line["text"].split())
        return [found[word] / 4000 for word in WORDS[1:5]]

    assert shares("plain.jsonl") == pytest.approx(chances[1:5], abs=0.03)
    nucleus = [0.5 / 0.8, 0.3 / 0.8, 0, 0]
    assert shares("nucleus.jsonl", top_p=0.75) == pytest.approx(nucleus, abs=0.03)
    warm = torch.tensor(chances[1:5]).sqrt()
    expected = (warm / warm.sum()).tolist()
    assert shares("warm.jsonl", temperature=2.0) == pytest.approx(expected, abs=0.03)


def test_columns_that_are_no_tokens_are_never_drawn(words: Any, tmp_path: Path) -> None:
    chances = [0.0, 0.01, *[0.0] * 28, 0.99]  # the last is padding of the vocabulary
    file = attar.synthesize(
        Always(chances), PROMPTS, words, into=tmp_path / "w.jsonl", tokens=3, eos=0
    )
    assert [line["text"] for line in lines(file)] == ["w1 w1 w1"] * 5


def test_a_student_learns_from_the_file(words: Any, tmp_path: Path) -> None:
    words.save(str(tmp_path / "tokenizer.json"))
    chances = [0.2, 0.4, 0.4, *[0.0] * 27]
    prompts = [f"w{1 + row % 29}" for row in range(40)]
    file = attar.synthesize(
        Always(chances), prompts, words, into=tmp_path / "w.jsonl", tokens=8, eos=0
    )
    train, test = attar.data.documents(
        train=str(file), tokenizer=str(tmp_path / "tokenizer.json"), eos="<eos>", length=16
    )
    assert len(train) + len(test) <= 40
    labels = torch.cat([train.labels, test.labels])
    learned = labels[labels != -100]
    written = sum(len(line["text"].split()) for line in lines(file))
    spoke = sum(bool(line["text"]) for line in lines(file))
    assert 0 < spoke < 40  # some had nothing to say
    assert len(learned) == written + spoke  # each word, and each end; no prompt
    assert set(learned.tolist()) == {0, 1, 2}


def test_what_cannot_be_written_is_said(words: Any, tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    with pytest.raises(UsageError, match="does not say its end token; give eos="):
        attar.synthesize(model(), PROMPTS, words, into=file)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        attar.synthesize(model(), ["w1", ""], words, into=file, eos=0)
    with pytest.raises(UsageError, match=r"w\.txt: is no \.jsonl file"):
        attar.synthesize(model(), PROMPTS, words, into=tmp_path / "w.txt", eos=0)
    for wrong in ({"tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            attar.synthesize(model(), PROMPTS, words, into=file, eos=0, **wrong)
    with pytest.raises(UsageError, match="makes no text of ids"):
        attar.synthesize(model(), PROMPTS, lambda text: [1], into=file, eos=0)
