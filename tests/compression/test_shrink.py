"""Smaller models from larger ones: what is kept fits together, and answers as before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.compression import Inheritance, plan_inheritance, plan_shrink, shrink
from attar.compression.axes import Axis
from attar.compression.importance import ranked_members
from attar.compression.inherit import PUBLISHED, Row, spaced
from attar.runtime import UsageError

TEXT: dict[str, Any] = {"shape": [16], "outputs": 50}
IMAGES: dict[str, Any] = {"shape": [3, 16, 16], "outputs": 5}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
SEQUENCE = {"vocab_size": 50, "d_model": 32, "decoder_start_token_id": 0}


def _language(architecture: str, config: dict[str, Any]) -> nn.Module:
    return attar.models.build("language_model", **TEXT, architecture=architecture, config=config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(**SEQUENCE, d_ff=48, num_layers=4, num_heads=4, d_kv=8)
    )


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sides = {f"{side}_layers": 4 for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    return BartForConditionalGeneration(BartConfig(**SEQUENCE, **sides))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _language("llama", LLAMA),
    "qwen3": lambda: _language("qwen3", {**LLAMA, "head_dim": 16}),
    "gpt2": lambda: _language("gpt2", GPT2),
    "bert": lambda: attar.models.build(
        "text_classifier", **TEXT, architecture="bert", vocabulary=50, config=BERT
    ),
    "vit of transformers": lambda: attar.models.build(
        "transformers",
        **IMAGES,
        architecture="vit",
        config={**BERT, "image_size": 16, "patch_size": 4},
    ),
    "t5": _t5,
    "bart": _bart,
    "vit": lambda: attar.models.build("vit", **IMAGES, depth=4, width=32, heads=4),
    "mlp": lambda: attar.models.build("mlp", **IMAGES, widths=[32, 32, 32, 32]),
    "resnet": lambda: attar.models.build("resnet", **IMAGES, depth=20, width=8),
    "mobilenet": lambda: attar.models.build("mobilenet", **IMAGES, depth=4, width=8),
    "bilstm": lambda: attar.models.build("bilstm", **TEXT, vocabulary=50, width=16, hidden=16),
}
OF_TRANSFORMERS = {"llama", "qwen3", "gpt2", "bert", "vit of transformers", "t5", "bart"}


def example(kind: str) -> Tensor:
    """A batch that a model of this kind reads."""
    generator = torch.Generator().manual_seed(1)
    if kind in ("vit", "mlp", "resnet", "mobilenet", "vit of transformers"):
        return torch.randn(3, 3, 16, 16, generator=generator)
    return torch.randint(3, 50, (3, 12), generator=generator)


def answer(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits of a model in eval mode."""
    with torch.no_grad():
        sides = {"decoder_input_ids": inputs} if "ConditionalGeneration" in str(type(model)) else {}
        out = model.eval()(inputs, **sides)
    return out if isinstance(out, Tensor) else out.logits


def made(kind: str, seed: int = 0) -> nn.Module:
    """A model whose tensors are all different, batch statistics too."""
    if kind in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KINDS[kind]()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


DEEP = sorted(KINDS.keys() - {"bilstm"})


def shallow(kind: str) -> int:
    return 8 if kind == "resnet" else 2


def zero(model: nn.Module, names: list[str]) -> None:
    """Set whole tensors to zero."""
    with torch.no_grad():
        for name in names:
            dict(model.named_parameters())[name].zero_()


# Depth


