"""Language models: what they see, what is learned, and that no layout changes it."""

from __future__ import annotations

import gc
import json
import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attar
from attar.data import text
from attar.losses import Projected, kl_divergence
from attar.runtime import DataError, PreflightError
from attar.tasks import LanguageModelling, language, restore

REAL, EOS, IGNORED = 90, 2, -100
TASK = LanguageModelling(vocabulary=REAL)
DOCUMENTS = [
    torch.randint(3, REAL, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    for size in (5, 11, 3, 8, 14, 2, 7)
]
PROMPTS = [[7, 8, 9][: index % 4] for index in range(len(DOCUMENTS))]
LAYOUTS: list[dict[str, Any]] = [
    {"pack": False, "side": "right"},
    {"pack": False, "side": "left"},
    {"pack": True, "side": "right"},
    {"pack": True, "side": "left"},
]


class Sequencer(nn.Module):
    """Causal attention of a plain module: within a document, as its positions say."""

    def __init__(self, vocabulary: int = REAL, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary, width)
            self.places = nn.Embedding(64, width)
            self.mix = nn.Linear(width, 3 * width)
            self.last = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        size = tokens.shape[1]
        usual = torch.arange(size).expand_as(tokens)
        positions = usual if positions is None else positions
        document = usual - positions  # where it begins
        seen = (document[:, :, None] == document[:, None]) & torch.ones(size, size).tril().bool()
        state = self.embed(tokens) + self.places(positions)
        q, k, v = self.mix(state).chunk(3, -1)
        return self.last(state + F.scaled_dot_product_attention(q, k, v, attn_mask=seen))


def tiny(kind: str, attention: str = "eager", vocabulary: int = REAL, **more: Any) -> nn.Module:
    """A random causal model of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    windows = {"head_dim": 8, "sliding_window": 8}
    options: dict[str, Any] = {
        "Llama": sizes,
        "Qwen2": sizes,
        "Qwen3": sizes | {"head_dim": 8},
        "Mistral": sizes | {"sliding_window": 8},
        "Gemma2": sizes | windows | {"final_logit_softcapping": 0.02},
        "Gemma3Text": sizes | windows | {"final_logit_softcapping": 0.03},
        "Cohere": sizes | {"logit_scale": 0.25},
        "Granite": sizes | {"logits_scaling": 4.0},
        "HyperCLOVAX": sizes | {"logits_scaling": 4.0},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "Bert": sizes | {"is_decoder": True},
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "Falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "OPT": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "Lfm2": sizes | {"layer_types": ["conv", "full_attention"]},
    }[kind]
    ends = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, **options | ends | {"attention_dropout": 0.0} | more
    )
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def window(length: int = 24, task: LanguageModelling = TASK, **layout: Any) -> dict[str, Tensor]:
    """All documents as one batch."""
    source = text(
        DOCUMENTS, length=length, prompts=PROMPTS, eos=EOS, vocabulary=task.vocabulary, **layout
    )
    return source.rows(torch.arange(len(source)))


def dense(logits: Any) -> Tensor:
    return logits.dense() if isinstance(logits, Projected) else logits


def logits_of(model: nn.Module, batch: dict[str, Tensor], task: Any = TASK) -> Tensor:
    return dense(task.output(task.forward(model, batch), "logits"))


def places(*sizes: int) -> Tensor:
    return torch.cat([torch.arange(size) for size in sizes])[None]


# A document sees itself alone

OBEDIENT = [
    (kind, attention)
    for kind in ("Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "Gemma2", "Gemma3Text")
    for attention in ("eager", "sdpa")
    if (kind, attention) != ("Gemma2", "sdpa")  # which transformers does not have
]


@pytest.mark.parametrize(("kind", "attention"), OBEDIENT)
@pytest.mark.parametrize("training", [False, True])
def test_a_document_has_the_same_logits_wherever_it_lies(
    kind: str, attention: str, training: bool
) -> None:
    model = tiny(kind, attention).train(training)
    other, own, pad = (torch.randint(3, REAL, (1, size)) for size in (11, 17, 6))
    alone = logits_of(model, {"inputs": own, "positions": places(17)})
    assert torch.equal(alone, logits_of(model, {"inputs": own}))
    laid = [
        (torch.cat([other, own], 1), places(11, 17), slice(11, 28)),
        (torch.cat([pad, own], 1), places(6, 17), slice(6, 23)),
        (torch.cat([own, pad], 1), places(17, 6), slice(0, 17)),
    ]
    for inputs, positions, where in laid:
        found = logits_of(model, {"inputs": inputs, "positions": positions})[:, where]
        torch.testing.assert_close(
            found, alone, rtol=1e-5, atol=1e-5 * float(alone.detach().abs().max())
        )
    language.check_packing(model, window(), TASK)


@pytest.mark.parametrize("kind", ["Bloom", "Falcon", "OPT", "Mamba", "Lfm2"])
def test_a_model_that_sees_the_document_before_is_refused_with_a_way_out(kind: str) -> None:
    model = tiny(kind)
    for layout in LAYOUTS[1:]:
        with pytest.raises(PreflightError, match="lets a document see the one before") as caught:
            TASK.try_forward(model, window(**layout), "teacher")
        assert 'pack=False, side="right"' in str(caught.value)
    TASK.try_forward(model, window(**LAYOUTS[0]), "teacher")


def test_a_recurrent_net_is_refused_and_a_plain_one_with_positions_is_not() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell = nn.Embedding(REAL, 8), nn.GRU(8, REAL, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.cell(self.embed(tokens))[0]

    with pytest.raises(PreflightError, match=r"the student \(Recurrent\) lets a document see"):
        TASK.try_forward(Recurrent(), window(), "student")
    TASK.try_forward(Recurrent(), window(**LAYOUTS[0]), "student")
    TASK.try_forward(Sequencer(), window(), "student")


def test_a_model_that_takes_the_place_in_the_row_for_one_in_the_document_is_refused() -> None:
    class Placed(Sequencer):
        def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
            own = self.places(torch.arange(tokens.shape[1])) @ self.last.weight.T
            return super().forward(tokens, positions) + own

    with pytest.raises(PreflightError, match="lets a document see the one before"):
        TASK.try_forward(Placed(), window(), "model")


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(REAL, 8), nn.Linear(8, REAL)

        def forward(self, tokens: Tensor) -> Tensor:
            state = self.embed(tokens)
            return self.last(state + state.mean(1, keepdim=True))

    for layout in LAYOUTS:
        with pytest.raises(PreflightError, match="sees the tokens that it is to predict"):
            TASK.try_forward(Both(), window(**layout), "student")


# The head is not run

HEADS = {
    "Llama": (1.0, None),
    "GPT2": (1.0, None),
    "Gemma2": (1.0, 0.02),
    "Gemma3Text": (1.0, 0.03),
    "Cohere": (0.25, None),
    "Granite": (0.25, None),  # which divides by 4
    "HyperCLOVAX": (4.0, None),  # which multiplies, under the same name
    "OPT": (1.0, None),
    "Mamba": (1.0, None),
}


@pytest.mark.parametrize("kind", HEADS)
def test_projected_logits_are_the_models_own(kind: str) -> None:
    model, batch = tiny(kind).eval(), window(**LAYOUTS[0])
    expected = model(batch["inputs"], use_cache=False).logits
    for _ in range(3):  # the first is recognised, the others are not run whole
        found = TASK.output(TASK.forward(model, batch), "logits")
        assert isinstance(found, Projected)
        assert (found.scale, found.softcap) == HEADS[kind]
        assert found.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
        torch.testing.assert_close(found.dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Granite", "HyperCLOVAX"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "untrained"])
def test_a_head_is_recognised_in_half_precision_and_where_it_gives_zeros(
    kind: str, how: str
) -> None:
    model, batch = tiny(kind), window()
    if how == "untrained":
        nn.init.zeros_(model.get_output_embeddings().weight)
    elif how != "autocast":
        model = model.to(getattr(torch, how))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = TASK.output(TASK.try_forward(model, batch, "student"), "logits")
    assert isinstance(found, Projected)
    assert (found.scale, found.softcap) == HEADS[kind]


@pytest.mark.parametrize("factor", [1, 2])
def test_a_head_that_tells_nothing_yet_is_run_until_it_does(factor: int) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Embedding(REAL, 8), nn.Linear(8, REAL, bias=False)
            nn.init.zeros_(self.head.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            return factor * self.head(self.backbone(tokens))

    model, batch = Named(), window()
    for _ in range(2):
        assert isinstance(TASK.output(TASK.forward(model, batch), "logits"), Tensor)
    nn.init.ones_(model.head.weight)
    torch.testing.assert_close(logits_of(model, batch), model(batch["inputs"]))
    found = TASK.output(TASK.forward(model, batch), "logits")
    assert isinstance(found, Projected if factor == 1 else Tensor)


def test_a_model_that_was_run_is_not_kept() -> None:
    model = tiny("Llama")
    TASK.try_forward(model, window(), "student")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_head_is_run_at_one_position_of_the_first_batch_and_never_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch, sizes = tiny("Llama"), window(), []
    plain = nn.Linear.forward

    def counted(self: nn.Linear, values: Tensor) -> Tensor:
        if self is model.get_output_embeddings():
            sizes.append(values.shape[1])
        return plain(self, values)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    for _ in range(3):
        TASK.forward(model, batch)
    assert sizes == [1]


def test_a_gradient_of_projected_logits_is_that_of_the_whole_model() -> None:
    for kind in ("Llama", "GPT2"):  # apart, and tied to the embedding
        model, batch = tiny(kind), window(**LAYOUTS[0])
        TASK.loss(model(batch["inputs"], use_cache=False), batch).sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        for _ in range(2):
            model.zero_grad()
            TASK.loss(TASK.forward(model, batch), batch).sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_model_with_more_before_its_last_layer_is_run_whole() -> None:
    model, batch = tiny("Bert").eval(), window(**LAYOUTS[0])
    for _ in range(2):
        out = TASK.output(TASK.forward(model, batch), "logits")
        torch.testing.assert_close(out, model(batch["inputs"]).logits)
    assert TASK.head(model) is None


def test_a_plain_module_names_its_parts_or_is_run_whole() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Embedding(REAL, 8), nn.Linear(8, REAL)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.backbone(tokens))

    class Warm(Named):
        def forward(self, tokens: Tensor) -> Tensor:
            return 2 * super().forward(tokens)

    batch = window()
    for kind, expected in ((Named, Projected), (Warm, Tensor), (Sequencer, Tensor)):
        model = kind()
        for _ in range(2):
            out = TASK.output(TASK.forward(model, batch), "logits")
            assert isinstance(out, expected)
            told = {"positions": batch["positions"]} if kind is Sequencer else {}
            torch.testing.assert_close(dense(out), model(batch["inputs"], **told))
    model = Named()
    assert TASK.head(model) is model.head


def test_a_head_whose_result_is_capped_or_scaled_is_not_plain() -> None:
    model = tiny("Llama")
    assert TASK.head(model) is model.get_output_embeddings()
    assert TASK.head(tiny("Gemma2")) is None
    assert TASK.head(tiny("Granite")) is None


def test_a_head_that_somebody_listens_to_is_run() -> None:
    model, batch = tiny("Llama"), window()
    expected = logits_of(model, batch)
    with attar.signals.Tap(model, ["input:lm_head"]) as tap:
        out, heard = tap(TASK.forward, model, batch)
    assert isinstance(TASK.output(out, "logits"), Tensor)
    torch.testing.assert_close(dense(TASK.output(out, "logits")), expected)
    assert heard["input:lm_head"].shape == (*batch["inputs"].shape, 32)
    assert isinstance(TASK.output(TASK.forward(model, batch), "logits"), Projected)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_tap_hears_the_first_pass_once() -> None:
    model, batch = tiny("Llama"), window()
    with attar.signals.Tap(model, ["feature:model.layers.1", "feature:model.norm"]) as tap:
        out, heard = tap(TASK.forward, model, batch)
    torch.testing.assert_close(out["last_hidden_state"], heard["feature:model.norm"])


class LowRank(nn.Linear):
    """What an adapter puts in a layer's place; it starts as the layer itself."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.a, self.b = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.b(self.a(input))


def test_an_adapter_on_the_head_is_not_left_out() -> None:
    model, batch = tiny("Llama"), window()
    TASK.forward(model, batch)  # the head is known, and then it changes
    model.set_output_embeddings(LowRank(model.get_output_embeddings()))
    TASK.forward(model, batch)
    nn.init.ones_(model.get_output_embeddings().b.weight)
    told = {"position_ids": batch["positions"], "use_cache": False}
    expected = model(batch["inputs"], **told).logits
    torch.testing.assert_close(logits_of(model, batch), expected)


def test_a_head_that_is_replaced_is_the_new_one() -> None:
    model, batch = tiny("Llama"), window()
    TASK.forward(model, batch)
    model.set_output_embeddings(nn.Linear(32, REAL))
    told = {"position_ids": batch["positions"], "use_cache": False}
    torch.testing.assert_close(logits_of(model, batch), model(batch["inputs"], **told).logits)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_model_of_peft_is_its_base_model_with_adapters(kind: str) -> None:
    peft = pytest.importorskip("peft")
    batch, plain = window(), tiny(kind)
    names = ["q_proj", "v_proj"] if kind == "Llama" else ["c_attn"]
    lora = {"r": 2, "target_modules": names, "init_lora_weights": False}
    model = peft.get_peft_model(plain, peft.LoraConfig(**lora, fan_in_fan_out=kind == "GPT2"))
    expected = model(batch["inputs"], position_ids=batch["positions"], use_cache=False).logits
    for _ in range(2):
        out = TASK.output(TASK.try_forward(model, batch, "student"), "logits")
        assert isinstance(out, Projected)
        torch.testing.assert_close(out.dense(), expected, rtol=1e-4, atol=1e-5)
    headed = peft.LoraConfig(**{**lora, "target_modules": ["lm_head"]})
    model = peft.get_peft_model(tiny("Llama"), headed)
    assert isinstance(TASK.output(TASK.forward(model, batch), "logits"), Tensor)


def test_a_model_of_peft_that_adds_tokens_is_not_run_without_them() -> None:
    peft, batch = pytest.importorskip("peft"), window(**LAYOUTS[0])
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        model = peft.get_peft_model(
            tiny("Llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ).eval()
        for _ in range(2):
            expected = model(batch["inputs"], use_cache=False).logits
            torch.testing.assert_close(logits_of(model, batch), expected)


# Padded vocabularies


@pytest.mark.parametrize("kind", ["Llama", "Plain"])
def test_columns_beyond_the_vocabulary_are_cut_off_on_both_sides(kind: str) -> None:
    def made(columns: int, seed: int) -> nn.Module:
        if kind == "Plain":
            return Sequencer(columns, seed=seed)
        model = tiny(kind, vocabulary=columns)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed + number))
        return model

    def cut(model: nn.Module) -> nn.Module:
        small = made(REAL, 0)
        state = small.state_dict()
        small.load_state_dict(
            {k: v[: state[k].shape[0]] if v.ndim else v for k, v in model.state_dict().items()}
        )
        return small

    batch, student, teacher = window(), made(96, 1), made(128, 50)
    mask = TASK.mask(batch)
    found, expected = (
        kl_divergence(logits_of(one, batch)[mask], logits_of(other, batch)[mask])
        for one, other in ((student, teacher), (cut(student), cut(teacher)))
    )
    torch.testing.assert_close(found, expected)
    own = TASK.loss(TASK.forward(student, batch), batch)
    torch.testing.assert_close(own, TASK.loss(TASK.forward(cut(student), batch), batch))
    rows = [TASK.rows(TASK.forward(each, batch), batch) for each in (student, cut(student))]
    torch.testing.assert_close(rows[0]["nll"], rows[1]["nll"])
    assert torch.equal(rows[0]["top"], rows[1]["top"])


def test_a_padded_column_gets_no_gradient() -> None:
    model, batch = tiny("Llama", vocabulary=96), window()
    for _ in range(2):
        model.zero_grad()
        TASK.loss(TASK.forward(model, batch), batch).sum().backward()
        grad = model.get_output_embeddings().weight.grad
        assert bool(grad[:REAL].any())
        assert not grad[REAL:].any()


# The next token, and what counts


class Planted(nn.Module):
    """A teacher that knows every document: at each position it is sure of the next token."""

    def __init__(self, documents: list[list[int]], prompts: list[list[int]]) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(60.0))
        self.next = {}
        for prompt, document in zip(prompts, documents, strict=True):
            whole = [*prompt, *document, EOS]
            for place in range(1, len(whole)):
                self.next[tuple(whole[:place])] = whole[place]

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, REAL)
        for row, line in enumerate(tokens.tolist()):
            for place in range(len(line)):
                start = place - int(positions[row, place]) if positions is not None else 0
                known = self.next.get(tuple(line[start : place + 1]))
                if known is not None:
                    logits[row, place, known] = 1
        return logits * self.sure


