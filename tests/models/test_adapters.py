"""Adapters of peft: they alone learn, and what is saved is the model with them merged."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.losses import kl_divergence
from attar.models import build, load, merged, read_extra, save
from attar.runtime import DataError, UsageError
from attar.training.loop import Loop

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
DOCUMENTS = [[1 + (a * b) % 90 for b in range(1, 8 + a % 9)] for a in range(1, 60)]
TOKENS = torch.arange(32).view(2, 16) * 3
SOFT = attar.Term(partial(kl_divergence, temperature=1.0), weight=0.9)
STEP: dict[str, Any] = {
    "batch_size": 8, "optimizer": partial(attar.training.adamw, lr=0.02), "progress": False,
}  # fmt: skip


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=100, **LLAMA))


def on(model: nn.Module, purpose: str = "CAUSAL_LM", **lora: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=purpose, **{**LORA, **lora}))


def moved(model: nn.Module) -> nn.Module:
    """*model* with adapters that do something; new ones add zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def bert(tmp_path: Path) -> str:
    torch.manual_seed(0)
    made = transformers.BertModel(
        transformers.BertConfig(vocab_size=100, initializer_range=0.3, **SIZES)
    )
    made.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def language() -> tuple[Any, Any]:
    data = attar.data.text(DOCUMENTS, length=32, eos=0, vocabulary=100)
    return data, attar.tasks.LanguageModelling().fitted(data)


def test_only_the_adapters_learn_and_the_frozen_head_costs_no_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from attar.losses.wide import _pass

    data, task = language()
    student = on(llama())
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    asked: list[tuple[bool, ...]] = []
    forward = _pass.Combined.forward

    def seen(ctx: Any, *args: Any) -> Any:
        asked.append(tuple(ctx.needs_input_grad[:3]))
        return forward(ctx, *args)

    monkeypatch.setattr(_pass.Combined, "forward", staticmethod(seen))
    attar.distill(student, attar.Teacher(llama(7), task), data, task, [SOFT], epochs=1, **STEP)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert len(changed) == 8
    assert len(asked) > 2  # and never the head's weight: only what comes before it
    assert set(asked) == {(True, False, False)}


def test_a_student_with_adapters_is_checkpointed_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, task = language()
    teacher = attar.Teacher(llama(7), task)
    straight, again = on(llama()), on(llama())
    attar.distill(straight, teacher, data, task, [SOFT], epochs=3, **STEP)
    how = {**STEP, "epochs": 3, "run": tmp_path / "run", "checkpoint_every": 2}
    step = Loop.step

    def failing(self: Loop, window: Any) -> float:
        if self.done == 5:
            raise RuntimeError("the power is gone")
        return step(self, window)

    monkeypatch.setattr(Loop, "step", failing)
    with pytest.raises(RuntimeError, match="power"):
        attar.distill(on(llama()), teacher, data, task, [SOFT], **how)
    monkeypatch.setattr(Loop, "step", step)
    attar.distill(again, teacher, data, task, [SOFT], resume=True, **how)
    assert torch.equal(logits(again.eval()), logits(straight.eval()))
    kept = load(tmp_path / "run" / "model")
    assert type(kept).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(kept), logits(again), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bare", [True, False], ids=["given", "built"])
def test_what_is_saved_is_merged_and_needs_peft_no_more(
    bare: bool, base: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"shape": (16,), "outputs": 100, "path": base, "lora": LORA}
    model = moved(on(llama()) if bare else build("pretrained_language_model", **how))
    assert (logits(model) - logits(llama().eval())).abs().max() > 0.1
    save(model, tmp_path / "kept", extra={"seed": 3})
    assert any("lora_" in name for name in model.state_dict())  # the model itself is as it was
    torch.testing.assert_close(logits(load(tmp_path / "kept")), logits(model), rtol=0, atol=1e-5)
    assert read_extra(tmp_path / "kept") == {"seed": 3}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept").eval()
    assert torch.equal(logits(theirs), logits(load(tmp_path / "kept")))
    code = "import sys; sys.modules['peft'] = None; from attar.models import load; "
    code += "print(type(load(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "kept")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "LlamaForCausalLM" in done.stdout, done.stderr


