"""`attar import`: what comes out is what was in, and a hostile file runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from attar import models
from attar.cli import main
from attar.models import importing, unpickling
from attar.models.importing import convert
from attar.runtime import DataError, RunExistsError, UsageError


@pytest.fixture
def state():
    torch.manual_seed(0)
    module = models.build("resnet", shape=(1, 8, 8), outputs=3, width=2)
    return module, dict(module.state_dict())


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.fixture
def attar(tmp_path, monkeypatch, capsys):
    """Call the command in a folder of its own; its code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def called(*words):
        monkeypatch.setattr(sys, "argv", ["attar", *words])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return called


# ---------------------------------------------------------------- what comes out


def test_a_state_dict_comes_out_as_it_was_and_fills_the_model(attar, state):
    _, tensors = state
    torch.save(tensors, "weights.pt")
    code, out, err = attar("import", "weights.pt", "--into", "net.safetensors")
    assert (code, err) == (0, "")
    same(load_file("net.safetensors"), tensors)
    assert f"wrote      net.safetensors: {len(tensors)} tensors" in out
    assert "next       attar check RECIPE 'teacher={model: FAMILY, load: net.safetensors}'" in out
    again = models.build("resnet", shape=(1, 8, 8), outputs=3, width=2)
    models.load_weights(again, "net.safetensors")
    same(dict(again.state_dict()), tensors)


