"""Sentence embeddings: pooling, ranks and neighbours against other programs, and verdicts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from attar.losses import attention_relation, mse, relation_distance, similarity_preserving
from attar.models.projectors import linear
from attar.runtime import DataError, PreflightError
from attar.tasks import SentenceEmbedding, restore, similarity_agreement
from attar.tasks.similarity import MOST, paired, spearman
from attar.training import Term, adamw

VOCABULARY = 40
TASK = SentenceEmbedding()
HOW: dict[str, Any] = {"optimizer": partial(adamw, lr=3e-3), "batch_size": 24}


def bert(layers: int = 2, width: int = 16, seed: int = 0, **more: object) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=40, **more,
    )  # fmt: skip
    return hf.BertModel(config).eval()


def words(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def texts(count: int, seed: int = 0) -> list[str]:
    """Of 2 to 9 words; the first says which half of the others are from."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        topic, length = draw.integers(2), draw.integers(1, 9)
        tail = 4 + 18 * topic + draw.integers(18, size=length)
        found.append(" ".join(map(str, [2 + topic, *tail])))
    return found


def embedded(model: nn.Module, batch: dict[str, Tensor], task: SentenceEmbedding = TASK) -> Tensor:
    with torch.no_grad():
        return task.output(task.forward(model, batch), "embedding")


def batch(more: int = 0) -> dict[str, Tensor]:
    found = attar.data.sentences(texts(8), words).rows(torch.arange(8))
    wider = {name: F.pad(found[name], (0, more)) for name in ("inputs", "attention")}
    return found | wider


