"""What a soak reports, and when it fails."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.soak import Soak, main, report

HELD = {"resident MB": 100, "descriptors": 40, "ledger rows": 9, "disk kB": 100}


def soak(**changes: object) -> Soak:
    plain = Soak([0.05] * 100, Counter(standby=99, direct=1), [], dict(HELD), dict(HELD), [9, 9])
    return plain._replace(**changes)  # type: ignore[arg-type]


def test_nothing_failed_nothing_grew(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(soak(), 20) == 0
    out = capsys.readouterr().out
    assert "100 resets, failures: 0; grown: nothing" in out
    assert "direct 1, standby 99" in out


@pytest.mark.parametrize("name", ["descriptors", "ledger rows"])
def test_one_more_of_what_may_not_grow_fails(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(soak(last=HELD | {name: HELD[name] + 1}), 20) == 1
    assert f"grown: {name}" in capsys.readouterr().out


def test_one_failure_fails() -> None:
    assert report(soak(failures=["reset 7: withheld"]), 20) == 1


def test_resets_that_slow_down_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(soak(took=[0.05] * 50 + [0.2] * 50), 20) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_the_settled_reset_must_come_before_the_last() -> None:
    with pytest.raises(SystemExit):
        main(["--n", "10", "--settled", "10"])
