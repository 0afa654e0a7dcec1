"""Language models: the next token at each position of a window of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor, nn

from attar.losses import Projected, cross_entropy, wide
from attar.runtime import DataError, PreflightError, eval_mode, first_line
from attar.tasks.decoders import Decoder, decoder_of, run, unwrapped
from attar.tasks.task import Batch, Rows, Task

IGNORED = -100  # the label where nothing is learned

_CHUNK_BYTES = 256 << 20  # of float32 logits that are made at a time
_PROBE = 64  # tokens
_SLACK = 8  # units in the last place
_MOVED = 0.1


@dataclass(frozen=True)
class LanguageModelling(Task):
    """A causal language model: from the tokens up to a position, logits of the next one.

    A batch holds ``inputs`` int64 [B, S], ``labels`` int64 [B, S], and where several documents lie
    in a row ``positions`` int64 [B, S]. Labels are *already the next token* of each position and
    are never shifted again; -100 is where nothing is learned. Positions begin at 0 with every
    document, and padding is a document of its own. ``attar.data.text`` makes such batches.

    The model is any of ``transformers`` that gives ``logits``, or a module that takes tokens
    [B, S] (and positions, where its ``forward`` names ``positions`` or ``position_ids``) and
    returns logits [B, S, V]. The head of a model that names it (``get_output_embeddings``, or
    ``backbone`` and ``head``) is not run: the logits are then ``attar.losses.Projected``.

    Args:
        vocabulary: how many token ids are real; taken from the data when left out. What a model
            gives beyond them, as vocabularies that are padded for speed do, is cut off, so models
            of one family agree whatever they are padded to.
    """

    vocabulary: Annotated[int, Ge(2)] | None = None

    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    criterion = staticmethod(cross_entropy)

    def __post_init__(self) -> None:
        if self.vocabulary is not None and self.vocabulary < 2:
            raise DataError(f"vocabulary is {self.vocabulary}; it must be 2 or more")

    @property
    def width(self) -> int | None:
        """How many tokens there are to choose from."""
        return self.vocabulary

    def fitted(self, source: Any) -> Self:
        """Take the vocabulary from the data, or check that it is the same."""
        known = getattr(source, "vocabulary", None)
        if known is None and self.vocabulary is None:
            raise DataError(
                f"{source.name}: says nothing of its vocabulary; make the data with "
                "attar.data.text, or give the task vocabulary: N"
            )
        if known is not None and self.vocabulary not in (None, known):
            raise DataError(
                f"the task has a vocabulary of {self.vocabulary:,} tokens but {source.name} one of "
                f"{known:,}; make them agree, or leave the task's out"
            )
        settled = replace(self, vocabulary=self.vocabulary if known is None else known)
        if source.labels is not None:
            settled._check_labels(source.labels, source.name)
        return settled

    def _check_labels(self, labels: Tensor, name: str) -> None:
        if labels.ndim != 2 or labels.is_floating_point():
            raise DataError(
                f"{name}: its labels are {labels.dtype} {list(labels.shape)}, and a language model "
                "needs the next token of each position, int64 [N, S]; make the data with "
                "attar.data.text"
            )
        wrong = (
            (labels != IGNORED) & ((labels < 0) | (labels >= (self.vocabulary or 0)))
        ).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            raise DataError(
                f"{name}: the label at position {place} of row {row} is {int(labels[row, place])}, "
                f"but with a vocabulary of {self.vocabulary:,} labels go from 0 to "
                f"{(self.vocabulary or 0) - 1:,}, or are {IGNORED}"
            )

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run *model* on the tokens and their positions, without its head where it has one."""
        return run(model, batch)

    def try_forward(self, model: nn.Module, batch: Batch, whose: str) -> Any:
        """``forward`` for the first time, and ``check_packing``."""
        _check_tokens(model, batch, whose)
        try:
            out = super().try_forward(model, batch, whose)
        except IndexError as error:
            raise DataError(
                f"the {whose} cannot read windows of {batch['inputs'].shape[1]} tokens "
                f"({first_line(error)}); give a smaller length"
            ) from error
        given = list(self.output(out, "logits").shape[:2])
        if given != list(batch["inputs"].shape):
            raise DataError(
                f"the {whose} gives logits for {given} positions where the batch has "
                f"{list(batch['inputs'].shape)}; a language model gives them for every token"
            )
        check_packing(model, batch, self, whose=whose)
        return out

    def output(self, out: Any, name: str) -> Any:
        """The logits: a tensor [B, S, vocabulary], or a ``Projected`` that stands for one."""
        found: Any = out.get(name) if isinstance(out, dict) else None
        if not isinstance(found, Projected):
            found = super().output(out, name)
        if name != "logits":
            return found
        if len(found.shape) != 3:
            raise DataError(
                f"the model gives logits of shape {list(found.shape)}; a language model gives "
                f"[B, S, {self.vocabulary or 'V'}], those of every position"
            )
        given = found.shape[-1]
        if self.vocabulary in (None, given):
            return found
        if given < (self.vocabulary or 0):
            raise DataError(
                f"the model gives {given:,} logits where the vocabulary has {self.vocabulary:,} "
                "tokens; give a model of this tokenizer"
            )
        if isinstance(found, Tensor):
            return found[..., : self.vocabulary]
        bias = None if found.bias is None else found.bias[: self.vocabulary]
        return replace(found, weight=found.weight[: self.vocabulary], bias=bias)

    def mask(self, batch: Batch) -> Tensor:
        """Which positions are learned, bool [B, S]."""
        return self.labels(batch) != IGNORED

    def labels(self, batch: Batch) -> Tensor:
        """The next token of each position, int64 [B, S]."""
        if "labels" not in batch:
            raise DataError(
                "the batch has no labels; a language model needs the next token of each position, "
                f"and {IGNORED} where nothing is learned: make the data with attar.data.text"
            )
        return batch["labels"]

    def body(self, model: nn.Module) -> nn.Module:
        """What is run without its head, once it is known that it can be; else all of it."""
        decoder = decoder_of(model)
        return model if decoder is None else decoder.backbone

    def head(self, model: nn.Module) -> nn.Linear | None:
        """The last linear layer when the logits are its plain result, else None."""
        decoder = self._decoder(model)
        plain = decoder is not None and decoder.scale == 1 and decoder.softcap is None
        return decoder.head if decoder is not None and plain else None

    def _decoder(self, model: nn.Module) -> Decoder | None:
        if decoder_of(model) is None and (first := next(model.parameters(), None)) is not None:
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=first.device)
            with eval_mode(model), torch.no_grad():
                run(model, {"inputs": tokens})
        return decoder_of(model)

    def loss(self, out: Any, batch: Batch) -> Tensor:
        """Cross-entropy with the next token in nats, one value a counted position."""
        logits, mask = self.output(out, "logits"), self.mask(batch)
        labels = self.labels(batch)[mask]
        if isinstance(logits, Tensor):
            return cross_entropy(logits[mask], labels)
        return wide.cross_entropy(logits[mask], labels)

    def rows(self, out: Any, batch: Batch) -> Rows:
        """What a window gives, without its logits.

        ``nll`` float64 [B], the sum of its cross-entropies in nats; ``tokens`` and ``correct``
        int64 [B], how many positions count, and of how many the most likely token is right;
        ``top`` int32 [B, S], the most likely token, -1 where nothing counts; ``labels`` int32.
        """
        logits, labels, mask = self.output(out, "logits"), self.labels(batch), self.mask(batch)
        top = torch.full_like(labels, -1)
        costs = torch.zeros(labels.shape, dtype=torch.float64)  # not every device has it
        chosen = labels[mask]
        made = [
            (part.argmax(1), _costs(part, label)) for part, label in _made(logits, mask, chosen)
        ]
        if made:
            answers, values = (torch.cat(parts) for parts in zip(*made, strict=True))
            top[mask], costs[mask.cpu()] = answers, values
        return {
            "nll": costs.sum(1),
            "tokens": mask.sum(1),
            "correct": ((top == labels) & mask).sum(1),
            "top": top.int(),
            "labels": labels.int(),
        }

    def score(self, rows: Rows) -> dict[str, float]:
        """Perplexity, cross-entropy (nats a token), and the share of tokens guessed right."""
        return {
            "perplexity": self.primary(rows),
            "cross_entropy": _ratio(rows["nll"], rows["tokens"]),
            "accuracy": _ratio(rows["correct"], rows["tokens"]),
        }

    def primary(self, rows: Rows) -> float:
        """exp of the mean cross-entropy of a counted token."""
        return _exp(_ratio(rows["nll"], rows["tokens"]))

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """Share of counted positions with the same most likely token; nats above the teacher."""
        counted = rows["top"] >= 0
        same = (rows["top"] == teacher_rows["top"]) & counted
        own, theirs = (_ratio(each["nll"], each["tokens"]) for each in (rows, teacher_rows))
        return {"agreement": _ratio(same, counted), "nats_above_teacher": own - theirs}

    def floor(self, labels: Tensor) -> float:
        """The perplexity of always answering with the shares of the labels themselves."""
        counts = torch.bincount(labels[labels != IGNORED].long()).double()
        shares = counts[counts > 0] / counts.sum()
        return _exp(float(-(shares * shares.log()).sum()))

    def describe(self) -> dict[str, Any]:
        """How many token ids are real."""
        return super().describe() | {"vocabulary": self.vocabulary}