def silent(kind: str, model: nn.Module, kept: dict[str, tuple[int, ...]]) -> None:
    """Make each layer that is not kept give what it is given: nothing is added to its input."""
    last = ("o_proj", "down_proj", "c_proj", "fc2", "o", "wo", "mlp.2", "project", "conv2.norm")
    last += ("project.norm",)
    for path, chosen in kept.items():
        for index, layer in enumerate(model.get_submodule(path).children()):
            if index not in chosen:
                named = dict(layer.named_parameters(prefix=f"{path}.{index}"))
                ends = [f".{part}.{kind}" for part in last for kind in ("weight", "bias")]
                zero(model, [name for name in named if name.endswith(tuple(ends))])


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "vit of transformers", "t5", "vit", "resnet", "mobilenet"]
)
@pytest.mark.parametrize("layers", ["spaced", "first"])
def test_without_layers_that_did_nothing_the_answer_is_the_same(kind: str, layers: str) -> None:
    teacher = made(kind)
    plan = plan_shrink(teacher, depth=shallow(kind), layers=layers)
    before = answer(teacher, example(kind))
    silent(kind, teacher, dict(plan.inheritance.layers))
    after = answer(teacher, example(kind))
    assert not torch.allclose(before, after, atol=1e-4)
    student = plan.apply(teacher)
    assert sum(p.numel() for p in student.parameters()) < 0.9 * plan.parameters[0]
    torch.testing.assert_close(answer(student, example(kind)), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DEEP)
def test_each_layer_is_the_one_that_the_plan_names(kind: str) -> None:
    teacher = made(kind)
    plan = plan_shrink(teacher, depth=shallow(kind), layers="first")
    assert all(chosen == tuple(range(len(chosen))) for chosen in plan.inheritance.layers.values())
    plan = plan_shrink(teacher, depth=shallow(kind))
    assert plan.inheritance.layers
    assert not plan.inheritance.fresh
    student = plan.apply(teacher)
    theirs = teacher.state_dict()
    for row in plan.inheritance.rows:
        assert torch.equal(student.state_dict()[row.name], theirs[row.source]), row.name


def test_layers_may_be_named_for_one_side_of_an_encoder_decoder() -> None:
    teacher = made("bart")
    plan = plan_shrink(
        teacher, depth={"decoder_layers": 2}, layers={"model.decoder.layers": [1, 2]}
    )
    assert plan.inheritance.layers == {"model.decoder.layers": (1, 2)}
    student = plan.apply(teacher)
    assert student.config.encoder_layers == 4
    assert student.config.decoder_layers == 2
    sources = {row.name: row.source for row in plan.inheritance.rows}
    one, other = "model.decoder.layers.1.fc1.weight", "model.decoder.layers.2.fc1.weight"
    assert sources[one] == other
    assert sources[one.replace("decoder", "encoder")] == one.replace("decoder", "encoder")


def test_the_table_of_distances_that_one_layer_has_is_never_lost() -> None:
    plan = plan_shrink(made("t5"), layers=[2, 3])
    assert not plan.inheritance.fresh
    named = {r.name: r.source for r in plan.inheritance.rows if "relative" in r.name}
    assert named
    assert all(name == source for name, source in named.items())


def test_published_tables_are_those_that_were_published() -> None:
    file = Path(__file__).parents[1] / "oracles" / "compression.json"
    tables = json.loads(file.read_text())["cases"]["layer_copy_tables"]["hyper"]["copy"]
    for of, table in tables.items():
        for count, layers in table.items():
            if of != count:
                assert PUBLISHED[int(of)][int(count)] == tuple(layers)


# Width


def quiet_channels(model: nn.Module, plan: Inheritance) -> None:
    """Make what is not kept say nothing: the outputs of dropped channels become zero."""
    with torch.no_grad():
        for row in plan.rows:
            tensor = model.state_dict()[row.source]
            axis = row.axes[0] if row.axes else None  # the count of batches is a number
            if axis is not None:
                dropped = torch.ones(tensor.shape[0], dtype=torch.bool)
                dropped[plan._index(axis)] = False
                if not row.source.endswith(("running_mean", "running_var")):
                    tensor[dropped] = 0


