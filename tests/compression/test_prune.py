"""Channels, features and heads that go: what stays is what was, and everything is smaller."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import pytest
import torch
from torch import nn

import attar
from attar.compression import Pruning, plan_prune, schedule
from attar.models import build, load, merged, save
from attar.runtime import UsageError

pytest.importorskip("torch_pruning")

INPUTS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TASK = attar.tasks.ImageClassification(classes=10)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net(family: str = "resnet", **options: Any) -> nn.Module:
    model = build(family, shape=(1, 8, 8), outputs=10, **options)
    model(INPUTS)  # statistics of its own
    return model.eval()


def classifier(architecture: str = "bert", **more: Any) -> nn.Module:
    pytest.importorskip("transformers")
    return build(
        "text_classifier",
        shape=(12,),
        outputs=3,
        architecture=architecture,
        config={**TINY, **more},
        vocabulary=50,
    ).eval()


def llama(groups: int = 4) -> nn.Module:
    pytest.importorskip("transformers")
    config = {**TINY, "num_key_value_heads": groups}
    return build(
        "language_model", shape=(12,), outputs=50, architecture="llama", config=config
    ).eval()


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def count(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(each.shape) for name, each in model.state_dict().items()}


def test_half_of_a_resnet_has_the_shapes_of_one_half_as_wide():
    assert shapes(attar.prune(net(width=16), INPUTS, ratio=0.5)) == shapes(net(width=8))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit", "mlp"])
@pytest.mark.parametrize("options", [{}, {"among": "model"}, {"importance": "taylor"}])
def test_a_smaller_model_counts_as_planned_runs_and_is_kept(tmp_path, family, options):
    model = net(family)
    example: Any = INPUTS
    if options.get("importance") == "taylor":
        example = {"inputs": INPUTS, "labels": torch.arange(6)}
        options = {**options, "task": TASK}
    plan = plan_prune(model, example, ratio=0.4, **options)
    made = plan.apply(model)
    assert plan.parameters == (count(model), count(made))
    assert count(made) < 0.75 * count(model)
    made.train()(INPUTS).sum().backward()
    assert all(each.grad is not None for each in made.parameters())
    save(made.eval(), tmp_path)
    assert torch.equal(load(tmp_path)(INPUTS), made(INPUTS))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit"])
def test_every_tensor_left_is_a_cut_of_the_one_it_was(family):
    model = net(family)
    plan = plan_prune(model, INPUTS, ratio=0.5)
    made = plan.apply(model).state_dict()
    changed = 0
    for name, tensor in model.state_dict().items():
        for dim, chosen in enumerate(plan.tensors.get(name, ())):
            if chosen is not None:
                tensor = tensor.index_select(dim, torch.tensor(plan.kept[chosen]))
                changed += 1
        assert torch.equal(made[name], tensor)
    assert changed > 10


RATIOS = (0.6, 0.85, 0.95, 0.999)


def widths(model: nn.Module) -> list[int]:
    """How many channels and features each layer makes, but for the head."""
    kinds = (nn.Linear, nn.Conv2d)
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]
    return [part.weight.shape[0] for name, part in parts if not name.startswith("head")]


@pytest.mark.parametrize("among", ["layer", "model"])
@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("family", ["resnet", "mobilenet", "vit", "mlp"])
def test_a_higher_ratio_never_leaves_more(family, round_to, among):
    model = net(family, **({"depth": 8, "width": 8} if family == "resnet" else {}))
    options = {"among": among, "round_to": round_to}
    made = [attar.prune(model, INPUTS, ratio=ratio, **options) for ratio in RATIOS]
    counts = [count(each) for each in made]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 0.15 * count(model)
    left = widths(made[-1])
    if family == "vit":  # the vector of a head stays as wide as it was
        heads = [part.heads for part in made[-1].modules() if hasattr(part, "heads")]
        assert heads
        assert set(heads) == {1}
        left = [wide for wide in left if wide != 3 * 16]
    assert set(left) == {round_to or 1}


def test_what_stays_of_a_layer_that_would_lose_all_is_the_most_important():
    model = net(width=8)
    path = "stage1.0.conv1"
    model.get_submodule(path).conv.weight.data[5] *= 100
    plan = plan_prune(model, INPUTS, ratio=0.99, layers=[path])
    chosen = plan.tensors[f"{path}.conv.weight"][0]
    assert chosen is not None
    assert plan.kept[chosen] == (5,)


def test_a_layer_narrower_than_round_to_keeps_all_of_it():
    made = attar.prune(net(width=8), INPUTS, ratio=0.9, round_to=16)
    assert widths(made)[0] == 8
    assert set(widths(made)) == {8, 16}


def silenced(model: nn.Module, gone: dict[str, list[int]]) -> nn.Module:
    """*model* with channels that say nothing and hear nothing."""
    made = copy.deepcopy(model)
    for path, channels in gone.items():
        part = made.get_submodule(path)
        part.weight.data[channels] = 0
        part.bias.data[channels] = 0
    return made


def test_channels_that_say_nothing_go_first_and_nothing_is_missed():
    dead = {
        "stage1.0.conv1.norm": [1, 5, 6, 7],
        "stage3.0.conv1.norm": [0, 2, 30, 9],
    }
    model = silenced(net(width=8), dead)
    for path in dead:
        model.get_submodule(path.replace("norm", "conv")).weight.data[dead[path]] = 0
    layers = [path.replace(".norm", "") for path in dead]
    made = attar.prune(model, INPUTS, ratio=0.125, layers=layers)
    assert made.get_submodule("stage1.0.conv1.norm").num_features == 7
    assert made.get_submodule("stage3.0.conv1.norm").num_features == 28
    torch.testing.assert_close(made(INPUTS), model(INPUTS), atol=1e-5, rtol=1e-5)


def test_heads_that_say_nothing_go_first_as_wholes_and_nothing_is_missed():
    model = classifier()
    for path in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        attention = model.get_submodule(path).attention
        for layer in (attention.self.query, attention.self.key, attention.self.value):
            layer.weight.data[8:16] = 0  # the second of four heads
            layer.bias.data[8:16] = 0
        attention.output.dense.weight.data[:, 8:16] = 0
    layers = [f"*.self.{name}" for name in ("query", "key", "value")]
    made = attar.prune(model, {"input_ids": IDS}, ratio=0.25, layers=layers)
    assert made.bert.encoder.layer[0].attention.self.query.out_features == 24
    assert made.bert.encoder.layer[0].attention.self.num_attention_heads == 3
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)


def test_a_vit_loses_whole_heads():
    model = net("vit")
    made = attar.prune(model, INPUTS, ratio=0.5)
    attention = made.get_submodule("blocks.0.attention")
    assert attention.heads == 2
    assert list(attention.qkv.weight.shape) == [3 * 2 * 16, 32]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "distilbert"])
def test_classifiers_of_transformers_become_smaller_and_are_kept(tmp_path, architecture):
    more = {}
    if architecture == "distilbert":
        more = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    if architecture == "distilbert":
        model = build(
            "text_classifier", shape=(12,), outputs=3, architecture=architecture, config=more,
            vocabulary=50,
        ).eval()  # fmt: skip
    else:
        model = classifier(architecture)
    made = attar.prune(model, {"input_ids": IDS}, ratio=0.5)
    assert count(made) < 0.9 * count(model)
    save(made, tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert torch.equal(load(tmp_path)(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (classifier, ["*.intermediate.dense"]),
        (lambda: llama(4), ["*.gate_proj", "*.up_proj"]),
        (lambda: llama(2), ["*.gate_proj", "*.up_proj"]),
        (t5, ["*.wi"]),
        (lambda: net("vit"), ["blocks.*.mlp.0"]),
    ],
    ids=["bert", "llama", "grouped", "t5", "vit"],
)
def test_the_inner_features_of_perceptrons_alone_can_go(model, layers):
    model = model()
    example: Any = {"input_ids": IDS}
    if "T5" in type(model).__name__:
        example["labels"] = IDS
    if isinstance(model, nn.Sequential):
        example = INPUTS
    before = shapes(model)
    made = attar.prune(model, example, ratio=0.5, layers=layers)
    inner = {name: shape for name, shape in shapes(made).items() if shape != before[name]}
    width = 256 if isinstance(model, nn.Sequential) else 64
    for name, shape in inner.items():
        assert [n // 2 if n == width else n for n in before[name]] == shape
    assert inner


@pytest.mark.parametrize("kept", [True, False])
def test_a_language_model_whose_heads_have_keys_of_their_own_becomes_smaller(kept):
    model = llama(4)
    model.config.use_cache = kept
    made = attar.prune(model, {"input_ids": IDS}, ratio=0.5)  # with keys kept it would not end
    assert count(made) < 0.5 * count(model)
    assert made(IDS).logits.shape == model(IDS).logits.shape
    assert made.config.use_cache is model.config.use_cache is kept


@pytest.mark.parametrize("model", [lambda: llama(2), t5], ids=["grouped", "t5"])
def test_what_torch_pruning_cannot_prune_is_refused_before_it_is_asked(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    example = {"input_ids": IDS, "labels": IDS}
    with pytest.raises(UsageError, match=r"attar\.shrink makes it narrower"):
        plan_prune(model(), example, ratio=0.5)


def test_without_the_library_the_line_to_type_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match=r'pip install "attar\[prune\]"'):
        plan_prune(net(), INPUTS, ratio=0.5)


def test_the_plan_is_json_gives_the_same_bits_twice_and_leaves_the_model():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    plan = plan_prune(model, INPUTS, ratio=0.5)
    again = Pruning.read(json.loads(json.dumps(plan.describe())))
    assert again == plan
    assert again == plan_prune(model, INPUTS, ratio=0.5)
    one, two = plan.apply(model), again.apply(model)
    assert all(torch.equal(two.state_dict()[n], t) for n, t in one.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training
    assert one.training
    assert all(each.grad is None for each in model.parameters())
    assert plan.told() == "77,754 parameters to 19,810 (75% fewer), 19 parts become smaller"


def test_a_frozen_model_is_pruned_too_and_stays_frozen():
    model = net().requires_grad_(False)
    with torch.no_grad():
        made = attar.prune(model, INPUTS, ratio=0.5)
    assert shapes(made) == shapes(net(width=8))
    assert not any(each.requires_grad for each in made.parameters())


def test_type_and_what_learns_stay_as_they_were():
    model = net().double()
    model.get_submodule("stem").requires_grad_(False)
    made = attar.prune(model, INPUTS.double(), ratio=0.5)
    learns = {name: each.requires_grad for name, each in model.named_parameters()}
    assert {name: each.requires_grad for name, each in made.named_parameters()} == learns
    assert {each.dtype for each in made.parameters()} == {torch.float64}


def test_channels_are_left_in_multiples_and_skipped_layers_keep_theirs():
    made = attar.prune(net(), INPUTS, ratio=0.3, round_to=8)
    sizes = [part.out_channels for part in made.modules() if isinstance(part, nn.Conv2d)]
    assert {size % 8 for size in sizes} == {0}
    assert made.get_submodule("head").out_features == 10
    spared = attar.prune(net(), INPUTS, ratio=0.5, skip=["head", "stage3"])
    assert spared.get_submodule("stage3.0.conv2.conv").out_channels == 64
    assert spared.get_submodule("stage2.0.conv2.conv").out_channels == 16


def test_the_gradient_decides_by_taylor_and_not_the_size():
    model = net("mlp", widths=[8])
    hidden = model.get_submodule("blocks.0.linear")
    head = model.get_submodule("head")
    loud = [0, 3, 4, 6]  # large, and nothing listens
    hidden.weight.data[loud] *= 50
    hidden.bias.data[:] = 1.0
    head.weight.data[:, loud] = 0
    batch = {"inputs": INPUTS, "labels": torch.arange(6)}
    plan = plan_prune(model, batch, ratio=0.5, importance="taylor", task=TASK)
    assert plan.kept == ((1, 2, 5, 7),)
    assert set(loud) <= set(plan_prune(model, INPUTS, ratio=0.5).kept[0])


def test_rounds_with_the_rest_of_the_schedule_end_at_the_final_share():
    model = net(width=16)
    for ratio in schedule(0.5, 2, of="rest"):
        model = attar.prune(model, INPUTS, ratio=ratio)
    widths = [model.get_submodule(f"stage{n}.0.conv2.conv").out_channels for n in (1, 2, 3)]
    assert widths == [8, 16, 32]


def test_a_pruned_student_is_distilled_and_exported(tmp_path):
    train, test = attar.data.digits()
    teacher = attar.train(build("resnet", data=train, width=8), train, TASK, epochs=3)
    student = attar.prune(teacher, INPUTS, ratio=0.5)
    terms = [attar.Term(attar.losses.kl_divergence)]
    before = attar.evaluate(student, test, TASK)
    student = attar.distill(student, attar.Teacher(teacher, TASK), train, TASK, terms, epochs=4)
    after = attar.evaluate(student, test, TASK)
    assert after["accuracy"] > before["accuracy"]
    done = attar.export(student, tmp_path, example=INPUTS, formats=["safetensors"])
    assert done["safetensors"].difference < 1e-4
    assert count(load(tmp_path)) == count(student) < 6000


def unmasked() -> nn.Module:
    return attar.sparsify(net(), amount=0.5)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (net, {"ratio": 0.0}, r"not 0\.0"),
        (net, {"ratio": 1}, "not 1"),
        (net, {"ratio": 0.5, "importance": "size"}, "not 'size'"),
        (net, {"ratio": 0.5, "among": "all"}, "not 'all'"),
        (net, {"ratio": 0.5, "importance": "taylor"}, "loss of a task"),
        (net, {"ratio": 0.5, "layers": ["stem"]}, "nothing .* smaller: .*added to or multiplied"),
        (net, {"ratio": 0.5, "round_to": 512}, "64 channels at most, and 512 stay; lower round_to"),
        (
            lambda: net("vit"),
            {"ratio": 0.2, "layers": ["*.qkv"]},
            r"whole heads go, and 0\.2 of 4 is less than one; give a ratio of 0\.25 or more",
        ),
        (net, {"ratio": 0.5, "layers": ["stpe1"]}, "no 'stpe1'"),
        (net, {"ratio": 0.5, "skip": []}, "."),
        (unmasked, {"ratio": 0.5}, r"has masks.*merged\(model\)"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(model, options, said):
    with pytest.raises(UsageError, match=said):
        plan_prune(model(), INPUTS, **options)


def test_zeros_that_were_merged_can_be_followed_by_fewer_channels():
    made = attar.prune(merged(unmasked()), INPUTS, ratio=0.5)
    assert int((made.get_parameter("stage1.0.conv1.conv.weight") == 0).sum()) > 0


def test_a_plan_for_another_model_is_refused():
    plan = plan_prune(net(width=16), INPUTS, ratio=0.5)
    with pytest.raises(UsageError, match="the plan is for another model"):
        plan.apply(net(width=4))


def test_a_model_whose_answer_would_lose_classes_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))
    with pytest.raises(UsageError, match=r"answer \[6, 5\] instead of \[6, 10\]"):
        plan_prune(model, INPUTS, ratio=0.5, skip=[])
