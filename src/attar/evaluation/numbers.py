"""Numbers as text: percent for shares, and no digit that the test set cannot carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attar.evaluation.intervals import Estimate

SHARES = {"agreement", "calibration_error", "gap_closed", "hamming_loss", "recall", "retention"}


def is_share(name: str) -> bool:
    """Whether a metric of this name is a share of 1 and shown in percent."""
    return name in SHARES or name.endswith(("accuracy", "f1", "precision"))


def title(name: str) -> str:
    """A metric's name as a reader writes it.

    >>> title("cross_entropy")
    'cross entropy'
    """
    return name.replace("_", " ")


def number(value: float) -> str:
    """A number with the digits that matter.

    >>> [number(x) for x in (1234.5, 12.345, 0.21345, 0.012345, 0.0, 1e-7)]
    ['1,234', '12.35', '0.213', '0.0123', '0', '1.0e-07']
    """
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.2f}"
    if size >= 0.1:
        return f"{value:.3f}"
    if size >= 1e-4:
        return f"{value:#.3g}"
    return f"{value:.1e}" if size else "0"


def digits_for(examples: int) -> int:
    """Decimals of a percentage: two only where there are examples enough to carry them."""
    return 2 if examples >= 5000 else 1


def show(name: str, value: float | None, *, digits: int = 1) -> str:
    """A metric's value: percent for shares, else ``number``; empty when there is none."""
    if value is None or value != value:
        return ""
    return f"{100 * value:.{digits}f} %" if is_share(name) else number(value)


def between(name: str, low: float, high: float, examples: int) -> str:
    """An interval in brackets, in the unit of the metric but without its sign."""
    if not is_share(name):
        return f"[{number(low)}, {number(high)}]"
    digits = digits_for(examples)
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def change(name: str, found: Estimate, examples: int) -> str:
    """A signed difference with its interval: points for shares.

    >>> from attar.evaluation.intervals import Estimate
    >>> change("accuracy", Estimate(0.033, 0.012, 0.054), 719)
    '+3.3 points [1.2, 5.4]'
    """
    interval = between(name, found.low, found.high, examples)
    return f"{signed(name, found.value, examples)} {interval}"


def signed(name: str, value: float, examples: int) -> str:
    """A signed difference without its interval."""
    if is_share(name):
        return f"{100 * value:+.{digits_for(examples)}f} points"
    return ("+" if value > 0 else "") + number(value)


def probability(p: float) -> str:
    """A p value, never rounded across 0.05.

    >>> [probability(p) for p in (0.2, 0.0496, 0.0031, 0.00002)]
    ['p = 0.200', 'p = 0.0496', 'p = 0.003', 'p < 0.001']
    """
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.{4 if f'{p:.3f}' == '0.050' else 3}f}"


def count(amount: int, noun: str) -> str:
    """An amount of things.

    >>> count(1, "seed"), count(1797, "test example")
    ('1 seed', '1,797 test examples')
    """
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def percent(value: float) -> str:
    """A share in percent with at most two decimals: 0.99 is ``99 %``, 0.995 is ``99.5 %``."""
    return f"{round(100 * value, 2):g} %"


def times(ratio: float, less: str, more: str) -> str:
    """How many times *less* (or *more*) the teacher's share: ``9.8 x smaller``.

    >>> times(9.83, "smaller", "larger"), times(0.5, "smaller", "larger")
    ('9.8 x smaller', '2.0 x larger')
    """
    if ratio <= 0:
        return ""
    word, factor = (less, ratio) if ratio >= 1 else (more, 1 / ratio)
    if factor < 1.05:
        return "as many" if less == "fewer" else "the same"
    return f"{factor:.1f} x {word}" if factor < 100 else f"{factor:,.0f} x {word}"