def check_packing(
    model: nn.Module, batch: Batch, task: Task | None = None, *, whose: str = "model"
) -> None:
    """Refuse a model that would see more of a row than the tokens of a document up to now.

    Four rows made of the batch's own tokens are run in eval mode. What a document gives must not
    depend on later tokens and, where the batch has ``positions``, neither on the document before
    it in the row nor on its place there.

    Args:
        task: reads the model's output; a ``LanguageModelling`` when left out.
        whose: for messages.

    Raises:
        PreflightError: it does, and what to do.
    """
    task = task or LanguageModelling()
    first, probe = _probe(model, batch)
    with eval_mode(model), torch.no_grad():
        logits = task.output(task.forward(model, probe), "logits")
    seen = getattr(logits, "hidden", logits)
    plain, other_before, other_after, moved = seen.cpu().double()
    slack = _SLACK * torch.finfo(seen.dtype).eps
    called = type(unwrapped(model)).__name__
    if _apart(plain[:-1], other_after[:-1]) > slack:
        raise PreflightError(
            f"the {whose} ({called}) sees the tokens that it is to predict: what it gives at a "
            "position changes with the tokens after it; use a causal language model"
        )
    if "positions" not in batch:
        return
    if _apart(plain[first:], other_before[first:]) > slack or (
        _apart(plain[first:], moved[: len(plain) - first]) > min(1000 * slack, _MOVED)
    ):
        raise PreflightError(
            f"the {whose} ({called}) lets a document see the one before it in its row: it does not "
            "go by positions, which begin at 0 with every document; lay one document in a row and "
            'pad behind it: attar.data.text(..., pack=False, side="right")'
        )


