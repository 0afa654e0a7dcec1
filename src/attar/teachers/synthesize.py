"""Distillation of samples: the teacher writes the text that the student learns from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attar.data.draw import hashed, key_of
from attar.data.tokens import encoded
from attar.runtime import (
    Bar,
    DataError,
    UsageError,
    eval_mode,
    read_json,
    resolve_device,
    write_json,
)
from attar.tasks import LanguageModelling
from attar.teachers.about import difference
from attar.teachers.fingerprint import fingerprint_of

Ids = NDArray[np.int32]

_ABOUT = ".about.json"
_MOST_TOKENS = 1 << 24  # of one text, so that no two draws share a number


def synthesize(
    teacher: nn.Module,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    into: str | Path,
    tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    eos: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool | None = None,
) -> Path:
    """Let a language model continue each prompt, once, and keep what it writes; returns the file.

    Sequence-level distillation (Kim and Rush, "Sequence-Level Knowledge Distillation", 2016): a
    student trained on the teacher's own text with plain labels learns what the teacher does, not
    all that people wrote. The file is one JSON object a line, ``{"prompt": ..., "text": ...}``, in
    order of the prompts, which ``attar.data.documents`` reads; the prompt is then not learned.

    A command that was stopped is given again: lines that are there stay, and only what is missing
    is written. Each token is drawn with a number that is a function of (seed, prompt, place), so
    that neither the batch size nor where it was stopped changes what is drawn, but for rounding.

    Args:
        teacher: a causal language model of transformers.
        prompts: what it continues, none of them empty.
        tokenizer: the teacher's own, one of transformers or of tokenizers.
        into: a ``.jsonl`` file; beside it a file says who wrote it.
        tokens: the most that is written for one prompt; it ends earlier with the end token.
        temperature: the logits are divided by it; 0 takes the most likely token each time.
        top_p: draw among the fewest most likely tokens that have this mass together (Holtzman et
            al., "The Curious Case of Neural Text Degeneration", 2020); 1 among all of them.
        eos: the end token's id; the tokenizer's own when left out.
        seed: of the draws.

    Raises:
        UsageError: a number outside its range, a model that cannot go on from where it was.
        DataError: *into* was written by another teacher, or of other prompts; an empty prompt.

    Example::

        attar.synthesize(teacher, prompts, tokenizer, into="runs/written.jsonl", tokens=200)
        train, test = attar.data.documents(train="runs/written.jsonl", tokenizer="models/teacher")
    """
    _check(tokens, temperature, top_p, batch_size)
    if not hasattr(tokenizer, "get_vocab"):
        raise UsageError(
            f"a {type(tokenizer).__name__} makes no text of ids; give a tokenizer of transformers "
            "or tokenizers"
        )
    end = eos if eos is not None else getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise UsageError("the tokenizer does not say its end token; give eos=")
    asked = list(prompts)
    if empty := [row for row, prompt in enumerate(asked) if not prompt]:
        raise DataError(f"prompt {empty[0]} is empty; leave it out, or begin it with something")
    target, place = Path(into), resolve_device(device)
    ids = encoded(asked, tokenizer, name="prompts")
    rows = [ids.flat[a:b] for a, b in zip(ids.offsets[:-1], ids.offsets[1:], strict=True)]
    rows = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    how = {"tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "eos": end}
    how["vocabulary"] = max(tokenizer.get_vocab().values()) + 1
    done = _begun(target, _about(teacher, asked, how))
    home = next(teacher.parameters()).device
    choose = _Choice(temperature, top_p, key_of("synthesize", seed))
    with (
        Bar("writing", len(asked), show=progress) as bar,
        open(target, "a", encoding="utf-8") as file,
        eval_mode(teacher),
        torch.no_grad(),
    ):
        try:
            teacher.to(place)
            for start in range(done, len(asked), batch_size):
                part = range(start, min(start + batch_size, len(asked)))
                written = _continued(teacher, [rows[row] for row in part], part, how, choose, place)
                for row, new in zip(part, written, strict=True):
                    text = tokenizer.decode(new, skip_special_tokens=True)
                    line = {"prompt": asked[row], "text": text}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.watch(part.stop)
        finally:
            teacher.to(home)
    return target


def _check(tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    if tokens < 1 or batch_size < 1:
        raise UsageError(f"tokens is {tokens} and batch_size {batch_size}; both are 1 or more")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}; it must be 0 or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _about(teacher: nn.Module, prompts: list[str], how: dict[str, Any]) -> dict[str, Any]:
    listed = json.dumps(prompts).encode()
    return {
        "teacher": fingerprint_of(teacher, LanguageModelling()),
        "prompts": hashlib.sha256(listed).hexdigest(),
        "how": how,
    }


def _begun(target: Path, about: dict[str, Any]) -> int:
    """How many lines there are already; a line that was not finished is taken away."""
    if target.suffix != ".jsonl":
        raise UsageError(f"{target}: is no .jsonl file, which is what is written")
    beside = target.with_name(target.name + _ABOUT)
    if not target.exists():
        write_json(beside, about)
        target.touch()
        return 0
    known = read_json(beside) if beside.exists() else None
    if found := difference(known, about):
        raise DataError(f"{target}: was written by another command: {found}; name another file")
    with open(target, "r+b") as file:
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
    return whole.count(b"\n")


@dataclass(frozen=True)
class _Choice:
    """Which token comes next."""

    temperature: float
    top_p: float
    key: int

    def __call__(self, logits: Tensor, rows: range, place: int) -> Tensor:
        """One token for each of *rows*, from logits [n, V]; *place* counts the tokens written."""
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = (logits.double() / self.temperature).softmax(-1)
        ids = None
        if self.top_p < 1:
            chances, ids = chances.sort(-1, descending=True)
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= self.top_p, 0.0)
        sums = chances.cumsum(-1)
        total = sums[:, -1:].contiguous()
        numbers = np.asarray(rows, dtype=np.int64) * _MOST_TOKENS + place
        drawn = torch.from_numpy((hashed(self.key, numbers) >> np.uint64(11)) * 2.0**-53)
        goal = drawn.to(sums.device).unsqueeze(-1) * total
        found = torch.searchsorted(sums, goal, right=True)
        # A product that was rounded up to the total belongs to the last column that has a mass.
        found = found.minimum(torch.searchsorted(sums, total))
        return (found if ids is None else ids.gather(-1, found)).squeeze(-1)


def _continued(
    model: Any, prompts: list[Ids], rows: range, how: dict[str, Any], choose: _Choice, device: Any
) -> list[list[int]]:
    """What the model writes after each prompt, without its end token."""
    longest = max(map(len, prompts))
    inputs = torch.full((len(prompts), longest), how["eos"], dtype=torch.int64)
    mask = torch.zeros_like(inputs)
    for row, ids in enumerate(prompts):  # on the left, so that all go on at one place
        inputs[row, longest - len(ids) :] = torch.from_numpy(ids.astype(np.int64))
        mask[row, longest - len(ids) :] = 1
    inputs, mask = inputs.to(device), mask.to(device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    written: list[Tensor] = []
    over, past = torch.zeros(len(prompts), dtype=torch.bool, device=device), None
    for place in range(how["tokens"]):
        out = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=places,
            past_key_values=past,
            use_cache=True,
        )
        past = getattr(out, "past_key_values", None)
        if past is None:
            raise UsageError(
                f"a {type(model).__name__} does not go on from where it was; text is written by a "
                "causal language model of transformers"
            )
        logits = out.logits[:, -1, : how["vocabulary"]]  # the rest is padding of the last layer
        token = choose(logits, rows, place).masked_fill(over, how["eos"])
        over = over | (token == how["eos"])
        written.append(token)
        if over.all():
            break
        inputs, places = token.unsqueeze(-1), places[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    columns = torch.stack(written, dim=-1).tolist()
    return [list(takewhile(lambda token: token != how["eos"], ids)) for ids in columns]
