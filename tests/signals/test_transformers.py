"""Hidden states and attention projections of transformers' models are signals like any other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import attention_relation, cosine_distance, mse
from attar.models.projectors import linear
from attar.runtime import PreflightError
from attar.signals import Hearing
from attar.training import Objective, Term, check

hf = pytest.importorskip("transformers")
TASK = attar.tasks.ImageClassification(classes=3)


def vit(width: int = 16, layers: int = 3, seed: int = 0, **more: object) -> nn.Module:
    torch.manual_seed(seed)
    config = hf.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=2 * width, image_size=8, patch_size=4, num_channels=1, num_labels=3,
        **more,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"inputs": torch.randn(6, 1, 8, 8, generator=generator), "labels": torch.arange(6) % 3}


def heard(model: nn.Module, *addresses: str) -> dict[str, Tensor]:
    with Hearing(model.eval(), TASK, addresses) as hearing:
        return hearing(batch())[1]


def test_hidden_states_are_what_the_layers_return() -> None:
    model = vit(output_hidden_states=True)
    paths = [name for name, _ in model.named_modules() if name.endswith("layers.1")]
    found = heard(model, f"feature:{paths[0]}", "output:hidden_states[2]", "output:logits")
    out = model(batch()["inputs"])
    torch.testing.assert_close(found["output:hidden_states[2]"], out.hidden_states[2])
    torch.testing.assert_close(found[f"feature:{paths[0]}"], out.hidden_states[2])
    torch.testing.assert_close(found["output:logits"], out.logits)


def test_a_part_of_an_output_that_is_not_there_is_said() -> None:
    with pytest.raises(PreflightError, match="where its config says output_hidden_states"):
        heard(vit(), "output:hidden_states[2]")
    with pytest.raises(PreflightError, match="no such part"):
        heard(vit(output_hidden_states=True), "output:hidden_states[9]")


def projections(model: nn.Module) -> list[str]:
    """Addresses of query, key and value of the last layer."""
    kinds = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)
             and n.rpartition(".")[2] in kinds]  # fmt: skip
    return [f"feature:{name}" for name in found[-3:]]


def test_attention_relations_teach_a_narrow_student() -> None:
    """MiniLM v2: relations of query, key and value, of nets that share no width."""
    teacher, student = vit(32, 4, seed=1), vit(16, 2, seed=2)
    term = Term(
        partial(attention_relation, heads=4), projections(student), projections(teacher)
    )  # fmt: skip
    told = attar.Teacher(teacher, TASK).open(projections(teacher))(batch())
    objective = Objective(student, TASK, [term], label_weight=0)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    values = []
    for _ in range(30):
        loss = objective(batch(), told).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0] / 2


def test_a_whole_stage_on_hidden_states_checks(digits: attar.data.Splits) -> None:
    task = attar.tasks.ImageClassification()
    teacher, student = vit(32, 4, seed=1), vit(16, 2, seed=2)
    for model in (teacher, student):
        model.classifier = nn.Linear(model.config.hidden_size, 10)
    names = [[n for n, _ in m.named_modules() if n.rpartition(".")[0].endswith("layers")]
             for m in (teacher, student)]  # fmt: skip
    terms = [
        Term(mse, f"feature:{names[1][1]}", f"feature:{names[0][3]}", projector=linear),
        Term(cosine_distance, f"feature:{names[1][0]}", f"feature:{names[0][1]}",
             projector=linear),
        Term(mse, "grad:top/inputs"),
    ]  # fmt: skip
    plan = check(student, teacher, digits.train, task, terms)
    assert [t.student_shape for t in plan.terms[:2]] == [[128, 5, 16]] * 2
    assert all(norm > 0 for norm in plan.gradients.values())


def test_a_language_model_is_differentiated_for_its_embeddings() -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).eval()
    asked = {"inputs": torch.randint(50, (4, 7)), "labels": torch.arange(4) % 3}
    with Hearing(model, TASK, ["grad:loss/embeddings"]) as hearing:
        _, found = hearing(asked)
    words = model.get_input_embeddings()
    gradient = found["grad:loss/embeddings"]
    assert gradient.shape == (4, 7, 16)
    # What the table's own gradient is: that of every word, summed where it stands.
    loss = torch.nn.functional.cross_entropy(
        model(asked["inputs"]).logits, asked["labels"], reduction="sum"
    )
    loss.backward()
    expected = torch.zeros_like(words.weight).index_add_(
        0, asked["inputs"].flatten(), gradient.detach().flatten(0, 1)
    )
    torch.testing.assert_close(words.weight.grad, expected, rtol=1e-4, atol=1e-6)