class Gives(nn.Module):
    """Always the same answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor) -> Any:
        return self.answer


# Pooling


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedding_is_that_of_the_text_alone(pooling: Any, normalize: bool) -> None:
    task, model = SentenceEmbedding(pooling=pooling, normalize=normalize), bert()
    alone = []
    for text in texts(8):
        hidden = model(torch.tensor([words(text)])).last_hidden_state[0]
        vector = hidden.mean(0) if pooling == "mean" else hidden[0]
        alone.append(vector / vector.norm() if normalize else vector)
    expected = torch.stack(alone).detach()
    torch.testing.assert_close(embedded(model, batch(), task), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedded(model, batch(5), task), expected, rtol=0, atol=1e-6)
    turned = batch(5)
    for row, count in enumerate(turned["attention"].sum(1).tolist()):
        for name in ("inputs", "attention"):
            turned[name][row] = turned[name][row].roll(turned[name].shape[1] - count)
    torch.testing.assert_close(embedded(model, turned, task), expected, rtol=0, atol=1e-6)


def test_hidden_states_of_padding_may_be_anything() -> None:
    asked = batch(3)
    hidden = torch.randn(8, asked["inputs"].shape[1], 5)
    expected = embedded(Gives(hidden), asked)
    hidden[asked["attention"] == 0] = torch.nan
    found = embedded(Gives(hidden), asked)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8))


def test_a_gradient_passes_over_padding() -> None:
    asked = batch(3)
    hidden = torch.randn(8, asked["inputs"].shape[1], 5)
    hidden[asked["attention"] == 0] = torch.nan
    hidden.requires_grad_()
    TASK.output(TASK.forward(Gives(hidden), asked), "embedding").square().sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert not hidden.grad[asked["attention"] == 0].any()


def test_an_embedding_is_found_in_any_common_form() -> None:
    vectors, hidden = torch.randn(8, 4), torch.randn(8, batch()["inputs"].shape[1], 4)
    unit = F.normalize(vectors, dim=1)
    strict = SentenceEmbedding(pooling="none")
    for task in (TASK, strict):
        for form in (vectors, (vectors, hidden), {"embedding": vectors}):
            assert torch.equal(embedded(Gives(form), batch(), task), unit)
    for name in ("sentence_embedding", "text_embeds", "pooler_output"):
        both = {name: vectors, "last_hidden_state": hidden}
        assert torch.equal(embedded(Gives(both), batch(), strict), unit)
        assert torch.equal(embedded(Gives(both), batch()), embedded(Gives(hidden), batch()))
    for model, task in ((Gives(hidden), strict), (Gives({"a": vectors}), TASK)):
        with pytest.raises(DataError, match="a sentence embedding needs"):
            embedded(model, batch(), task)


def test_half_precision_is_pooled_in_whole() -> None:
    exact = torch.randn(8, batch()["inputs"].shape[1], 64)
    found = embedded(Gives(exact.bfloat16()), batch())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


def test_a_task_is_kept_beside_a_model() -> None:
    task = SentenceEmbedding(pooling="cls", normalize=False)
    assert restore(task.describe()) == task
    with pytest.raises(DataError, match="choose mean, cls or none"):
        SentenceEmbedding(pooling="max")  # type: ignore[arg-type]


# Ranks and neighbours


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    one, two = draw.normal(size=(2, 200))
    two = one + two
    if ties:
        one, two = one.round(), two.round()
    expected = stats.spearmanr(one, two).statistic
    assert spearman(one, two) == pytest.approx(expected, abs=1e-12)
    assert spearman(torch.from_numpy(one), torch.from_numpy(two)) == pytest.approx(expected)
    assert spearman(one, np.zeros(200)) == 0.0


def by_hand(student: Tensor, teacher: Tensor, k: int) -> float:
    """Recall by sorting every row whole."""
    hits = 0
    sides = [F.normalize(side, dim=1).double() for side in (student, teacher)]
    for row in range(len(student)):
        near = []
        for side in sides:
            order = (side @ side[row]).argsort(descending=True).tolist()
            near.append({other for other in order if other != row} and
                        [other for other in order if other != row][:k])  # fmt: skip
        hits += len(set(near[0]) & set(near[1]))
    return hits / (k * len(student))


@pytest.mark.parametrize("block", [None, 100])
def test_agreement_is_what_scipy_and_sorting_say(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = pytest.importorskip("scipy.stats")
    if block is not None:  # a row at a time
        monkeypatch.setattr("attar.tasks.similarity._BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(60, 8, generator=generator)
    student = torch.cat([teacher, torch.randn(60, 3, generator=generator)], 1)
    found = similarity_agreement(student, teacher, neighbours=(1, 5, 10, 60))
    assert set(found) == {"similarity_spearman", "recall_at_1", "recall_at_5", "recall_at_10"}
    for k in (1, 5, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(by_hand(student, teacher, k))
        assert 0.2 < found[f"recall_at_{k}"] < 0.9
    one, two = (np.corrcoef(F.normalize(s, dim=1)) for s in (student, teacher))
    one, two = (F.normalize(s, dim=1) @ F.normalize(s, dim=1).T for s in (student, teacher))
    pairs = torch.triu_indices(60, 60, 1)
    expected = stats.spearmanr(one[*pairs], two[*pairs]).statistic
    assert found["similarity_spearman"] == pytest.approx(expected, abs=1e-9)


def test_many_rows_are_compared_by_pairs_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(900, 8, generator=generator)
    student = teacher + 0.5 * torch.randn(900, 8, generator=generator)
    whole = similarity_agreement(student, teacher, neighbours=())["similarity_spearman"]
    monkeypatch.setattr("attar.tasks.similarity.MOST", 300)
    drawn = similarity_agreement(student, teacher, neighbours=())["similarity_spearman"]
    assert drawn != whole
    assert drawn == pytest.approx(whole, abs=0.01)
    assert drawn == similarity_agreement(student, teacher)["similarity_spearman"]
    assert MOST == 2_000


def test_what_cannot_be_compared_is_refused() -> None:
    for student, teacher in ((torch.ones(3, 2), torch.ones(4, 2)), (torch.ones(1, 2),) * 2):
        with pytest.raises(ValueError, match="same 2 rows or more"):
            similarity_agreement(student, teacher)


def test_pairs_lie_within_groups_and_each_is_of_two_rows() -> None:
    rows = torch.randn(70, 4)
    ids = torch.arange(70)
    ids[10:40] = torch.arange(30)  # drawn twice
    cosines, apart = paired(rows, ids)
    assert len(cosines) == len(apart) == 4 * 16 * 15 // 2 + 6 * 5 // 2
    table = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    places = torch.triu_indices(70, 70, 1)
    known = table[*places]
    nearest = (cosines[:, None] - known[None]).abs().min(1)
    assert float(nearest.values.max()) < 1e-6
    same = ids[places[0]] == ids[places[1]]
    assert torch.equal(apart, ~same[nearest.indices])
    assert not apart.all()


# Labels, and data without them


def pairs(labels: Tensor | None = None) -> attar.data.Source:
    return attar.data.sentences(texts(40), words, labels, others=texts(40, seed=1))


def test_the_metric_of_pairs_is_the_rank_correlation_with_their_labels() -> None:
    stats = pytest.importorskip("scipy.stats")
    labels = torch.rand(40, generator=torch.Generator().manual_seed(0))
    model = bert()
    found = attar.evaluate(model, pairs(labels), TASK, batch_size=7)
    first = attar.data.sentences(texts(40), words).rows(torch.arange(40))
    second = attar.data.sentences(texts(40, seed=1), words).rows(torch.arange(40))
    cosines = (embedded(model, first) * embedded(model, second)).sum(1)
    assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, labels).statistic)
    asked = pairs(labels).rows(torch.arange(40))
    loss = TASK.loss(TASK.forward(model, asked), asked)
    torch.testing.assert_close(loss, (cosines - labels).square(), rtol=1e-4, atol=1e-6)


def test_a_student_learns_similarities_of_pairs() -> None:
    one, two = ([int(text[0]) for text in texts(120, seed=s)] for s in (0, 1))
    labels = torch.tensor([float(a == b) for a, b in zip(one, two, strict=True)])
    data = attar.data.sentences(texts(120), words, labels, others=texts(120, seed=1))
    model = bert(1)
    before = attar.evaluate(model, data, TASK)["spearman"]
    attar.train(model, data, TASK, epochs=6, **HOW)
    assert attar.evaluate(model, data, TASK)["spearman"] > max(before + 0.2, 0.5)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (lambda: pairs(5 * torch.rand(40)), "divide them by the largest"),
        (lambda: attar.data.sentences(texts(4), words, torch.arange(4), classes=4), "are classes"),
        (lambda: attar.data.sentences(texts(4), words, torch.arange(4)), "are classes"),
    ],
)
def test_labels_that_are_no_similarities_are_refused(source: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        TASK.fitted(source())


def test_rows_without_a_meaning_for_the_metric_are_explained() -> None:
    model = bert()
    rows = attar.evaluation.collect(model, attar.data.sentences(texts(20), words), TASK)
    assert set(rows) == {"embedding", "row"}
    with pytest.raises(DataError, match="give the teacher's embeddings as labels"):
        TASK.primary(rows)
    with pytest.raises(DataError, match="give the second texts"):
        TASK.primary(rows | {"labels": torch.rand(20, 1)})
    with pytest.raises(DataError, match="set label_weight: 0"):
        TASK.loss(embedded(model, batch()), {"labels": torch.rand(8, 7)})


def test_embeddings_as_labels_are_a_metric_against_a_teacher() -> None:
    """Of any width: the teacher itself has 1, a constant 0, an unlike model something between."""
    teacher, other = bert(2, 32, seed=1), bert(2, 16, seed=2)
    plain = attar.data.sentences(texts(100), words)
    told = attar.evaluation.collect(teacher, plain, TASK)["embedding"]
    data = attar.data.sentences(texts(100), words, told)
    found = attar.evaluate(teacher, data, TASK)
    assert found["spearman"] == pytest.approx(1)
    assert found["recall_at_1"] == found["recall_at_10"] == 1
    rows = attar.evaluation.collect(other, data, TASK)
    cosines, _ = paired(rows["embedding"], rows["row"])
    wanted, _ = paired(told, rows["row"])
    assert TASK.primary(rows) == pytest.approx(spearman(cosines, wanted))
    constant = rows | {"embedding": torch.ones(100, 3)}
    assert TASK.primary(constant) == TASK.floor(told) == 0
    asked = data.rows(torch.arange(100))
    loss = TASK.loss(TASK.forward(teacher, asked), asked)
    torch.testing.assert_close(loss, torch.zeros(100), rtol=0, atol=1e-6)


def test_a_row_that_is_drawn_twice_says_nothing_about_a_model() -> None:
    """Unlike models have no correlation, in resamples either."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 64, 16, generator=generator)
    rows = {"embedding": one, "labels": two, "row": torch.arange(64)}
    chosen = torch.randint(8, (64,), generator=generator)
    drawn = {name: value[chosen] for name, value in rows.items()}
    assert abs(TASK.primary(drawn)) < 0.5
    unaware = drawn | {"row": torch.arange(64)}
    assert TASK.primary(unaware) > abs(TASK.primary(drawn)) + 0.1