@pytest.mark.parametrize("kind", ["mlp", "resnet", "mobilenet", "bilstm"])
@pytest.mark.parametrize("select", ["spaced", "first"])
def test_without_channels_that_said_nothing_the_answer_is_the_same(kind: str, select: str) -> None:
    teacher = made(kind)
    plan = plan_shrink(teacher, width=0.5, select=select)
    if kind == "bilstm":  # embeddings are read along their second dimension
        index = plan.inheritance.kept["16 to 8"]
        words = teacher.state_dict()["words.weight"]
        words[:, [i for i in range(16) if i not in index]] = 0
    quiet_channels(teacher, plan.inheritance)
    student = plan.apply(teacher)
    before, after = answer(teacher, example(kind)), answer(student, example(kind))
    assert before.std() > 1e-3
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("heads", [(2, 1), (2, 2), (1, 1)])
def test_without_heads_that_said_nothing_the_answer_is_the_same(
    kind: str, heads: tuple[int, int]
) -> None:
    """Each head stays with the keys and values that it read, whichever go."""
    teacher = made(kind)
    width = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    plan = plan_shrink(teacher, width={**width, "intermediate_size": 20})
    with torch.no_grad():
        for row in plan.inheritance.rows:
            if row.name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor, axis = teacher.state_dict()[row.source], row.axes[1]
                dropped = torch.ones(tensor.shape[1], dtype=torch.bool)
                dropped[plan.inheritance._index(axis)] = False
                tensor[:, dropped] = 0
    student = plan.apply(teacher)
    before, after = answer(teacher, example(kind)), answer(student, example(kind))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_a_residual_stream_keeps_the_same_channels_everywhere() -> None:
    """What is dropped of it is zero; only the mean square of the norm then counts fewer."""
    teacher = made("llama")
    plan = plan_shrink(teacher, width={"hidden_size": 16})
    kept = torch.tensor(plan.inheritance.kept["32 to 16"])
    dropped = torch.tensor([i for i in range(32) if i not in kept])
    with torch.no_grad():
        for name, tensor in teacher.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[dropped] = 0
            if name.endswith("embed_tokens.weight"):
                tensor[:, dropped] = 0
    student = plan.apply(teacher)
    with torch.no_grad():
        for name, tensor in student.named_parameters():
            if "norm" in name:
                tensor *= 2**0.5
    before, after = answer(teacher, example("llama")), answer(student, example("llama"))
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_share_of_the_width_leaves_nothing_uncovered(kind: str) -> None:
    teacher = made(kind)
    plan = plan_shrink(teacher, width=0.5)
    student = plan.apply(teacher)
    assert not plan.inheritance.fresh
    assert sum(p.numel() for p in student.parameters()) == plan.parameters[1]
    assert plan.parameters[1] < 0.6 * plan.parameters[0]
    assert answer(student, example(kind)).shape == answer(teacher, example(kind)).shape


def test_narrower_heads_keep_pairs_that_rotate_together() -> None:
    plan = plan_shrink(made("llama"), width={"head_dim": 4})
    row = next(
        r for r in plan.inheritance.rows if r.name.endswith("layers.0.self_attn.q_proj.weight")
    )
    index = plan.inheritance._index(row.axes[0]).tolist()
    assert index[:4] == [0, 2, 4, 6]
    assert index[4:8] == [8, 10, 12, 14]
    frequency = made("llama").model.rotary_emb.inv_freq
    narrow = plan.apply(made("llama")).model.rotary_emb.inv_freq
    assert torch.allclose(frequency[[0, 2]], narrow)


def test_indices_are_those_of_weight_selection() -> None:
    assert spaced(8, 4) == (0, 2, 4, 6)
    assert spaced(7, 3) == (0, 3, 6)
    assert spaced(6, 4) == (0, 2, 3, 5)  # 1.67 and 3.33
    assert spaced(5, 5) == (0, 1, 2, 3, 4)


# Importance


