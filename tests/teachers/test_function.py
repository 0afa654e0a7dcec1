"""A function on numpy arrays teaches as a module does; every answer of it is checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn

import attar
from attar.losses import hard_distillation, kl_divergence
from attar.runtime import DataError, UsageError
from attar.teachers import Function, from_sklearn

THREE = attar.tasks.TabularClassification(classes=("a", "b", "c"))
TWO = attar.tasks.TabularClassification(classes=2)
YES_NO = attar.tasks.MultiLabelClassification(classes=3)
UNITS = attar.tasks.Regression(targets=2, mean=(10.0, -1.0), std=(4.0, 0.5))
PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 16, "progress": False}
SOFT = [attar.Term(partial(kl_divergence, temperature=2.0))]


def says(answer: Any, task: Any = THREE, **options: Any) -> Function:
    """A function that says the same of everything."""
    return Function(lambda rows: np.asarray(answer), task, **options)


# ---------------------------------------------------------------- what it is given


def test_it_is_given_a_copy_that_it_may_change() -> None:
    def greedy(rows: np.ndarray) -> np.ndarray:
        rows[:] = 7
        return rows[:, :3]

    inputs = torch.rand(4, 5, requires_grad=True)
    before = inputs.detach().clone()
    assert torch.equal(Function(greedy, THREE)(inputs), torch.full((4, 3), 7.0))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_images_come_channels_first_or_last_in_float32(last: bool, dtype: torch.dtype) -> None:
    seen: list[np.ndarray] = []

    def look(images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return np.zeros((len(images), 3))

    images = torch.rand(2, 3, 4, 5).to(dtype)
    answer = Function(look, THREE, channels_last=last)(images)
    expected = images.float().permute(0, 2, 3, 1) if last else images.float()
    assert seen[0].dtype == np.float32
    assert seen[0].flags.c_contiguous
    assert np.array_equal(seen[0], expected.numpy())
    assert answer.dtype == torch.float32


# ---------------------------------------------------------------- what its answers become


def test_a_net_behind_a_function_teaches_to_the_same_bits(blobs: Any, net: Any) -> None:
    teacher, students = net(width=32, seed=3), [net(seed=5), net(seed=5)]
    attar.train(teacher, blobs.train, THREE, **PLAN)

    def answers(rows: np.ndarray) -> np.ndarray:
        return teacher(torch.from_numpy(rows)).numpy()

    for student, asked in zip(students, (teacher, Function(answers, THREE)), strict=True):
        attar.distill(student, asked, blobs.train, THREE, SOFT, **PLAN)
    first, second = (student.state_dict().values() for student in students)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_softmax_gives_probabilities_back_floored_and_normalised() -> None:
    generator = np.random.default_rng(0)
    told = generator.dirichlet(np.full(6, 0.05), 500)  # many far below any floor
    told[0] = [1, 0, 0, 0, 0, 0]
    for floor in (1e-7, 1e-3):
        task = attar.tasks.TabularClassification(classes=6)
        logits = says(told, task, gives="probabilities", floor=floor)(torch.zeros(500, 1))
        raised = np.maximum(told, floor)
        expected = torch.from_numpy(raised / raised.sum(1, keepdims=True))
        assert float((logits.double().softmax(1) - expected).abs().max()) < 1e-6
        assert torch.isfinite(logits).all()
        assert float(logits.logsumexp(1).abs().max()) < 1e-5  # log-probabilities


def test_a_sigmoid_gives_probabilities_back_where_classes_do_not_compete() -> None:
    told = np.array([[0.0, 1.0, 0.3], [1e-9, 1 - 1e-9, 0.9]])
    logits = says(told, YES_NO, gives="probabilities")(torch.zeros(2, 1))
    expected = torch.from_numpy(told.clip(1e-7, 1 - 1e-7))
    assert float((logits.double().sigmoid() - expected).abs().max()) < 1e-7


def test_labels_are_what_a_hard_loss_learns_and_a_soft_one_has_a_value() -> None:
    labels = np.array([2, 0, 1, 1])
    told = says(labels, gives="labels")(torch.zeros(4, 1))
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    exact = F.cross_entropy(student, torch.from_numpy(labels), reduction="none")
    assert torch.equal(hard_distillation(student, told), exact)
    soft = kl_divergence(student, told, temperature=1.0)
    torch.testing.assert_close(soft, exact, atol=3e-5, rtol=0)
    assert torch.isfinite(kl_divergence(student, told, temperature=4.0)).all()


def test_several_labels_are_zeros_and_ones() -> None:
    told = np.array([[0, 1, 1], [1, 0, 0]])
    logits = says(told, YES_NO, gives="labels")(torch.zeros(2, 1))
    assert np.array_equal((logits > 0).numpy(), told.astype(bool))


@pytest.mark.parametrize("gives", ["values", "standardized"])
def test_a_regressions_values_are_in_the_targets_units_or_standardised(gives: Any) -> None:
    told = np.array([[14.0, -2.0], [10.0, -1.0]])
    out = says(told, UNITS, gives=gives)(torch.zeros(2, 1))
    expected = [[1.0, -2.0], [0.0, 0.0]] if gives == "values" else told
    torch.testing.assert_close(out, torch.tensor(np.array(expected)).float())


def test_one_target_may_come_as_a_plain_row() -> None:
    one = attar.tasks.Regression(targets=1, mean=(1.0,), std=(2.0,))
    out = says([3.0, 5.0], one, gives="values")(torch.zeros(2, 1))
    assert out.tolist() == [[1.0], [2.0]]


def test_an_answer_may_be_a_tensor_with_a_gradient() -> None:
    layer = nn.Linear(4, 3)
    teacher = Function(lambda rows: layer(torch.from_numpy(rows)), THREE)
    inputs = torch.rand(2, 4)
    answer = teacher(inputs)
    torch.testing.assert_close(answer, layer(inputs).detach())
    assert not answer.requires_grad


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[Any, Any, str, str]] = [
    (np.zeros((3, 3)), THREE, "logits", r"answers \[3, 3\] to 2 rows, and gives: logits is \[2, 3"),
    (np.zeros((2, 4)), THREE, "logits", r"answers \[2, 4\] to 2 rows"),
    (np.zeros(2), TWO, "probabilities", r"stack\(\[1 - p, p\], 1\)"),
    (np.zeros((2, 3)), THREE, "labels", r"gives: labels is \[2\]"),
    ([[0, 1, 2], [0, np.nan, 2]], THREE, "logits", r"row 1 of the batch, nan, is not finite"),
    ([[0, 1, -np.inf], [0, 1, 2]], THREE, "logits", r"row 0 of the batch, -inf, is not finite"),
    ([[0.2, 0.8, 0], [1, 0, 0]], THREE, "logits", r"are probabilities; say gives: probabilities"),
    ([[1, 0, 0], [0.5, 0.3, 0.1]], THREE, "probabilities", r"row 1 of the batch, 0.9, is the sum"),
    ([[1, 0, 0], [1.2, -0.2, 0]], THREE, "probabilities", r"row 1 of the batch, 1.2, is no prob"),
    ([[1, 0, 0], [5, 1, 2]], YES_NO, "probabilities", r"row 1 of the batch, 5, is no probability"),
    ([0, 3], THREE, "labels", r"row 1 of the batch, 3, is no class: with 3 they go from 0 to 2"),
    ([-1, 0], THREE, "labels", r"row 0 of the batch, -1, is no class"),
    ([0.0, 1.0], THREE, "labels", r"type float64, and gives: labels is whole class numbers"),
    (["a", "b"], THREE, "labels", r"whole class numbers, such as argmax"),
    ([[0, 1, 2], [0, 1, 0]], YES_NO, "labels", r"row 0 of the batch, 2, is neither 0 nor 1"),
    ([[None] * 3] * 2, THREE, "logits", r"numbers of type object"),
]


@pytest.mark.parametrize(("answer", "task", "gives", "message"), BAD)
def test_an_answer_that_cannot_be_is_refused_by_its_row(
    answer: Any, task: Any, gives: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        says(answer, task, gives=gives)(torch.zeros(2, 1))


def test_probabilities_may_miss_their_sum_by_a_rounding() -> None:
    told = [[0.3334, 0.3333, 0.3334], [0.9995, 0, 0]]
    chances = says(told, gives="probabilities")(torch.zeros(2, 1)).softmax(1)
    torch.testing.assert_close(chances.sum(1), torch.ones(2))


def test_a_function_that_fails_is_named_and_its_own_error_kept() -> None:
    def broken(rows: np.ndarray) -> np.ndarray:
        raise KeyError("no such table\nsecond line")

    with pytest.raises(DataError, match=r"^broken failed on inputs \[2, 1\]: .*no such") as caught:
        Function(broken, THREE)(torch.zeros(2, 1))
    assert isinstance(caught.value.__cause__, KeyError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (UNITS, {}, "the task is a regression; say values"),
        (THREE, {"gives": "values"}, "of classes it is one of logits, probabilities, labels"),
        (attar.tasks.TabularClassification(), {}, r"take task\.fitted\(train\)"),
        (attar.tasks.Regression(targets=1), {"gives": "values"}, r"take task\.fitted\(train\)"),
        (THREE, {"floor": 0.0}, r"floor is 0.0; it must be a probability in \(0, 0.1\]"),
        (THREE, {"floor": 0.5}, "floor is 0.5"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_at_once(
    task: Any, options: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        says(0, task, **options)


# ---------------------------------------------------------------- as a teacher


def test_it_keeps_the_contract_of_a_teacher() -> None:
    teacher = attar.Teacher(says([[1.0, 2.0, 3.0]]), THREE)
    teacher.open(["output:logits"], torch.device("cpu"))
    told = teacher({"inputs": torch.zeros(1, 2), "ids": torch.tensor([0])})
    teacher.check()
    teacher.close()
    assert {address: value.tolist() for address, value in told.items()} == {
        "output:logits": [[1.0, 2.0, 3.0]]
    }


def test_it_has_no_features(blobs: Any, net: Any) -> None:
    term = attar.Term(attar.losses.mse, "feature:body", "feature:layer1")
    with pytest.raises(UsageError, match=r"has no part 'layer1'; what .* is output:logits"):
        attar.distill(net(), says(0, gives="labels"), blobs.train, THREE, [term], **PLAN)


def test_it_is_a_member_of_an_ensemble_like_any_module(net: Any) -> None:
    one, other = net(seed=1), says(np.eye(3), gives="probabilities", floor=0.01)
    both = attar.Ensemble([one, other], THREE)
    inputs = torch.randn(3, 2)
    with torch.no_grad():
        expected = (one(inputs).softmax(1) + other(inputs).softmax(1)) / 2
    torch.testing.assert_close(both({"inputs": inputs})["output:logits"].softmax(1), expected)


def test_it_is_judged_without_a_size_that_nobody_knows(blobs: Any, net: Any) -> None:
    models = {"teacher": says(0, gives="labels"), "student": net()}
    models["teacher"] = Function(lambda rows: np.zeros(len(rows), int), THREE, gives="labels")
    verdict = attar.compare(models, blobs.test, THREE)
    assert verdict.models["teacher"].cost is None
    assert verdict.models["distilled"].cost is not None
    assert "parameters" not in verdict.headline
    assert verdict.to_json()["models"]["distilled"]["ratios"] is None


def test_a_recipe_of_python_says_what_was_not_told(blobs: Any, net: Any, tmp_path: Path) -> None:
    train = blobs.train
    rows = train.rows(torch.arange(len(train)))
    forest = RandomForestClassifier(20, random_state=0)
    forest.fit(rows["inputs"].numpy(), rows["labels"].numpy())
    recipe = attar.Recipe(
        task=THREE,
        data=blobs,
        teacher=from_sklearn(forest, THREE, name="the forest", floor=0.01),
        student=net(),
        stages=[partial(attar.distill, terms=SOFT, epochs=1, batch_size=16)],
    )
    said: list[str] = []
    attar.run(recipe, folder=tmp_path / "run", say=said.append)
    lost = "the forest gives probabilities: what is below 0.01 is not known"
    assert f"note       {lost}" in said
    verdict = attar.runtime.read_json(tmp_path / "run" / "verdict.json")
    assert verdict["environment"]["not told"] == lost
    plan = attar.runtime.read_json(tmp_path / "run" / "plan.json")
    assert plan["teacher"] == {"model": "the forest"}


def test_what_is_lost_is_said() -> None:
    assert says(0).lost is None
    assert says(0, UNITS, gives="values").lost is None
    assert "labels alone" in str(says(0, gives="labels").lost)
    assert "below 1e-07 is not known" in str(says(0, gives="probabilities").lost)
    assert "nearer to 0 or 1 than" in str(says(0, YES_NO, gives="probabilities").lost)


# ---------------------------------------------------------------- scikit-learn


def clouds(names: Any, count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """Points about the corners of a triangle, each class by its name."""
    numbers = np.arange(count) % 3
    points = np.array([[0, 4], [4, 0], [-4, -4]])[numbers]
    noise = np.random.default_rng(0).normal(size=(count, 2))
    return (points + noise).astype(np.float32), np.asarray(names)[numbers]


@pytest.mark.parametrize("names", [(0, 1, 2), ("a", "b", "c"), ("c", "a", "b")])
@pytest.mark.parametrize("make", [RandomForestClassifier, LinearSVC])
def test_its_classes_are_put_into_the_tasks_order(names: Any, make: Callable[..., Any]) -> None:
    """Numbers are the task's, whatever its classes are called; names stand for themselves."""
    points, labels = clouds(names)
    model = make_pipeline(StandardScaler(), make(random_state=0)).fit(points, labels)
    order = ("b", "c", "a")
    teacher = from_sklearn(model, attar.tasks.TabularClassification(classes=order))
    told = teacher(torch.from_numpy(points))
    ours = np.array([0, 1, 2] if names[0] == 0 else [order.index(name) for name in names])
    assert np.array_equal(told.argmax(1).numpy(), ours[np.arange(len(points)) % 3])
    assert teacher.gives == ("labels" if make is LinearSVC else "probabilities")


