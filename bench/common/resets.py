"""Resets as values: what is measured in which order, and what the figures of a run say. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.common.recorder import Milestones
from bench.common.stats import Summary, independent, summary

COLD, INTERNAL, DIRECT, STANDBY = "cold boot", "internal revert", "direct restore", "standby"
WAYS = {"cold": COLD, "internal": INTERNAL, "direct": DIRECT, "standby": STANDBY}
_STEPS = (
    ("files checked, overlay made", "began"),
    ("libvirt starts QEMU", "started"),
    ("state loaded", "loaded"),
    ("running", "resumed"),
    ("agent answers", "answered"),
    ("proved", "proved"),
    ("plugged", "plugged"),
    ("call returns", "returned"),
)


class Reset(NamedTuple):
    """One reset: its steps in seconds, and the new machine's memory in bytes before it does any work.

    ``own`` belongs to no file; ``unique`` is mapped by no other process, and holds pages of the baseline too.
    """

    steps: Milestones
    own: int
    unique: int


class Case(NamedTuple):
    """One kind of machine, one way, so many MiB written before each reset."""

    kind: str
    way: str
    dirt: int


Results = Mapping[Case, Sequence[Reset]]


class Aim(NamedTuple):
    """One figure that was asked for, what was measured, and whether it was met."""

    what: str
    limit: str
    found: str
    met: bool


def schedule(counts: Mapping[Case, int], seed: int) -> list[Case]:
    """Every case as often as it is wanted, in random order: all share the drift of the host."""
    order = [case for case, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(order)
    return order


def wanted(
    kinds: Sequence[str], ways: Sequence[str], dirt: Sequence[int], counts: Mapping[str, int], large: int
) -> dict[Case, int]:
    """How often each case is measured; from 1000 MiB on ``large`` times at most. A cold boot knows no dirt."""
    found = {}
    for kind in kinds:
        for way in ways:
            for mebibytes in dirt if way != COLD else [0]:
                count = counts[way]
                found[Case(kind, way, mebibytes)] = min(count, large) if mebibytes >= 1000 else count
    return found


def ready(resets: Sequence[Reset]) -> Summary:
    """Seconds from request to an answering, plugged guest."""
    return summary([r.steps.ready for r in resets])


def breakdown(resets: Sequence[Reset]) -> list[tuple[str, Summary]]:
    """Seconds of each step; the medians add up to about the whole. Steps that no reset took are left out."""
    columns: dict[str, list[float]] = {}
    for reset in resets:
        before = 0.0
        taken = [(name, getattr(reset.steps, field)) for name, field in _STEPS]
        for name, moment in sorted(((n, m) for n, m in taken if m is not None), key=lambda t: t[1]):
            columns.setdefault(name, []).append(moment - before)
            before = moment
    return [(name, summary(values)) for name, values in columns.items()]


def ratio(results: Results, case: Case, other: str) -> float | None:
    """How many times longer ``case`` takes than way ``other`` of the same machine and dirt, by medians."""
    rival = results.get(Case(case.kind, other, case.dirt if other != COLD else 0))
    if not rival or not results.get(case):
        return None
    return ready(results[case]).p50 / ready(rival).p50


def aims(results: Results) -> list[Aim]:
    """What a run says of the figures that were asked for; only of those it measured."""
    found = []
    for case, resets in results.items():
        if not resets:
            continue
        s, where = ready(resets), f"{case.way}, {case.kind}, {case.dirt} MiB"
        if case.way == STANDBY:
            found.append(_at_most(f"{where}: p50", s.p50, 0.05))
            found.append(_at_most(f"{where}: p99", s.p99, 0.15))
            rival = results.get(case._replace(way=INTERNAL))
            if rival:
                times = ready(rival).p50 / s.p50
                found.append(
                    Aim(f"{where}: against internal revert", ">= 50 times", f"{times:.0f}", times >= 50)
                )
        if case.way == DIRECT:
            found.append(_at_most(f"{where}: p50", s.p50, 0.6))
            own = summary([r.own / 1e6 for r in resets])
            found.append(
                Aim(f"{where}: own memory", "<= 100 MB", f"{own.worst:.0f} MB at most", own.worst <= 100)
            )
        clean = results.get(case._replace(dirt=0))
        if clean and case.dirt and case.way in (DIRECT, STANDBY):
            base = ready(clean).p50
            found.append(
                Aim(
                    f"{where}: as at 0 MiB", f"<= {base * 1.1 + 0.01:.3f} s", f"{s.p50:.3f} s",
                    independent(base, s.p50),
                )
            )  # fmt: skip
    return found


def _at_most(what: str, value: float, limit: float) -> Aim:
    return Aim(what, f"<= {limit:g} s", f"{value:.3f} s", value <= limit)
