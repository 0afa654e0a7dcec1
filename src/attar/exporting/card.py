"""The model card: what the student is, and how it is loaded without attar."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

import attar
from attar.evaluation import Verdict
from attar.evaluation.numbers import show, title
from attar.exporting.artefact import Artefact
from attar.exporting.tokens import reads_tokens
from attar.models.changed import FAMILY as CHANGED
from attar.models.language import record_of
from attar.models.quantized import parameters_of
from attar.runtime import UsageError, suggest
from attar.tasks import (
    ImageClassification,
    LanguageModelling,
    MultiLabelClassification,
    Regression,
    SentenceEmbedding,
    Task,
)
from attar.tasks.classes import ClassTask
from attar.tasks.classification import Classification

AUTO = {
    "language_model": "AutoModelForCausalLM",
    "text_classifier": "AutoModelForSequenceClassification",
    "text_encoder": "AutoModel",
    "transformers": "AutoModelForImageClassification",
}
SHOWN = 100  # classes that are named
LONGEST = 300  # signs of one text from outside
LICENCES = {
    "licence": "licence",
    "teacher_licence": "licence of the teacher",
    "data_licence": "licence of the data",
}

ONNX = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
inputs = np.zeros({shape}, dtype=np.{dtype})  # {yours}
{mask}(outputs,) = session.run(None, {{"inputs": inputs{fed}}})
print(outputs.shape)
```"""

TORCH_EXPORT = """Only where you trust whoever gave you the file: `torch.export.load` can run code
that a `.pt2` file holds. attar itself never loads one that it did not just make. The other files
hold no code.

```python
import torch

model = torch.export.load("model.pt2").module()
inputs = torch.zeros({shape}, dtype=torch.{dtype})  # {yours}
{mask}with torch.no_grad():
    outputs = model(inputs{given})
print(tuple(outputs.shape))
```"""

SAFETENSORS = """The weights by name. `model.json` says how the network was built; fill a network of
your own that has the same names with `net.load_state_dict(weights)` and call `net.eval()`.

```python
from safetensors.torch import load_file

weights = load_file("model.safetensors")
for name, tensor in weights.items():
    print(name, tuple(tensor.shape))
```

With attar: `attar.models.load(".")`."""

TRANSFORMERS = """

`config.json` makes the folder one of transformers: `{auto}.from_pretrained(".")` reads it."""

HOW = {
    "safetensors": ("safetensors, in plain torch", SAFETENSORS),
    "onnx": ("ONNX, in onnxruntime", ONNX),
    "onnx_int8": ("ONNX of whole numbers, in onnxruntime", ONNX),
    "torch_export": ("torch.export, in plain torch", TORCH_EXPORT),
}


class Card(TypedDict, total=False):
    """What a model card tells that the module does not know. Texts are written as they are read.

    ``name`` of the student, ``teacher``, ``data``; the ``verdict`` with its headline and table, as
    it is or as a run wrote it (``verdict.json``); the ``date``, today's when left out.
    """

    name: str
    teacher: str
    data: str
    verdict: Verdict | Mapping[str, Any]
    date: str


def check_card(card: Mapping[str, Any], licences: Mapping[str, Any]) -> None:
    """Refuse a field that no card has, or one that is not text."""
    for name, value in licences.items():
        if not isinstance(value, str):
            raise UsageError(f"{name} must be text, such as 'MIT', not {type(value).__name__}")
    for name, value in card.items():
        if name not in Card.__annotations__:
            raise UsageError(f"a card has no '{name}'; {suggest(name, Card.__annotations__)}")
        kinds = (Verdict, Mapping) if name == "verdict" else (str,)
        if not isinstance(value, kinds):
            raise UsageError(
                f"the card's {name} must be a {kinds[0].__name__}, not {type(value).__name__}"
            )


def escaped(text: str) -> str:
    """Text from outside as one line that Markdown and HTML show as it is.

    >>> escaped("<b>*a*</b>")
    '&lt;b&gt;\\\\*a\\\\*&lt;\\\\/b&gt;'
    """
    line = "".join(sign if sign.isprintable() else " " for sign in text[: LONGEST + 1])
    line = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    marked = re.sub(r"([\\`*_{}\[\]#|~/:@$^]|(?<=www)\.)", r"\\\1", line, flags=re.IGNORECASE)
    return html.escape(marked, quote=False)


