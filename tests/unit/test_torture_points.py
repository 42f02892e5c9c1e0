"""The campaign's points: repeatable one by one, and spread over everything that can be struck."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.torture.campaign import Result, table
from tests.torture.points import DEFAULT_KINDS, KINDS, SCALES, SEAL_EVENTS, TRIAL_EVENTS, campaign, draw


def test_a_seed_gives_the_same_points_and_another_gives_others() -> None:
    assert campaign(1, 50, DEFAULT_KINDS) == campaign(1, 50, DEFAULT_KINDS)
    assert campaign(1, 50, DEFAULT_KINDS) != campaign(2, 50, DEFAULT_KINDS)


def test_a_point_does_not_depend_on_those_before_it() -> None:
    assert campaign(7, 200, DEFAULT_KINDS)[150] == draw(7, 150, DEFAULT_KINDS)


def test_two_hundred_points_strike_everybody_at_every_transition() -> None:
    points = campaign(1, 200, DEFAULT_KINDS)
    assert set(Counter(p.kind for p in points)) == set(DEFAULT_KINDS)
    assert {p.action for p in points} == set(SCALES) - {"build"}
    assert {p.event for p in points if p.action in ("trial", "seal")} == {*TRIAL_EVENTS, *SEAL_EVENTS}
    assert all(0 <= p.delay <= SCALES[p.action] and 0 <= p.pick < 1 for p in points)
    assert all(p.action in KINDS[p.kind][1] for p in points)


@pytest.mark.parametrize("kinds", [(), ("server", "no-such-kind")])
def test_unknown_kinds_are_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="there are server"):
        campaign(1, 1, kinds)


def test_the_table_counts_what_was_missed_and_what_was_wrong() -> None:
    results = [
        Result(0, "server", "trial+0.1s", "server 1", "t1", "void", "", 10.0),
        Result(1, "server", "trial+0.1s", "", "t2", "sealed", "", 20.0, ["stray: x"]),
        Result(2, "qemu", "open+0.1s", "QEMU x", "", "", "", 3.0),
    ]
    rows = {line.split()[0]: line.split()[1:] for line in table(results).splitlines()}
    assert rows["server"] == ["2", "1", "1", "1", "0", "1", "15.0"]
    assert rows["qemu"] == ["1", "0", "0", "0", "0", "0", "3.0"]
    assert rows["all"] == ["3", "1", "1", "1", "0", "1", "11.0"]
    assert "FAULT stray: x" in results[1].line
    assert results[0].line.endswith("ok")