# Distillation


def hidden(model: nn.Module, layer: int) -> str:
    return f"feature:encoder.layer.{layer}"


def relations(model: nn.Module) -> list[str]:
    path = f"encoder.layer.{model.config.num_hidden_layers - 1}.attention.self"
    return [f"feature:{path}.{name}" for name in ("query", "key", "value")]


def terms(name: str, student: nn.Module, teacher: nn.Module) -> list[Term]:
    return {
        "projected": [Term(mse, projector=linear)],
        "relation": [Term(relation_distance), Term(similarity_preserving, weight=10.0)],
        "hidden": [Term(mse, hidden(student, 0), hidden(teacher, 1), projector=linear)],
        "attention": [
            Term(partial(attention_relation, heads=4), relations(student), relations(teacher))
        ],
    }[name]


@pytest.mark.parametrize("name", ["projected", "relation", "hidden", "attention"])
def test_a_wide_teacher_teaches_a_narrow_student_without_labels(name: str) -> None:
    teacher, student = bert(4, 32, seed=1, initializer_range=0.2), bert(2, 16, seed=2)
    data = attar.data.sentences(texts(96), words)
    records: list[dict[str, Any]] = []
    attar.fit(
        student, teacher, data, TASK, terms(name, student, teacher), label_weight=0, epochs=6,
        log=records.append, log_every=1, log_gradients=True, **HOW,
    )  # fmt: skip
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    norms = [norm for record in records for norm in record.get("gradients", {}).values()]
    assert norms
    assert all(0 < norm < float("inf") for norm in norms)


