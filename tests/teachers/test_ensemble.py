"""Several teachers answer as one, weighted as the papers say."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence
from attar.runtime import PreflightError, UsageError
from attar.teachers import adapted, learned_weights
from attar.teachers.weighting import (
    confidence_weights,
    entropy_weights,
    most_likely_weights,
)
from attar.training.checkpoint import teacher_digest

TASK = attar.tasks.TabularClassification(classes=("a", "b", "c", "d"))
K, N, C = 3, 6, 4


class Says(nn.Module):
    """Answers the same logits [N, C] whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, inputs: Tensor) -> Any:
        return self.logits


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(K, N, C, dtype=torch.float64) * 3


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def answer(logits: Tensor, labels: Tensor | None = LABELS, **options: Any) -> Tensor:
    """The combination's probabilities."""
    ensemble = attar.Ensemble([Says(one) for one in logits], TASK, **options)
    batch = {"inputs": torch.zeros(logits.shape[1], 1)}
    batch |= {} if labels is None else {"labels": labels}
    return ensemble(batch)["output:logits"]


def test_the_mean_is_one_of_probabilities(logits: Tensor) -> None:
    expected = sum(one.softmax(-1) for one in logits) / K
    torch.testing.assert_close(answer(logits, None).exp(), expected)


def test_at_the_losss_temperature_its_gradient_is_that_of_the_mean_loss(logits: Tensor) -> None:
    """AVER, the mean of K losses, is one loss against the ensemble but for a constant."""
    student = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    loss = partial(kl_divergence, temperature=4.0)
    mean = sum(loss(student, one).sum() for one in logits) / K
    joint = loss(student, answer(logits, temperature=4.0)).sum()
    (expected,) = torch.autograd.grad(mean, student)
    (found,) = torch.autograd.grad(joint, student)
    torch.testing.assert_close(found, expected)
    (other,) = torch.autograd.grad(loss(student, answer(logits)).sum(), student)
    assert not torch.allclose(other, expected, rtol=0.01)


def test_entropy_weights_are_the_papers(logits: Tensor) -> None:
    """EBKD: 1 - H_k / sum H, written as sums, and made to sum to one."""
    weights = torch.zeros(K, N, dtype=torch.float64)
    for row in range(N):
        own = [
            -sum(float(p) * math.log(float(p)) for p in logits[k, row].softmax(0)) for k in range(K)
        ]
        for k in range(K):
            weights[k, row] = (1 - own[k] / sum(own)) / (K - 1)
    torch.testing.assert_close(entropy_weights(logits.log_softmax(-1)), weights)
    expected = (weights[..., None] * logits.softmax(-1)).sum(0)
    torch.testing.assert_close(answer(logits, None, weighting="entropy").exp(), expected)


@pytest.mark.parametrize("weighting", ["entropy", "confidence"])
def test_weights_are_found_at_temperature_one_whatever_the_means(
    logits: Tensor, weighting: str
) -> None:
    logs = logits.log_softmax(-1)
    weights = entropy_weights(logs) if weighting == "entropy" else confidence_weights(logs, LABELS)
    expected = (weights[..., None] * (logits / 4).softmax(-1)).sum(0)
    said = answer(logits, weighting=weighting, temperature=4.0)
    torch.testing.assert_close((said / 4).exp(), expected)


def test_answers_of_narrow_teachers_are_joined_in_float32(logits: Tensor) -> None:
    narrow = logits.bfloat16()
    said = answer(narrow)
    assert said.dtype == torch.float32
    torch.testing.assert_close(said, answer(narrow.float()))


