"""Percentiles of a series, and comparisons of two. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """A series in six numbers; all but ``n`` in the unit of the series."""

    n: int
    p50: float
    p90: float
    p99: float
    worst: float
    least: float


def summary(values: Sequence[float]) -> Summary:
    """Percentiles by linear interpolation between the values seen; below 100 of them p99 leans on the worst.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no values to summarise")
    if len(values) == 1:
        return Summary(1, *[float(values[0])] * 5)
    cut = statistics.quantiles(values, n=100, method="inclusive")
    return Summary(len(values), cut[49], cut[89], cut[98], float(max(values)), float(min(values)))


def independent(base: float, other: float, *, share: float = 0.10, slack: float = 0.010) -> bool:
    """True if ``other`` is within ``share`` of ``base`` plus ``slack`` (seconds): a figure that does not grow."""
    return other <= base * (1 + share) + slack