def _probe(model: nn.Module, batch: Batch) -> tuple[int, Batch]:
    """Rows of two documents: [a b], [another a, b], [a, b with another end], [b a]."""
    inputs = batch["inputs"]
    length = inputs.shape[1]
    if hasattr(unwrapped(model), "config"):  # reads any length
        length = min(length, _PROBE)
    row, first = inputs[0, :length], length // 2
    a, b = row[:first], row[first:]
    # Another token that is known to be one: the next of those in the batch.
    known = inputs.unique()
    after = known.roll(-1)
    if len(known) == 1:
        after = torch.where(known > 0, known - 1, known + 1)
    other = after[torch.searchsorted(known, row)]
    rows = [
        row,
        torch.cat([other[:first], b]),
        torch.cat([row[:-1], other[-1:]]),
        torch.cat([b, a]),
    ]
    probe = {"inputs": torch.stack(rows)}
    if "positions" in batch:
        here, there = (torch.arange(len(part), device=row.device) for part in (a, b))
        usual, moved = torch.cat([here, there]), torch.cat([there, here])
        probe["positions"] = torch.stack([usual, usual, usual, moved])
    return first, probe


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    size = max(float(one.abs().max()), torch.finfo(torch.float32).tiny)
    return float((one - other).abs().max()) / size


def _check_tokens(model: nn.Module, batch: Batch, whose: str) -> None:
    tokens = batch["inputs"]
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise DataError(
            f"the inputs are {tokens.dtype} {list(tokens.shape)}, and a language model reads token "
            "ids, int64 [B, S]; make the data with attar.data.text"
        )
    inner = unwrapped(model)
    table = getattr(inner, "get_input_embeddings", lambda: None)()
    rows = getattr(table, "num_embeddings", None)
    if rows is not None and (most := int(tokens.max())) >= rows:
        raise DataError(
            f"the data have the token {most:,}, but the {whose} knows only {rows:,}: they are of "
            "another tokenizer; make the data with the model's own"
        )


def _made(logits: Any, mask: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits at the counted positions in float32, a few at a time, and their labels."""
    places = mask.flatten().nonzero()[:, 0]
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    if isinstance(logits, Tensor):
        flat: Any = logits.detach().flatten(0, 1)
    else:
        flat, places = logits.detach()[mask], torch.arange(len(labels), device=mask.device)
    for part, label in zip(places.split(size), labels.split(size), strict=True):
        if not len(part):
            return
        chosen = flat[part]
        yield (chosen if isinstance(chosen, Tensor) else chosen.dense()).float(), label


def _costs(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits.gather(1, labels[:, None])[:, 0]
    return logits.logsumexp(1).cpu().double() - picked.cpu().double()


def _ratio(values: Tensor, counts: Tensor) -> float:
    return float(values.sum(dtype=torch.float64) / counts.sum(dtype=torch.float64))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
