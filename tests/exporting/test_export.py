"""`export`: every file answers as the module does, and nothing else is touched."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import attar
from attar.exporting import check_export, export
from attar.exporting.artefact import largest_difference
from attar.runtime import DataError, UsageError

room = importlib.import_module("attar.exporting.export")
ROOT = Path(__file__).parents[2]
ALL = ["safetensors", "onnx", "torch_export"]
FAMILIES = {
    "mlp": {"widths": [16]},
    "resnet": {"width": 4},
    "mobilenet": {"width": 4, "depth": 1},
    "vit": {"width": 16, "depth": 2},
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason='needs pip install "attar[onnx]"',
)


def tiny(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def rows(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- the files


@needs_onnx
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_the_same_in_every_format_and_without_attar(
    family: str, tmp_path: Path, digits: attar.data.Splits
) -> None:
    train, test = digits[0], digits[-1]
    torch.manual_seed(0)
    student = attar.models.build(family, data=train, **FAMILIES[family])
    inputs = test.rows(torch.arange(100))["inputs"]
    with torch.no_grad():
        for _ in range(3):
            student(inputs)  # so that batch normalisation differs between its modes
    made = export(student, tmp_path / "out", formats=ALL, example=inputs)
    assert student.training
    student.eval()
    for size in (1, 2, 7, 100):
        with torch.no_grad():
            wanted = student(inputs[:size])
            loaded = attar.models.load(tmp_path / "out")(inputs[:size])
            program = torch.export.load(tmp_path / "out" / "model.pt2").module()(inputs[:size])
        assert torch.equal(loaded, wanted)
        assert (program - wanted).abs().max() < 1e-5
        assert (by_onnx(tmp_path / "out" / "model.onnx", inputs[:size]) - wanted).abs().max() < 1e-5
    for name, artefact in made.items():
        data = artefact.path.read_bytes()
        assert artefact.format == name
        assert artefact.bytes == len(data)
        assert artefact.sha256 == hashlib.sha256(data).hexdigest()
        assert artefact.examples == 100
        assert set(artefact.latency) == {"1", "64"}
        assert 0 <= artefact.difference < 1e-5
    if family not in ("resnet", "vit"):  # each process costs seconds; these hold every operator
        return
    done = without_attar(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["(1, 10)", "(1, 10)"]
    assert "head.weight" in done.stdout


def by_onnx(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"inputs": inputs.numpy()})[0])


def without_attar(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what the card says, where attar cannot be imported."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    code = "\n".join(["import sys", "sys.modules['attar'] = None", *blocks])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@needs_onnx
def test_an_onnx_file_is_one_file_of_opset_20_with_a_free_batch(tmp_path: Path) -> None:
    import onnx

    export(tiny(), tmp_path / "out", formats=["onnx"], example=rows())
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.onnx"]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    (given,) = model.graph.input
    (told,) = model.graph.output
    shapes = [value.type.tensor_type.shape.dim for value in (given, told)]
    assert [(given.name, shapes[0][0].dim_param, shapes[0][1].dim_value)] == [
        ("inputs", "batch", 4)
    ]
    assert [(told.name, shapes[1][0].dim_param, shapes[1][1].dim_value)] == [
        ("outputs", "batch", 3)
    ]


@needs_onnx
def test_the_same_module_gives_the_same_bytes(tmp_path: Path) -> None:
    first = export(tiny(), tmp_path / "a", formats=ALL, example=rows())
    again = export(tiny(), tmp_path / "b", formats=ALL, example=rows(3))
    assert {n: a.sha256 for n, a in first.items()} == {n: a.sha256 for n, a in again.items()}


@needs_onnx
def test_no_file_holds_an_example_or_a_path_of_this_machine(tmp_path: Path) -> None:
    student = attar.models.build("vit", shape=(1, 8, 8), outputs=3, width=8, depth=1)
    example = torch.full((4, 1, 8, 8), 0.1234567)
    export(student, tmp_path / "out", formats=ALL, example=example)
    pattern = example[0].numpy().tobytes()[:16]
    for name, data in content(tmp_path / "out").items():
        assert pattern not in data, name
        for place in (ROOT, tmp_path, sys.prefix, "site-packages", "forward("):
            assert str(place).encode() not in data, (name, place)


@needs_onnx
def test_an_export_says_nothing_on_the_terminal(tmp_path: Path) -> None:
    code = (
        "import torch; from attar.exporting import export\n"
        "export(torch.nn.Linear(2, 3), 'out', formats=['onnx', 'torch_export'],"
        " example=torch.rand(3, 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_module_of_ones_own_is_exported_too(tmp_path: Path) -> None:
    student = tiny()
    made = export(
        student, tmp_path / "out", formats=["safetensors", "torch_export"], example=rows()
    )
    assert made["safetensors"].difference == 0
    back = attar.models.load(tmp_path / "out", into=tiny())
    assert torch.equal(back(rows()), student.eval()(rows()))


def test_tied_weights_of_ones_own_module_are_read_back(tmp_path: Path) -> None:
    student = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    student[2].weight = student[0].weight
    formats = ["safetensors", "torch_export"]
    made = export(student, tmp_path / "out", formats=formats, example=rows())
    assert [artefact.difference for artefact in made.values()] == [0, 0]


def test_one_example_is_enough(tmp_path: Path) -> None:
    made = export(tiny(), tmp_path / "out", formats=["torch_export"], example=rows(1))
    assert made["torch_export"].examples == 1


def test_at_most_256_examples_are_asked(tmp_path: Path) -> None:
    made = export(tiny(), tmp_path / "out", example=rows(300))
    assert made["safetensors"].examples == 256


def test_the_task_is_kept_with_the_weights(tmp_path: Path) -> None:
    task = attar.tasks.ImageClassification(classes=("a", "b", "c"))
    export(tiny(), tmp_path / "out", example=rows(), task=task)
    assert attar.tasks.restore(attar.models.read_extra(tmp_path / "out")["task"]) == task


@pytest.mark.parametrize("formats", [["safetensors", "torch_export"]])
def test_the_module_comes_back_as_it_was(formats: list[str], tmp_path: Path) -> None:
    student = tiny()
    student[1].eval()
    student[0].weight.requires_grad_(False)
    student[3](torch.ones(1, 8)).sum().backward()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    held = [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in
            student.parameters()]  # fmt: skip
    generator = torch.get_rng_state()
    export(student, tmp_path / "out", formats=formats, example=rows())
    assert [part.training for part in student.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())
    for parameter, (same, trained, grad) in zip(student.parameters(), held, strict=True):
        assert id(parameter) == same
        assert parameter.requires_grad is trained
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)
    assert torch.equal(torch.get_rng_state(), generator)


# ---------------------------------------------------------------- what is refused


def shifted(by: float):
    def run_of(data: bytes):
        student = tiny().eval()
        return lambda inputs: student(inputs) + by

    return run_of


def test_a_file_that_differs_is_refused_with_the_number_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "pt2_run", shifted(0.25))
    with pytest.raises(DataError, match=r"model\.pt2: differs .* by up to 0\.25 where 0\.0001 is"):
        export(tiny(), tmp_path / "out", formats=["safetensors", "torch_export"], example=rows())
    assert os.listdir(tmp_path) == []


def test_a_refused_export_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny(), tmp_path / "out", example=rows())
    before = content(tmp_path)
    monkeypatch.setattr(room, "pt2_run", shifted(0.25))
    with pytest.raises(DataError):
        export(tiny(), tmp_path / "out", formats=["torch_export"], example=rows())
    assert content(tmp_path) == before


@pytest.mark.parametrize(("by", "passes"), [(0.5e-4, True), (2e-4, False), (torch.nan, False)])
def test_the_bound_is_one_in_ten_thousand(by: float, passes: bool) -> None:
    student = nn.Identity()
    examples = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    if passes:
        found = largest_difference("f", lambda x: x + by, student, (examples,), ordered=True)
        assert found == pytest.approx(by, abs=1e-6)
        return
    with pytest.raises(DataError, match="differs from the module"):
        largest_difference("f", lambda x: x + by, student, (examples,), ordered=True)


def test_another_class_is_refused_however_small_the_difference() -> None:
    examples = torch.tensor([[0.0, 1e-6], [1.0, 0.0], [1e-6, 0.0]])

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return torch.where(inputs.max(1, keepdim=True)[0] < 0.5, inputs.flip(1), inputs)

    with pytest.raises(DataError, match="another one on 3 of 3 examples"):
        # The first example is asked twice: with the others, and once more at the end.
        largest_difference("f", run, nn.Identity(), (examples,), ordered=True)
    found = largest_difference("f", run, nn.Identity(), (examples,), ordered=False)
    assert found == pytest.approx(1e-6)


@pytest.mark.parametrize("known", [1, 2, 5])
def test_a_file_of_one_batch_size_is_refused(known: int) -> None:
    def run(inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) != known:
            raise RuntimeError(f"expected {known}")
        return inputs

    with pytest.raises(
        DataError, match=rf"cannot read a batch of \[\d, \d+\] \(expected {known}\)"
    ):
        largest_difference("f", run, nn.Identity(), (rows(5),), ordered=True)


def test_a_module_that_answers_at_random_is_refused(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(inputs, 0.5, training=True)

    with pytest.raises(DataError, match="differs from the module"):
        export(Noisy(), tmp_path / "out", example=rows(), formats=["torch_export"])


class Branching(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else -inputs


class Table(nn.Module):
    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": inputs}


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (tiny(), {"formats": ["onx"]}, "there is no format 'onx'; did you mean 'onnx'?"),
        (tiny(), {"formats": []}, "give a list, each format once, of: safetensors, onnx"),
        (tiny(), {"formats": "onnx"}, "formats is 'onnx'; give a list"),
        (tiny(), {"formats": ["safetensors"] * 2}, "each format once"),
        (tiny(), {"example": torch.zeros(0, 4)}, "real inputs"),
        (tiny(), {"example": torch.zeros(2, 5)}, r"cannot read the example \[2, 5\]"),
        (tiny().half(), {}, r"'0.weight' is torch.float16, .* call module.float\(\) first"),
        (Table(), {}, "returns a dict, but .* returns one tensor"),
        (Branching(), {"formats": ["torch_export"]}, "torch cannot trace the Branching"),
        (tiny(), {"card": {"tacher": "x"}}, "a card has no 'tacher'; did you mean 'teacher'?"),
        (tiny(), {"card": {"teacher": 3}}, "the card's teacher must be a str, not int"),
        (tiny(), {"card": {"licence": "MIT"}}, "a card has no 'licence'"),
        (tiny(), {"licence": 3}, "licence must be text, such as 'MIT', not int"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_written(
    module: nn.Module, given: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(module, tmp_path / "out", **{"example": rows(), **given})
    assert os.listdir(tmp_path) == []


def test_a_missing_library_is_said_with_the_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r'onnx is missing; type: pip install "attar\[onnx\]"$'):
        export(tiny(), tmp_path / "out", formats=["safetensors", "onnx"], example=rows())
    assert os.listdir(tmp_path) == []


def test_weights_beyond_one_onnx_file_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    huge = nn.Linear(2**15, 2**14, bias=False, device="meta")
    with pytest.raises(UsageError, match="the weights have 2147483648 bytes"):
        export(huge, tmp_path / "out", formats=["onnx"], example=rows())


# ---------------------------------------------------------------- before training


@needs_onnx
def test_a_module_that_can_be_exported_passes_and_leaves_nothing(tmp_path: Path) -> None:
    student = tiny()
    held = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    check_export(student, example=rows(), formats=ALL)
    assert student.training
    assert all(torch.equal(held[name], tensor) for name, tensor in student.state_dict().items())
    assert os.listdir(tmp_path) == []


class Unspeakable(nn.Module):
    """Traced by torch, without a word in ONNX."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(inputs)


