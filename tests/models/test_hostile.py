"""A model folder from a stranger: every lie is a DataError, and nothing runs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct

import pytest
import torch
from torch import nn

from attar import models
from attar.models.weights import header_of, to_bytes
from attar.runtime import DataError

WEIGHTS, RECORD = "model.safetensors", "model.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    models.save(models.build("resnet", shape=(1, 8, 8), outputs=3, width=2), folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def sealed(value: dict) -> bytes:
    """*value* with a checksum that fits, as a stranger who has read this code would write it."""
    body = {key: item for key, item in value.items() if key != "checksum"}
    digest = hashlib.sha256(spelled(body)).hexdigest()
    return spelled({**body, "checksum": digest})


def spelled(value: dict) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def changed(folder, path: str, value: object) -> bytes:
    record = json.loads((folder / RECORD).read_text())
    *parents, last = path.split("/")
    place = record
    for key in parents:
        place = place[key]
    place[last] = value
    return sealed(record)


def refused(folder, content: bytes, **how) -> str:
    (folder / RECORD).write_bytes(content)
    with pytest.raises(DataError) as caught:
        models.load(folder, **how)
    said = str(caught.value)
    assert str(folder) in said
    assert said.isprintable()
    assert len(said) < 900
    return said


def test_sealing_is_what_save_does(folder):
    assert sealed(json.loads((folder / RECORD).read_text())) == (folder / RECORD).read_bytes()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("family", "os.system", "family 'os.system' is none of attar's"),
        ("family", "__import__", "none of attar's"),
        ("family", "load", "none of attar's"),
        ("family", "\x1b[31mred\nline", "none of attar's"),
        ("family", "x" * 100_000, "none of attar's"),
        ("family", ["resnet"], "family: Input should be a valid string"),
        ("family", "mobilenet", "missing"),
        ("options/widht", 2, "no option 'widht'"),
        ("options/\x1b[31m", 2, "no option"),
        ("options/data", {}, "no option 'data'"),
        ("options/width", "2", "width should be a valid integer"),
        ("options/width", True, "width should be a valid integer"),
        ("options/width", 2.0, "width should be a valid integer"),
        ("options/width", 10**15, "width should be less than"),
        ("options/width", 10**400, "width should be less than"),
        ("options/width", 2**24, r"stem\.conv\.weight"),
        ("options/depth", 602, "unexpected|missing"),
        ("options/depth", 10**9 + 2, "depth should be less than"),
        ("options/shape", [2**24] * 3, r"stem\.conv\.weight"),
        ("options/shape", [[1]], r"shape\[0\]"),
        ("options/shape", [], "shape"),
        ("options/outputs", None, "outputs"),
        ("options", [], "options: Input should be a valid dictionary"),
        ("format", "attar-model/2", "its format is 'attar-model/2'; this attar reads"),
        ("format", 1, "its format is 1"),
        ("weights/file", "/etc/passwd", r"weights\.file"),
        ("weights/file", "../model.safetensors", r"weights\.file"),
        ("weights/file", "other.safetensors", r"weights\.file"),
        ("weights/bytes", -1, r"weights\.bytes"),
        ("weights/bytes", 7, "not the 7 that model.json names"),
        ("weights/sha256", "0" * 64, "SHA-256"),
        ("weights/sha256", "0" * 63, r"weights\.sha256"),
        ("weights/more", 1, r"weights\.more: Extra inputs"),
        ("parameters", 1, "lists 1 parameters"),
        ("parameters", True, "parameters: Input should be a valid integer"),
        ("parameters", 10**30, "lists 1000000"),
        ("tensors/head.weight", {"dtype": "F16", "shape": [3, 8]}, "not those that"),
        ("tensors/head.weight", {"dtype": "F32", "shape": [8, 3]}, "not those that"),
        ("tensors/head.weight", {"dtype": "F32", "shape": [-3, 8]}, "tensors.head.weight"),
        ("tensors/more", {"dtype": "F32", "shape": []}, "not those that"),
        ("tensors", {}, "not those that"),
        ("aliases", {"a": "b", "b": "a"}, "alias 'a' must be a new name for a stored tensor"),
        ("aliases", {"a": "a"}, "alias 'a'"),
        ("aliases", {"head.weight": "head.weight"}, "alias 'head.weight'"),
        ("aliases", {"head.weight": "head.bias"}, "alias 'head.weight'"),
        ("aliases", {"more": "head.weight"}, "unexpected: more"),
        ("aliases", {"a": 1}, "aliases.a"),
        ("extra", None, "extra: Input should be a valid dictionary"),
        ("surprise", 1, "surprise: Extra inputs"),
    ],
)
def test_lies_that_carry_a_fitting_checksum(folder, path, value, said):
    assert re.search(said, refused(folder, changed(folder, path, value)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'"attar-model/1"',
        b"{}",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"format": "attar-model/1", "extra": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"format": "attar-model/1", "a": ' + b"9" * 5_000 + b"}",
        b'{"format": "attar-model/1", "parameters": 1e999}',
        b'{"format": NaN}',
        b" " * ((1 << 20) + 1),
        b"cos\nsystem\n(S'exit 1'\ntR.",
    ],
)
def test_content_that_is_no_record(folder, content):
    assert RECORD in refused(folder, content)
    with pytest.raises(DataError):
        models.read_extra(folder)


def test_numbers_that_json_does_not_have(folder):
    text = (folder / RECORD).read_text()
    for number in ("NaN", "Infinity", "1e999"):
        said = refused(folder, text.replace('"extra": {}', f'"extra": {{"a": {number}}}').encode())
        assert "damaged" in said


def test_a_key_given_twice_and_another_spelling(folder):
    text = (folder / RECORD).read_text()
    for other in (
        text.replace('"family"', '"family": "os.system",\n "family"'),
        text.replace("\n", "\r\n"),
        text + "\n",
        json.dumps(json.loads(text)),
    ):
        assert "checksum" in refused(folder, other.encode())


def test_deeply_nested_extra_that_is_sealed(folder):
    value: object = 1
    for _ in range(200):
        value = [value]
    (folder / RECORD).write_bytes(changed(folder, "extra/deep", value))
    models.load(folder)


def test_an_absurd_model_takes_no_memory(folder, monkeypatch):
    """Names and shapes are compared on the meta device before anything is allocated."""
    taken = []
    monkeypatch.setattr(nn.Module, "to_empty", lambda self, **_: taken.append(self))
    for options in ({"width": 2**22}, {"shape": [1, 2**24, 2**24], "outputs": 2**24}):
        record = json.loads((folder / RECORD).read_text())
        record["options"] |= options
        assert "does not fit" in refused(folder, sealed(record))
    assert taken == []


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"shape": [2**24] * 3, "outputs": 2, "patch": 1, "width": 2**20}),
        ("vit", {"shape": [2**24] * 3, "outputs": 2, "patch": 2**24, "width": 2**20}),
        ("mlp", {"shape": [2**24] * 8, "outputs": 2}),
    ],
)
def test_sizes_beyond_any_integer(folder, family, options):
    record = json.loads((folder / RECORD).read_text())
    record |= {"family": family, "options": options}
    assert re.search("beyond any memory|does not fit", refused(folder, sealed(record)))


def test_an_alias_does_not_turn_a_statistic_into_a_parameter(folder):
    record = json.loads((folder / RECORD).read_text())
    module = models.load(folder)
    state = {name: t for name, t in module.state_dict().items() if name != "stem.norm.running_mean"}
    weights = to_bytes(state)
    (folder / WEIGHTS).write_bytes(weights)
    record["weights"] |= {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["tensors"] = header_of(weights)
    record["aliases"] = {"stem.norm.running_mean": "stem.norm.weight"}
    assert "only one of them is a parameter" in refused(folder, sealed(record))


def hostile_header(header: object, body: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8 + 1) + b"{}",
        hostile_header(b"\xff\xff"),
        hostile_header([]),
        hostile_header({"weight": 1}),
        hostile_header({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}),
        hostile_header({"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}),
        hostile_header({"weight": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 16]}}),
        hostile_header({"weight": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}),
        hostile_header({"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}),
        hostile_header({"weight": {"dtype": "OBJ", "shape": [2, 2], "data_offsets": [0, 16]}}),
        hostile_header(
            {
                "weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
                "bias": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
            }
        ),
        hostile_header(
            {"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 20
        ),
        b"PK\x03\x04" + b"\0" * 60,
        b"\x80\x04cos\nsystem\n.",
    ],
)
def test_weights_that_are_no_safetensors(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(DataError) as caught:
        models.load_weights(module, path)
    assert str(path) in str(caught.value)
    assert torch.equal(module.weight, before)
