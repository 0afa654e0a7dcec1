"""`save` and `load`: the same bits come back, or the file is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from attar import models
from attar.models import store
from attar.runtime import DataError, UsageError

FAMILIES = ["mlp", "mobilenet", "resnet", "vit"]  # those that need no other library
WEIGHTS, RECORD = "model.safetensors", "model.json"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path):
    """A small model, saved, and its folder."""
    module = models.build("mlp", shape=(1, 4, 4), outputs=3, widths=(5,))
    models.save(module, tmp_path / "model", extra={"classes": ["a", "b", "c"]})
    return module, tmp_path / "model"


class Tied(nn.Module):
    """Embedding and head share their weight; `mirror` is the whole layer a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.mirror = self.layer
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("same_scale", self.scale)

    def forward(self, ids):
        hidden = self.mirror(self.layer(self.embedding(ids)).tanh()) * self.same_scale
        return self.head(hidden)


def tied_model(shape, outputs):
    return Tied()


def bits(module: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else str(tensor.item()).encode()
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_come_back_bit_for_bit(family, tmp_path):
    module = models.build(family, shape=(2, 8, 8), outputs=3, mean=[0.1, 0.2], std=[0.3, 0.4])
    for _ in range(3):
        module(torch.rand(4, 2, 8, 8))  # moves the running statistics of batch normalisation
    module.eval()
    models.save(module, tmp_path)
    loaded = models.load(tmp_path)
    inputs = torch.rand(5, 2, 8, 8)
    assert not loaded.training
    assert torch.equal(loaded(inputs), module(inputs))
    assert bits(loaded) == bits(module)
    assert loaded.attar_build == module.attar_build
    assert str(loaded) == str(module)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(os.listdir(tmp_path)) == [RECORD, WEIGHTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_leaves_the_random_generator_alone(family, tmp_path):
    models.save(models.build(family, shape=(1, 8, 8), outputs=2), tmp_path)
    before = torch.get_rng_state()
    models.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_twice_gives_the_same_files_and_replaces(small):
    module, folder = small
    first = {name: (folder / name).read_bytes() for name in (RECORD, WEIGHTS)}
    models.save(models.load(folder), folder, extra=models.read_extra(folder))
    assert {name: (folder / name).read_bytes() for name in (RECORD, WEIGHTS)} == first
    with torch.no_grad():
        module.head.bias.add_(1)
    models.save(module, folder)
    assert torch.equal(models.load(folder).head.bias, module.head.bias)
    assert models.read_extra(folder) == {}


def test_the_record_says_what_the_folder_holds(small):
    module, folder = small
    record = json.loads((folder / RECORD).read_text())
    weights = (folder / WEIGHTS).read_bytes()
    assert record["format"] == "attar-model/1"
    assert {"family": record["family"], "options": record["options"]} == module.attar_build
    assert record["parameters"] == 16 * 5 + 5 + 5 * 3 + 3
    assert record["weights"] == {
        "file": WEIGHTS,
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert record["tensors"]["head.weight"] == {"dtype": "F32", "shape": [3, 5]}
    assert models.read_extra(folder) == {"classes": ["a", "b", "c"]}


def test_the_weights_are_plain_safetensors(small):
    module, folder = small
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[name], t) for name, t in module.state_dict().items())


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    module = models.build(tied_model, shape=(1,), outputs=11).eval()
    models.save(module, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert sorted(stored) == ["embedding.weight", "layer.bias", "layer.weight", "scale"]
    loaded = models.load(tmp_path, families={"tied_model": tied_model})
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.mirror is loaded.layer
    assert loaded.same_scale is loaded.scale
    ids = torch.arange(11)
    assert torch.equal(loaded(ids), module(ids))
    assert sum(p.numel() for p in loaded.parameters()) == 11 * 6 + 6 * 6 + 6


def test_a_tie_that_the_family_does_not_make_survives(tmp_path):
    module = models.build("mlp", shape=(6,), outputs=3, widths=(6, 6)).eval()
    module.blocks[1].linear.weight = module.blocks[0].linear.weight
    module.blocks[1].linear.bias = nn.Parameter(module.blocks[0].linear.bias.data)
    models.save(module, tmp_path)
    for loaded in (models.load(tmp_path), models.load(tmp_path, into=models.load(tmp_path))):
        assert loaded.blocks[1].linear.weight is loaded.blocks[0].linear.weight
        assert loaded.blocks[1].linear.bias is loaded.blocks[0].linear.bias
        inputs = torch.rand(4, 6)
        assert torch.equal(loaded(inputs), module(inputs))
        loaded(inputs).sum().backward()


def test_a_module_of_ones_own(tmp_path):
    module, other = Tied().eval(), Tied()
    models.save(module, tmp_path)
    kept = other.layer.weight
    with pytest.raises(DataError, match=r"not made by attar\.models\.build.*into=module"):
        models.load(tmp_path)
    loaded = models.load(tmp_path, into=other)
    assert loaded is other
    assert not other.training
    assert other.layer.weight is kept, "an optimiser that holds the parameter goes on"
    ids = torch.arange(11)
    assert torch.equal(other(ids), module(ids))


def test_a_plugin_family_is_named(tmp_path):
    models.save(models.build(tied_model, shape=(1,), outputs=11), tmp_path)
    assert json.loads((tmp_path / RECORD).read_text())["family"] == "tied_model"
    with pytest.raises(
        DataError, match=r"model\.json: family 'tied_model'.*from a plugin.*families="
    ):
        models.load(tmp_path)
    before = torch.get_rng_state()
    models.load(tmp_path, families={"tied_model": tied_model, "mlp": models.mlp})
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UsageError, match=r"'mlp' exists in attar\.models already"):
        models.load(tmp_path, families={"mlp": tied_model})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype, tmp_path):
    module = models.build("resnet", shape=(1, 8, 8), outputs=2, width=4).to(dtype).eval()
    models.save(module, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.head.weight.dtype == dtype
    assert loaded.stem.norm.num_batches_tracked.dtype == torch.int64
    inputs = torch.rand(2, 1, 8, 8).to(dtype)
    assert torch.equal(loaded(inputs), module(inputs))
    wide = models.build("resnet", shape=(1, 8, 8), outputs=2, width=4)
    assert models.load(tmp_path, into=wide).head.weight.dtype == dtype


def test_special_values_and_odd_layouts_keep_their_bits(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned = nn.Parameter(torch.rand(4, 3).t())
            self.strided = nn.Parameter(torch.rand(8, 2)[::2])
            self.register_buffer("special", torch.tensor([float("nan"), float("-inf"), -0.0]))
            self.register_buffer("spread", torch.rand(1, 3).expand(5, 3))
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("also_empty", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(2.5))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("passing", torch.rand(2), persistent=False)
            self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)

    module = Odd()
    models.save(module, tmp_path)
    other = Odd()
    other.spread = other.spread.clone()
    models.load(tmp_path, into=other)
    assert bits(other) == bits(module)
    assert not other.frozen.requires_grad
    assert other.empty is not other.also_empty


def test_views_of_one_memory(tmp_path):
    flat = torch.rand(10)
    apart, across = nn.Module(), nn.Module()
    apart.a, apart.b = nn.Parameter(flat[:5]), nn.Parameter(flat[5:])
    models.save(apart, tmp_path)
    for one, other in ((flat[:6], flat[5:]), (flat[:6], flat[:5]), (flat, flat.view(2, 5))):
        across.a, across.b = nn.Parameter(one), nn.Parameter(other)
        with pytest.raises(UsageError, match=r"'[ab]' and '[ab]' share memory without being the"):
            models.save(across, tmp_path)
    mixed = nn.Module()
    mixed.a = nn.Parameter(flat)
    mixed.register_buffer("b", flat)
    with pytest.raises(UsageError, match="share memory without being the"):
        models.save(mixed, tmp_path)


def test_a_compiled_module_is_saved_as_itself(tmp_path):
    module = models.build("mlp", shape=(3,), outputs=2)
    models.save(torch.compile(module, backend="eager"), tmp_path)
    assert bits(models.load(tmp_path)) == bits(module)


def test_a_model_without_tensors(tmp_path):
    models.save(nn.Identity(), tmp_path)
    assert isinstance(models.load(tmp_path, into=nn.Identity()), nn.Identity)


def test_a_module_that_was_changed_since_build_is_not_saved_as_built(tmp_path):
    module = models.build("mlp", shape=(3,), outputs=2)
    module.head = nn.Linear(32, 5)
    with pytest.raises(
        UsageError, match=r"head\.weight \[5, 32\] instead of \[2, 32\].*attar_build"
    ):
        models.save(module, tmp_path)
    assert not list(tmp_path.iterdir())
    module.attar_build["options"]["outputs"] = 5
    models.save(module, tmp_path)
    assert models.load(tmp_path).head.out_features == 5


def lazy():
    return nn.LazyLinear(3)


def meta():
    return nn.Linear(2, 2, device="meta")


def sparse():
    module = nn.Module()
    module.register_buffer("weights", torch.eye(3).to_sparse())
    return module


def stateful():
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"step": 3}

    return Extra()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lazy, "'weight' .*not initialised"),
        (meta, "'weight' .*meta device"),
        (sparse, "'weights' .*sparse"),
        (stateful, "extra state"),
    ],
)
def test_modules_that_have_no_file(make, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        models.save(make(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "extra",
    [{"a": float("nan")}, {"a": torch.zeros(1)}, {"a": {1, 2}}, ["a"], {"a": "x" * (1 << 20)}],
)
def test_extra_must_be_json_and_small(extra, tmp_path):
    with pytest.raises(UsageError, match=r"extra|model\.json"):
        models.save(nn.Linear(2, 2), tmp_path / "model", extra=extra)
    assert not (tmp_path / "model").exists()


def test_extra_of_any_script(tmp_path):
    extra = {"classes": ["猫", "naïve", 'a"b\\c\n'], "scale": 1e-300, "none": None, "deep": [[{}]]}
    models.save(nn.Linear(2, 2), tmp_path, extra=extra)
    assert models.read_extra(tmp_path) == extra


def test_saving_onto_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        models.save(nn.Linear(2, 2), tmp_path / "model")


def refused(folder, match=None):
    """The error of loading *folder* into the random generator's next model."""
    with pytest.raises(DataError, match=match) as caught:
        models.load(folder)
    return str(caught.value)


def test_every_bit_flip_in_the_weights_is_refused(small):
    _, folder = small
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(8 * len(whole)), 50):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert str(path) in refused(folder, "SHA-256")
    path.write_bytes(whole)
    models.load(folder)


def test_every_bit_flip_in_the_record_is_refused(small):
    _, folder = small
    path = folder / RECORD
    whole = path.read_bytes()
    for position in random.Random(1).sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert str(path) in refused(folder)
        with pytest.raises(DataError, match=r"model\.json"):
            models.read_extra(folder)


@pytest.mark.parametrize("name", [WEIGHTS, RECORD])
def test_every_truncation_is_refused(small, name):
    _, folder = small
    path = folder / name
    whole = path.read_bytes()
    for length in [*range(12), *range(12, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert str(path) in refused(folder)
    path.write_bytes(whole + b" ")
    assert str(path) in refused(folder)


def test_weights_of_another_step_are_refused(small, tmp_path):
    module, folder = small
    with torch.no_grad():
        module.head.bias.add_(1)
    models.save(module, tmp_path / "later")
    os.replace(tmp_path / "later" / WEIGHTS, folder / WEIGHTS)
    assert str(folder / WEIGHTS) in refused(folder, "another model")
    (folder / WEIGHTS).unlink()
    assert str(folder / WEIGHTS) in refused(folder, "no such file")


def test_into_lists_what_does_not_fit_and_changes_nothing(small):
    _, folder = small
    other = nn.Sequential()
    other.add_module("head", nn.Linear(5, 4))
    other.add_module("more", nn.Linear(2, 2))
    before = bits(other)
    with pytest.raises(DataError) as caught:
        models.load(folder, into=other)
    said = str(caught.value)
    assert "missing: more.weight, more.bias" in said
    assert "unexpected: blocks.0.linear.bias, blocks.0.linear.weight" in said
    assert "head.weight [3, 5] instead of [4, 5]" in said
    assert bits(other) == before


def test_a_buffer_is_not_taken_for_a_parameter(tmp_path):
    trained, fixed = nn.Module(), nn.Module()
    trained.a = nn.Parameter(torch.rand(3))
    fixed.register_buffer("a", torch.rand(3))
    models.save(trained, tmp_path)
    with pytest.raises(DataError, match="lists 3 parameters, but the module has 0"):
        models.load(tmp_path, into=fixed)


def test_a_tied_module_refuses_a_file_with_two_values(tmp_path):
    free, tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2)
    models.save(free, tmp_path)
    with pytest.raises(DataError, match=r"'0\.weight' and '1\.weight' differ, but are one tensor"):
        models.load(tmp_path, into=nn.ModuleList([tied, tied]))


class Crash(Exception):
    """The process ends here."""


def stop_after(monkeypatch, steps: int) -> None:
    """Let *steps* of the steps of `save` through, and fail at the next."""
    left = [steps]

    def counted(function):
        def step(*arguments):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*arguments)

        return step

    monkeypatch.setattr(store, "write_atomic", counted(store.write_atomic))
    monkeypatch.setattr(store.os, "replace", counted(os.replace))


@pytest.mark.parametrize("steps", range(6))
def test_a_crash_leaves_the_old_model_or_the_new_one(small, monkeypatch, steps):
    old, folder = small
    new = models.build("mlp", shape=(1, 4, 4), outputs=3, widths=(5,))
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        if steps < 5:
            with pytest.raises(Crash):
                models.save(new, folder)
        else:
            models.save(new, folder)
    survived = bits(models.load(folder))
    assert survived == bits(new if steps >= 4 else old)
    third = models.build("mlp", shape=(1, 4, 4), outputs=3, widths=(5,))
    with monkeypatch.context() as patch:
        stop_after(patch, 2 + (steps == 4))
        with pytest.raises(Crash):
            models.save(third, folder)
    assert bits(models.load(folder)) == survived
    models.save(third, folder)
    assert bits(models.load(folder)) == bits(third)
    assert sorted(os.listdir(folder)) == [RECORD, WEIGHTS]


def test_a_first_save_that_crashes_leaves_no_model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Crash):
            models.save(nn.Linear(2, 2), folder)
    refused(folder, r"holds no model\.json")
    models.save(nn.Linear(2, 2), folder)
    models.load(folder, into=nn.Linear(2, 2))