def test_numbers_are_names_where_they_are_not_the_tasks() -> None:
    task = attar.tasks.TabularClassification(classes=("8", "3"))
    points, _ = clouds((0, 0, 0))
    labels = np.where(points[:, 0] > 0, 8, 3)
    forest = RandomForestClassifier(10, random_state=0).fit(points, labels)
    told = from_sklearn(forest, task)(torch.from_numpy(points)).argmax(1).numpy()
    assert np.array_equal(told, np.where(points[:, 0] > 0, 0, 1))


def test_another_set_of_classes_is_refused() -> None:
    points, labels = clouds(("a", "b", "b"))
    forest = RandomForestClassifier(5, random_state=0).fit(points, labels)
    with pytest.raises(
        UsageError, match=r"knows 2 classes and the task 3: 'c' is the task's alone"
    ):
        from_sklearn(forest, THREE)
    with pytest.raises(UsageError, match="does not say its classes_; fit it first"):
        from_sklearn(RandomForestClassifier(), THREE)


def test_images_are_given_flat_and_several_labels_at_once(digits: Any) -> None:
    rows = digits.train.rows(torch.arange(200))
    holds = np.stack([rows["labels"] % 2 == 0, rows["labels"] < 5, rows["labels"] == 1], 1)
    forest = RandomForestClassifier(10, random_state=0)
    forest.fit(rows["inputs"].flatten(1).numpy(), holds.astype(int))
    told = from_sklearn(forest, YES_NO)(rows["inputs"])
    assert ((told > 0).numpy() == holds).mean() > 0.97
    expected = [each[:, 1] for each in forest.predict_proba(rows["inputs"].flatten(1).numpy())]
    torch.testing.assert_close(
        told.sigmoid(), torch.from_numpy(np.stack(expected, 1)).float(), atol=1e-6, rtol=0
    )


