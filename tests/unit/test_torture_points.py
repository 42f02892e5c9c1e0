"""The campaign's points: repeatable one by one, and spread over everything that can be struck."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.torture import __main__ as program
from tests.torture.campaign import Result, keep, known, results_file, table
from tests.torture.points import (
    DEFAULT_KINDS,
    KINDS,
    SCALES,
    SEAL_EVENTS,
    TRIAL_EVENTS,
    Point,
    campaign,
    draw,
)


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


def test_each_campaign_has_results_of_its_own() -> None:
    def name(kinds: Sequence[str], *, single: bool = False) -> str:
        return results_file(Path("/w"), 7, kinds, single=single).name

    assert name(DEFAULT_KINDS) == "seed-7.jsonl"
    assert name(DEFAULT_KINDS, single=True) == "seed-7-only.jsonl"
    assert name(("build",)) == "seed-7-build.jsonl"
    assert name(("disk-full", "qga")) == "seed-7-disk-full+qga.jsonl"
    assert name(("build",), single=True) == "seed-7-build-only.jsonl"


def test_a_point_that_is_repeated_leaves_its_campaign_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[int]] = []

    def run(
        _work: Path, todo: list[Point], results: list[Result], file: Path, _limit: float, every: int
    ) -> list[str]:
        assert every == 1, "a whole trial after each, unless it is asked for otherwise"
        ran.append([p.number for p in todo])
        for point in todo:
            results.append(Result(point.number, point.kind, point.where))
            keep(file, results[-1])
        return []

    def campaign_of(*argv: str) -> None:
        monkeypatch.setattr(sys, "argv", ["x", "--seed", "7", "--count", "4", "--work", str(tmp_path), *argv])
        assert program.main() == 0

    monkeypatch.setattr(program, "_run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    campaign_of()
    done = (tmp_path / "seed-7.jsonl").read_bytes(), (tmp_path / "seed-7.json").read_bytes()
    for extra in ((), (), ("--fresh",)):
        campaign_of("--only", "2", *extra)
    campaign_of("--kinds", "qemu")
    assert ((tmp_path / "seed-7.jsonl").read_bytes(), (tmp_path / "seed-7.json").read_bytes()) == done
    assert [r.number for r in known(tmp_path / "seed-7-only.jsonl")] == [2, 2, 2]
    campaign_of()
    campaign_of("--fresh")
    assert ran == [[0, 1, 2, 3], [2], [2], [2], [0, 1, 2, 3], [], [0, 1, 2, 3]]


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
