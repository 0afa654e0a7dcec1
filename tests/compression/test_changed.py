"""Models with other parts than their family gives them: saved, loaded, refused."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attar
from attar.models import build, load, reuse_head, save
from attar.models.changed import LowRank, differences, noted, skeleton
from attar.models.record import encode, read_record
from attar.runtime import DataError, UsageError

INPUTS = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(**options: Any) -> nn.Module:
    return build("resnet", shape=(1, 8, 8), outputs=10, width=8, **options).eval()


def bert(labels: int = 3) -> nn.Module:
    pytest.importorskip("transformers")
    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    return build(
        "text_classifier",
        shape=(12,),
        outputs=labels,
        architecture="bert",
        config=config,
        vocabulary=50,
    ).eval()


def doctored(folder: Any, **options: Any) -> None:
    record = read_record(folder)
    changed = record.model_copy(update={"options": {**record.options, **options}})
    (folder / "model.json").write_bytes(encode(changed))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one(INPUTS), other(INPUTS))


def test_a_factorised_model_comes_back_with_the_same_bits(tmp_path):
    made = attar.factorize(net(), rank=0.25)
    save(made, tmp_path)
    assert read_record(tmp_path).family == "changed"
    again = load(tmp_path)
    assert isinstance(again.get_submodule("stage1.0.conv1.conv"), LowRank)
    assert same(again, made)


def test_a_chain_of_changes_is_told_from_its_first_start(tmp_path):
    model = attar.factorize(attar.prune(net(), INPUTS, ratio=0.4), rank=0.25)
    for _ in range(2):
        save(model, tmp_path)
        model = attar.prune(load(tmp_path), INPUTS, ratio=0.3)
    assert model.attar_build["options"]["start"]["family"] == "resnet"
    save(model, tmp_path)
    assert same(load(tmp_path), model)


def test_a_smaller_student_can_take_its_teachers_head_and_be_kept(tmp_path):
    student = attar.factorize(net(), rank=0.25)
    made = reuse_head(student, net(), INPUTS).eval()
    save(made, tmp_path)
    assert same(load(tmp_path), made)


def test_a_model_that_took_its_teachers_head_can_become_smaller(tmp_path):
    made = attar.factorize(reuse_head(net(), net(), INPUTS), rank=0.25).eval()
    save(made, tmp_path)
    assert read_record(tmp_path).options["start"]["family"] == "reused"
    assert same(load(tmp_path), made)


def test_a_model_of_ones_own_is_loaded_into_a_module(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 3))
    made = attar.factorize(own, rank=4, skip=[])
    save(made, tmp_path)
    with pytest.raises(DataError, match="into=module"):
        load(tmp_path)
    empty = attar.factorize(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 3)), rank=4, skip=[]
    )
    assert same(load(tmp_path, into=empty), made)


def test_a_smaller_model_of_transformers_leaves_no_config_that_would_lie(tmp_path):
    ids = torch.randint(0, 50, (2, 12))
    save(bert(), tmp_path)
    assert (tmp_path / "config.json").exists()
    made = attar.factorize(bert(), rank=0.25)
    save(made, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.safetensors"]
    assert torch.equal(load(tmp_path)(ids).logits, made(ids).logits)


def test_a_model_that_transformers_made_itself_is_kept_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    made = attar.factorize(transformers.BertForSequenceClassification(config).eval(), rank=0.25)
    save(made, tmp_path)
    assert not (tmp_path / "config.json").exists()
    ids = torch.randint(0, 50, (2, 12))
    assert torch.equal(load(tmp_path)(ids).logits, made(ids).logits)


def test_a_module_changed_by_hand_has_no_config_that_would_lie(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    save(model, tmp_path / "whole")
    model.classifier = nn.Linear(32, 7)
    save(model, tmp_path / "other")
    assert (tmp_path / "whole" / "config.json").exists()
    assert not (tmp_path / "other" / "config.json").exists()


def test_what_no_part_can_say_is_not_noted():
    model, other = net(), net()
    other.pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    assert differences(model, other) is None
    assert not hasattr(noted(other, model), "attar_build")


def test_a_module_that_is_as_built_has_no_differences():
    model = net()
    assert differences(skeleton(model.attar_build), model) == {}


def test_a_change_after_it_was_noted_is_refused_by_save(tmp_path):
    made = attar.factorize(net(), rank=0.25)
    made.head = nn.Linear(32, 4)
    with pytest.raises(UsageError, match=r"not what changed builds.*head\.weight"):
        save(made, tmp_path)


def test_making_keeping_and_building_again_draw_nothing_from_the_generator(tmp_path):
    model = net()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    save(attar.factorize(model, rank=0.25), tmp_path)
    load(tmp_path)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("light", [True, False], ids=["meta", "cpu"])
@pytest.mark.parametrize("make", [net, bert, lambda: attar.factorize(net(), rank=0.25)])
def test_a_skeleton_has_the_shapes_and_draws_from_no_generator(make, light, monkeypatch):
    monkeypatch.setattr("attar.models.changed.on_meta", lambda family, options: light)
    model = make()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    found = skeleton(model.attar_build)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(tensor.is_meta is light for tensor in found.parameters())
    assert {name: each.shape for name, each in found.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }


RESNET = {"family": "resnet", "options": {"shape": [1, 8, 8], "outputs": 10}}
DEEP: dict[str, Any] = {"family": "resnet", "options": {}}
for _ in range(20):
    DEEP = {
        "family": "changed",
        "options": {"shape": [1], "outputs": 1, "start": DEEP, "parts": {}},
    }
SIZES = {"kind": "sizes", "tensors": {}, "numbers": {}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": {"family": "os.system", "options": {}}}, "the start's family 'os.system'"),
        ({"start": DEEP}, "a chain of 21 models"),
        ({"parts": {"stem.nowhere": SIZES}}, r"no part 'stem\.nowhere'"),
        ({"parts": {"stem.conv": {"kind": "eval"}}}, "parts"),
        ({"parts": {"stem.conv": {**SIZES, "numbers": {"forward": 3}}}}, "no number 'forward'"),
        ({"parts": {"stem.conv": {**SIZES, "numbers": {"stride": 3}}}}, "no number 'stride'"),
        ({"parts": {"stem.conv": {**SIZES, "tensors": {"other": [3]}}}}, "no tensor"),
        ({"parts": {"stem.conv": {**SIZES, "tensors": {"weight": [2**24] * 4}}}}, "."),
    ],
)  # fmt: skip
def test_a_doctored_folder_is_refused_before_memory_is_taken(tmp_path, options, said):
    save(attar.factorize(net(), rank=0.25), tmp_path)
    doctored(tmp_path, **options)
    with pytest.raises(DataError, match=said):
        load(tmp_path)


def test_what_is_kept_is_plain_json(tmp_path):
    made = attar.prune(net(), INPUTS, ratio=0.5)
    assert json.loads(json.dumps(made.attar_build)) == made.attar_build
    parts = made.attar_build["options"]["parts"]
    assert parts["stage1.0.conv1.conv"]["numbers"] == {"in_channels": 4, "out_channels": 4}


def test_a_low_rank_layer_tells_the_matrix_that_it_stands_for():
    two = LowRank(nn.Linear(6, 2, bias=False), nn.Linear(2, 5))
    inputs: Tensor = torch.rand(3, 6)
    whole = torch.nn.functional.linear(inputs, two.weight, two.bias)
    torch.testing.assert_close(two(inputs), whole)


def test_a_card_says_what_the_model_was_and_how_many_parts_are_smaller(tmp_path):
    made = attar.prune(net(), INPUTS, ratio=0.5)
    attar.export(made, tmp_path, example=INPUTS)
    card = (tmp_path / "README.md").read_text()
    assert "- student: resnet, depth 8, width 8, stem\\_stride 1, smaller parts 19, " in card
