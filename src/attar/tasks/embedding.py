"""Sentence embeddings: a vector for each text, near to those of texts that mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.runtime import DataError
from attar.tasks.similarity import paired, similarity_agreement, spearman
from attar.tasks.task import Batch, Rows
from attar.tasks.texts import Texts, aligned, read

Pooling = Literal["mean", "cls", "none"]

_POOLED = ("embedding", "sentence_embedding", "text_embeds", "pooler_output")


@dataclass(frozen=True)
class SentenceEmbedding(Texts):
    """A vector for each text, whose cosines say which texts are alike.

    A batch holds ``inputs`` int64 [N, S], token ids, and ``attention`` [N, S], 1 at each real
    token, as ``attar.data.sentences`` makes it; with pairs also ``other`` and ``other_attention``,
    which the model reads in a second call. The model gives hidden states [N, S, D], which are
    pooled, or vectors [N, D]. A student's D may differ from its teacher's.

    Labels are not needed to distil. Where data have some they are, [N, 1], how similar the two
    texts of a pair are, -1 to 1; or, [N, D], embeddings to agree with, such as a teacher's, as
    ``attar.evaluation.collect(teacher, source, task)["embedding"]`` gives them. The metric is then
    Spearman's rank correlation of cosines: with the labels of the pairs, or with the cosines of the
    labels over all pairs of rows within groups of 16 that are drawn with a fixed seed. A constant
    answer has 0.

    Args:
        pooling: ``mean`` over the real tokens, the first one (``cls``), or ``none``: the vector
            that the model itself gives. What is a vector already is taken as it is by ``mean`` too.
        normalize: divide each vector by its length.
    """

    pooling: Pooling = "mean"
    normalize: bool = True

    outputs: ClassVar[tuple[str, ...]] = ("embedding",)
    metric: ClassVar[str] = "spearman"
    competing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls", "none"):
            raise DataError(f"pooling is {self.pooling!r}; choose mean, cls or none")

    @property
    def width(self) -> int | None:
        """Not known: each model has its own."""
        return None

    def fitted(self, source: Any) -> Self:
        """This task, after a check of what labels there are."""
        labels = source.labels
        if labels is None:
            return self
        if not labels.is_floating_point() or source.classes is not None:
            raise DataError(
                f"{source.name}: its labels are classes; use text-classification, or leave them out"
            )
        if labels.shape[1] == 1 and float(labels.abs().max()) > 1:
            raise DataError(
                f"{source.name}: its similarities go up to {float(labels.abs().max()):g}, and "
                "cosines from -1 to 1; divide them by the largest there can be"
            )
        return self

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """What *model* says by name, and ``embedding`` [N, D]; ``other`` of the second texts."""
        found = self._embedded(model, *aligned(batch))
        if "other" in batch:
            second = self._embedded(model, *aligned(batch, "other", "other_attention"))
            found["other"] = second["embedding"]
        return found

    def head(self, model: nn.Module) -> nn.Linear | None:
        """None: an embedding is pooled."""
        return None

    def loss(self, out: Any, batch: Batch) -> Tensor:
        """Of a pair (cosine - label)^2, of an embedding 1 - cosine with the label; [N]."""
        embedding, labels = self.output(out, "embedding"), batch["labels"]
        if "other" in batch:
            gap = F.cosine_similarity(embedding, self.output(out, "other")) - labels[:, 0]
            return gap.square()
        if embedding.shape != labels.shape:
            raise DataError(
                f"the embeddings are {list(embedding.shape)} and their labels "
                f"{list(labels.shape)}, which cannot be compared one by one; set label_weight: 0 "
                "and match a teacher by a term"
            )
        return 1 - F.cosine_similarity(embedding, labels)

    def rows(self, out: Any, batch: Batch) -> Rows:
        """``embedding`` float32 [N, D], ``row`` the id, and of pairs ``similarity`` [N]; labels."""
        embedding = self.output(out, "embedding").detach().float()
        row = batch.get("ids", torch.arange(len(embedding), device=embedding.device))
        kept = {"embedding": embedding, "row": row}
        if "other" in batch:
            other = self.output(out, "other").detach().float()
            kept["similarity"] = F.cosine_similarity(embedding, other)
        return kept | ({"labels": batch["labels"]} if "labels" in batch else {})

    def score(self, rows: Rows) -> dict[str, float]:
        """Spearman's correlation; with embeddings as labels recall of their neighbours too."""
        found = {"spearman": self.primary(rows)}
        if "similarity" in rows:
            return found
        recall = similarity_agreement(rows["embedding"], rows["labels"])
        return found | {k: v for k, v in recall.items() if k.startswith("recall")}

    def primary(self, rows: Rows) -> float:
        """Spearman's rank correlation of cosines with the labels, or with the labels' cosines."""
        if "labels" not in rows:
            raise DataError(
                "these rows have no labels to score against; compare them with the teacher's by "
                "task.agreement, or give the teacher's embeddings as labels"
            )
        if "similarity" in rows:
            return spearman(rows["similarity"], rows["labels"][:, 0])
        if rows["labels"].shape[1] == 1:
            raise DataError(
                "each row has one number as label and one text; give the second texts "
                "(attar.data.sentences(..., others=...)), or embeddings as labels"
            )
        cosines, apart = paired(rows["embedding"], rows["row"])
        wanted, _ = paired(rows["labels"], rows["row"])
        return spearman(cosines[apart], wanted[apart])

    def agreement(self, rows: Rows, teacher_rows: Rows) -> dict[str, float]:
        """Whether the teacher sees the same texts as alike: ``similarity_agreement``."""
        return similarity_agreement(rows["embedding"], teacher_rows["embedding"])

    def floor(self, labels: Tensor) -> float:
        """0: equal embeddings order nothing."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """How hidden states become an embedding."""
        return super().describe() | {"pooling": self.pooling, "normalize": self.normalize}

    def _embedded(
        self, model: nn.Module, inputs: Tensor, attention: Tensor | None
    ) -> dict[str, Any]:
        out = read(model, inputs, attention)
        named = dict(out) if isinstance(out, Mapping) else {}
        found = self._whole(out)
        # Halves are too coarse for the mean of many, and for the length of a vector.
        found = found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
        found = self._pooled(found, attention)
        return {**named, "embedding": F.normalize(found, dim=1) if self.normalize else found}

    def _whole(self, out: Any) -> Tensor:
        """The hidden states [N, S, D] or vectors [N, D] in what the model gave."""
        if isinstance(out, tuple | list) and out:
            out = out[0]
        names = _POOLED if self.pooling == "none" else ("embedding", "last_hidden_state")
        found = out if isinstance(out, Tensor) else _named(out, names)
        wanted = (2,) if self.pooling == "none" else (2, 3)
        if isinstance(found, Tensor) and found.ndim in wanted:
            return found
        given = type(out).__name__ if found is None else f"a tensor {list(found.shape)}"
        hidden = "" if self.pooling == "none" else "hidden states [N, S, D] or "
        raise DataError(
            f"the model gives {given}, and with pooling {self.pooling} a sentence embedding needs "
            f"{hidden}vectors [N, D]; return these, or choose another pooling"
        )

    def _pooled(self, hidden: Tensor, attention: Tensor | None) -> Tensor:
        if hidden.ndim == 2:
            return hidden
        if self.pooling == "cls":
            return hidden[:, 0]
        if attention is None:
            return hidden.mean(1)
        real = attention.bool()[..., None]
        # Not a product: what padding holds may be anything.
        total = hidden.masked_fill(~real, 0.0).sum(1)
        return total / real.sum(1).clamp(min=1)


def _named(out: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        found = out.get(name) if isinstance(out, Mapping) else getattr(out, name, None)
        if found is not None:
            return found
    return None
