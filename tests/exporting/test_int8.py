"""`onnx_int8`: files of whole numbers, calibrated or learned, and what they lose."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.exporting import check_export, export
from attar.exporting.artefact import likeness, lost
from attar.runtime import DataError, PreflightError, UsageError

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason='needs pip install "attar[onnx]"',
)

IMAGES = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TASK = attar.tasks.ImageClassification(classes=10)
FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"widths": [16]},
    "resnet": {"width": 4},
    "mobilenet": {"width": 4, "depth": 1},
    "vit": {"width": 16, "depth": 1},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(family: str = "resnet", **options: Any) -> nn.Module:
    model = attar.models.build(family, shape=(1, 8, 8), outputs=10, **(options or FAMILIES[family]))
    with torch.no_grad():
        for _ in range(3):
            model.train()(IMAGES)  # so that batch norms do something
    return model.eval()


def graph(path: Path) -> Any:
    onnx = importlib.import_module("onnx")
    return onnx.load(path).graph


def run(path: Path, images: Tensor, *, exactly: bool = False) -> Tensor:
    """What onnxruntime answers; *exactly*: as the file says, operator by operator, in float."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if exactly:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"inputs": images.numpy()})[0])


def kernels(path: Path, folder: Path) -> list[str]:
    """The operators that onnxruntime makes of a file for this processor."""
    ort, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


# ---------------------------------------------------------------- learned


@pytest.mark.parametrize(("family", "bits"), [*((name, 8) for name in FAMILIES), ("resnet", 7)])
def test_a_file_of_what_was_learned_answers_as_the_frozen_module(family, bits, tmp_path):
    learning = attar.quantize(net(family), IMAGES, bits=bits).train()
    learning(IMAGES * 0.9)  # limits move: they are the module's and not the examples'
    frozen = attar.quantize(learning, mode="freeze").eval()
    made = export(frozen, tmp_path / "out", example=IMAGES, formats=["onnx_int8"])["onnx_int8"]
    with torch.no_grad():
        wanted = frozen(IMAGES)
    # Operator by operator the same, but for single numbers at the middle between two steps.
    same = (run(made.path, IMAGES, exactly=True) - wanted).abs()
    size = float(wanted.abs().max())
    assert float(same.median()) < 1e-5 * size
    assert float(same.max()) < 0.05 * size
    # With whole numbers the halves fall otherwise more often, and nothing else is added.
    assert made.difference < 0.1 * size
    assert made.agreement is not None
    assert made.agreement > 0.9


def test_convolutions_and_their_relus_become_whole_number_kernels(tmp_path):
    for family in ("resnet", "mobilenet"):
        learning = attar.quantize(net(family), IMAGES)
        made = export(learning, tmp_path / family, example=IMAGES, formats=["onnx_int8"])
        found = kernels(made["onnx_int8"].path, tmp_path)
        products = sum(isinstance(part, nn.Conv2d) for part in net(family).modules())
        assert found.count("QLinearConv") == products
        assert "QGemm" in found
        assert not {"Conv", "Gemm", "MatMul", "Clip"} & set(found)


def test_no_two_products_pass_what_16_bits_hold(tmp_path):
    onnx = importlib.import_module("onnx")
    for name, model in (("eight", attar.quantize(net(), IMAGES)), ("static", net())):
        made = export(
            model, tmp_path / name, example=IMAGES, formats=["onnx_int8"], calibration=IMAGES
        )
        held = {each.name: each for each in graph(made["onnx_int8"].path).initializer}
        weights = [
            onnx.numpy_helper.to_array(held[node.input[0]])
            for node in graph(made["onnx_int8"].path).node
            if node.op_type == "DequantizeLinear"
            and len(getattr(held.get(node.input[0]), "dims", ())) > 1
        ]
        assert len(weights) == 10
        assert {str(each.dtype) for each in weights} == {"uint8" if name == "eight" else "int8"}
        if name == "static":
            assert max(int(abs(each.astype(int)).max()) for each in weights) <= 64


