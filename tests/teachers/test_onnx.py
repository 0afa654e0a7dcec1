"""An ONNX file teaches as the module it was made from; what it holds elsewhere is never read."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import attar
from attar.recipes import parse, resolve
from attar.recipes.recipe import TeacherPlan
from attar.runtime import DataError, PreflightError, UsageError, read_json
from attar.teachers import from_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
helper = onnx.helper

TASK = attar.tasks.TabularClassification(classes=3)
FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
TABLE = np.arange(6, dtype=np.float32).reshape(2, 3) / 7


def made(
    folder: Path,
    *nodes: Any,
    tables: Any = (),
    reads: Any = ("x", FLOAT, ["n", 2]),
    says: Any = ("y", FLOAT, ["n", 3]),
    name: str = "model.onnx",
) -> Path:
    """A file of one matrix, x @ w, or of other nodes."""
    table = onnx.numpy_helper.from_array(TABLE.astype(np.float64 if reads[1] == DOUBLE else "f4"))
    table.name = "w"
    answers = says if isinstance(says, list) else [says]
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info(*reads)],
        [helper.make_tensor_value_info(*each) for each in answers],
        list(tables) or [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


@pytest.fixture
def trained(digits: Any, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A net that reads digits, and its file."""
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = attar.models.build("mlp", data=digits.train, widths=[64])
    task = attar.tasks.ImageClassification(classes=10)
    attar.train(model, digits.train, task, epochs=3, batch_size=64, progress=False)
    example = digits.train.rows(torch.arange(4))["inputs"]
    attar.export(model, tmp_path / "made", example=example, formats=["onnx"])
    return model, tmp_path / "made" / "model.onnx"


# ---------------------------------------------------------------- what it answers


def test_it_answers_as_the_module_that_was_exported(trained: Any, digits: Any) -> None:
    model, path = trained
    task = attar.tasks.ImageClassification(classes=10)
    teacher = from_onnx(path, task)
    inputs = digits.test.rows(torch.arange(100))["inputs"]
    with torch.no_grad():
        torch.testing.assert_close(teacher(inputs), model.eval()(inputs), atol=1e-5, rtol=0)
    assert teacher.version == hashlib.sha256(path.read_bytes()).hexdigest()
    assert teacher.name == "model.onnx"
    assert teacher.lost is None
    same = attar.evaluate(model, digits.test, task).scores["accuracy"]
    assert attar.evaluate(teacher, digits.test, task).scores["accuracy"] == same


@pytest.mark.parametrize("rows", [1, 4, 7, 8])
def test_a_file_for_a_fixed_number_of_rows_is_run_on_as_many_at_a_time(
    tmp_path: Path, rows: int
) -> None:
    path = made(tmp_path, reads=("x", FLOAT, [4, 2]), says=("y", FLOAT, [4, 3]))
    inputs = torch.randn(rows, 2)
    torch.testing.assert_close(from_onnx(path, TASK)(inputs), inputs @ torch.from_numpy(TABLE))


def test_numbers_are_given_in_the_type_that_it_reads(tmp_path: Path) -> None:
    path = made(tmp_path, reads=("x", DOUBLE, ["n", 2]), says=("y", DOUBLE, ["n", 3]))
    inputs = torch.randn(5, 2)
    torch.testing.assert_close(from_onnx(path, TASK)(inputs), inputs @ torch.from_numpy(TABLE))


def test_one_of_several_outputs_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    path = made(tmp_path, *nodes, says=[("y", FLOAT, ["n", 3]), ("z", FLOAT, ["n", 3])])
    inputs = torch.randn(5, 2)
    told = from_onnx(path, TASK, output="z")(inputs)
    torch.testing.assert_close(told, -inputs @ torch.from_numpy(TABLE))
    with pytest.raises(UsageError, match=r"has 2 outputs \(y, z\); name one .*output='y'"):
        from_onnx(path, TASK)
    with pytest.raises(UsageError, match=r"has no output 'zz'; did you mean 'z'"):
        from_onnx(path, TASK, output="zz")


