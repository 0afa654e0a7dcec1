"""Numbers a person can trust: rows, scores, intervals, cost and the verdict."""

from attar.evaluation.cost import Cost, cost, costs, count_macs
from attar.evaluation.intervals import (
    Difference,
    Estimate,
    Resampled,
    bootstrap,
    mcnemar,
    over_seeds,
)
from attar.evaluation.judge import compare, judge
from attar.evaluation.rows import Evaluation, collect, evaluate
from attar.evaluation.table import table
from attar.evaluation.verdict import Goal, ModelReport, Seen, Verdict
from attar.evaluation.verdicts import Verdicts

__all__ = [
    "Cost",
    "Difference",
    "Estimate",
    "Evaluation",
    "Goal",
    "ModelReport",
    "Resampled",
    "Seen",
    "Verdict",
    "Verdicts",
    "bootstrap",
    "collect",
    "compare",
    "cost",
    "costs",
    "count_macs",
    "evaluate",
    "judge",
    "mcnemar",
    "over_seeds",
    "table",
]