def test_nests_prefixes_ties_and_other_entries(attar):
    weight = torch.rand(4, 3)
    inner = {
        "module.embed.weight": weight,
        "module.head.weight": weight,
        "module.half": torch.rand(2).half(),
        "module.view": torch.rand(4, 4).t(),
        "module.scalar": torch.tensor(3),
    }
    content = {"epoch": 3, "optimizer": {"lr": 0.1}, "model": {"state_dict": inner}}
    torch.save(content, "run.ckpt")
    code, out, _ = attar("import", "run.ckpt", "--into", "net")
    assert code == 0
    wanted = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    wanted.pop("head.weight")
    same(load_file("net/model.safetensors"), wanted)
    with safe_open("net/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    assert "taken from model.state_dict\n" in out
    assert "'module.' was taken off the names" in out
    assert "tied       head.weight is embed.weight (held once)" in out
    assert "left out   epoch (int), optimizer (dict)\n" in out


def test_views_of_one_memory_come_out_apart(tmp_path):
    whole = torch.arange(6.0)
    torch.save({"first": whole[:4], "last": whole[2:]}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    same(load_file(tmp_path / "w.safetensors"), {"first": whole[:4], "last": whole[2:]})


def test_the_format_before_archives_is_read(tmp_path, state):
    torch.save(state[1], tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    same(load_file(tmp_path / "w.safetensors"), state[1])


def test_what_safetensors_cannot_hold_is_listed(tmp_path):
    torch.save({"a": torch.rand(2), "s": torch.eye(3).to_sparse(), "n": None}, tmp_path / "w.pt")
    done = convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert done.left_out == ["s (torch.float32)", "n (NoneType)"]
    assert load_file(tmp_path / "w.safetensors").keys() == {"a"}


def test_a_folder_of_transformers_becomes_one_that_is_read(attar):
    hf = pytest.importorskip("transformers")
    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        patch_size=4, image_size=8, num_labels=3,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config)
    model.save_pretrained("old")
    os.unlink("old/model.safetensors")
    torch.save(model.state_dict(), "old/pytorch_model.bin")
    with pytest.raises(DataError) as caught:
        models.build("pretrained", shape=(3, 8, 8), outputs=3, path="old")
    words = str(caught.value).split("attar import ")[1].split()
    assert words[:2] == ["old/pytorch_model.bin", "--into"]
    code, out, _ = attar("import", words[0], "--into", "new")
    assert code == 0
    assert "copied     config.json\n" in out
    assert "attar distill --teacher new --student resnet --data DATA" in out
    ours = models.build("pretrained", shape=(3, 8, 8), outputs=3, path="new")
    same(dict(ours.state_dict()), dict(model.state_dict()))


# ---------------------------------------------------------------- hostile files


class Runs:
    """A pickle of this runs a command when it is read without care."""

    def __init__(self, function, *words):
        self.function, self.words = function, words

    def __reduce__(self):
        return self.function, self.words


def archive(path: Path, pickled: bytes, how: int = zipfile.ZIP_STORED, data: bytes = b"") -> None:
    """A file as torch.save writes it, around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr("w/data.pkl", pickled)
        file.writestr("w/byteorder", "little")
        file.writestr("w/version", "3\n")
        file.writestr("w/data/0", data)


def refused(path: Path, said: str) -> None:
    target = path.with_name("out.safetensors")
    with pytest.raises(DataError, match=said) as caught:
        convert(path, target)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_command_in_a_pickle_is_refused_by_name_and_not_run(zipped, tmp_path):
    path, ran = tmp_path / "evil.pt", tmp_path / "ran"
    pickled = pickle.dumps({"a": Runs(os.system, f"touch {ran}")}, protocol=2)
    archive(path, pickled) if zipped else path.write_bytes(pickled)
    refused(path, r"asks for (posix|nt)\.system, which is no tensor")
    assert not ran.exists()
    pickle.loads(pickled)  # it is a real one
    assert ran.exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [(eval, ("1",)), (__import__, ("os",)), (getattr, ("", "join")), (io.open, ("/etc/passwd",))],
)
def test_other_functions_are_refused_by_name(function, words, tmp_path):
    path = tmp_path / "evil.bin"
    archive(path, pickle.dumps({"a": Runs(function, *words)}, protocol=2))
    name = "open" if function is io.open else function.__name__
    refused(path, rf"asks for (\w+\.)?{name}, which is no tensor")


def test_a_global_of_a_module_that_would_be_imported_is_refused(tmp_path, monkeypatch):
    ran = tmp_path / "imported"
    (tmp_path / "trap.py").write_text(f"open({str(ran)!r}, 'w')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    archive(tmp_path / "evil.pth", b"\x80\x02ctrap\nThing\n.")
    refused(tmp_path / "evil.pth", r"asks for trap\.Thing")
    assert not ran.exists()


def storage(numel: int, size: bytes, stride: bytes) -> bytes:
    """A pickle of {"a": tensor} over storage "0" of *numel* floats."""
    persistent = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    )  # fmt: skip
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + b"K\x00" + size + b"\x85" + stride
        + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    return b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."


def wide(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def test_the_pickle_made_by_hand_is_one_that_torch_reads(tmp_path):
    archive(tmp_path / "w.pt", storage(2, wide(2), wide(1)), data=struct.pack("<2f", 1, 2))
    convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    same(load_file(tmp_path / "w.safetensors"), {"a": torch.tensor([1.0, 2.0])})


def test_a_tensor_far_larger_than_its_file_is_refused_before_it_is_made(tmp_path):
    path = tmp_path / "huge.pt"
    archive(path, storage(1, wide(2**40), wide(0)), data=bytes(4))
    refused(path, r"claims 4,398,046,511,104 bytes of tensors in a file of")


def test_storage_far_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / "huge.pt"
    archive(path, storage(2**40, wide(2**40), wide(1)), data=bytes(4))
    refused(path, "record size .* use another copy")


def test_nested_lists_that_share_their_parts_are_no_state_dict(tmp_path):
    """A few bytes that stand for many numbers: memoised lists of lists."""
    pickled = b"\x80\x02]q\x00(" + b"K\x01" * 1000 + b"e" + b"".join(
        b"]q" + bytes([n]) + b"(" + (b"h" + bytes([n - 1])) * 100 + b"e" for n in range(1, 5)
    ) + b"."  # fmt: skip
    archive(tmp_path / "deep.pt", pickled)
    refused(tmp_path / "deep.pt", "holds a list, not a state dict")


def test_a_zip_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "bomb.pt"
    archive(path, b"\x80\x02}.", zipfile.ZIP_DEFLATED, bytes(64_000_000))
    assert path.stat().st_size < 100_000
    refused(path, "unpacks to 64,000,0.* was not opened")


def test_every_truncation_is_refused(tmp_path):
    torch.save({"a": torch.rand(3)}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "part.pt"
    for length in (0, 1, 40, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:length])
        refused(path, "damaged|cannot be read")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.rand(2), {"model": {"a": "b"}}])
def test_files_without_tensors_say_what_they_hold(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds (a|no)")


def test_names_that_a_terminal_might_obey_are_escaped(attar):
    torch.save({"a": torch.rand(2), "b\x1b[2J": 3}, "w.pt")
    code, out, _ = attar("import", "w.pt", "--into", "w.safetensors")
    assert code == 0
    assert "\x1b" not in out
    assert r"b\x1b[2J (int)" in out


def test_reading_takes_no_more_time_than_it_may(tmp_path, monkeypatch):
    torch.save({"a": torch.rand(2)}, tmp_path / "w.pt")
    monkeypatch.setattr(importing, "SECONDS", 0.01)
    refused(tmp_path / "w.pt", "was not read within 0.01 s")


def test_the_limits_of_memory_and_disk_stand_in_the_other_process(tmp_path, monkeypatch):
    set_: dict[int, int] = {}
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "setrlimit", lambda what, most: set_.update({what: most[0]}))
    unpickling._limit(10)
    assert set_[resource.RLIMIT_FSIZE] == 20 + unpickling.SPARE
    assert set_[resource.RLIMIT_AS] >= 40 + unpickling.SPARE


# ---------------------------------------------------------------- source and target


def test_sources_and_targets_are_checked(tmp_path):
    torch.save({"a": torch.rand(2)}, tmp_path / "w.pt")
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "file").touch()
    models.save(models.build("mlp", shape=(4,), outputs=2), tmp_path / "model")
    for source, into, kind, said in (
        ("w.npz", "new", UsageError, "is not converted"),
        ("absent.pt", "new", DataError, "there is no such file"),
        ("w.pt", "file", UsageError, "is a file"),
        ("w.pt", "there.safetensors", RunExistsError, "nothing is written over"),
        ("w.pt", "model", RunExistsError, "nothing is written over"),
    ):
        with pytest.raises(kind, match=said):
            convert(tmp_path / source, tmp_path / into)


@pytest.mark.parametrize(
    "words",
    [
        ["check", "r.yaml", "teacher={load: w.pt}"],
        ["check", "r.yaml", "teacher={model: mlp, load: w.pt}"],
        ["distill", "--teacher", "w.pt", "--student", "mlp", "--data", "digits"],
        ["evaluate", "w.pt", "--data", "digits"],
    ],
)
def test_wherever_pickled_weights_are_met_the_command_is_named(attar, words):
    torch.save({"a": torch.rand(2)}, "w.pt")
    Path("r.yaml").write_text(
        "{task: image-classification, data: digits, teacher: {load: x}, student: mlp, "
        "stages: [{do: distill, terms: [{loss: kl_divergence}]}]}"
    )
    code, _, err = attar(*words)
    assert code == 65
    assert "attar import w.pt --into w.safetensors" in err