def card_text(
    card: Mapping[str, Any],
    licences: Mapping[str, str],
    module: nn.Module,
    task: Task | None,
    examples: tuple[Tensor, ...],
    outputs: Tensor,
    artefacts: Sequence[Artefact],
) -> str:
    """The whole card in Markdown."""
    parts = [
        f"# {escaped(card.get('name', 'A student'))}",
        "A small network that a larger one taught (knowledge distillation), made with attar.",
        "\n".join(_facts(card, module, task, examples, outputs)),
        *_result(card.get("verdict")),
        "## Files",
        "\n".join(_files(artefacts)),
        _checked(artefacts),
        *(_rounded(made) for made in artefacts if made.format == "onnx_int8"),
        "## Loading",
        *_loading(module, examples, artefacts),
        "## Licence",
        "\n".join(
            f"- {title}: {escaped(licences.get(field, 'not stated'))}"
            for field, title in LICENCES.items()
        ),
        "## Made with",
        _versions(card, artefacts),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(
    card: Mapping[str, Any],
    module: nn.Module,
    task: Task | None,
    examples: tuple[Tensor, ...],
    outputs: Tensor,
) -> list[str]:
    first, tokens = examples[0], reads_tokens(examples)
    shape = "length" if tokens else ", ".join(map(str, first.shape[1:]))
    each = "length, " if tokens and outputs.ndim == 3 else ""
    width = each + ", ".join(map(str, outputs.shape[2 if each else 1 :]))
    return [
        f"- student: {escaped(described(module))}",
        f"- teacher: {escaped(card.get('teacher', 'not stated'))}",
        f"- data: {escaped(card.get('data', 'not stated'))}",
        f"- task: {escaped(type(task).__name__) if task else 'not stated'}",
        f"- input: [n, {shape}], {_dtype(first)}{_scale(task, examples)}",
        f"- output: [n, {width}], {_dtype(outputs)}{_meaning(task)}",
        *_classes(task),
    ]


def described(module: nn.Module) -> str:
    """What a network is, in a line: its family with its options, or its class; its size."""
    built = getattr(module, "attar_build", None) or {}
    hidden = {"shape", "outputs", "mean", "std"}
    if built.get("family") == CHANGED:
        smaller = built["options"]["parts"]
        built = built["options"]["start"]
        built = {**built, "options": {**built["options"], "smaller parts": len(smaller)}}
    options = built.get("options", {}).items()
    parts = [str(built.get("family", module._get_name()))]
    parts += [f"{key} {value}" for key, value in options if key not in hidden]
    count = parameters_of(module)
    return ", ".join([*parts, f"{count:,} parameters"] if count else parts)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _scale(task: Task | None, examples: tuple[Tensor, ...]) -> str:
    """How pixels become numbers; what else is done to them, the network does itself."""
    if reads_tokens(examples):
        more = "; and attention [n, length], 1 at each real token" if len(examples) > 1 else ""
        return f", token ids of the teacher's tokenizer{more}"
    images = isinstance(task, MultiLabelClassification) and examples[0].ndim == 4
    if not (images or isinstance(task, ImageClassification)):
        return ""
    return ", pixels / 255, so in [0, 1]; all other normalising is inside the network"


def _meaning(task: Task | None) -> str:
    if isinstance(task, Regression):
        mean = [round(value, 6) for value in (task.mean or ())]
        std = [round(value, 6) for value in (task.std or ())]
        return f", standardised: value = output x std + mean, with mean {mean} and std {std}"
    if isinstance(task, MultiLabelClassification):
        return ", logits in the order of the classes; the sigmoid of each is its probability"
    if isinstance(task, LanguageModelling):
        return ", logits of the next token; a row is one document from its first token on"
    if isinstance(task, SentenceEmbedding):
        return f", the embedding of each text ({task.pooling} pooling)"
    return ", logits in the order of the classes" if isinstance(task, Classification) else ""


def _classes(task: Task | None) -> list[str]:
    if not isinstance(task, ClassTask):
        return []
    names = task.names()
    shown = ", ".join(map(escaped, names[:SHOWN]))
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"- classes ({len(names)}): {shown}{more}"]