def test_large_weights_answer_right_on_a_processor_of_16_bits(tmp_path):
    # 127 x 255 twice is beyond 16 bits: as int8 such a file answers wrongly without VNNI.
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    nn.init.constant_(model[0].weight, 1.0)
    given = torch.rand(16, 8, 8, 8) * 0.1 + 0.9
    frozen = attar.quantize(attar.quantize(model, given), mode="freeze").eval()
    made = export(frozen, tmp_path / "out", example=given, formats=["onnx_int8"])["onnx_int8"]
    with torch.no_grad():
        assert made.difference < 0.03 * float(frozen(given).abs().max())


def test_a_learning_model_is_exported_frozen_and_comes_back(tmp_path):
    learning = attar.quantize(net(), IMAGES).eval()
    formats: Any = ["safetensors", "onnx_int8", "torch_export"]
    made = export(learning, tmp_path / "out", example=IMAGES, formats=formats, task=TASK)
    with torch.no_grad():
        wanted = learning(IMAGES)
        assert torch.equal(attar.models.load(tmp_path / "out")(IMAGES), wanted)
        program = torch.export.load(tmp_path / "out" / "model.pt2").module()(IMAGES)
    torch.testing.assert_close(program, wanted)
    assert made["safetensors"].difference == 0
    assert made["safetensors"].agreement is None
    kept = attar.models.load(tmp_path / "out")
    assert kept.head.weight.dtype == torch.int8
    frozen = attar.quantize(learning, mode="freeze")
    same = export(frozen, tmp_path / "frozen", example=IMAGES, formats=["onnx_int8"])["onnx_int8"]
    assert same.sha256 == made["onnx_int8"].sha256


def test_the_same_plan_gives_the_same_bytes(tmp_path):
    sums = [
        export(
            model, tmp_path / f"{index}{kind}", example=IMAGES, formats=["onnx_int8"],
            calibration=IMAGES,
        )["onnx_int8"].sha256
        for kind, model in (("learned", attar.quantize(net(), IMAGES)), ("static", net()))
        for index in range(2)
    ]  # fmt: skip
    assert sums[0] == sums[1]
    assert sums[2] == sums[3]


# ---------------------------------------------------------------- calibrated


def test_a_trained_network_keeps_its_accuracy_and_its_file_is_smaller(digits, tmp_path):
    train, test = digits[0], digits[-1]
    model = attar.models.build("resnet", data=train, width=16)
    optimizer = partial(attar.training.adamw, lr=2e-3)
    attar.train(model, train, TASK, epochs=4, batch_size=64, seed=0, optimizer=optimizer)
    images = test.rows(torch.arange(len(test)))["inputs"]
    made = export(
        model,
        tmp_path / "out",
        example=images,
        formats=["onnx", "onnx_int8"],
        task=TASK,
        calibration=train.rows(torch.arange(256))["inputs"],
        drop=0.02,
        test=test,
    )
    small, lost = made["onnx_int8"], made["onnx_int8"].lost
    assert lost is not None
    assert lost.module == attar.evaluate(model, test, TASK)["accuracy"]
    assert lost.module > 0.9
    with torch.no_grad():
        logits, answers = model.eval()(images), run(small.path, images)
    right = answers.argmax(1) == test.rows(torch.arange(len(test)))["labels"]
    assert lost.file == pytest.approx(float(right.float().mean()))
    assert lost.drop == pytest.approx(lost.module - lost.file)
    # An answer changes only where the two best logits are nearer than what both may move.
    best = logits.topk(2).values
    moved = (answers - logits).abs().amax(1)
    near = float(((best[:, 0] - best[:, 1]) <= 2 * moved).float().mean())
    assert abs(lost.drop) <= near < 0.05
    assert lost.missed is (lost.drop > 0.02)
    assert small.bytes < 0.45 * made["onnx"].bytes
    card = (tmp_path / "out" / "README.md").read_text()
    told = [f"{value:.2%}".replace("%", " %") for value in (lost.file, lost.module)]
    assert f"its accuracy is {told[0]}, the network's {told[1]}" in card
    assert '"model.int8.onnx"' in card
    assert json.loads(json.dumps(small.to_json()))["lost"]["budget"] == 0.02


