"""The reset benchmark's pure half: steps from what was noted, order, ratios, aims, the ordinary domain."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from appliance.cell.domain import domain_xml
from bench.common.ordinary import ordinary_xml
from bench.common.recorder import Event, Milestones, milestones
from bench.common.resets import (
    COLD,
    DIRECT,
    INTERNAL,
    STANDBY,
    Case,
    Reset,
    aims,
    breakdown,
    ratio,
    ready,
    schedule,
    wanted,
)
from tests.golden.cases import CASES, domain_spec

NEW, OLD, TAP = "hc-c-target-1-new", "hc-c-target-1-old", "hct1"


def event(kind: str, subject: str, began: float, ended: float, detail: str = "", ok: bool = True) -> Event:
    return Event(kind, subject, detail, began, ended, ok)


DIRECT_EVENTS = [
    event("qga", OLD, 9.0, 9.1, "guest-exec"),
    event("start", NEW, 10.1, 10.4),
    event("qmp", NEW, 10.4, 10.41, "migrate-incoming"),
    event("qmp", NEW, 10.41, 10.45, "query-status"),
    event("resume", NEW, 10.45, 10.47),
    event("qga", NEW, 10.47, 10.5, "guest-ping", ok=False),
    event("qga", NEW, 10.5, 10.55, "guest-ping"),
    event("qga", NEW, 10.56, 10.7, "guest-file-read"),
    event("plug", TAP, 10.71, 10.72),
]
STANDBY_EVENTS = [
    event("resume", NEW, 8.0, 8.1),  # when it was made
    event("qga", NEW, 8.1, 8.2),
    event("plug", TAP, 10.001, 10.002),
    event("resume", NEW, 10.003, 10.01),
    event("qga", NEW, 10.01, 10.03, "guest-ping"),
    event("qga", NEW, 10.03, 10.2, "guest-set-time"),
]


def test_the_steps_of_a_direct_restore() -> None:
    m = milestones(DIRECT_EVENTS, NEW, TAP, 10.0, 10.73)
    expected = (0.1, 0.4, 0.45, 0.47, 0.55, 0.71, 0.72, 0.72, 0.73)
    assert m == pytest.approx(expected), "a refused ping is no answer, and ready is the later of the two"


def test_the_steps_of_a_standby_begin_with_the_request() -> None:
    m = milestones(STANDBY_EVENTS, NEW, TAP, 10.0, 10.21)
    assert (m.began, m.started, m.loaded) == (None, None, None)
    assert (m.resumed, m.plugged, m.answered, m.ready) == pytest.approx((0.01, 0.002, 0.03, 0.03))
    assert m.returned == pytest.approx(0.21)


@pytest.mark.parametrize("missing", ["plug", "qga"])
def test_a_reset_that_shows_no_answer_or_no_plug_is_refused(missing: str) -> None:
    events = [e for e in DIRECT_EVENTS if e.kind != missing]
    with pytest.raises(ValueError, match="were noted"):
        milestones(events, NEW, TAP, 10.0, 10.73)


def test_an_answer_before_the_machine_was_resumed_does_not_count() -> None:
    events = [*STANDBY_EVENTS[:2], event("qga", NEW, 10.0, 10.001), *STANDBY_EVENTS[2:4]]
    with pytest.raises(ValueError, match="0 answers"):
        milestones(events, NEW, TAP, 10.0, 10.21)


def reset(ready_s: float, own: int = 50_000_000) -> Reset:
    steps = Milestones(None, None, None, ready_s / 2, ready_s, ready_s, ready_s, ready_s, ready_s + 0.1)
    return Reset(steps, own, own)


def test_the_order_holds_every_case_as_often_as_wanted_and_only_the_seed_decides_it() -> None:
    counts = wanted(["idle"], [COLD, INTERNAL, STANDBY], [0, 1024], {COLD: 3, INTERNAL: 8, STANDBY: 30}, 10)
    assert counts == {
        Case("idle", COLD, 0): 3,
        Case("idle", INTERNAL, 0): 8,
        Case("idle", INTERNAL, 1024): 8,
        Case("idle", STANDBY, 0): 30,
        Case("idle", STANDBY, 1024): 10,
    }
    order = schedule(counts, 7)
    assert Counter(order) == counts
    assert order == schedule(counts, 7) != schedule(counts, 8)
    assert order != sorted(order)


def test_the_steps_add_up_to_the_whole() -> None:
    m = milestones(DIRECT_EVENTS, NEW, TAP, 10.0, 10.73)
    steps = breakdown([Reset(m, 0, 0)])
    assert next(name for name, _ in steps) == "files checked, overlay made"
    assert sum(s.p50 for _, s in steps) == pytest.approx(m.returned)
    woken = breakdown([Reset(milestones(STANDBY_EVENTS, NEW, TAP, 10.0, 10.21), 0, 0)])
    assert [name for name, _ in woken] == ["proved", "plugged", "running", "agent answers", "call returns"]


def test_ratios_compare_medians_of_the_same_machine_and_dirt() -> None:
    standby, cold = Case("idle", STANDBY, 100), Case("idle", COLD, 0)
    results = {standby: [reset(0.02)] * 3, Case("idle", STANDBY, 0): [reset(0.02)], cold: [reset(20.0)]}
    assert ratio(results, cold, STANDBY) == pytest.approx(1000)
    assert ratio(results, standby, COLD) == pytest.approx(0.001)
    assert ratio(results, standby, DIRECT) is None
    assert ready(results[standby]).n == 3


def test_aims_are_met_and_missed() -> None:
    results = {
        Case("warm", STANDBY, 0): [reset(0.03)] * 5,
        Case("warm", STANDBY, 1024): [reset(0.05)] * 5,
        Case("warm", INTERNAL, 0): [reset(3.0)],
        Case("warm", DIRECT, 0): [reset(0.7, own=120_000_000)],
        Case("warm", DIRECT, 100): [],
    }
    told = {a.what: a.met for a in aims(results)}
    assert told == {
        "standby, warm, 0 MiB: p50": True,
        "standby, warm, 0 MiB: p99": True,
        "standby, warm, 0 MiB: against internal revert": True,
        "standby, warm, 1024 MiB: p50": True,
        "standby, warm, 1024 MiB: p99": True,
        "standby, warm, 1024 MiB: as at 0 MiB": False,
        "direct restore, warm, 0 MiB: p50": False,
        "direct restore, warm, 0 MiB: own memory": False,
    }


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_ordinary_domain_is_the_same_machine_without_our_arguments(name: str) -> None:
    spec = domain_spec(name)
    ours, plain = ET.fromstring(domain_xml(spec)), ET.fromstring(ordinary_xml(spec))
    tags = [e.tag for e in ours if not e.tag.endswith("commandline")]
    assert [e.tag for e in plain] == tags
    assert len(tags) < len(ours)
    assert "mem-path" not in ordinary_xml(spec)
