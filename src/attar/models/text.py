"""The recurrent classifier of texts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attar.models.types import Count, Shape, Size
from attar.runtime import UsageError


class Recurrent(nn.Module):
    """Tokens [N, S, width] to [N, S, 2 hidden], by an LSTM from each end of the real tokens."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, depth, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        if attention is None:
            return self.lstm(tokens)[0]
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        ends = (attention.ne(0) * places).amax(1).clamp(min=1)
        packed = pack_padded_sequence(tokens, ends.cpu(), batch_first=True, enforce_sorted=False)
        found, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=tokens.shape[1]
        )
        return found


class Pool(nn.Module):
    """The mean or the maximum over the real tokens: [N, S, C] to [N, C]."""

    def __init__(self, kind: Literal["max", "mean"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
        if attention is None:
            attention = torch.ones(tokens.shape[:2], device=tokens.device)
        real = attention.ne(0)[..., None]
        if self.kind == "mean":
            return tokens.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)
        return tokens.masked_fill(~real, -torch.inf).amax(1)


class BiLSTM(nn.Module):
    """Calls its parts on token ids [N, S], and a mask [N, S] of the real ones."""

    def __init__(
        self,
        outputs: int,
        vocabulary: int,
        width: int,
        hidden: int,
        depth: int,
        pool: Literal["max", "mean"],
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.body = Recurrent(width, hidden, depth)
        self.pool = Pool(pool)
        self.head = nn.Linear(2 * hidden, outputs)

    def forward(self, inputs: Tensor, attention: Tensor | None = None) -> Tensor:
        tokens = self.body(self.words(inputs), attention)
        return self.head(self.pool(tokens, attention))


def bilstm(
    shape: Shape,
    outputs: Size,
    *,
    vocabulary: Size | None = None,
    width: Size = 128,
    hidden: Size = 128,
    depth: Count = 1,
    pool: Literal["max", "mean"] = "max",
) -> nn.Module:
    """Bidirectional LSTM over token ids, pooled over the real tokens.

    The student of Tang et al., "Distilling Task-Specific Knowledge from BERT into Simple Neural
    Networks" (arXiv:1903.12136), but for its pooling, which there takes the last states.

    Args:
        shape: [S], of which nothing is needed: texts may have any length.
        outputs: number of classes, or of the embedding's values.
        vocabulary: how many token ids there are; the data's own where they tell.
        width: size of a token's vector.
        hidden: size of the state in each direction.
        depth: layers of the LSTM.
        pool: what becomes of the states: their maximum or their mean.

    Tap addresses: ``words`` ([N, S, width]), ``body`` ([N, S, 2 hidden]), ``pool`` ([N, 2 hidden])
    and ``head``.
    """
    if len(shape) != 1:
        raise UsageError(
            f"bilstm reads token ids of shape [S], but one input has shape {list(shape)}; use it "
            "with texts"
        )
    if vocabulary is None:
        raise UsageError(
            "bilstm: the data do not tell how many token ids there are; give vocabulary"
        )
    return BiLSTM(outputs, vocabulary, width, hidden, depth, pool)