class Tokens(attar.tasks.ImageClassification):
    """Rows of token ids, of which each is read."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        out = model(batch["inputs"].long())
        return getattr(out, "logits", out)


def texts(rows: int = 24) -> tuple[Any, Any]:
    documents = [[3 + (a * b) % 45 for b in range(1, 12)] for a in range(1, rows + 1)]
    data = attar.data.text(documents, length=12, eos=1, vocabulary=50)
    return data, attar.tasks.LanguageModelling().fitted(data)


def test_important_heads_and_features_are_kept_with_what_they_read() -> None:
    teacher = made("llama")
    data, task = texts()
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.v_proj.weight[:8] *= 0.01  # keys and values of heads 0 and 1
            layer.mlp.up_proj.weight[5:] *= 0.01
    plan = plan_shrink(
        teacher,
        width={"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 5},
        select="importance",
        data=data,
        task=task,
    )
    kept = plan.inheritance.kept
    for index in range(4):
        assert kept[f"heads of model.layers.{index}.self_attn"] == (2, 3)
        assert kept[f"groups of model.layers.{index}.self_attn"] == (1,)
        assert kept[f"inside of model.layers.{index}.mlp"] == (0, 1, 2, 3, 4)


def test_important_heads_are_found_under_every_name() -> None:
    """In BERT queries and what mixes them lie in other parts."""
    teacher = made("bert")
    ids = torch.randint(3, 50, (24, 12), generator=torch.Generator().manual_seed(0))
    data = attar.data.TensorSource(ids, torch.arange(24) % 3, classes=3)
    with torch.no_grad():
        for index, layer in enumerate(teacher.bert.encoder.layer):
            for head in {0, 1, 2, 3} - {index % 2, 3}:
                layer.attention.self.value.weight[8 * head : 8 * head + 8] *= 0.01
                layer.attention.self.value.bias[8 * head : 8 * head + 8] *= 0.01
    plan = plan_shrink(
        teacher, width=0.5, select="importance", data=data, task=Tokens(classes=3)
    ).inheritance
    for index in range(4):
        for kind in ("heads", "groups"):
            assert plan.kept[f"{kind} of bert.encoder.layer.{index}.attention"] == (index % 2, 3)


def test_layers_with_one_table_of_distances_keep_the_same_heads() -> None:
    plan = plan_shrink(made("t5"), width=0.5).inheritance
    heads = {space for space in plan.kept if space.startswith("heads of encoder")}
    assert heads == {"heads of encoder.SelfAttention"}
    table = next(r for r in plan.rows if r.name.startswith("encoder") and "relative" in r.name)
    assert table.axes[1] is not None
    assert table.axes[1].space in heads


def test_both_directions_of_an_lstm_count_for_a_channel() -> None:
    teacher = made("bilstm")
    documents = [[3 + (a * b) % 45 for b in range(1, 12)] for a in range(1, 25)]
    ids = torch.tensor(documents)
    data = attar.data.TensorSource(ids, torch.arange(24) % 5, classes=5)
    row = Row("head.weight", "head.weight", (None, Axis("x", (32, 16), blocks=2)), matrix=True)
    heard: list[Tensor] = []
    handle = teacher.head.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    found = ranked_members(teacher, [row], data, Tokens(classes=5), 24)["x"]
    handle.remove()
    norms = torch.cat(heard).abs().square().sum(0).sqrt()
    torch.testing.assert_close(found, norms[:16] + norms[16:])


@pytest.mark.parametrize("kept", [True, False])
def test_a_language_model_keeps_its_keys_as_before_it_was_measured(kept: bool) -> None:
    teacher = made("llama")
    teacher.config.use_cache = kept
    before = teacher.config.to_dict()
    data, task = texts()
    student = shrink(teacher, depth=2, width=0.5, select="importance", data=data, task=task)
    assert teacher.config.to_dict() == before
    assert student.config.use_cache is kept


def test_what_nothing_reads_has_no_importance() -> None:
    class Blind(attar.tasks.ImageClassification):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            return batch["labels"]

    labels = torch.zeros(4, dtype=torch.long)
    data = attar.data.TensorSource(torch.randn(4, 3, 16, 16), labels, classes=5)
    with pytest.raises(UsageError, match="importance of '32 to 16' is not known"):
        plan_shrink(made("mlp"), width=0.5, select="importance", data=data, task=Blind())


def test_a_score_is_the_mean_over_positions_and_the_norm_over_examples() -> None:
    inputs = torch.zeros(4, 5, 3)
    inputs[:, 0, 0] = -10.0  # a mean of 2
    inputs[:, :, 1] = 3.0
    inputs[0, :, 2] = 5.0  # of one example alone
    data = attar.data.TensorSource(inputs, torch.zeros(4, 1))
    model = nn.Sequential(nn.Linear(3, 2))
    row = Row("0.weight", "0.weight", (None, Axis("x", (3, 2))), matrix=True)
    found = ranked_members(model, [row], data, attar.tasks.Regression(), 4)
    torch.testing.assert_close(found["x"], torch.tensor([4.0, 6.0, 5.0]))


def test_a_channel_that_all_layers_read_is_kept() -> None:
    teacher = made("resnet")
    images = torch.randn(40, 3, 16, 16)
    data = attar.data.TensorSource(images, torch.arange(40) % 5, classes=5)
    loud = [1, 2, 6, 7]
    with torch.no_grad():
        for part in teacher.modules():
            if isinstance(part, nn.BatchNorm2d) and part.num_features == 8:
                part.weight[:] = 0.01
                part.bias[:] = 0.0
                part.weight[loud] = 3.0
    plan = plan_shrink(
        teacher, width=0.5, select="importance", data=data, task=attar.tasks.ImageClassification()
    )
    assert plan.inheritance.kept["8 to 4"] == tuple(loud)


def test_layers_that_turn_what_goes_through_them_are_kept() -> None:
    teacher = made("llama")
    data, task = texts()
    silent("llama", teacher, {"model.layers": (1, 3)})
    plan = plan_shrink(teacher, depth=2, layers="importance", data=data, task=task)
    assert plan.inheritance.layers == {"model.layers": (1, 3)}


# Plans


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "resnet"])
def test_a_plan_applied_twice_gives_the_same_bits_and_changes_nothing(kind: str) -> None:
    teacher = made(kind)
    before = copy.deepcopy(teacher.state_dict())
    state = torch.get_rng_state()
    plan = plan_shrink(teacher, width=0.5, blend=0.5, seed=3)
    json.dumps(plan.describe())
    one, other = plan.apply(teacher), plan.apply(teacher)
    assert not one.training
    assert torch.equal(state, torch.get_rng_state())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])
    third = plan_shrink(teacher, width=0.5, blend=0.5, seed=4).apply(teacher)
    assert any(not torch.equal(t, third.state_dict()[n]) for n, t in one.state_dict().items())


def test_the_student_has_the_type_of_the_teacher() -> None:
    student = shrink(made("resnet").double(), width=0.5)
    assert {p.dtype for p in student.parameters()} == {torch.float64}


def test_scale_is_of_matrices_alone_and_blend_of_all() -> None:
    teacher = made("resnet")
    plain, scaled = shrink(teacher, width=0.5), shrink(teacher, width=0.5, scale=0.5)
    for (name, a), b in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(b, a * 0.5 if a.ndim > 1 else a), name
    most = shrink(teacher, width=0.5, blend=0.75)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = attar.models.build("resnet", shape=[3, 16, 16], outputs=5, depth=20, width=4)
    for (name, a), b, c in zip(
        plain.named_parameters(), most.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(b, 0.75 * a + 0.25 * c, msg=name)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"t5", "bart"}))
def test_the_result_is_saved_and_loaded_as_any_other(kind: str, tmp_path: Path) -> None:
    student = shrink(made(kind), width=0.5)
    attar.models.save(student, tmp_path)
    again = attar.models.load(tmp_path)
    assert torch.equal(answer(again, example(kind)), answer(student, example(kind)))


@pytest.mark.parametrize("kind", ["t5", "bart", "llama"])
def test_the_result_is_read_by_its_own_library(kind: str, tmp_path: Path) -> None:
    student = shrink(made(kind), depth=2, width=0.5)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(answer(again, example(kind)), answer(student, example(kind)))


def test_a_student_built_by_hand_inherits_what_fits() -> None:
    teacher = made("mlp")
    with torch.random.fork_rng():
        student = attar.models.build("mlp", shape=[3, 16, 16], outputs=5, widths=[16, 64])
    start = copy.deepcopy(student.state_dict())
    plan = plan_inheritance(student, teacher)
    assert set(plan.fresh) == {"blocks.1.linear.weight", "blocks.1.linear.bias", "head.weight"}
    assert "only [32, 32] there" in plan.fresh["blocks.1.linear.weight"]
    plan.apply(student, teacher)
    for name in plan.fresh:
        assert torch.equal(student.state_dict()[name], start[name])
    kept = plan.kept["32 to 16"]
    theirs = teacher.state_dict()["blocks.0.linear.weight"]
    assert torch.equal(student.state_dict()["blocks.0.linear.weight"], theirs[list(kept)])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {}, "say what becomes smaller"),
        ("llama", {"depth": 5}, "num_hidden_layers must be from 1 to 4, not 5"),
        ("llama", {"depth": {"layers": 2}}, "depth has no 'layers'; choose from: num_hidden"),
        ("llama", {"width": {"hiden_size": 8}}, "no 'hiden_size'; did you mean 'hidden_size'"),
        ("llama", {"width": {"hidden_size": 64}}, "hidden_size must be from 1 to 32, not 64"),
        ("llama", {"width": {"num_key_value_heads": 1}}, "take heads away with them"),
        ("llama", {"width": {"head_dim": 6}}, "a head of 8 cannot become one of 6"),
        ("llama", {"layers": [0, 9]}, "2 numbers from 0 to 3"),
        ("llama", {"depth": 2, "layers": "even"}, "no 'even'"),
        ("llama", {"depth": 2, "layers": "published"}, "no table of 2 of 4 layers"),
        ("llama", {"depth": 2, "layers": {"layers": [0, 1]}}, "no list of layers .* at 'layers'"),
        ("llama", {"width": 0.5, "select": "importance"}, "give data= and task="),
        ("resnet", {"width": {"wide": 4}}, "resnet has no option 'wide'; did you mean 'width'"),
        ("resnet", {"depth": 26}, "depth must be 20 at most, not 26"),
        ("resnet", {"depth": 9}, "6 n \\+ 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan_shrink(made(kind), **options)


def test_fused_matrices_in_an_order_that_is_not_known_are_refused() -> None:
    pytest.importorskip("transformers")
    phi = _language("phi3", {**LLAMA, "pad_token_id": 0})
    with pytest.raises(UsageError, match=r"qkv_proj.* holds several matrices"):
        plan_shrink(phi, width=0.5)
    assert not plan_shrink(phi, depth=2).inheritance.fresh


def test_a_module_of_ones_own_is_told_what_to_do() -> None:
    with pytest.raises(UsageError, match="build the smaller one and call"):
        plan_shrink(nn.Linear(2, 2), depth=1)
    assert KINDS.keys() >= OF_TRANSFORMERS


@pytest.mark.parametrize(
    ("family", "options", "layers", "kept"),
    [
        ("resnet", {"depth": 20, "width": 4}, [0, 2], {"depth": 14}),
        ("resnet", {"depth": 14, "width": 4}, [1], {"depth": 8}),
        ("mobilenet", {"depth": 3, "width": 4}, [0, 2], {"depth": 2}),
        ("vit", {"depth": 4, "width": 16}, [0, 3], {"depth": 2}),
    ],
)
def test_a_list_of_layers_is_as_many_in_every_family(family, options, layers, kept):
    model = attar.models.build(family, shape=(1, 8, 8), outputs=10, **options)
    plan = plan_shrink(model, layers=layers)
    assert plan.changes == kept
    assert set(plan.inheritance.layers.values()) == {tuple(layers)}


@pytest.mark.parametrize(
    ("options", "layers", "said"),
    [
        ({"depth": 8}, [0, 99], "no layer 99; this resnet has layer 0 alone in each stage"),
        ({"depth": 20}, [-1], "no layer -1; this resnet has layers 0 to 2 in each stage"),
    ],
)
def test_a_layer_that_there_is_not_is_named(options, layers, said):
    model = attar.models.build("resnet", shape=(1, 8, 8), outputs=10, **options)
    with pytest.raises(UsageError, match=f"shrink: there is {said}"):
        plan_shrink(model, layers=layers)