def test_a_file_that_loses_more_than_it_may_says_so(digits, tmp_path):
    test = digits[-1]
    model = net()
    images = test.rows(torch.arange(20))["inputs"]
    narrow = images * 1e-3  # ranges of other images than those that come
    made = export(
        model, tmp_path / "out", example=images, formats=["onnx_int8"], task=TASK,
        calibration=narrow, drop=0.0, test=test,
    )["onnx_int8"]  # fmt: skip
    assert made.lost is not None
    assert made.lost.missed is (made.lost.drop > 0)
    assert made.agreement is not None
    assert made.agreement < 1
    assert made.difference > 0.1


def test_what_is_lost_is_missed_above_the_budget_alone(digits):
    train, test = digits[0], digits[-1]
    images, labels = (train.rows(torch.arange(len(train)))[name] for name in ("inputs", "labels"))
    means = torch.stack([images[labels == each].mean(0).flatten() for each in range(10)])
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # the nearest mean of a class
    module[1].weight.data, module[1].bias.data = means, -means.square().sum(1) / 2
    worse = nn.Sequential(module, nn.Threshold(0.0, 0.0), nn.Linear(10, 10))
    there = partial(lost, test=test, task=TASK)
    found = there(lambda x: worse(x).detach(), module, budget=0.1)
    assert found.module > 0.8
    assert found.drop == pytest.approx(found.module - found.file)
    assert found.missed
    assert not there(lambda x: worse(x).detach(), module, budget=found.drop).missed
    assert not there(lambda x: module(x).detach(), module, budget=0.0).missed
    better = there(lambda x: module(x).detach(), worse, budget=0.0)
    assert better.drop < 0
    assert not better.missed
    loss = partial(lost, test=test, task=Backwards(classes=10))  # where less is better
    assert not loss(lambda x: worse(x).detach(), module, budget=0.0).missed
    assert loss(lambda x: module(x).detach(), worse, budget=0.0).missed


class Backwards(attar.tasks.ImageClassification):
    higher_is_better = False


def test_ranges_are_those_of_the_calibration(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3))
    given = torch.tensor([[-1.0, 0.5, 1.0, 4.1]])
    made = export(model, tmp_path / "out", example=given, formats=["onnx_int8"], calibration=given)[
        "onnx_int8"
    ]
    onnx = importlib.import_module("onnx")
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph(made.path).initializer}
    first = next(node for node in graph(made.path).node if node.op_type == "QuantizeLinear")
    scale, zero = (held[name] for name in first.input[1:3])
    assert float(scale) == pytest.approx(5.1 / 255)  # from -1 to 4.1
    assert int(zero) == 50
    weight = model[0].weight.detach()
    step = next(
        held[node.input[1]]
        for node in graph(made.path).node
        if node.op_type == "DequantizeLinear" and held.get(node.input[1], scale).size == 3
        and held[node.input[0]].ndim == 2
    )  # fmt: skip
    # Of each output by itself, and of 7 bits: the largest weight is 64 steps or one less.
    assert [round(float(x), 1) for x in weight.abs().amax(1) / torch.from_numpy(step)] == [
        pytest.approx(64, abs=1)
    ] * 3


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, given: Tensor) -> Tensor:
        return self.head(self.memory(given)[0][:, -1])


def test_a_layer_that_would_stay_float_is_named_unless_it_is_skipped(tmp_path):
    given = torch.randn(8, 5, 4)
    make = partial(export, example=given, formats=["onnx_int8"], calibration=given)
    with pytest.raises(UsageError, match=r"onnx_int8: 'memory' \(is a LSTM\) would stay float"):
        make(Remembers(), tmp_path / "out")
    with pytest.raises(UsageError, match=r"'memory' \(is a LSTM\)"):
        check_export(Remembers(), example=given, formats=["onnx_int8"])
    assert not (tmp_path / "out").exists()
    made = make(Remembers(), tmp_path / "out", skip=["memory"])["onnx_int8"]
    found = {node.op_type for node in graph(made.path).node}
    assert {"LSTM", "QuantizeLinear"} <= found


