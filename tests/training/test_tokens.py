"""Features of tokens as terms of tasks whose examples count as one: padding is no part of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import attention_relation, cosine_distance, mse, relation_distance
from attar.models.projectors import linear
from attar.runtime import UsageError
from attar.training import Objective, Term

TASK = attar.tasks.TextClassification(classes=3)
LENGTHS = torch.tensor([2, 5, 1, 4])


class Words(nn.Module):
    """A vector for each token, and logits of their mean."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(20, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, inputs: Tensor, attention: Tensor) -> Tensor:
        found = self.body(self.words(inputs)).masked_fill(attention[..., None] == 0, 0.0)
        return self.head(found.sum(1) / attention.sum(1, keepdim=True))


def batch(more: int = 0) -> dict[str, Tensor]:
    width = int(LENGTHS.max()) + more
    real = torch.arange(width) < LENGTHS[:, None]
    inputs = torch.randint(
        1, 20, (4, int(LENGTHS.max())), generator=torch.Generator().manual_seed(0)
    )
    inputs = torch.nn.functional.pad(inputs, (0, more)).masked_fill(~real, 0)
    return {"inputs": inputs, "attention": real.long(), "labels": torch.arange(4) % 3}


def parts(term: Term, batch: dict[str, Tensor], padding: float | None = None) -> tuple[Tensor, ...]:
    """The term's value and the gradient of the student's weights."""
    student, teacher = Words(6, seed=1), Words(4, seed=2)
    if padding is not None:
        for model in (student, teacher):
            with torch.no_grad():
                model.words.weight[0] = padding
    addresses = [term.teacher] if isinstance(term.teacher, str) else list(term.teacher)
    told = attar.Teacher(teacher, TASK).open(addresses)(batch)
    torch.manual_seed(3)
    with Objective(student, TASK, [term], label_weight=0, example=(batch, told)) as objective:
        found = objective(batch, told)
        found.loss.backward()
        assert found.values[0].shape == (4,)
    return found.values[0], student.body.weight.grad


BODY = "feature:body"
TERMS = {
    "mse": Term(mse, BODY, BODY, projector=linear),
    "cosine": Term(cosine_distance, BODY, BODY, projector=linear),
    "relation": Term(partial(attention_relation, heads=2), BODY, BODY),
    "relations": Term(partial(attention_relation, heads=2), (BODY, "feature:words"),
                      (BODY, "feature:words")),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_more_padding_changes_neither_value_nor_gradient(name: str) -> None:
    few, many = (parts(TERMS[name], batch(more)) for more in (0, 6))
    torch.testing.assert_close(many, few, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_what_padding_holds_changes_neither_value_nor_gradient(name: str) -> None:
    plain, poisoned = (parts(TERMS[name], batch(3), padding) for padding in (0.0, 1e3))
    torch.testing.assert_close(poisoned, plain, rtol=0, atol=1e-6)


def test_the_value_of_a_text_is_the_mean_over_its_tokens() -> None:
    value, _ = parts(TERMS["mse"], batch(2))
    student, teacher = Words(6, seed=1), Words(4, seed=2)
    asked = batch(2)
    told = attar.Teacher(teacher, TASK).open([BODY])(asked)
    torch.manual_seed(3)
    with Objective(student, TASK, [TERMS["mse"]], label_weight=0, example=(asked, told)) as made:
        heard = made.bound[0].projector(made.signals(asked)[BODY])
    alone = [
        (heard[row, :count] - told[BODY][row, :count]).square().mean()
        for row, count in enumerate(LENGTHS.tolist())
    ]
    torch.testing.assert_close(value, torch.stack(alone).detach())


def test_a_relation_between_texts_is_not_one_between_their_tokens() -> None:
    with pytest.raises(UsageError, match="compares examples with one another"):
        parts(Term(relation_distance, BODY, BODY), batch())


def test_a_signal_without_tokens_is_compared_whole() -> None:
    """Also one whose second size is the number of tokens by chance."""
    student, teacher = Words(6, seed=1), Words(4, seed=2)
    asked = {name: value[:3, :3] for name, value in batch().items() if value.ndim == 2}
    told = attar.Teacher(teacher, TASK).open()(asked)
    with Objective(student, TASK, [Term(mse)], label_weight=0) as objective:
        value = objective(asked, told).values[0]
    gap = TASK.forward(student, asked) - told["output:logits"]
    torch.testing.assert_close(value, gap.square().mean(1).detach())