def test_members_that_are_certain_weigh_the_same() -> None:
    certain = torch.tensor([[[1e4, 0.0, 0.0, 0.0]], [[0.0, 1e4, 0.0, 0.0]]])
    assert torch.equal(entropy_weights(certain.log_softmax(-1)), torch.full((2, 1), 0.5))
    said = answer(certain, None, weighting="entropy").exp()
    torch.testing.assert_close(said, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_confidence_weights_are_the_papers(logits: Tensor) -> None:
    """CA-MKD: (1 - softmax_k(CE_k)) / (K - 1)."""
    weights = torch.zeros(K, N, dtype=torch.float64)
    for row, label in enumerate(LABELS.tolist()):
        far = [-math.log(float(logits[k, row].softmax(0)[label])) for k in range(K)]
        for k in range(K):
            weights[k, row] = (1 - math.exp(far[k]) / sum(map(math.exp, far))) / (K - 1)
    found = confidence_weights(logits.log_softmax(-1), LABELS)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(found.sum(0), torch.ones(N, dtype=torch.float64))
    shares = torch.nn.functional.one_hot(LABELS, C).float()
    torch.testing.assert_close(confidence_weights(logits.log_softmax(-1), shares), weights)
    expected = (weights[..., None] * logits.softmax(-1)).sum(0)
    torch.testing.assert_close(answer(logits, weighting="confidence").exp(), expected)


def test_a_number_for_each_member(logits: Tensor) -> None:
    expected = (1 * logits[0].softmax(-1) + 3 * logits[2].softmax(-1)) / 4
    torch.testing.assert_close(answer(logits, weighting=(1, 0, 3)).exp(), expected)


@pytest.mark.parametrize("weighting", ["mean", "entropy", "confidence"])
def test_extreme_logits_have_finite_answers(weighting: str) -> None:
    torch.manual_seed(0)
    said = answer((torch.randn(K, N, C) * 1e4), weighting=weighting, temperature=2.0)
    assert bool(said.isfinite().all())


def test_labels_that_are_not_there_are_missed_before_training(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification()
    inputs = blobs.train.rows(torch.arange(64))["inputs"]
    source = attar.data.TensorSource(inputs, classes=("a", "b", "c"))
    teacher = attar.Ensemble([net(seed=1), net(seed=2)], task, weighting="confidence")
    with pytest.raises(PreflightError, match="have no labels, and weighting: confidence"):
        attar.training.check(
            net(), teacher, source, task, [attar.Term(kl_divergence)], label_weight=0
        )


def test_a_member_is_addressed_by_its_number(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    first, second = net(seed=1), net(seed=2, width=5)
    inputs = torch.randn(7, 2)
    asked = ["output:1", "feature:1.body", "output:logits", "input:0.head", "param:1.head.bias"]
    with torch.no_grad():
        told = attar.Ensemble([first, second], task).open(asked)({"inputs": inputs})
        assert list(told) == asked
        assert torch.equal(told["output:1"], second(inputs))
        assert torch.equal(told["feature:1.body"], second.body(inputs))
        assert torch.equal(told["input:0.head"], first.body(inputs).tanh())
    assert torch.equal(told["param:1.head.bias"], second.head.bias)


@pytest.mark.parametrize("address", ["feature:body", "output:loss", "grad:probe/inputs"])
def test_an_address_without_a_member_is_refused(net: Any, address: str) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    with pytest.raises(UsageError, match=r"output:0 or feature:0\.PATH"):
        attar.Ensemble([net(), net()], task).open([address])


def test_a_member_that_is_not_there_is_refused_and_none_is_left_open(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    members = [net().train(), net().train()]
    ensemble = attar.Ensemble(members, task)
    with pytest.raises(UsageError, match="numbered 0 to 1"):
        ensemble.open(["output:2"])
    with pytest.raises(UsageError, match="has no module 'bodi'"):
        ensemble.open(["feature:0.body", "feature:1.bodi"])
    with pytest.raises(UsageError, match="numbered 0 to 1"):
        ensemble.open(["feature:0.body"]).open(["output:2"])
    assert all(part.training for member in members for part in member.modules())
    assert not any(part._forward_hooks for member in members for part in member.modules())


def test_members_are_left_as_they_were_also_those_that_are_not_asked() -> None:
    def noisy() -> nn.Module:
        return nn.Sequential(nn.Linear(1, C), nn.BatchNorm1d(C)).train()

    members = [noisy(), noisy()]
    before = [tensor.clone() for m in members for tensor in m.state_dict().values()]
    source = attar.data.TensorSource(
        torch.randn(32, 1), torch.arange(32) % C, classes=tuple("abcd")
    )
    student = nn.Linear(1, C)
    term = attar.Term(kl_divergence, teacher="output:0")
    attar.distill(student, attar.Ensemble(members, TASK), source, TASK, [term], epochs=1)
    after = [tensor for m in members for tensor in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(part.training for m in members for part in m.modules())


def test_a_member_that_is_not_asked_is_not_run(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    first, second = net(seed=1), net(seed=2)
    runs: list[nn.Module] = []
    for member in (first, second):
        member.register_forward_hook(lambda module, *_: runs.append(module))
    ensemble = attar.Ensemble([first, second], task).open(["output:1", "feature:1.body"])
    ensemble({"inputs": torch.randn(4, 2)})
    assert runs == [second]


def test_answers_of_several_shapes_are_refused() -> None:
    members = [Says(torch.zeros(N, width)) for width in (3, 4)]
    ensemble = attar.Ensemble(members, attar.tasks.TabularClassification())
    with pytest.raises(UsageError, match=r"members answer \[6, 3\] and \[6, 4\]; all must"):
        ensemble({"inputs": torch.zeros(N, 1)})


def test_a_member_that_changes_is_refused(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    member = net(seed=1)
    ensemble = attar.Ensemble([net(), member], task).open()
    ensemble.check()
    with torch.no_grad():
        member.head.bias.add_(1)
    with pytest.raises(PreflightError, match=r"head\.bias was written to"):
        ensemble.check()


# ---------------------------------------------------------------- members of other classes


def test_a_class_is_the_mean_over_the_members_that_know_it(logits: Tensor) -> None:
    """By hand: member 1 knows d and b, member 2 all, member 0 all."""
    pair = Says(logits[1, :, :2])
    members = [Says(logits[0]), adapted(pair, TASK, classes=("d", "b")), Says(logits[2])]
    said = attar.Ensemble(members, TASK)({"inputs": torch.zeros(N, 1)})["output:logits"].exp()
    p, q, r = logits[0].softmax(-1), logits[1, :, :2].softmax(-1), logits[2].softmax(-1)
    raw = torch.stack(
        [
            (p[:, 0] + r[:, 0]) / 2,
            (p[:, 1] + q[:, 1] + r[:, 1]) / 3,
            (p[:, 2] + r[:, 2]) / 2,
            (p[:, 3] + q[:, 0] + r[:, 3]) / 3,
        ],
        dim=1,
    )
    torch.testing.assert_close(said, raw / raw.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_of_a_class_that_it_does_not_know_a_member_says_nothing() -> None:
    """Two halves of the classes, both certain: neither takes anything from the other."""
    low, high = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    members = [
        adapted(Says(low), TASK, classes=(0, 1)),
        adapted(Says(high), TASK, classes=("c", "d")),
    ]
    said = attar.Ensemble(members, TASK)({"inputs": torch.zeros(1, 1)})["output:logits"].exp()
    expected = torch.cat([low.softmax(1), high.softmax(1)], dim=1) / 2
    torch.testing.assert_close(said, expected)
    hot = attar.Ensemble(members, TASK, temperature=20.0)({"inputs": torch.zeros(1, 1)})
    expected = torch.cat([(low / 20).softmax(1), (high / 20).softmax(1)], dim=1) / 2
    torch.testing.assert_close((hot["output:logits"] / 20).exp(), expected)


def test_only_members_that_know_the_label_are_asked_how_confident_they_are() -> None:
    torch.manual_seed(0)
    logs = torch.randn(3, 4, C).log_softmax(-1)
    known = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    logs = logs.masked_fill(~known[:, None], -math.inf).log_softmax(-1)
    weights = confidence_weights(logs, torch.tensor([0, 1, 2, 3]), known)
    full = confidence_weights(logs[:, :1], torch.tensor([0]))
    torch.testing.assert_close(weights[:, :1], full)
    pair = confidence_weights(logs[:2, 1:2], torch.tensor([1]))
    torch.testing.assert_close(weights[:2, 1:2], pair)
    assert weights[2, 1] == 0
    assert weights[:, 3].tolist() == [1, 0, 0]
    mixed = torch.tensor([[0.0, 0.5, 0.5, 0.0]])  # of which members 1 and 2 know a half each
    torch.testing.assert_close(
        confidence_weights(logs[1:, :1], mixed, known[1:]).sum(0), torch.ones(1)
    )


@pytest.mark.parametrize("weighting", ["mean", "entropy", "confidence", (1.0, 2.0)])
def test_members_of_few_classes_give_a_finite_distribution(weighting: Any) -> None:
    torch.manual_seed(0)
    members = [
        adapted(Says(torch.randn(N, 3) * 1e3), TASK, classes=("a", None, "b")),
        adapted(Says(torch.randn(N, 3) * 1e3), TASK, classes=("b", "c", "d")),
    ]
    ensemble = attar.Ensemble(members, TASK, weighting=weighting, temperature=2.0)
    said = ensemble({"inputs": torch.zeros(N, 1), "labels": LABELS})["output:logits"]
    torch.testing.assert_close((said / 2).exp().sum(1), torch.ones(N))
    assert bool(said.isfinite().all())


def test_how_sure_a_member_is_is_measured_by_how_unsure_it_could_be() -> None:
    """To know nothing of two classes is not to be surer than to know nothing of four."""
    known = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    logs = torch.zeros(2, 1, 4).masked_fill(~known[:, None], -math.inf).log_softmax(-1)
    torch.testing.assert_close(entropy_weights(logs, known), torch.full((2, 1), 0.5))


def test_a_class_that_nobody_knows_is_refused() -> None:
    members = [adapted(Says(torch.zeros(1, 2)), TASK, classes=pair) for pair in ("ab", "bd")]
    with pytest.raises(UsageError, match="no member knows the class 'c'"):
        attar.Ensemble(members, TASK)


# ---------------------------------------------------------------- learned weights


def test_learned_weights_make_the_labels_most_likely() -> None:
    """The condition of a maximum on the simplex: no member's derivative is above the others'."""
    torch.manual_seed(0)
    chances = torch.rand(200, 4, dtype=torch.float64)
    chances[:, 3] *= 0.1  # one that is always worse
    weights = most_likely_weights(chances)
    slope = (chances / (chances @ weights)[:, None]).mean(0)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[3]) < 1e-3
    torch.testing.assert_close(slope[weights > 1e-2], torch.ones(3).double(), atol=1e-3, rtol=0)
    assert float(slope[3]) < 1


def test_an_example_that_no_member_expected_says_nothing() -> None:
    torch.manual_seed(0)
    chances = torch.rand(50, 3, dtype=torch.float64)
    some = torch.cat([chances, torch.zeros(5, 3, dtype=torch.float64)])
    found, expected = most_likely_weights(some), most_likely_weights(chances)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_weights_are_learned_from_every_row_and_leave_the_members_as_they_were(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    members = [net(seed=1).train(), net(seed=2).train()]
    source = attar.data.TensorSource(torch.randn(600, 2), torch.arange(600) // 200, classes=3)
    found = learned_weights(members, source, task)
    batch = source.rows(torch.arange(600))
    with torch.no_grad():
        chances = [m(batch["inputs"]).double().softmax(1) for m in members]
    own = torch.stack([c[torch.arange(600), batch["labels"]] for c in chances], dim=1)
    assert found == pytest.approx(most_likely_weights(own).tolist(), abs=1e-5)
    assert all(part.training for member in members for part in member.modules())
    assert not any(part._forward_hooks for member in members for part in member.modules())


def test_a_better_teacher_learns_to_weigh_more(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification().fitted(blobs.train)
    good, bad = net(seed=1), net(seed=2)
    attar.train(good, blobs.train, task, epochs=10, batch_size=16)
    weights = learned_weights([bad, attar.Teacher(good, task)], blobs.test, task)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] > 0.9
    told = attar.Ensemble([bad, good], task, weighting=weights)
    assert attar.evaluate(told.model, blobs.test, task)["accuracy"] > 0.85


def test_weights_need_labels_and_classes(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    source = attar.data.TensorSource(torch.randn(4, 2), classes=3)
    with pytest.raises(UsageError, match="has no labels to learn the weights from"):
        learned_weights([net(), net()], source, task)
    with pytest.raises(UsageError, match="the task has none"):
        learned_weights([net(), net()], source, attar.tasks.Regression(targets=3))
    with pytest.raises(UsageError, match="learned weights are numbers"):
        attar.Ensemble([net(), net()], task, weighting="learned")  # type: ignore[arg-type]


# ---------------------------------------------------------------- as a teacher


def test_classes_that_do_not_compete_are_averaged_each_by_itself(logits: Tensor) -> None:
    task = attar.tasks.MultiLabelClassification(classes=4)
    members = [Says(one) for one in logits]
    batch = {"inputs": torch.zeros(N, 1)}
    said = attar.Ensemble(members, task, weighting=(2, 1, 1), temperature=3.0)(batch)
    chance = [(one / 3).sigmoid() for one in logits]
    expected = (2 * chance[0] + chance[1] + chance[2]) / 4
    torch.testing.assert_close((said["output:logits"] / 3).sigmoid(), expected)
    with pytest.raises(UsageError, match="about classes that compete"):
        attar.Ensemble(members, task, weighting="entropy")


def test_numbers_are_averaged_as_they_are() -> None:
    task = attar.tasks.Regression(targets=2)
    values = torch.randn(3, 5, 2)
    members = [Says(one) for one in values]
    batch = {"inputs": torch.zeros(5, 1)}
    said = attar.Ensemble(members, task)(batch)["output:values"]
    torch.testing.assert_close(said, values.mean(0))
    said = attar.Ensemble(members, task, weighting=(2, 1, 1))(batch)["output:values"]
    torch.testing.assert_close(said, (2 * values[0] + values[1] + values[2]) / 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "entropy"}, "weighting: entropy is about classes that compete"),
        ({"weighting": "confidence"}, "weighting: confidence is about"),
        ({"temperature": 2.0}, "temperature is about"),
    ],
)
def test_numbers_have_no_entropy(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        attar.Ensemble([nn.Linear(1, 2), nn.Linear(1, 2)], attar.tasks.Regression(), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weighting": "men"}, r"weighting 'men' is unknown; did you mean 'mean'\?"),
        ({"weighting": (1.0,)}, "1 weights for 2 members"),
        ({"weighting": (0.0, 0.0)}, "not all 0"),
        ({"weighting": (-1.0, 2.0)}, "0 or more"),
        ({"weighting": (math.inf, 1.0)}, "0 or more"),
        ({"temperature": 0.0}, "must be above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        attar.Ensemble([nn.Linear(1, 4), nn.Linear(1, 4)], TASK, **options)


def test_members_that_do_not_fit_are_refused(net: Any) -> None:
    member = net()
    with pytest.raises(UsageError, match="at least two members, not 1"):
        attar.Ensemble([member], TASK)
    with pytest.raises(UsageError, match="a module stands twice"):
        attar.Ensemble([member, attar.Teacher(member, TASK)], TASK)
    with pytest.raises(UsageError, match="is a str"):
        attar.Ensemble([member, "resnet"], TASK)


def test_the_whole_is_judged_without_a_look_at_the_labels(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification().fitted(blobs.train)
    members = [net(seed=1), net(seed=2)]
    judged = [
        attar.evaluation.collect(attar.Ensemble(members, task, weighting=w).model, blobs.test, task)
        for w in ("mean", "confidence")
    ]
    assert torch.equal(judged[0]["logits"], judged[1]["logits"])
    assert attar.Ensemble(members, task).model.training
    for member in members:
        member.eval()
    assert not attar.Ensemble(members, task).model.training  # as the members are
    inputs = blobs.test.rows(torch.arange(80))["inputs"]
    expected = sum(member(inputs).softmax(1) for member in members) / 2
    torch.testing.assert_close(judged[0]["logits"].exp(), expected.detach())


def test_a_student_learns_from_it_and_its_size_is_that_of_all(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification().fitted(blobs.train)
    members = [net(seed=1, width=9), net(seed=2, width=12)]
    for member in members:
        attar.train(member, blobs.train, task, epochs=5, batch_size=16)
    teacher = attar.Ensemble(members, task, weighting="confidence")
    student = net(seed=3)
    terms = [attar.Term(kl_divergence), attar.Term(kl_divergence, teacher="output:1")]
    done = attar.fit(
        student, teacher, blobs.train, task, terms, label_weight=0, epochs=5, batch_size=16
    )
    assert done.plan.teacher_parameters == sum(p.numel() for m in members for p in m.parameters())
    assert attar.evaluate(student, blobs.test, task)["accuracy"] > 0.85


def test_a_student_that_is_a_member_is_refused(blobs: Any, net: Any) -> None:
    task = attar.tasks.TabularClassification().fitted(blobs.train)
    student = net()
    teacher = attar.Ensemble([net(seed=2), student], task)
    with pytest.raises(PreflightError, match="is the teacher's own tensor"):
        attar.training.check(student, teacher, blobs.train, task, [attar.Term(kl_divergence)])


def test_another_ensemble_has_another_digest(net: Any) -> None:
    task = attar.tasks.TabularClassification(classes=3)
    make = partial(attar.Ensemble, task=task)
    made = [
        make([net(seed=1), net(seed=2)]),
        make([net(seed=1), net(seed=3)]),
        make([net(seed=1), net(seed=2)], weighting="entropy"),
        make([net(seed=1), net(seed=2)], weighting=(1.0, 2.0)),
        make([net(seed=1), net(seed=2)], temperature=2.0),
    ]
    assert len({teacher_digest(ensemble) for ensemble in made}) == len(made)
    assert teacher_digest(make([net(seed=1), net(seed=2)])) == teacher_digest(made[0])