def _result(verdict: Verdict | Mapping[str, Any] | None) -> list[str]:
    if verdict is None:
        return ["## Result", "Not stated: no verdict was given to this export."]
    written = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    lines = [line for line in (written["headline"], written["goal_line"]) if line]
    told = written["table"]
    rows = [
        "| | " + " | ".join(escaped(column["title"]) for column in told["columns"]) + " |",
        "|---|" + "---:|" * len(told["columns"]),
    ]
    for section in told["sections"]:
        for row in section["rows"]:
            texts = [escaped(row["label"]), *map(_cell, row["cells"])]
            rows.append("| " + " | ".join(texts) + " |")
    return ["## Result", *map(escaped, lines), "\n".join(rows)]


def _cell(cell: Mapping[str, str]) -> str:
    return escaped(" ".join(filter(None, (cell["text"] or "-", cell["note"]))))


def _files(artefacts: Sequence[Artefact]) -> list[str]:
    rows = ["| file | bytes | batch 1, ms | batch 64, ms | difference | SHA-256 |"]
    rows.append("|---|---:|---:|---:|---:|---|")
    for made in artefacts:
        one, many = (_times(made.latency[batch]) for batch in ("1", "64"))
        rows.append(
            f"| `{made.path.name}` | {made.bytes:,} | {one} | {many} "
            f"| {made.difference:.2g} | `{made.sha256}` |"
        )
    return rows


def _times(taken: Mapping[str, float]) -> str:
    return f"{taken['p50_ms']:.3g}, {taken['p95_ms']:.3g}"


def _checked(artefacts: Sequence[Artefact]) -> str:
    first = artefacts[0]
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    return (
        f"Each file was run against the network it came from on {first.examples} examples; the "
        "difference is the largest absolute one of any output. Times are the median and the 95th "
        f"percentile of a pass on the CPU with {threads}, by batch size."
    )


def _rounded(made: Artefact) -> str:
    """What whole numbers changed."""
    parts = [f"`{made.path.name}` computes with whole numbers of 8 bits."]
    if made.agreement is not None:
        parts.append(
            "Its largest output is the network's on "
            f"{show('agreement', made.agreement)} of these examples."
        )
    if (found := made.lost) is not None:
        parts.append(
            f"On the test examples its {title(found.metric)} is "
            f"{show(found.metric, found.file, digits=2)}, the network's "
            f"{show(found.metric, found.module, digits=2)}"
            + (
                "."
                if found.budget is None
                else f"; {found.budget:g} was the most that it should lose."
            )
        )
    return " ".join(parts)


def _loading(
    module: nn.Module, examples: tuple[Tensor, ...], artefacts: Sequence[Artefact]
) -> list[str]:
    parts = ["None of this needs attar."]
    for made in artefacts:
        title, how = HOW[made.format]
        if made.format == "safetensors":
            auto = AUTO.get(_family(module))
            text = how + (TRANSFORMERS.format(auto=auto) if auto else "")
        else:
            text = how.format(file=made.path.name, **_filled(made.format, examples))
        parts += [f"### {title}", text]
    return parts


def _filled(form: str, examples: tuple[Tensor, ...]) -> dict[str, Any]:
    """What differs in the code that calls a file."""
    tokens, masked = reads_tokens(examples), len(examples) > 1
    library = "torch" if form == "torch_export" else "np"
    yours = "token ids, as many and as long as you like" if tokens else ""
    return {
        "shape": (1, *examples[0].shape[1:]),
        "dtype": _dtype(examples[0]),
        "yours": yours or "your examples here, as many as you like",
        "mask": f"attention = {library}.ones_like(inputs)  # 0 where padded\n" if masked else "",
        "fed": ', "attention": attention' if masked else "",
        "given": ", attention" if masked else "",
    }


def _family(module: nn.Module) -> str:
    built = getattr(module, "attar_build", None) or record_of(module) or {}
    return str(built.get("family"))


def _versions(card: Mapping[str, Any], artefacts: Sequence[Artefact]) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parts = [f"attar {attar.__version__}", f"torch {torch.__version__}"]
    if any(made.format.startswith("onnx") for made in artefacts):
        parts += [f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime")]
    parts.append(f"Python {platform.python_version()}")
    return f"{', '.join(parts)}. Date: {escaped(card.get('date', today))}."
