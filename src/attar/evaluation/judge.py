"""From rows to a verdict: what ``run`` ends with, and ``compare`` for models of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from attar.evaluation.cost import Cost
from attar.evaluation.cost import costs as measured_costs
from attar.evaluation.intervals import ALPHA, RESAMPLES, Difference, Estimate, Resampled
from attar.evaluation.rows import collect
from attar.evaluation.verdict import (
    Goal,
    Limit,
    ModelReport,
    Outcome,
    Seen,
    Verdict,
    limits_of,
)
from attar.runtime import UsageError, suggest

if TYPE_CHECKING:
    from attar.data import Source
    from attar.tasks.task import Rows, Task

ROLES = ("teacher", "baseline", "start", "distilled", "last")


def judge(
    task: Task,
    *,
    distilled: Sequence[Rows],
    teacher: Rows | None = None,
    baseline: Sequence[Rows] | None = None,
    start: Sequence[Rows] | None = None,
    last: Sequence[Rows] | None = None,
    others: Mapping[str, Sequence[Rows]] | None = None,
    costs: Mapping[str, Cost] | None = None,
    seconds: Mapping[str, float] | None = None,
    teacher_share: float | None = None,
    retain: float | None = None,
    limits: Mapping[str, float] | None = None,
    called: str = "distilled",
    taught_by: str | None = None,
    reuses_head: bool = False,
    saw: Mapping[str, Seen] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Judge the distilled student by the rows of every model on the same test examples.

    Args:
        distilled, baseline: rows of each seed, in the same order of seeds.
        teacher: the teacher's rows.
        start: the student before distillation, by seed (or once, if all seeds start from it);
            what the student is compared with when there is no baseline.
        last: the distilled student at its last epoch, where *distilled* is its best epoch by
            validation.
        others: more models to show, by name.
        costs: by role or name, as ``cost`` measured them.
        seconds: training time of one run, by role or name.
        teacher_share: the share of the distillation's time that was spent asking the teacher.
        retain: the goal: the share of the teacher's metric to keep, as 0.99.
        limits: the most that the student may cost beside it: ``latency_ms``, ``size_mb``, ``macs``.
        called: what the judged student is called.
        taught_by: what taught it, where that is no model of a role.
        reuses_head: the judged student ends in its teacher's classifier.
        saw: the rows that each learned from, by role.
        resamples, seed: of the bootstrap.

    Raises:
        UsageError: a goal without a teacher, limits without a goal or a cost, seeds that do not
            pair, a name that is a role.
        DataError: no labels, or not the same examples for all models.
    """
    given = {"teacher": teacher and [teacher], "baseline": baseline, "start": start}
    given |= {"distilled": distilled, "last": last, **(others or {})}
    groups = {name: list(rows) for name, rows in given.items() if rows}
    _check(groups, others or {}, retain)
    within = _limits(limits or {}, retain, (costs or {}).get("distilled"))
    found = Resampled(task, groups, resamples=resamples, seed=seed)
    costs, seconds = costs or {}, seconds or {}
    models = {
        name: _report(task, found, groups, name, costs, seconds)
        for name in groups
        if name != "last"
    }
    against: Literal["baseline", "start"] | None
    against = next((name for name in ("baseline", "start") if name in groups), None)
    difference = None if against is None else found.difference("distilled", against)
    labels = groups["distilled"][0]["labels"]
    return Verdict(
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        examples=found.examples,
        seeds=len(distilled),
        outcome=_outcome(difference, task.higher_is_better),
        against=against,
        difference=difference,
        models=models,
        goal=None
        if retain is None
        else _goal(retain, models["distilled"].retention, found.examples, within),
        last=found.mean("last") if "last" in groups else None,
        floor=task.floor(labels),
        teacher_share=teacher_share,
        resamples=resamples,
        labels=_class_counts(labels, models["distilled"].per_class),
        called=called,
        taught_by=taught_by,
        reuses_head=reuses_head,
        saw=saw or {},
    )


def _check(
    groups: Mapping[str, list[Rows]], others: Mapping[str, Any], retain: float | None
) -> None:
    if "distilled" not in groups:
        raise UsageError("there is nothing to judge: distilled has no rows; give one for each seed")
    seeds = len(groups["distilled"])
    for name in ("baseline", "last", "start"):
        amount = len(groups.get(name, groups["distilled"]))
        if amount != seeds and not (name == "start" and amount == 1):
            raise UsageError(
                f"{name} has rows of {amount} seeds and distilled of {seeds}; they are compared "
                "seed by seed, so give both the same number"
            )
    if taken := sorted(set(others) & set(ROLES)):
        raise UsageError(f"another model cannot be called '{taken[0]}'; that name is a role")
    if retain is None:
        return
    if not 0 < retain <= 1:
        raise UsageError(f"the goal is to retain {retain}; it must be a share in (0, 1], as 0.99")
    if "teacher" not in groups:
        raise UsageError(
            "a goal to retain a share of the teacher's metric needs the teacher's rows"
        )