def test_a_text_classifier_learns_its_adapters_and_its_head(bert: str, tmp_path: Path) -> None:
    texts = [f"w{1 + n % 19 + 20 * (n % 2)} w{1 + n % 7}" for n in range(60)]
    data = attar.data.sentences(
        texts, lambda text: [int(word[1:]) for word in text.split()],
        torch.arange(60) % 2, classes=["a", "b"], length=12,
    )  # fmt: skip
    task = attar.tasks.TextClassification().fitted(data)
    torch.manual_seed(0)
    model = build(
        "pretrained_text_classifier",
        data=data,
        path=bert,
        lora={"r": 4, "target_modules": ["query"]},
    )
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in learned if "lora_" not in name} == {"modules_to_save"}
    before = logits(merged(model).eval())
    attar.train(model, data, task, epochs=4, **STEP)
    save(model, tmp_path / "kept")
    again = load(tmp_path / "kept")
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=0, atol=1e-5)
    assert (logits(again) - before).abs().max() > 0.1
    found = [attar.evaluate(each, data, task)["cross_entropy"] for each in (again, model)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(logits(theirs.eval()), logits(again))


def test_every_new_part_of_a_head_learns(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=1, n_heads=4)
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    how: dict[str, Any] = {"shape": (16,), "outputs": 3, "path": str(tmp_path)}
    model = build("pretrained_text_classifier", **how, lora={"target_modules": ["q_lin"]})
    learned = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert learned == {"classifier", "distilbert", "pre_classifier"}


def test_options_that_do_not_fit_are_one_sentence(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(
        build, "pretrained_language_model", shape=(16,), outputs=100, path=base
    )  # fmt: skip
    with pytest.raises(UsageError, match="lora has no 'target_module'; did you mean 'target_modu"):
        make(lora={"target_module": ["q_proj"]})
    with pytest.raises(UsageError, match=r"cannot change this model so \(Target modules {'query'}"):
        make(lora={"target_modules": ["query"]})
    with pytest.raises(UsageError, match="lora has no 'task_type'"):
        make(lora={"task_type": "SEQ_CLS"})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r'install it: pip install "attar\[peft\]"'):
        make(lora=LORA)


def test_what_cannot_be_merged_is_refused_before_training(tmp_path: Path) -> None:
    data, task = language()
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    student = peft.get_peft_model(llama(), prompts)
    with pytest.raises(UsageError, match=r"\(PROMPT_TUNING\) are no change of its weights"):
        save(student, tmp_path / "kept")
    small = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4)
    tied = on(transformers.GPT2LMHeadModel(small), target_modules=["lm_head"])
    with pytest.raises(UsageError, match="sits on 'lm_head', whose weight is also that of 'transf"):
        save(tied, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    before = {name: p.detach().clone() for name, p in tied.named_parameters()}
    with pytest.raises(UsageError, match="sits on 'lm_head'"):
        attar.train(tied, data, task, epochs=1, run=tmp_path / "run", **STEP)
    assert all(torch.equal(p, before[name]) for name, p in tied.named_parameters())


def test_a_bare_model_of_transformers_is_built_again_from_its_folder(tmp_path: Path) -> None:
    model = llama().eval()
    save(model, tmp_path / "kept")
    assert torch.equal(logits(load(tmp_path / "kept")), logits(model))
    assert json.loads((tmp_path / "kept/config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    short: Any = llama()
    short.model.layers = short.model.layers[:1]  # no longer what its config says
    save(short, tmp_path / "short")
    with pytest.raises(DataError, match="does not say how to build it"):
        load(tmp_path / "short")
    save(attar.models.build("mlp", shape=(4,), outputs=2), tmp_path / "kept")
    assert not (tmp_path / "kept/config.json").exists()