def test_a_regressor_answers_in_the_targets_units() -> None:
    points, _ = clouds((0, 0, 0))
    targets = points * [3.0, 0.1] + [10, -1]
    forest = RandomForestRegressor(10, random_state=0).fit(points, targets)
    told = from_sklearn(forest, UNITS)(torch.from_numpy(points))
    back = UNITS.rows(told, {})["values"]
    torch.testing.assert_close(back, torch.from_numpy(forest.predict(points)).float())


def test_a_function_teaches_a_student_that_beats_no_teaching_at_all(blobs: Any, net: Any) -> None:
    """By labels alone, on rows without labels."""
    centres = np.array([[0, 3], [3, 0], [-3, -3]])

    def nearest(rows: np.ndarray) -> np.ndarray:
        return ((rows[:, None] - centres) ** 2).sum(2).argmin(1)

    bare = attar.data.TensorSource(blobs.train.rows(torch.arange(160))["inputs"])
    student, term = net(), attar.Term(hard_distillation)
    options = PLAN | {"epochs": 10, "label_weight": 0}
    attar.distill(student, Function(nearest, THREE, gives="labels"), bare, THREE, [term], **options)
    assert attar.evaluate(student, blobs.test, THREE)["accuracy"] > 0.9


def test_a_batch_of_a_device_is_answered_there() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: Tensor = says([[1.0, 2.0, 3.0]])(torch.zeros(1, 2, device=device))
    assert out.device.type == device.type