def _report(
    task: Task,
    found: Resampled,
    groups: Mapping[str, list[Rows]],
    name: str,
    costs: Mapping[str, Cost],
    seconds: Mapping[str, float],
) -> ModelReport:
    rows = groups[name]
    teacher = groups["teacher"][0] if name != "teacher" and "teacher" in groups else None
    with_teacher = teacher is not None
    return ModelReport(
        primary=found.mean(name),
        seeds=tuple(found.values[name].tolist()),
        scores=_mean([task.score(each) for each in rows]),
        agreement=None if teacher is None else _mean([task.agreement(r, teacher) for r in rows]),
        retention=_retention(found, name, task.higher_is_better) if with_teacher else None,
        gap_closed=_gap_closed(found, name, task.higher_is_better),
        per_class=_mean([task.per_class(each) or {} for each in rows]) or None,
        cost=costs.get(name),
        ratios=_ratios(costs.get("teacher"), costs.get(name)) if with_teacher else None,
        seconds=seconds.get(name),
    )


def _mean(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}


def _retention(found: Resampled, name: str, higher_is_better: bool) -> Estimate | None:
    return found.ratio(name, "teacher") if higher_is_better else found.ratio("teacher", name)


def _gap_closed(found: Resampled, name: str, higher_is_better: bool) -> float | None:
    if name in ("teacher", "baseline") or not {"teacher", "baseline"} <= found.values.keys():
        return None
    value, teacher, baseline = (
        float(found.values[each].mean()) for each in (name, "teacher", "baseline")
    )
    gap = teacher - baseline
    above = gap > 0 if higher_is_better else gap < 0
    return (value - baseline) / gap if above else None


def _ratios(teacher: Cost | None, model: Cost | None) -> dict[str, float] | None:
    if teacher is None or model is None:
        return None
    one, two = _sizes(teacher), _sizes(model)
    return {name: one[name] / two[name] if two[name] else 0.0 for name in one if name in two}


def _sizes(found: Cost) -> dict[str, float]:
    sizes: dict[str, float] = {
        "parameters": found.parameters,
        "macs": found.macs,
        "bytes": found.bytes,
    }
    times = {"latency": found.latency, "one_thread": found.one_thread}
    medians = {
        f"{kind}_{batch}": p["p50_ms"] for kind, each in times.items() for batch, p in each.items()
    }
    return sizes | medians


def _outcome(difference: Difference | None, higher_is_better: bool) -> Outcome:
    if difference is None:
        return "not compared"
    if not difference.p < ALPHA:  # a p value that is not a number proves nothing either
        return "no difference"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


def _limits(
    asked: Mapping[str, float], retain: float | None, cost: Cost | None
) -> tuple[Limit, ...]:
    if not asked:
        return ()
    if retain is None:
        raise UsageError("limits stand beside the share to keep; give retain too, as 0.99")
    if cost is None:
        raise UsageError(f"the goal for {min(asked)} needs what the student costs; give costs")
    return limits_of(asked, cost)


def _goal(retain: float, found: Estimate | None, examples: int, limits: tuple[Limit, ...]) -> Goal:
    if found is None:
        return Goal(retain, None, met=False, sure=False, enough_examples=False, limits=limits)
    loss = 1 - retain
    enough = found.high - found.low <= loss and examples * loss >= 3
    met = found.value >= retain and all(limit.met for limit in limits)
    sure = met and found.low >= retain
    return Goal(retain, found, met=met, sure=sure, enough_examples=enough, limits=limits)


def _class_counts(
    labels: torch.Tensor, per_class: dict[str, float] | None
) -> tuple[int, ...] | None:
    if not per_class:
        return None
    if labels.is_floating_point():  # multi-label: a column of 0 and 1 for each class
        return tuple(labels.sum(0).long().tolist())
    return tuple(torch.bincount(labels, minlength=len(per_class)).tolist())


def compare(
    models: Mapping[str, nn.Module],
    source: Source,
    task: Task,
    *,
    teacher: str = "teacher",
    baseline: str = "baseline",
    distilled: str | None = None,
    retain: float | None = None,
    batch_size: int = 256,
    device: str | torch.device = "auto",
    measure_cost: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Run any set of models on the same labelled *source* and judge one of them.

    The one judged is *distilled*, or the first that is neither teacher nor baseline. All others
    are shown beside it.

    Example:
        ``print(compare({"teacher": big, "baseline": plain, "student": small}, test, task))``

    Raises:
        UsageError: a name that is not among the models, or no model to judge.
    """
    judged = distilled or next((n for n in models if n not in (teacher, baseline)), None)
    if judged is None:
        raise UsageError(
            f"there is no model to judge beside '{teacher}' and '{baseline}'; add the student"
        )
    named = {judged: True, teacher: teacher != "teacher", baseline: baseline != "baseline"}
    for name, needed in named.items():
        if needed and name not in models:
            raise UsageError(f"there is no model '{name}'; {suggest(name, models)}")
    roles = {teacher: "teacher", baseline: "baseline", judged: "distilled"}
    rows = {
        n: collect(m, source, task, batch_size=batch_size, device=device) for n, m in models.items()
    }
    costs: dict[str, Cost] = {}
    if measure_cost:
        inputs = source.rows(torch.arange(min(64, len(source))))["inputs"]
        sized = {n: m for n, m in models.items() if any(True for _ in m.parameters())}
        named_by_role = {roles.get(n, n): m for n, m in sized.items()}  # not of a plain function
        costs = measured_costs(named_by_role, inputs, device=device)
    return judge(
        task,
        teacher=rows.get(teacher),
        baseline=[rows[baseline]] if baseline in rows else None,
        distilled=[rows[judged]],
        others={name: [each] for name, each in rows.items() if name not in roles},
        costs=costs,
        retain=retain,
        resamples=resamples,
        seed=seed,
    )
