"""Models of tokens as files: any number of texts of any length, padding that changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.exporting import check_export, export
from attar.exporting.tokens import fewer
from attar.runtime import UsageError
from attar.tasks import LanguageModelling, SentenceEmbedding, TextClassification

transformers = pytest.importorskip("transformers")
for name in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(name)

ALL = ["safetensors", "onnx", "torch_export"]
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
LLAMA = {**SIZES, "num_key_value_heads": 2}
LANGUAGE = LanguageModelling(vocabulary=100)


def tokens(count: int, length: int) -> Tensor:
    return torch.randint(1, 100, (count, length), generator=torch.Generator().manual_seed(length))


def causal(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":  # bare, with a tied head
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=4)
        )
    more = {"head_dim": 8, "sliding_window": 8} if kind == "gemma2" else {}
    return attar.models.build(
        "language_model", shape=(16,), outputs=100, architecture=kind, config={**LLAMA, **more}
    )


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(causal("llama"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def by_onnx(folder: Path, *inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    given = zip(("inputs", "attention"), inputs, strict=False)
    return torch.from_numpy(session.run(None, {name: each.numpy() for name, each in given})[0])


def by_torch(folder: Path, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.export.load(folder / "model.pt2").module()(*inputs)


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor, attention: Tensor | None = None) -> Tensor:
    mask = {} if attention is None else {"attention_mask": attention}
    return model.eval()(input_ids=inputs, **mask).logits


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "adapters"])
def test_a_language_model_answers_the_same_in_every_format(kind: str, tmp_path: Path) -> None:
    model = adapted() if kind == "adapters" else causal(kind)
    made = export(model, tmp_path / "out", formats=ALL, example=tokens(20, 12), task=LANGUAGE)
    assert list(made) == ALL
    assert model.training
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = attar.models.load(tmp_path / "out")
    assert type(loaded).__name__ == type(theirs).__name__
    for shape in ((1, 1), (1, 5), (3, 12), (5, 40)):
        inputs = tokens(*shape)
        wanted = logits(model, inputs)
        for found in (
            logits(theirs, inputs), logits(loaded, inputs), by_onnx(tmp_path / "out", inputs),
            by_torch(tmp_path / "out", inputs),
        ):  # fmt: skip
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert all(0 <= each.difference < 1e-5 and each.examples == 20 for each in made.values())


def test_the_card_says_how_a_language_model_is_read(tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces the first
        export(causal("llama"), tmp_path / "out", formats=ALL, example=tokens(3, 8), task=LANGUAGE)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "- input: [n, length], int64, token ids of the teacher's tokenizer",
        "- output: [n, length, 100], float32, logits of the next token; a row is one document",
        '`AutoModelForCausalLM.from_pretrained(".")` reads it',
    ):
        assert line in card, line
    done = as_the_card_says(tmp_path / "out")
    assert done.stdout.splitlines()[-2:] == ["(1, 8, 100)", "(1, 8, 100)"], done.stderr


def as_the_card_says(folder: Path) -> subprocess.CompletedProcess[str]:
    blocks = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.M | re.S)
    code = "\n".join(["import sys", "sys.modules['attar'] = None", *blocks])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def encoder(kind: str = "classifier") -> Any:
    torch.manual_seed(0)
    if kind == "classifier":
        how: dict[str, Any] = {"architecture": "bert", "config": SIZES, "vocabulary": 100}
        return attar.models.build("text_classifier", shape=(16,), outputs=3, **how)
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, **SIZES))


def padded() -> dict[str, Tensor]:
    lengths = torch.tensor([3, 7, 5, 1])
    return {"inputs": tokens(4, 7), "attention": (torch.arange(7) < lengths[:, None]).long()}


@pytest.mark.parametrize("kind", ["classifier", "embedding"])
def test_a_text_answers_the_same_alone_and_padded_in_every_format(
    kind: str, tmp_path: Path
) -> None:
    model: Any = encoder(kind)
    task: Any = TextClassification(classes=3) if kind == "classifier" else SentenceEmbedding()
    export(model, tmp_path / "out", formats=ALL, example=padded(), task=task)
    done = as_the_card_says(tmp_path / "out")
    width = 3 if kind == "classifier" else 32
    assert done.stdout.splitlines()[-2:] == [f"(1, {width})"] * 2, done.stderr
    for inputs in (padded(), {name: each[:, :2] for name, each in padded().items()}):
        model.eval()
        with torch.no_grad():
            rows = zip(inputs["inputs"], inputs["attention"], strict=True)
            alone = [{"inputs": row[None, : int(mask.sum())]} for row, mask in rows]
            said = [task.output(task.forward(model, row), task.outputs[0]) for row in alone]
        wanted = torch.cat(said)
        for read in (by_onnx, by_torch):
            found = read(tmp_path / "out", *inputs.values())
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_traced_is_known_before_training_and_has_its_weights(
    tmp_path: Path,
) -> None:
    model = attar.models.build("bilstm", shape=(7,), outputs=3, vocabulary=100, width=8, hidden=4)
    task = TextClassification(classes=3)
    with pytest.raises(UsageError, match="cannot trace the BiLSTM for any batch size and length"):
        check_export(model, example=padded(), formats=["onnx"], task=task)
    check_export(model, example=padded(), formats=["safetensors"], task=task)
    made = export(model, tmp_path / "out", example=padded(), task=task)
    assert made["safetensors"].difference == 0


def test_logits_of_a_large_vocabulary_are_asked_of_few_tokens() -> None:
    (small,) = fewer((tokens(256, 32),), torch.zeros(1, 32, 100))
    assert small.shape == (256, 32)
    (large,) = fewer((tokens(256, 512),), torch.zeros(1, 512, 50_000))
    assert large.shape[1] == 20
    assert large.numel() * 50_000 <= 2**26
    texts = (tokens(256, 512), tokens(256, 512))
    assert fewer(texts, torch.zeros(1, 3)) is texts


def test_a_folder_that_transformers_saved_is_not_replaced(tmp_path: Path) -> None:
    causal("gpt2").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    before = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    with pytest.raises(UsageError, match=r"holds 'config\.json', which no export wrote"):
        export(causal("gpt2"), tmp_path / "theirs", example=tokens(2, 4))
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == before


def test_an_attention_of_another_shape_is_refused(tmp_path: Path) -> None:
    wrong = {"inputs": tokens(4, 7), "attention": torch.ones(4, 6)}
    with pytest.raises(UsageError, match="attention must have the shape of its inputs"):
        export(encoder(), tmp_path / "out", example=wrong)