def test_a_layer_that_is_skipped_stays_float(tmp_path):
    made = export(
        net(), tmp_path / "out", example=IMAGES, formats=["onnx_int8"], calibration=IMAGES,
        skip=["stem", "head"],
    )["onnx_int8"]  # fmt: skip
    held = {each.name for each in graph(made.path).initializer}
    floats = [
        node.op_type
        for node in graph(made.path).node
        if node.op_type in ("Conv", "Gemm") and node.input[1] in held
    ]
    assert floats == ["Conv", "Gemm"]


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"formats": ["onnx_int8"]}, "needs examples that its ranges are taken from"),
        (
            {"formats": ["onnx_int8"], "calibration": torch.zeros(())},
            "calibration must be a tensor",
        ),
        (
            {"formats": ["onnx_int8"], "calibration": IMAGES, "drop": 0.1},
            "drop needs test and task",
        ),
        ({"formats": ["onnx-int8"]}, "there is no format 'onnx-int8'; did you mean 'onnx_int8'"),
        (
            {"formats": ["onnx_int8"], "calibration": IMAGES, "skip": ["nowhere"]},
            "skip: the module has no 'nowhere'",
        ),
    ],
)
def test_what_is_wrong_is_said(options, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        export(net(), tmp_path / "out", example=IMAGES, task=TASK, **options)
    assert not (tmp_path / "out").exists()


def test_a_budget_needs_the_format_and_a_number(digits, tmp_path):
    make = partial(export, net(), tmp_path / "out", example=IMAGES, task=TASK, test=digits[-1])
    with pytest.raises(UsageError, match="drop is what the format onnx_int8 may lose"):
        make(formats=["onnx"], drop=0.1)
    with pytest.raises(UsageError, match="drop is a number from 0 on"):
        make(formats=["onnx_int8"], calibration=IMAGES, drop=-1)
    with pytest.raises(UsageError, match="and accuracy is at most 1: a file could lose all"):
        make(formats=["onnx_int8"], calibration=IMAGES, drop=1.5)


@pytest.mark.parametrize(
    ("mode", "format_", "said"),
    [
        ("learn", "onnx", "the format onnx is for floats; export onnx_int8 or safetensors"),
        ("weights", "onnx", "the format onnx is for floats; export safetensors"),
        ("dynamic", "onnx_int8", "this one has mode 'dynamic'; export safetensors"),
    ],
)
def test_formats_in_which_whole_numbers_would_be_floats_are_refused(mode, format_, said, tmp_path):
    model = attar.quantize(net("mlp"), IMAGES, mode=mode)
    with pytest.raises(UsageError, match=said):
        export(model, tmp_path / "out", example=IMAGES, formats=[format_], calibration=IMAGES)
    with pytest.raises(UsageError, match=said):
        check_export(model, example=IMAGES, formats=[format_])


@pytest.mark.parametrize("mode", ["weights", "dynamic"])
def test_small_linear_layers_are_exported_in_the_formats_that_keep_them(mode, tmp_path):
    model = attar.quantize(net("mlp", widths=[128]), mode=mode).eval()
    formats: Any = ["safetensors", "torch_export"]
    made = export(model, tmp_path / "out", example=IMAGES, formats=formats)
    with torch.no_grad():
        assert torch.equal(attar.models.load(tmp_path / "out")(IMAGES), model(IMAGES))
    assert made["safetensors"].bytes < 0.4 * 4 * (64 * 128 + 128 * 10)


def test_a_file_that_answers_no_numbers_is_not_written():
    with pytest.raises(DataError, match="answers NaN or infinity"):
        likeness("file", lambda x: x / 0, nn.Identity(), (IMAGES.flatten(1),), ordered=True)
    gap, same = likeness("file", lambda x: -x, nn.Identity(), (torch.eye(4),), ordered=True)
    assert gap == 2
    assert same == 0
    assert likeness("file", lambda x: x, nn.Identity(), (torch.eye(4),), ordered=False) == (0, None)


# ---------------------------------------------------------------- in a recipe

RECIPE = """\
task: image-classification
data: digits
teacher:
  model: {name: mlp, widths: [32]}
  train: {epochs: 2, batch_size: 64}
student: {name: mlp, widths: [8]}
stages:
  - {do: distill, epochs: 1, batch_size: 64, terms: [{loss: kl_divergence}]}
  - {do: export, formats: [safetensors, onnx_int8], drop: DROP}
"""


@pytest.mark.parametrize("drop", ["0.5", "0.0"])
def test_a_recipe_calibrates_on_training_rows_and_tells_what_was_lost(drop, tmp_path, monkeypatch):
    from attar.recipes import exports

    asked: list[Any] = []
    made = export

    def noted(module: nn.Module, folder: Path, **options: Any) -> Any:
        asked.append(options)
        return made(module, folder, **options)

    monkeypatch.setattr(exports, "export", noted)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DROP", drop))
    lines: list[str] = []
    attar.run(tmp_path / "recipe.yaml", folder=tmp_path / "run", say=lines.append)
    told = json.loads((tmp_path / "run" / "verdict.json").read_text())
    small = told["exports"][1]
    assert (small["format"], small["path"]) == ("onnx_int8", "model.int8.onnx")
    assert (tmp_path / "run" / "export" / "model.int8.onnx").stat().st_size == small["bytes"]
    assert small["lost"]["budget"] == float(drop)
    assert told["notes"][0].startswith("model.int8.onnx has ")
    assert small["lost"]["module"] == pytest.approx(
        told["models"]["distilled"]["scores"]["accuracy"]
    )
    assert exports.missed(told["exports"]) is (small["lost"]["drop"] > float(drop))
    assert any(f"the {float(drop):g} it may lose" in line for line in lines)
    assert exports.missed([{"lost": None}, {"lost": {"missed": True}}])
    assert not exports.missed([{"lost": None}, {}, {"lost": {"missed": False}}])
    train, test = attar.data.digits()
    (options,) = asked
    seen = options["calibration"]["inputs"].flatten(1)
    ours, theirs = (
        {tuple(row) for row in part.rows(torch.arange(len(part)))["inputs"].flatten(1).tolist()}
        for part in (train, test)
    )
    rows = {tuple(row) for row in seen.tolist()}
    assert len(rows) > 200
    assert rows <= ours
    assert len(rows & theirs) < len(rows) / 10


@pytest.mark.parametrize(
    ("formats", "drop", "said"),
    [
        ("onnx", "0.1", "drop is what the format onnx_int8 may lose; add it to formats"),
        ("onnx_int8", "1.5", "drop is 1.5, and accuracy is at most 1"),
    ],
)
def test_a_budget_that_nothing_is_judged_by_is_found_before_training(formats, drop, said, tmp_path):
    recipe = RECIPE.replace("safetensors, onnx_int8", formats).replace("DROP", drop)
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(PreflightError, match=said):
        attar.check(tmp_path / "recipe.yaml")


def test_the_page_says_that_the_goal_is_not_about_the_file():
    from attar.recipes.exports import notes

    made = {
        "format": "onnx_int8",
        "path": "model.int8.onnx",
        "bytes": 24_100,
        "latency": {"1": {"p50_ms": 0.076, "p95_ms": 0.1}},
    }
    (plain,) = notes({"macs": 1.0}, [made, made | {"format": "safetensors"}])
    assert plain == (
        "model.int8.onnx has 24.1 kB and takes 0.076 ms for one example; the goal and the table "
        "are about the student in PyTorch."
    )
    (missed,) = notes({"size_mb": 0.02, "latency_ms": 0.08}, [made])
    assert missed == f"{plain} This file misses the goal of 20 kB."
    assert notes({"size_mb": 0.0241}, [made]) == [plain]
