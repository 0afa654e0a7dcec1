"""Text classification: padding on any side changes no number, and encoders teach smaller ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import attention_relation, kl_divergence, mse
from attar.models.projectors import linear
from attar.runtime import DataError, UsageError
from attar.signals import Hearing
from attar.tasks import restore
from attar.training import Term, adamw

VOCABULARY, CLASSES, PAD = 40, 3, 0
TASK = attar.tasks.TextClassification(classes=CLASSES)
LENGTHS = (5, 1, 9, 3, 7, 9)
HOW: dict[str, Any] = {"optimizer": partial(adamw, lr=3e-3), "batch_size": 20}


def bert(
    layers: int = 2, width: int = 16, seed: int = 0, kind: str = "Bert", **more: object
) -> nn.Module:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY, "num_labels": CLASSES, "max_position_embeddings": 40,
    }  # fmt: skip
    if kind == "DistilBert":
        sizes |= {"dim": width, "n_layers": layers, "n_heads": 2, "hidden_dim": 2 * width}
    else:
        sizes |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 2 * width}
    config = getattr(hf, f"{kind}Config")(**sizes, **more)
    return getattr(hf, f"{kind}ForSequenceClassification")(config).eval()


def texts(left: int = 0, right: int = 0, pad: int = PAD) -> dict[str, Tensor]:
    """Six texts of 1 to 9 tokens with so many more pads on either side."""
    generator = torch.Generator().manual_seed(0)
    whole = left + max(LENGTHS) + right
    inputs = torch.full((len(LENGTHS), whole), pad)
    attention = torch.zeros(len(LENGTHS), whole, dtype=torch.int64)
    for row, count in enumerate(LENGTHS):
        # On the left of the free space where right > left, else at its end.
        start = left + (max(LENGTHS) - count if left else 0)
        inputs[row, start : start + count] = torch.randint(3, VOCABULARY, (count,),
                                                           generator=generator)  # fmt: skip
        attention[row, start : start + count] = 1
    return {"inputs": inputs, "attention": attention, "labels": torch.arange(6) % CLASSES,
            "ids": torch.arange(6)}  # fmt: skip


class Bag(nn.Module):
    """The mean of the embeddings of the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor, attention: Tensor | None = None) -> Tensor:
        words = self.words(inputs)
        if attention is None:
            return self.classify(words.mean(1))
        words = words.masked_fill(attention.unsqueeze(2) == 0, 0.0)
        return self.classify(words.sum(1) / attention.sum(1, keepdim=True))


class Alone(Bag):
    """The same, but takes no mask."""

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(inputs)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return TASK.output(TASK.forward(model, batch), "logits")


@pytest.mark.parametrize("kind", ["Bert", "DistilBert", "Roberta"])
@pytest.mark.parametrize("sides", [(0, 7), (4, 0), (3, 5)], ids=str)
def test_padding_on_either_side_changes_no_number(kind: str, sides: tuple[int, int]) -> None:
    more = {"pad_token_id": PAD} if kind == "Roberta" else {}
    model = bert(kind=kind, **more)
    expected = torch.stack([
        model(texts()["inputs"][[row], :count]).logits[0] for row, count in enumerate(LENGTHS)
    ])  # fmt: skip
    torch.testing.assert_close(logits(model, texts()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, texts(*sides)), expected, rtol=0, atol=1e-6)


def test_what_stands_where_a_text_is_padded_is_not_looked_at() -> None:
    model, bag = bert(), Bag()
    expected = logits(model, texts())
    torch.testing.assert_close(logits(model, texts(pad=17)), expected, rtol=0, atol=1e-6)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        words[PAD] = 1e4
        torch.testing.assert_close(logits(model, texts(2, 3)), expected, rtol=0, atol=1e-6)
        plain = logits(bag, texts())
        bag.words.weight[PAD] = torch.nan
    torch.testing.assert_close(logits(bag, texts(2, 3)), plain, rtol=0, atol=1e-6)


def test_a_gap_inside_a_text_stays_where_it_is() -> None:
    model, batch = bert(), texts()
    batch["attention"][2, 4] = 0
    with torch.no_grad():
        expected = model(batch["inputs"], attention_mask=batch["attention"]).logits
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-6)


def test_a_module_is_given_the_mask_where_it_takes_one() -> None:
    bag, alone = Bag(), Alone()
    alone.load_state_dict(bag.state_dict())
    batch = texts()
    assert torch.equal(logits(bag, batch), bag(batch["inputs"], batch["attention"]))
    assert torch.equal(logits(alone, batch), alone(batch["inputs"]))
    del batch["attention"]
    assert torch.equal(logits(bag, batch), alone(batch["inputs"]))
    assert TASK.tokens(batch) is None
    chain = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Flatten(), nn.Linear(72, CLASSES))
    assert logits(chain, texts()).shape == (6, CLASSES)


@pytest.mark.parametrize("make", [bert, Bag, Alone])
def test_students_of_a_group_are_called_as_they_are_alone(make: Any) -> None:
    members = [make(), make()]
    found = TASK.forward(attar.Group(members, TASK), texts())
    assert torch.equal(found["1"], TASK.output(TASK.forward(members[1], texts()), "logits"))