def test_folders_that_are_no_model_say_where_to_look(small, tmp_path):
    module, folder = small
    run = tmp_path / "run"
    models.save(module, run / "stages" / "0" / "model")
    models.save(module, run / "teacher")
    said = refused(run, r"holds no model\.json; models are in: ")
    assert str(run / "teacher") in said
    assert str(run / "stages" / "0" / "model") in said
    assert str(folder) in refused(tmp_path / "modle", "there is no such folder; models are in")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"write one with attar\.models\.save")
    refused(folder / WEIGHTS, f"load the folder, {folder}")
    (tmp_path / "loose.safetensors").write_bytes(b"")
    refused(tmp_path / "loose.safetensors", r"model: FAMILY, load: .*loose.*load_weights")
    refused(tmp_path / "absent" / "loose.safetensors", "there is no such file; check the path")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / WEIGHTS).write_bytes(b"")
    refused(theirs / WEIGHTS, f"load the folder, {theirs}")
    refused(theirs, f"name: pretrained, path: {theirs}")
    assert str(theirs) in refused(tmp_path / "thiers", "there is no such folder; models are in")
    for suffix in ("pt", "pth", "bin", "ckpt", "PT"):
        path = tmp_path / f"weights.{suffix}"
        path.write_bytes(b"")
        refused(path, r"can hold code.*attar import")
        with pytest.raises(DataError, match=r"can hold code.*attar import"):
            models.load_weights(module, path)


