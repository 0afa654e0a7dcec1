"""Judgements in words. The terminal and the page say exactly the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attar.evaluation import cells
from attar.evaluation.numbers import (
    between,
    change,
    count,
    digits_for,
    percent,
    probability,
    show,
    signed,
    times,
    title,
)

if TYPE_CHECKING:
    from attar.evaluation.intervals import Estimate
    from attar.evaluation.verdict import Goal, Limit, Verdict

OUTCOMES = {
    "better": "BETTER than",
    "no difference": "NO DIFFERENCE from",
    "worse": "WORSE than",
}
LIMITS = {"latency_ms": "time for one example", "size_mb": "size", "macs": "multiply-adds"}
AGAINST = {
    "baseline": "the baseline",
    "start": "the student before distillation (no baseline: the training data have no labels)",
}


def _alone(verdict: Verdict) -> int | None:
    """The labels that the baseline had, where the student was given other rows; else None."""
    one, other = (verdict.saw.get(name) for name in ("baseline", "distilled"))
    return None if one is None or other is None or one == other else one.labelled


def headline(verdict: Verdict) -> str:
    """The verdict in one line."""
    metric, examples = verdict.metric, verdict.examples
    digits = digits_for(examples)
    judged = verdict.models["distilled"].primary
    value = show(metric, judged.value, digits=digits)
    basis = f"({count(verdict.seeds, 'seed')}, {count(examples, 'test example')})"
    if verdict.against is None or verdict.difference is None:
        interval = between(metric, judged.low, judged.high, examples)
        return f"NOT COMPARED, there is no baseline: {title(metric)} {value} {interval} {basis}"
    other = show(metric, verdict.models[verdict.against].primary.value, digits=digits)
    return (
        f"{OUTCOMES[verdict.outcome]} {_against(verdict)}: {title(metric)} {value} against "
        f"{other}, {change(metric, verdict.difference, examples)}, "
        f"{probability(verdict.difference.p)} {basis}"
    )


def _against(verdict: Verdict) -> str:
    alone = _alone(verdict)
    of = "" if alone is None else f" of {count(alone, 'label')}"
    return AGAINST[verdict.against or "baseline"] + of


def goal_line(goal: Goal, verdict: Verdict) -> str:
    """Whether the goal is met, how surely, and whether the test set could tell."""
    wanted = f"goal {percent(goal.retain)}"
    if goal.retention is None:
        return f"NOT MEASURABLE: the {title(verdict.metric)} is 0, so there is no ratio; {wanted}"
    found = goal.retention
    digits = digits_for(verdict.examples)
    interval = between("retention", found.low, found.high, verdict.examples)
    value = f"retention {show('retention', found.value, digits=digits)} {interval}, {wanted}"
    doubts = _doubts(goal, found, "examples or seeds" if verdict.seeds > 1 else "examples")
    costly = not all(limit.met for limit in goal.limits)  # which no other test rows would change
    word = "MET" if goal.met else "MISSED"
    line = f"{word}{' by the point estimate' if doubts and not costly else ''}, {value}"
    return "; ".join([line, *doubts, *map(limit_line, goal.limits)])


def limit_line(limit: Limit) -> str:
    """What the student costs in one respect, and the most that it may."""
    what = LIMITS[limit.name]
    close = limit.value != limit.most and amount(limit.name, limit.value) == amount(
        limit.name, limit.most
    )
    value, most = (
        f"{each:.6g}" if close else amount(limit.name, each) for each in (limit.value, limit.most)
    )
    return f"{what} {value}, {'goal' if limit.met else 'over the goal of'} {most}"


def amount(name: str, value: float) -> str:
    """A cost in the unit of its limit.

    >>> amount("latency_ms", 0.04213), amount("size_mb", 0.0123), amount("macs", 77754)
    ('0.0421 ms', '12.3 kB', '77.8 thousand')
    """
    if name == "latency_ms":
        return f"{value:.3g} ms"
    return cells.size(value * 1e6) if name == "size_mb" else cells.scaled(value)


def _doubts(goal: Goal, found: Estimate, missing: str) -> list[str]:
    doubts = []
    if goal.kept and found.low < goal.retain:
        doubts.append("the lower end of the interval does not agree")
    if not goal.kept and found.high >= goal.retain:
        doubts.append("the upper end of the interval does not agree")
    if not goal.enough_examples:
        doubts.append(f"too few test {missing} to tell a loss of {percent(1 - goal.retain)}")
    return doubts


def summary(verdict: Verdict) -> list[str]:
    """The verdict for a reader who knows no statistics, a few sentences."""
    return [line for line in (_reached(verdict), _chance(verdict), _kept(verdict)) if line]


def _reached(verdict: Verdict) -> str:
    metric, digits = verdict.metric, digits_for(verdict.examples)
    value = show(metric, verdict.models["distilled"].primary.value, digits=digits)
    alone, seen = _alone(verdict), verdict.saw.get("distilled")
    on = "" if alone is None or seen is None else f" on {count(seen.rows, 'row')}"
    by = verdict.taught_by or "the teacher"
    line = f"Taught by {by}{on}, the student reaches {_with_article(metric)} of {value}"
    if verdict.against is None:
        return line + "."
    other = show(metric, verdict.models[verdict.against].primary.value, digits=digits)
    if verdict.against == "start":
        return f"{line}; before it was taught, it had {other}."
    labels = "the labels" if alone is None else f"the {count(alone, 'labelled row')}"
    return f"{line}. The same student, trained on {labels} alone, reaches {other}."


def _with_article(metric: str) -> str:
    name = title(metric)
    return f"{'an' if name[0] in 'aeior' and name != 'recall' else 'a'} {name}"


def _chance(verdict: Verdict) -> str:
    return {
        "better": "The gain is larger than chance alone would explain.",
        "no difference": "Chance alone could explain the difference between the two.",
        "worse": "The loss is larger than chance alone would explain.",
    }.get(verdict.outcome, "")


def _kept(verdict: Verdict) -> str:
    student = verdict.models["distilled"]
    if student.retention is None:
        return ""
    kept = show("retention", student.retention.value, digits=digits_for(verdict.examples))
    what = title(verdict.metric)
    if not verdict.higher_is_better:
        what = f"quality (the teacher's {what} over its own)"
    line = f"It keeps {kept} of the teacher's {what}"
    if student.ratios is None:
        return line + "."
    return f"{line} with {times(student.ratios['parameters'], 'fewer', 'more')} parameters."


def highlights(verdict: Verdict) -> list[dict[str, str]]:
    """The few numbers that a reader in a hurry takes along."""
    found, student = [], verdict.models["distilled"]
    if verdict.difference is not None:
        gain = signed(verdict.metric, verdict.difference.value, verdict.examples)
        who = "the baseline" if verdict.against == "baseline" else "the untaught student"
        chance = ", could be chance" if verdict.outcome == "no difference" else ""
        label = f"{title(verdict.metric)} against {who}{chance}"
        found.append({"value": gain, "label": label})
    if student.retention is not None:
        kept = show("retention", student.retention.value, digits=digits_for(verdict.examples))
        what = title(verdict.metric) if verdict.higher_is_better else "quality"
        found.append({"value": kept, "label": f"of the teacher's {what} kept"})
    if student.ratios is not None:
        size = times(student.ratios["parameters"], "fewer", "more")
        found.append({"value": size, "label": "parameters, compared with the teacher"})
        speed = times(student.ratios["latency_1"], "faster", "slower")
        found.append({"value": speed, "label": "for one example, compared with the teacher"})
    return found


TESTS = {
    "mcnemar": "the exact McNemar test, two-sided",
    "bootstrap": "the paired bootstrap, two-sided",
    "banerjee": "Banerjee's test over seeds and examples, two-sided",
    "sign": "a sign test over examples",
}


def method(verdict: Verdict) -> list[str]:
    """How each number was measured."""
    examples = count(verdict.examples, "test example")
    lines = [_interval_method(verdict.seeds, examples, verdict.resamples)]
    if verdict.difference is not None:
        lines.append(
            f"Better or worse: p below 0.05 by {TESTS[verdict.difference.test]}; "
            "models are compared on the same examples."
        )
    if verdict.against == "baseline":
        lines.append(_baseline_method(verdict))
    if verdict.floor is not None:
        floor = show(verdict.metric, verdict.floor, digits=digits_for(verdict.examples))
        metric = _with_article(verdict.metric)
        lines.append(f"Always giving the same best answer has {metric} of {floor}.")
    if costs := [model.cost for model in verdict.models.values() if model.cost is not None]:
        lines.append(
            f"Time: a forward pass on {costs[0].device} with "
            f"{count(costs[0].threads, 'CPU thread')}, half of the passes are below the median "
            "and 95 % below the second number."
        )
        lines.append("Multiply-adds: matrix products, convolutions and attention of one example.")
        if any(cost.peak_bytes for cost in costs):
            lines.append(
                "Memory: the most that a forward pass holds at once, beyond the weights and the "
                "batch."
            )
    return lines


def _baseline_method(verdict: Verdict) -> str:
    alone = _alone(verdict)
    if alone is None:
        return (
            "Baseline: the same student with the same start, data, steps and seeds, trained on "
            "the labels alone."
        )
    return (
        "Baseline: the same student with the same start, steps and seeds, trained on the "
        f"{count(alone, 'row')} that have labels; each comes up as often as makes as many steps. "
        "Which rows have labels is drawn once, so the intervals do not cover the luck of that draw."
    )


def _interval_method(seeds: int, examples: str, resamples: int) -> str:
    if seeds == 1:
        return f"Intervals: 95 %, percentile bootstrap over {examples}, {resamples:,} resamples."
    return (
        f"Intervals: 95 % for new training runs and new examples, over {seeds} seeds and "
        f"{examples} (Banerjee 1960, {resamples:,} resamples)."
    )


def notes(verdict: Verdict) -> list[str]:
    """What a reader must know before believing the verdict."""
    lines = [
        *kind_of_student(verdict),
        *_doubts_of_models(verdict),
        _last_epoch(verdict),
        _few_seeds(verdict),
    ]
    return [line for line in lines if line]


def kind_of_student(verdict: Verdict) -> list[str]:
    """What is unusual in how the judged student was taught, or in what it is."""
    lines = []
    if verdict.taught_by is not None:
        lines.append(
            f"Taught by {verdict.taught_by}. That is no fixed model, so the student is compared "
            "with the baseline alone."
        )
    if verdict.reuses_head:
        lines.append(
            "The student ends in its teacher's classifier, behind a projector of its own: its "
            "size, its time and its file are those of the whole. The baseline is the plain student."
        )
    return lines


def _last_epoch(verdict: Verdict) -> str:
    if verdict.last is None:
        return ""
    value = show(verdict.metric, verdict.last.value, digits=digits_for(verdict.examples))
    return (
        "Judged are the student's weights of the best epoch by validation; those of its last "
        f"epoch have {_with_article(verdict.metric)} of {value}."
    )


def _few_seeds(verdict: Verdict) -> str:
    if verdict.seeds > 2:
        return ""
    if verdict.seeds == 2:
        return (
            "Two training runs tell little of the luck of a run, so the intervals are wide. Train "
            "with 3 or more seeds."
        )
    return (
        "One training run: the intervals cover new test examples, not the luck of a run. "
        "Train with 3 or more seeds to cover both."
    )


def _doubts_of_models(verdict: Verdict) -> list[str]:
    found, models = [], verdict.models
    above = (lambda a, b: a > b) if verdict.higher_is_better else (lambda a, b: a < b)
    for name in ("teacher", "distilled"):
        floor, model = verdict.floor, models.get(name)
        if model and floor is not None and not above(model.primary.value, floor):
            who = "teacher" if name == "teacher" else f"{verdict.called} student"
            found.append(f"The {who} is no better than always giving the same answer.")
    teacher, baseline = models.get("teacher"), models.get("baseline")
    if teacher and baseline and not above(teacher.primary.value, baseline.primary.value):
        found.append("The teacher is not better than the baseline: there is no gap to close.")
    return found