def test_hidden_states_and_attentions_are_signals() -> None:
    model = bert(output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    addresses = ["output:hidden_states[1]", "output:attentions[0]", "feature:bert.encoder.layer.0"]
    with Hearing(model, TASK, addresses) as hearing:
        _, heard = hearing(texts(2, 0))
    out = model(texts()["inputs"], attention_mask=texts()["attention"])
    real = texts()["attention"].bool()
    assert torch.equal(TASK.tokens(texts(2, 0))[:, :9], real)
    torch.testing.assert_close(
        heard["output:hidden_states[1]"][:, :9][real], out.hidden_states[1][real]
    )
    torch.testing.assert_close(
        heard["feature:bert.encoder.layer.0"][:, :9][real], out.hidden_states[1][real]
    )
    assert heard["output:attentions[0]"].shape == (6, 2, 11, 11)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"reads token ids, int64 \[N, S\]"):
        TASK.forward(Bag(), {"inputs": torch.rand(2, 3)})
    batch = texts()
    batch["attention"] = batch["attention"][:, 1:]
    with pytest.raises(DataError, match=r"attention is \[6, 8\] where the inputs are \[6, 9\]"):
        TASK.forward(Bag(), batch)


def test_another_tokenizers_ids_are_explained() -> None:
    batch = texts()
    batch["inputs"][0, 0] = VOCABULARY + 5
    with pytest.raises(DataError, match="student cannot read texts of 9 tokens with ids up to 45"):
        TASK.try_forward(bert(), batch, "student")
    with pytest.raises(DataError, match=r"smaller length|cannot read inputs"):
        TASK.try_forward(bert(), texts(0, 60), "student")


def test_a_text_task_is_kept_beside_a_model() -> None:
    task = attar.tasks.TextClassification(classes=("sport", "tech"), label_smoothing=0.1)
    assert restore(task.describe()).names() == ["sport", "tech"]
    assert isinstance(restore(task.describe()), attar.tasks.TextClassification)


def corpus() -> tuple[attar.data.Source, attar.data.Source]:
    """Texts of random words; the class is which of three words stands in it."""
    generator = torch.Generator().manual_seed(1)
    rows, labels = [], []
    for index in range(240):
        count = int(torch.randint(3, 10, (), generator=generator))
        ids = torch.randint(6, VOCABULARY, (count,), generator=generator)
        ids[int(torch.randint(count, (), generator=generator))] = 3 + index % CLASSES
        rows.append(" ".join(map(str, ids.tolist())))
        labels.append(index % CLASSES)

    def source(part: slice) -> attar.data.Source:
        return attar.data.sentences(
            rows[part], lambda text: [int(word) for word in text.split()],
            torch.tensor(labels[part]), classes=CLASSES,
        )  # fmt: skip

    return source(slice(180)), source(slice(180, None))


def last(model: nn.Module) -> list[str]:
    layer = f"bert.encoder.layer.{model.config.num_hidden_layers - 1}.attention.self"
    return [f"feature:{layer}.{name}" for name in ("query", "key", "value")]


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """A teacher of four layers that knows the words."""
    model = bert(4, 32, seed=1)
    attar.train(model, corpus()[0], TASK, epochs=8, **HOW)
    assert attar.evaluate(model, corpus()[1], TASK)["accuracy"] > 0.8
    return model


TERMS: dict[str, Callable[[nn.Module, nn.Module], Term]] = {
    "MiniLM v2": lambda s, t: Term(partial(attention_relation, heads=4), last(s), last(t)),
    "TinyBERT": lambda *_: Term(
        mse, "feature:bert.encoder.layer.0", "feature:bert.encoder.layer.1", projector=linear
    ),
    "logits": lambda *_: Term(partial(kl_divergence, temperature=2.0)),
}


@pytest.mark.parametrize("name", TERMS)
def test_four_layers_teach_two(name: str, taught: nn.Module) -> None:
    """By relations of query, key and value, by hidden states of another width, and by logits."""
    student = bert(2, 16, seed=2)
    records: list[dict[str, Any]] = []
    attar.fit(
        student, taught, corpus()[0], TASK, [TERMS[name](student, taught)], label_weight=0,
        epochs=5, log=records.append, log_every=1, log_gradients=True, **HOW,
    )  # fmt: skip
    losses = [record["loss"] for record in records if "loss" in record]
    assert sum(losses[-9:]) < 0.9 * sum(losses[:9])
    norms = [norm for record in records for norm in record.get("gradients", {}).values()]
    assert len(norms) == len(losses)
    assert all(0 < norm < float("inf") for norm in norms)


def test_a_student_of_logits_and_hidden_states_reads_texts(taught: nn.Module) -> None:
    train, test = corpus()
    student = bert(2, 16, seed=2)
    before = attar.evaluate(student, test, TASK)["accuracy"]
    terms = [TERMS[name](student, taught) for name in ("TinyBERT", "logits")]
    attar.distill(student, taught, train, TASK, terms, label_weight=0, epochs=8, **HOW)
    assert attar.evaluate(student, test, TASK)["accuracy"] > before + 0.2


def test_a_teacher_of_texts_is_asked_once(tmp_path: Any) -> None:
    """A row is the same whatever texts it was batched with, so its answer is found again."""
    train, _ = corpus()
    teacher, soft = bert(2, 32, seed=1), Term(kl_divergence)
    cached = attar.cache(attar.Teacher(teacher, TASK), train, TASK, into=tmp_path / "asked")
    live, kept = bert(1, 16, seed=2), bert(1, 16, seed=2)
    options: dict[str, Any] = {"label_weight": 0, "epochs": 1, "batch_size": 50}
    attar.distill(live, teacher, train, TASK, [soft], **options)
    attar.distill(kept, cached, train, TASK, [soft], **options)
    for one, other in zip(live.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_no_family_is_built_by_the_mean_of_tokens() -> None:
    with pytest.raises(UsageError, match="token ids, which have no mean"):
        attar.models.build("mlp", data=corpus()[0])