def test_it_runs_with_as_many_threads_as_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, data: bytes, options: Any, **more: Any) -> None:
            seen.append(options.intra_op_num_threads)
            super().__init__(data, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    from_onnx(made(tmp_path), TASK)
    assert seen == [3]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid"])
def test_a_file_that_ends_in_probabilities_gives_no_logits(tmp_path: Path, kind: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node(kind, ["h"], ["p"]),
        helper.make_node("Identity", ["p"], ["y"]),
    ]
    path = made(tmp_path, *nodes)
    task = TASK if kind == "Softmax" else attar.tasks.MultiLabelClassification(classes=3)
    with pytest.raises(UsageError, match=f"ends in a {kind.lower()}, so it gives probabilities"):
        from_onnx(path, task)
    inputs = torch.randn(5, 2)
    told = from_onnx(path, task, gives="probabilities")(inputs)
    logits = inputs @ torch.from_numpy(TABLE)
    chances = (torch.softmax(told, 1), told.sigmoid())[kind == "Sigmoid"]
    expected = (torch.softmax(logits, 1), logits.sigmoid())[kind == "Sigmoid"]
    torch.testing.assert_close(chances, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"says": ("y", FLOAT, ["n", 4])}, r"output 'y' is \['n', 4\], where the task has 3"),
        ({"reads": ("x", onnx.TensorProto.UINT8, ["n", 2])}, r"'x' is a tensor\(uint8\), and inpu"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_before_it_runs(
    tmp_path: Path, options: Any, message: str
) -> None:
    nodes: list[Any] = []
    if "reads" in options:
        nodes = [
            helper.make_node("Cast", ["x"], ["f"], to=FLOAT),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ]
    tables = []
    if "says" in options:
        tables = [onnx.numpy_helper.from_array(np.zeros((2, 4), np.float32), "w")]
    with pytest.raises(DataError, match=message):
        from_onnx(made(tmp_path, *nodes, tables=tables, **options), TASK)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([8, 8, 1], r"reads inputs \[8, 8, 1\], and the data have \[1, 8, 8\]; .*channels_last=Tr"),
        ([1, 16, 16], r"resized by size: 16"),
        ([64], r"reads inputs \[64\], and the data have \[1, 8, 8\]; .*adapted"),
    ],
)
def test_inputs_of_another_shape_are_refused_with_the_way_out(
    tmp_path: Path, shape: list[int], message: str
) -> None:
    table = onnx.numpy_helper.from_array(np.zeros((int(np.prod(shape)), 3), np.float32), "w")
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = made(tmp_path, *nodes, tables=[table], reads=("x", FLOAT, ["n", *shape]))
    with pytest.raises(DataError, match=message):
        from_onnx(path, TASK)(torch.zeros(2, 1, 8, 8))


def test_channels_come_last_where_the_file_wants_them(tmp_path: Path) -> None:
    table = onnx.numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32), "w"
    )
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = made(tmp_path, *nodes, tables=[table], reads=("x", FLOAT, ["n", 2, 4, 3]))
    images = torch.randn(5, 3, 2, 4)
    told = from_onnx(path, TASK, channels_last=True)(images)
    flat = images.permute(0, 2, 3, 1).reshape(5, 24)
    torch.testing.assert_close(told, flat @ torch.tensor(onnx.numpy_helper.to_array(table)))