def test_a_verdict_without_labels_is_about_the_teacher() -> None:
    """Its embeddings are the labels: the student is compared with its own start."""
    teacher, student = bert(2, 32, seed=1, initializer_range=0.2), bert(1, 16, seed=2)
    start = copy.deepcopy(student)
    train = attar.data.sentences(texts(160), words)
    held = texts(60, seed=9)
    told = attar.evaluation.collect(teacher, attar.data.sentences(held, words), TASK)["embedding"]
    test = attar.data.sentences(held, words, told)
    attar.distill(
        student, teacher, train, TASK, terms("relation", student, teacher), label_weight=0,
        epochs=8, validation=test, **HOW,
    )  # fmt: skip
    models = {"teacher": teacher, "before": start, "student": student}
    verdict = attar.compare(
        models, test, TASK, baseline="before", distilled="student", resamples=200,
        measure_cost=False,
    )  # fmt: skip
    assert verdict.metric == "spearman"
    assert verdict.outcome == "better"
    assert verdict.difference.test == "bootstrap"
    assert verdict.models["teacher"].primary.value == pytest.approx(1)
    agreement = verdict.models["distilled"].agreement
    assert set(agreement) == {"similarity_spearman", "recall_at_1", "recall_at_10"}
    assert verdict.models["distilled"].retention.value == pytest.approx(
        verdict.models["distilled"].primary.value
    )


def test_a_softmax_over_an_embedding_is_refused() -> None:
    teacher, student = bert(2, 16, seed=1), bert(1, 16, seed=2)
    data = attar.data.sentences(texts(20), words)
    with pytest.raises(PreflightError, match="each is an answer of its own"):
        attar.distill(
            student, teacher, data, TASK, [Term(attar.losses.kl_divergence)], label_weight=0
        )
