"""The verdict's tables as text: what the terminal draws and the page prints.

A cell is ``{"text", "note"}``: the number, and what stands small under it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attar.evaluation.numbers import (
    between,
    digits_for,
    is_share,
    show,
    signed,
    times,
    title,
)

if TYPE_CHECKING:
    from attar.evaluation.verdict import ModelReport, Verdict

Cell = dict[str, str]
Row = dict[str, Any]
TITLES = {"start": "before distillation"}
HINTS = {
    "cross_entropy": "how surprised the model is by the right answers, in nats; lower is better",
    "calibration_error": "how far its confidence is from how often it is right; lower is better",
    "balanced_accuracy": "mean of the classes' accuracies, each class counting the same",
    "mean_average_precision": "mean of the classes' average precisions, with its 95 % interval",
    "micro_f1": "of precision and recall, over all answers together",
    "macro_f1": "of precision and recall, mean of the classes",
    "subset_accuracy": "how often all classes of an example are answered right",
    "hamming_loss": "share of wrong answers over examples and classes; lower is better",
    "binary_cross_entropy": "how surprised the model is by each right answer, in nats; lower is"
    " better",
    "rmse": "root mean squared error, in the target's units; lower is better",
    "mae": "mean absolute error, in the target's units; lower is better",
    "r2": "share of the variance explained; 1 is perfect",
    "agreement": "how often the answer is the teacher's, right or wrong",
    "kl": "how far its probabilities are from the teacher's, in nats; lower is better",
    "rmse_to_teacher": "root mean squared difference from the teacher, in the target's units",
    "nats_above_teacher": "cross-entropy of a token beyond the teacher's; lower is better",
    "spearman": "rank correlation of similarities with those wanted; 1 is perfect",
    "similarity_spearman": "rank correlation of similarities with the teacher's; 1 is the same",
    "recall_at_1": "how often the nearest neighbour is the teacher's",
    "recall_at_10": "share of the teacher's ten nearest neighbours among its own ten",
}
LABELS = {"kl": "KL to the teacher", "agreement": "agreement with teacher"}


def cell(text: str = "", note: str = "") -> Cell:
    """One cell; empty where there is nothing to say."""
    return {"text": text, "note": note}


def clean(text: str) -> str:
    """Text from data without control characters, which a terminal would obey.

    >>> clean("a" + chr(27) + "[31mb")
    'a[31mb'
    """
    return "".join(sign for sign in text if unicodedata.category(sign) not in ("Cc", "Cf", "Cs"))


def columns(verdict: Verdict) -> list[str]:
    """The models in the order they are read; the start only where it is what counts."""
    first = ["teacher", verdict.against or "baseline", "distilled"]
    others = [name for name in verdict.models if name not in {*first, "start", "baseline"}]
    return [name for name in [*first, *others] if name in verdict.models]


def _title(verdict: Verdict, name: str) -> str:
    return verdict.called if name == "distilled" else TITLES.get(name, name)


def table(verdict: Verdict) -> dict[str, Any]:
    """Quality and cost of each model, as titles, sections, rows and cells."""
    names = columns(verdict)
    quality = [*_scores(verdict), *_towards_teacher(verdict)]
    sections = [("Learned from", _seen(verdict)), ("Quality", quality), ("Cost", _costs(verdict))]
    return {
        "columns": [{"key": name, "title": clean(_title(verdict, name))} for name in names],
        "sections": [
            {"title": heading, "rows": [_pick(row, names) for row in rows if _told(row, names)]}
            for heading, rows in sections
            if any(_told(row, names) for row in rows)
        ],
    }


def _row(
    verdict: Verdict, label: str, hint: str, make: Callable[[ModelReport], Cell | None]
) -> Row:
    made = {name: make(model) or cell() for name, model in verdict.models.items()}
    return {"label": label, "hint": hint, "cells": made}


def _told(row: Row, names: list[str]) -> bool:
    return any(row["cells"][name]["text"] for name in names)


def _pick(row: Row, names: list[str]) -> Row:
    return row | {"cells": [row["cells"][name] for name in names]}


def _seen(verdict: Verdict) -> list[Row]:
    """The rows of each model, where they are not the same for all."""
    if len(set(verdict.saw.values())) < 2:
        return []
    notes = {seen: f"{seen.labelled:,} labelled" for seen in verdict.saw.values()}
    notes |= {seen: "all labelled" for seen in notes if seen.labelled == seen.rows}
    notes |= {seen: "no labels" for seen in notes if not seen.labelled}
    told = {name: cell(f"{seen.rows:,}", notes[seen]) for name, seen in verdict.saw.items()}
    made = {name: told.get(name, cell()) for name in verdict.models}
    return [{"label": "training rows", "hint": "which each learned from", "cells": made}]


def _scores(verdict: Verdict) -> list[Row]:
    metric, digits = verdict.metric, digits_for(verdict.examples)

    def primary(model: ModelReport) -> Cell:
        found = model.primary
        interval = between(metric, found.low, found.high, verdict.examples)
        return cell(show(metric, found.value, digits=digits), interval)

    def seeds(model: ModelReport) -> Cell | None:
        if len(model.seeds) < 2:
            return None
        ends = [show(metric, end(model.seeds), digits=digits) for end in (min, max)]
        return cell(" to ".join(ends).replace(" % to", " to"))

    rows = [
        _row(verdict, title(metric), HINTS.get(metric, "with its 95 % interval"), primary),
        _row(verdict, "over the seeds", "the lowest and the highest", seeds),
    ]
    chosen = rows[0]["cells"]["distilled"]["text"]
    last = cell(show(metric, verdict.last.value if verdict.last else None, digits=digits))
    if last["text"] not in ("", chosen):  # the same number again would say nothing
        made = {name: last if name == "distilled" else cell() for name in verdict.models}
        rows.append(
            {"label": "at the last epoch", "hint": "not chosen by validation", "cells": made}
        )
    others = [name for name in verdict.models["distilled"].scores if name != metric]
    return rows + [_score_row(verdict, name, digits) for name in others]


def _score_row(verdict: Verdict, name: str, digits: int) -> Row:
    return _row(
        verdict,
        title(name),
        HINTS.get(name, ""),
        lambda model: cell(show(name, model.scores.get(name), digits=digits)),
    )


def _towards_teacher(verdict: Verdict) -> list[Row]:
    digits, examples = digits_for(verdict.examples), verdict.examples

    def retention(model: ModelReport) -> Cell | None:
        if (found := model.retention) is None:
            return None
        interval = between("retention", found.low, found.high, examples)
        return cell(show("retention", found.value, digits=digits), interval)

    def gap(model: ModelReport) -> Cell:
        return cell(show("gap_closed", model.gap_closed, digits=0))

    metric = title(verdict.metric)
    share = f"{metric} / teacher's" if verdict.higher_is_better else f"teacher's {metric} / its own"
    rows = [
        _row(verdict, "retention", share, retention),
        _row(verdict, "gap closed", "of the way from the baseline to the teacher", gap),
    ]
    for name in verdict.models["distilled"].agreement or {}:
        rows.append(_agreement_row(verdict, name, digits))
    return rows


def _agreement_row(verdict: Verdict, name: str, digits: int) -> Row:
    label = LABELS.get(name, title(name))
    return _row(
        verdict,
        label,
        HINTS.get(name, ""),
        lambda model: cell(show(name, (model.agreement or {}).get(name), digits=digits)),
    )


def _costs(verdict: Verdict) -> list[Row]:
    def counted(key: str, unit: Callable[[float], str], less: str, more: str) -> Any:
        def make(model: ModelReport) -> Cell | None:
            if model.cost is None:
                return None
            return cell(unit(getattr(model.cost, key)), _times(model, key, less, more))

        return make

    return [
        _row(verdict, "parameters", "", counted("parameters", _whole, "fewer", "more")),
        _row(verdict, "multiply-adds", "for one example", counted("macs", scaled, "fewer", "more")),
        _row(verdict, "size", "of the weights", counted("bytes", size, "smaller", "larger")),
        *_latencies(verdict, "latency", "in ms", "median / 95 % of passes"),
        *_latencies(verdict, "one_thread", "one thread", "the same without the others"),
        _memory(verdict),
        _training(verdict),
    ]


def _latencies(verdict: Verdict, kind: str, label: str, hint: str) -> list[Row]:
    """Times of both batch sizes; empty cells where they were not measured."""

    def of(batch: str) -> Callable[[ModelReport], Cell | None]:
        def make(model: ModelReport) -> Cell | None:
            if model.cost is None or (taken := getattr(model.cost, kind).get(batch)) is None:
                return None
            text = f"{_ms(taken['p50_ms'])} / {_ms(taken['p95_ms'])}"
            return cell(text, _times(model, f"{kind}_{batch}", "faster", "slower"))

        return make

    return [_row(verdict, f"time for {n}, {label}", hint, of(n)) for n in ("1", "64")]


def _memory(verdict: Verdict) -> Row:
    teacher = verdict.models.get("teacher")
    most = teacher.cost.peak_bytes.get("64") if teacher and teacher.cost else None

    def make(model: ModelReport) -> Cell | None:
        if model.cost is None or (held := model.cost.peak_bytes.get("64")) is None:
            return None
        if not most or not held or model is teacher:
            return cell(size(held))
        return cell(size(held), times(most / held, "less", "more"))

    return _row(verdict, "memory for 64", "of a pass, beyond the weights", make)


def _training(verdict: Verdict) -> Row:
    row = _row(
        verdict,
        "training time",
        "of one run",
        lambda model: None if model.seconds is None else cell(duration(model.seconds)),
    )
    if verdict.teacher_share is not None and row["cells"]["distilled"]["text"]:
        asked = f"{100 * verdict.teacher_share:.0f} % in teacher"
        row["cells"]["distilled"]["note"] = asked
    return row


def _times(model: ModelReport, key: str, less: str, more: str) -> str:
    return "" if model.ratios is None else times(model.ratios[key], less, more)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _ms(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:,.0f}"


def scaled(value: float) -> str:
    """A count in thousands, millions or billions.

    >>> scaled(950), scaled(77754), scaled(2.14e7)
    ('950', '77.8 thousand', '21.4 million')
    """
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in units of 1,000.

    >>> size(950), size(311016), size(4.07e6)
    ('950 B', '311 kB', '4.07 MB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> duration(4.21), duration(75), duration(7384)
    ('4.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def class_table(verdict: Verdict) -> dict[str, Any] | None:
    """The primary metric of each class and what distillation changed; None without classes."""
    judged = verdict.models["distilled"].per_class
    if not judged:
        return None
    names = columns(verdict)
    heads = [clean(_title(verdict, name)) for name in names]
    against = f"against {TITLES.get(verdict.against, verdict.against)}" if verdict.against else ""
    unit = ", in percent" if is_share(verdict.metric) else ""
    return {
        # What is a mean over the classes is one number of it for each class.
        "caption": f"{title(verdict.metric).removeprefix('mean ')} of each class"
        f"{unit}".capitalize(),
        "columns": ["class", "examples", *heads, *([against] if against else [])],
        "rows": [_class_row(verdict, index, kind, names) for index, kind in enumerate(judged)],
    }


def _class_row(verdict: Verdict, index: int, kind: str, names: list[str]) -> dict[str, Any]:
    values = {name: (verdict.models[name].per_class or {}).get(kind) for name in names}
    # The caption says "in percent" once: six columns have to fit a telephone.
    shown = [show(verdict.metric, values[name]).removesuffix(" %") for name in names]
    amount = f"{verdict.labels[index]:,}" if verdict.labels else ""
    row: dict[str, Any] = {"cells": [clean(kind), amount, *shown], "tone": ""}
    if verdict.against is None:
        return row
    ours, theirs = values["distilled"], values[verdict.against]
    if ours is None or theirs is None or ours != ours or theirs != theirs:
        row["cells"].append("")
        return row
    gain = ours - theirs
    row["cells"].append(_gain(verdict.metric, gain))
    if gain:
        row["tone"] = "good" if (gain > 0) == verdict.higher_is_better else "bad"
    return row


def _gain(metric: str, gain: float) -> str:
    if not gain:
        return "0"
    return f"{100 * gain:+.1f}" if is_share(metric) else signed(metric, gain, 0)