def test_load_weights_fills_exactly(tmp_path):
    source, target = Tied(), Tied()
    path = tmp_path / "weights.safetensors"
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    save_file(state, path)
    kept = target.layer.weight
    assert models.load_weights(target, path) is None
    assert bits(target) == bits(source)
    assert target.layer.weight is kept
    assert target.head.weight is target.embedding.weight
    assert target.training


@pytest.mark.parametrize("dropped", ["embedding.weight", "head.weight"])
def test_load_weights_needs_one_of_the_tied_names(tmp_path, dropped):
    source, target = Tied(), Tied()
    path = tmp_path / "weights.safetensors"
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    del state[dropped], state["mirror.bias"]
    save_file(state, path)
    models.load_weights(target, path)
    assert bits(target) == bits(source)
    del state["layer.bias"]
    save_file(state, path)
    with pytest.raises(DataError, match=r"missing: layer\.bias, mirror\.bias"):
        models.load_weights(target, path)


def test_load_weights_refuses_what_does_not_fit(tmp_path):
    module = Tied()
    before = bits(module)
    path = tmp_path / "weights.safetensors"
    good = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = torch.rand(11, 6)
    cases = {
        r"unexpected: 'new\\x1b": {**good, "new\x1b[31m": torch.zeros(1)},
        r"head\.weight \[6, 11\] instead of \[11, 6\]": {**good, "head.weight": torch.zeros(6, 11)},
        "differ, but are one tensor": {**good, "head.weight": other},
        r"'scale' is torch\.float64": {**good, "scale": torch.zeros(6, dtype=torch.float64)},
        r"'scale' is torch\.int64": {**good, "scale": torch.zeros(6, dtype=torch.int64)},
        "'layer.bias' holds NaN": {
            **good,
            "layer.bias": torch.full((6,), float("inf")),
            "mirror.bias": torch.full((6,), float("inf")),
        },
    }
    for said, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(DataError, match=said) as caught:
            models.load_weights(module, path)
        assert str(path) in str(caught.value)
        assert bits(module) == before


def test_load_weights_widens_but_does_not_narrow(tmp_path):
    path = tmp_path / "half.safetensors"
    module = nn.Linear(3, 2)
    save_file({name: tensor.half() for name, tensor in module.state_dict().items()}, path)
    models.load_weights(module, path)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, module.weight.half().float())
    fine_but_short, wide_but_coarse = torch.float16, torch.bfloat16
    cases = [(fine_but_short, torch.float8_e4m3fn), (fine_but_short, wide_but_coarse)]
    for held, own in [*cases, (wide_but_coarse, fine_but_short), (torch.float32, torch.float16)]:
        save_file({name: t.to(held) for name, t in module.state_dict().items()}, path)
        with pytest.raises(DataError, match="cannot hold"):
            models.load_weights(nn.Linear(3, 2).to(own), path)


def test_load_weights_paths(tmp_path):
    module = nn.Linear(2, 2)
    (tmp_path / "weights.txt").write_text("")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    for name, said in {
        "": "is a folder; use attar.models.load",
        "none.safetensors": "there is no such file",
        "weights.txt": "only such a file is read",
        "broken.safetensors": "not a whole safetensors file",
    }.items():
        with pytest.raises(DataError, match=said):
            models.load_weights(module, tmp_path / name)