# Contexts that no two documents share, so that the teacher can know what follows.
DISTINCT = [[10 * (i + 1) + j for j in range(size)] for i, size in enumerate((5, 8, 3, 7))]
ASKED = [[9], [], [8, 9, 6], [7, 9]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_planted_teacher_is_right_at_every_counted_position(layout: dict[str, Any]) -> None:
    source = text(DISTINCT, length=15, prompts=ASKED, eos=EOS, vocabulary=REAL, **layout)
    batch = source.rows(torch.arange(len(source)))
    teacher, mask = Planted(DISTINCT, ASKED), TASK.mask(batch)
    assert int(mask.sum()) == sum(map(len, DISTINCT)) + 3  # a first token without a prompt: none
    told = logits_of(teacher, batch).detach()
    right = told.softmax(-1)[mask].gather(1, TASK.labels(batch)[mask][:, None])
    torch.testing.assert_close(right, torch.ones_like(right))
    assert not kl_divergence(told[mask], told[mask]).any()
    assert TASK.loss(TASK.forward(teacher, batch), batch).max() < 1e-6
    scores = TASK.score(TASK.rows(TASK.forward(teacher, batch), batch))
    assert scores == {"perplexity": 1.0, "cross_entropy": 0.0, "accuracy": 1.0}
    # One place to either side, and it is wrong nearly everywhere.
    for shift in (-1, 1):
        moved = told.roll(shift, 1).softmax(-1)[mask].gather(1, TASK.labels(batch)[mask][:, None])
        assert moved.mean() < 0.1
    # What a mask would let through by mistake is not what it knows.
    padding = batch["labels"] == IGNORED
    assert mask.sum() + padding.sum() == mask.numel()


def total_gradient(
    model: nn.Module, terms: list[Any], batches: list[dict[str, Tensor]], told: nn.Module
) -> Tensor:
    """The gradient of one optimiser step in these micro-batches, as a loop takes it."""
    from attar.training import Counts, Objective

    model.zero_grad()
    with Objective(model, TASK, terms, label_weight=0.5) as objective:
        counts = Counts.of(TASK, batches)
        for batch in batches:
            with torch.no_grad():
                goal = TASK.output(TASK.forward(told, batch), "logits")
            objective(batch, {"output:logits": goal}, counts).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def layouts_and_splits() -> list[list[dict[str, Tensor]]]:
    cut = []
    for layout in LAYOUTS:
        for length in (18, 24, 40):
            whole = window(length, **layout)
            for size in (len(whole["inputs"]), 1, 2, 3):
                cut.append(
                    [
                        {name: value[start : start + size] for name, value in whole.items()}
                        for start in range(0, len(whole["inputs"]), size)
                    ]
                )
    return cut


@pytest.mark.parametrize("double", [False, True])
def test_a_step_is_the_same_for_any_split_padding_and_packing_of_dense_logits(
    double: bool,
) -> None:
    student, teacher = Sequencer(96, seed=1), Sequencer(128, seed=2)
    _same_steps(student, teacher, double)


@pytest.mark.parametrize("double", [False, True])
def test_a_step_is_the_same_for_any_split_padding_and_packing_of_wide_logits(double: bool) -> None:
    student, teacher = tiny("Llama", vocabulary=96), tiny("Qwen2", vocabulary=128)
    _same_steps(student, teacher, double)


def _same_steps(student: nn.Module, teacher: nn.Module, double: bool) -> None:
    student, teacher = (m.double() if double else m for m in (student, teacher))
    terms = [attar.Term(partial(kl_divergence, temperature=2.0))]
    steps = layouts_and_splits()
    first = total_gradient(student, terms, steps[0], teacher)
    assert first.norm() > 1e-3
    for batches in steps[1:]:
        found = total_gradient(student, terms, batches, teacher)
        # Models of transformers take norms in float32 whatever they are.
        assert (found - first).norm() < (1e-9 if double else 1e-5) * first.norm()


def test_a_student_that_is_its_teacher_learns_nothing_from_it() -> None:
    from attar.training import Objective

    for model in (Sequencer(96), tiny("Llama", vocabulary=96)):
        batch = window()
        with Objective(model, TASK, [attar.Term(kl_divergence)], label_weight=0) as objective:
            with torch.no_grad():
                goal = TASK.output(TASK.forward(model, batch), "logits")
            parts = objective(batch, {"output:logits": goal})
        parts.loss.backward()
        assert float(parts.loss.detach().abs()) < 1e-6
        assert (
            max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6
        )


def test_wide_and_dense_logits_give_the_same_step() -> None:
    class Dense(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
            return self.inner(tokens, position_ids=positions, use_cache=False).logits

    terms = [attar.Term(partial(kl_divergence, temperature=2.0))]
    for kind in ("Llama", "Gemma2", "Granite", "GPT2"):
        student, teacher = tiny(kind, vocabulary=96), tiny("Qwen2", vocabulary=128)
        batches = [window()]
        wide = total_gradient(student, terms, batches, teacher)
        plain = total_gradient(Dense(student), terms, batches, Dense(teacher))
        assert (wide - plain).norm() < 1e-5 * plain.norm()


# Numbers


def test_rows_and_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = window(), tiny("Llama", vocabulary=96)
    logits = logits_of(model, batch).detach()
    mask, labels = TASK.mask(batch), batch["labels"]
    costs = F.cross_entropy(logits[mask].double(), labels[mask], reduction="none")
    monkeypatch.setattr(language, "_CHUNK_BYTES", 4 * 96 * 3)
    for out in (TASK.forward(model, batch), logits):
        rows = TASK.rows(out, batch)
        assert rows["tokens"].tolist() == mask.sum(1).tolist()
        assert float(rows["nll"].sum()) == pytest.approx(float(costs.sum()), rel=1e-6)
        first = int(mask[0].sum())
        assert float(rows["nll"][0]) == pytest.approx(float(costs[:first].sum()), rel=1e-6)
        assert torch.equal(rows["top"][mask], logits[mask].argmax(1).int())
        assert bool((rows["top"][~mask] == -1).all())
        assert rows["correct"].tolist() == ((rows["top"] == labels) & mask).sum(1).tolist()
        scores = TASK.score(rows)
        assert scores["cross_entropy"] == pytest.approx(float(costs.mean()), rel=1e-6)
        assert scores["perplexity"] == pytest.approx(math.exp(costs.mean()), rel=1e-6)
        right = (logits[mask].argmax(1) == labels[mask]).double().mean()
        assert scores["accuracy"] == pytest.approx(float(right))


def test_rows_keep_no_logits() -> None:
    batch, model = window(), tiny("Llama")
    rows = TASK.rows(TASK.forward(model, batch), batch)
    assert {tuple(v.shape) for v in rows.values()} == {
        (len(batch["inputs"]),),
        batch["inputs"].shape,
    }
    assert not any(value.requires_grad for value in rows.values())


def test_an_interval_takes_only_what_the_metric_reads() -> None:
    """Most of what windows keep is a token a position, and a bootstrap draws a thousand times."""
    from attar.evaluation.intervals import bootstrap

    class Heavy(Tensor):
        def __getitem__(self, chosen: Any) -> Tensor:
            raise AssertionError("drawn")

    source = text(DOCUMENTS, length=15, eos=EOS, vocabulary=REAL)
    rows = attar.evaluate(Sequencer(), source, TASK).rows
    light = bootstrap(TASK, rows, resamples=20)
    rows["top"] = rows["top"].as_subclass(Heavy)
    assert bootstrap(TASK, rows, resamples=20) == light


def test_a_window_in_which_nothing_counts_costs_nothing() -> None:
    batch = window()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    out = TASK.forward(tiny("Llama"), batch)
    assert TASK.rows(out, batch)["nll"].tolist() == [0.0] * len(batch["inputs"])
    loss = TASK.loss(out, batch).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_agreement_is_about_answers_not_labels() -> None:
    batch = window()
    one, other = (TASK.rows(Sequencer(seed=s)(batch["inputs"]), batch) for s in (1, 2))
    assert TASK.agreement(one, one) == {"agreement": 1.0, "nats_above_teacher": 0.0}
    found = TASK.agreement(one, other)
    mask = TASK.mask(batch)
    same = (one["top"] == other["top"])[mask].double().mean()
    assert found["agreement"] == pytest.approx(float(same))
    worse = TASK.score(one)["cross_entropy"] - TASK.score(other)["cross_entropy"]
    assert found["nats_above_teacher"] == pytest.approx(worse)


def test_the_floor_is_the_perplexity_of_the_labels_alone() -> None:
    labels = torch.tensor([[3, 3, IGNORED], [5, IGNORED, 3]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert TASK.floor(labels) == pytest.approx(math.exp(entropy))
    constant = torch.full((1, 2, 3, REAL), -1e4)
    constant[..., 3], constant[..., 5] = math.log(0.75), math.log(0.25)
    rows = TASK.rows(constant[0], {"inputs": labels, "labels": labels})
    assert TASK.primary(rows) == pytest.approx(TASK.floor(labels), rel=1e-6)


def test_an_evaluation_counts_tokens_not_windows() -> None:
    source = text(DOCUMENTS, length=15, eos=EOS, vocabulary=REAL)
    model = tiny("Llama")
    found = attar.evaluate(model, source, TASK, batch_size=2)
    batch = source.rows(torch.arange(len(source)))
    mask = TASK.mask(batch)
    costs = F.cross_entropy(logits_of(model, batch)[mask], batch["labels"][mask])
    assert found["perplexity"] == pytest.approx(float(costs.exp()), rel=1e-5)
    assert found.interval[0] <= found["perplexity"] <= found.interval[1]


# What a task is told


def test_a_task_takes_its_vocabulary_from_the_data_and_is_restored() -> None:
    source = text(DOCUMENTS, length=15, eos=EOS, vocabulary=REAL)
    task = LanguageModelling().fitted(source)
    assert task == TASK
    assert task.width == REAL
    assert restore(json.loads(json.dumps(task.describe()))) == task
    assert TASK.fitted(attar.data.Subset(source, torch.arange(2))) == TASK


def test_data_that_contradict_the_task_are_refused() -> None:
    source = text(DOCUMENTS, length=15, eos=EOS, vocabulary=REAL)
    with pytest.raises(DataError, match="a vocabulary of 91 tokens but text one of 90"):
        LanguageModelling(vocabulary=91).fitted(source)
    table = attar.data.TensorSource(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), classes=2)
    with pytest.raises(DataError, match="says nothing of its vocabulary"):
        LanguageModelling().fitted(table)
    with pytest.raises(DataError, match="needs the next token of each position"):
        TASK.fitted(table)
    with pytest.raises(DataError, match="vocabulary is 1"):
        LanguageModelling(vocabulary=1)
    source._columns["labels"][1, 3] = REAL
    with pytest.raises(DataError, match=r"position 3 of row 1 is 90.* 0 to 89"):
        TASK.fitted(source)


def test_a_model_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match="the student knows only 40: they are of another tokenizer"):
        TASK.try_forward(tiny("Llama", vocabulary=40), window(), "student")
    with pytest.raises(DataError, match="gives 40 logits where the vocabulary has 90"):
        TASK.output(torch.zeros(1, 4, 40), "logits")
    with pytest.raises(DataError, match=r"logits of shape \[1, 90\]"):
        TASK.output(torch.zeros(1, REAL), "logits")


def test_a_model_that_leaves_positions_out_is_refused() -> None:
    class Shifted(Sequencer):
        def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
            return super().forward(tokens, positions)[:, :-1]

    with pytest.raises(DataError, match=r"logits for \[\d, 23\] positions where the batch has"):
        TASK.try_forward(Shifted(), window(), "student")


def test_a_window_longer_than_the_model_reads_is_refused() -> None:
    with pytest.raises(DataError, match="cannot read windows of 24 tokens"):
        TASK.try_forward(tiny("GPT2", n_positions=16), window(**LAYOUTS[0]), "student")


def test_a_batch_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="needs the next token of each position"):
        TASK.mask({"inputs": torch.zeros(1, 4, dtype=torch.int64)})
    with pytest.raises(DataError, match=r"reads token ids, int64 \[B, S\]"):
        TASK.try_forward(tiny("Llama"), {"inputs": torch.zeros(1, 4)}, "student")


def test_what_is_compiled_is_what_is_called() -> None:
    """A model whose head is not run is not called itself, so its compiled call would be idle."""
    model: Any = tiny("Llama")
    task = LanguageModelling()
    assert task.body(model) is model
    task.forward(model, {"inputs": torch.zeros(1, 4, dtype=torch.int64)})
    assert task.body(model) is model.model
    assert task.body(plain := nn.Identity()) is plain
