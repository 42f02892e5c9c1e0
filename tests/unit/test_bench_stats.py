"""Benchmarks' arithmetic: percentiles, growth, tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.common.holdings import grown, used_bytes
from bench.common.stats import independent, summary
from bench.common.table import seconds, show


def test_percentiles_of_a_known_series() -> None:
    found = summary([float(n) for n in range(101)])
    assert (found.n, found.p50, found.p90, found.p99, found.worst, found.least) == (101, 50, 90, 99, 100, 0)


def test_one_value_is_all_its_percentiles() -> None:
    assert summary([0.25]) == (1, 0.25, 0.25, 0.25, 0.25, 0.25)


def test_nothing_has_no_percentiles() -> None:
    with pytest.raises(ValueError, match="no values"):
        summary([])


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_ordered_and_within_what_was_seen(values: list[float]) -> None:
    found = summary(values)
    slack = 1e-6 * max(values)
    assert min(values) == found.least <= found.p50 + slack
    assert found.p50 <= found.p90 + slack
    assert found.p90 <= found.p99 + slack
    assert found.p99 <= found.worst + slack
    assert found.worst == max(values)


def test_independence_allows_a_tenth_and_ten_milliseconds() -> None:
    assert independent(1.0, 1.10)
    assert independent(0.02, 0.031)
    assert not independent(0.02, 0.033)
    assert not independent(1.0, 1.2)


def test_growth_is_told_by_name_beyond_its_slack() -> None:
    first = {"resident MB": 100, "threads": 9, "descriptors": 30, "disk kB": 1000}
    assert grown(first, first) == []
    assert grown(first, {"resident MB": 110, "threads": 10, "descriptors": 30, "disk kB": 9400}) == []
    last = {"resident MB": 111, "threads": 11, "descriptors": 31, "disk kB": 9401}
    assert grown(first, last) == list(first)


def test_used_bytes_leave_out_what_they_are_told_to(tmp_path: Path) -> None:
    for name in ("kept", "left/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x" * 8192)
    with_all, without = used_bytes(tmp_path), used_bytes(tmp_path, (tmp_path / "left",))
    assert with_all == 2 * without > 0


def test_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    show(("way", "p50"), [("cold boot", seconds(24.04)), ("none", seconds(None)), ("quick", seconds(0.02))])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split("|")[1].strip() == "way"
    assert set(lines[1]) <= set("|-: ")
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["24.0", "-", "0.020"]