@pytest.mark.parametrize(
    ("module", "formats", "message"),
    [
        (tiny(), ["onx"], "did you mean 'onnx'"),
        (Table(), ["safetensors"], "returns a dict"),
        (Branching(), ["torch_export"], "torch cannot trace the Branching"),
        pytest.param(
            Unspeakable(), ["onnx"], "torch cannot say this module in ONNX", marks=needs_onnx
        ),
    ],
)
def test_what_cannot_be_exported_is_known_before_training(
    module: nn.Module, formats: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_export(module, example=rows(), formats=formats)


# ---------------------------------------------------------------- the folder


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    export(tiny(), tmp_path / "out", formats=["safetensors", "torch_export"], example=rows())
    export(tiny(outputs=2), tmp_path / "out", example=rows())
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "model.json", "model.safetensors"]
    assert "[n, 2]" in (tmp_path / "out" / "README.md").read_text()
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_with_any_other_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    (tmp_path / "out" / "README.md").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UsageError, match=r"holds 'thesis.tex', which no export wrote"):
        export(tiny(), tmp_path / "out", example=rows())
    assert content(tmp_path) == before


def test_a_file_that_appears_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years")
        return "card"

    monkeypatch.setattr(room, "card_text", slow)
    with pytest.raises(UsageError, match=r"holds 'thesis.tex'"):
        export(tiny(), tmp_path / "out", example=rows())
    assert content(tmp_path) == {"out/thesis.tex": b"years"}


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_symbolic_link_is_not_followed(what: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "README.md").write_text("precious")
    if what == "folder":
        (tmp_path / "out").symlink_to(elsewhere)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "README.md").symlink_to(elsewhere / "README.md")
    with pytest.raises(UsageError, match=r"symbolic link|no export wrote"):
        export(tiny(), tmp_path / "out", example=rows())
    assert content(elsewhere) == {"README.md": b"precious"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        export(tiny(), tmp_path / "out", example=rows())


def test_an_error_at_the_end_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> str:
        raise OSError("no space")

    monkeypatch.setattr(room, "card_text", broken)
    with pytest.raises(OSError, match="no space"):
        export(tiny(), tmp_path / "out", example=rows())
    assert os.listdir(tmp_path) == []


def test_the_draft_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    draft = tmp_path / f".out.tmp-{ended.pid}"
    draft.mkdir()
    (draft / "model.onnx").write_text("half")
    export(tiny(), tmp_path / "out", example=rows())
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("replaced", [False, True])
def test_an_export_that_a_killed_process_put_aside_comes_back(
    replaced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two renames: the earlier export lies beside its place, or is not needed."""
    export(tiny(), tmp_path / "out", example=rows())
    before = content(tmp_path / "out")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    aside = tmp_path / f".out.old-{ended.pid}"
    shutil.copytree(tmp_path / "out", aside) if replaced else (tmp_path / "out").rename(aside)
    monkeypatch.setattr(room, "pt2_run", shifted(0.25))
    with pytest.raises(DataError):
        export(tiny(), tmp_path / "out", formats=["torch_export"], example=rows())
    assert os.listdir(tmp_path) == ["out"]
    assert content(tmp_path / "out") == before