def test_what_is_no_file_of_onnx_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        from_onnx(tmp_path / "none.onnx", TASK)
    whole = made(tmp_path).read_bytes()
    damaged = tmp_path / "damaged.onnx"
    for data in (b"", b"\xff" * 100, whole[: len(whole) // 2], b"not a model"):
        damaged.write_bytes(data)
        with pytest.raises(DataError, match=r"damaged\.onnx: (not a whole|onnxruntime cannot|has)"):
            from_onnx(damaged, TASK)


def secret(folder: Path) -> bytes:
    data = np.full((2, 3), 42, np.float32).tobytes()
    (folder / "secret.bin").write_bytes(data)
    return data


def outside(location: str, name: str = "w") -> Any:
    """A table whose values are said to be in a file."""
    tensor = onnx.TensorProto(name=name, data_type=FLOAT, dims=[2, 3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "24"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("place", ["beside", "absolute", "above", "link", "hard link"])
def test_weights_in_another_file_are_never_read(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    secret(tmp_path)
    target = inner / "w.bin"
    if place == "beside":
        secret(inner)
    elif place == "link":
        target.symlink_to(tmp_path / "secret.bin")
    elif place == "hard link":
        os.link(tmp_path / "secret.bin", target)
    said = {"beside": "secret.bin", "absolute": str(tmp_path / "secret.bin")}
    said |= {"above": "../secret.bin", "link": "w.bin", "hard link": "w.bin"}
    path = made(inner, tables=[outside(said[place])])
    monkeypatch.chdir(inner)
    with pytest.raises(DataError, match=r"'w' lies in another file.*onnx\.save"):
        from_onnx(path, TASK)


def test_weights_in_another_file_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """In a constant, in a branch of a branch, or with the mark that they are outside taken off."""
    secret(tmp_path)
    constant = helper.make_node("Constant", [], ["w"], value=outside("secret.bin", "hidden"))
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    unmarked = outside("secret.bin")
    unmarked.data_location = onnx.TensorProto.DEFAULT
    inner = helper.make_graph(
        [constant, helper.make_node("Identity", ["w"], ["v"])],
        "branch",
        [],
        [helper.make_tensor_value_info("v", FLOAT, [2, 3])],
    )
    choice = helper.make_node("If", ["b"], ["w2"], then_branch=inner, else_branch=inner)
    yes = onnx.numpy_helper.from_array(np.array(True), "b")
    after = helper.make_node("MatMul", ["x", "w2"], ["y"])
    for nodes, tables in (
        ([constant, product], [yes]),
        ([choice, after], [yes]),
        ([product], [unmarked]),
    ):
        with pytest.raises(DataError, match="lies in another file"):
            from_onnx(made(tmp_path, *nodes, tables=tables), TASK)


# ---------------------------------------------------------------- in a recipe


def recipe(path: Path, **teacher: Any) -> Any:
    text = f"""
task: image-classification
data: digits
teacher: {{load: {path}}}
student: {{name: mlp, widths: [16]}}
stages:
  - {{do: distill, epochs: 2, batch_size: 64, terms: [{{loss: kl_divergence}}]}}
"""
    return resolve(parse(text), overrides=[f"teacher.{k}={v}" for k, v in teacher.items()])


def test_a_recipe_learns_from_a_file(trained: Any, tmp_path: Path) -> None:
    model, path = trained
    verdict = attar.run(recipe(path), folder=tmp_path / "run")
    plan = read_json(tmp_path / "run" / "plan.json")
    assert plan["teacher"] == {"model": "model.onnx"}
    _, test = attar.data.digits()
    task = attar.tasks.ImageClassification(classes=10)
    alone = attar.evaluate(model, test, task).scores["accuracy"]
    assert verdict.models["teacher"].primary.value == pytest.approx(alone)
    assert "not told" not in read_json(tmp_path / "run" / "verdict.json")["environment"]
    assert "model.onnx" in (tmp_path / "run" / "report.html").read_text()


def test_a_recipe_names_the_classes_of_a_files_outputs(trained: Any) -> None:
    _, path = trained
    numbers = list(range(10))
    plan = attar.recipes.check(recipe(path, classes=numbers))
    assert plan["stages"][0]["terms"][0]["teacher_shape"] == [64, 10]
    with pytest.raises(DataError, match="where the task has 9"):
        attar.recipes.check(recipe(path, classes=numbers[:9]))
    with pytest.raises(PreflightError, match="knows too little to teach"):
        attar.recipes.check(recipe(path, classes=numbers[::-1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load": "folder", "gives": "labels"}, "it stands with load: FILE.onnx"),
        ({"load": "m.onnx", "project": True}, "an ONNX file does not say what its classes are"),
        ({"load": "m.onnx", "classes": {"a": ["b"]}}, "an ONNX file does not say what its classes"),
    ],
)
def test_a_plan_of_a_file_that_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherPlan(**options)


def test_a_file_teaches_a_regression_and_several_labels_in_a_recipe(
    blobs: Any, net: Any, tmp_path: Path
) -> None:
    points = blobs.train.rows(torch.arange(160))["inputs"]
    table = torch.from_numpy(TABLE)
    targets = points @ table + 10
    holds = (points @ table > 0).long()
    for labels, task, gives, extra in (
        (targets, attar.tasks.Regression(), "values", [10.0]),
        (holds, attar.tasks.MultiLabelClassification(), None, [0.0]),
    ):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", "b"], ["y"]),
        ]
        bias = onnx.numpy_helper.from_array(np.array(extra, np.float32), "b")
        weight = onnx.numpy_helper.from_array(TABLE, "w")
        path = made(tmp_path, *nodes, tables=[weight, bias])
        loss = attar.losses.mse if gives else attar.losses.binary_kl
        plan = attar.Recipe(
            task=task,
            data=attar.data.tensors(points[:120], labels[:120], points[120:], labels[120:]),
            teacher=TeacherPlan(load=str(path), gives=gives),
            student=net(),
            stages=[partial(attar.distill, terms=[attar.Term(loss)], epochs=1, batch_size=16)],
        )
        verdict = attar.run(plan, folder=tmp_path / f"run-{gives}")
        best = verdict.models["teacher"].primary.value
        assert best < 1e-5 if gives else best == 1.0  # the file is what the labels were made by


def test_a_regression_must_say_in_which_units_a_file_answers(
    blobs: Any, net: Any, tmp_path: Path
) -> None:
    task = attar.tasks.Regression(targets=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(UsageError, match=r"say values .* or standardized"):
        from_onnx(made(tmp_path), task)
