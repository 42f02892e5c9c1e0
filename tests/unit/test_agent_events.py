"""Event lines are bounded, clean and marked when cut; a port that fails never disturbs the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.events import CUT, MAX_KEYS, MAX_LINE, Events, encode
from appliance.cell.events import parse


def lines(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.splitlines() if line]


def test_a_short_event_is_kept_whole() -> None:
    line = encode("result", 3, "ok", {"stdout": "a\nb", "terminal": 1})
    assert json.loads(line) == {
        "v": 1, "kind": "result", "step": 3, "text": "ok", "data": {"stdout": "a\nb", "terminal": 1},
    }  # fmt: skip
    assert line.count(b"\n") == 1


@pytest.mark.parametrize("char", ["x", "é", "\x00", "\U0001f600", "\ud800", '"', "\u2028"])
def test_a_long_event_is_cut_and_marked(char: str) -> None:
    line = encode("result", 1, char * 50_000, {"stdout": char * 50_000, "terminal": 2})
    assert len(line) <= MAX_LINE
    record = json.loads(line)
    assert record["data"]["truncated"] is True
    assert record["data"]["terminal"] == 2
    assert record["text"].endswith(CUT)
    assert record["data"]["stdout"].endswith(CUT)
    assert parse(line.rstrip(b"\n")).step == 1


def test_data_with_too_many_keys_is_cut_and_marked() -> None:
    line = encode("note", 1, "t", {f"key{n}": "v" * 50 for n in range(5000)})
    record = json.loads(line)
    assert len(record["data"]) == MAX_KEYS + 1
    assert record["data"]["truncated"] is True
    assert parse(line.rstrip(b"\n")).data["key0"] == "v" * 50


def test_what_cannot_be_cut_enough_is_left_out_and_marked() -> None:
    line = encode("note", 1, "\x00" * 99_999, {f"{n:02}" + "\x00" * 99: "\x00" * 99_999 for n in range(30)})
    assert len(line) <= MAX_LINE
    assert json.loads(line)["data"] == {"truncated": True}


def test_nested_and_odd_values_become_text() -> None:
    line = encode("note", 1, "t", {"a": [1, {"b": None}], "nan": float("nan"), "big": 10**40, "t": True})
    assert json.loads(line)["data"] == {"a": '[1, {"b": null}]', "nan": "NaN", "big": str(10**40), "t": True}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(max_size=3000), st.dictionaries(st.text(max_size=20), values, max_size=5))
def test_every_line_is_one_bounded_line_of_printable_ascii(text: str, data: dict[str, object]) -> None:
    line = encode("note", 1, text * 20, data)
    assert len(line) <= MAX_LINE
    assert line.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert set(json.loads(line)) == {"v", "kind", "step", "text", "data"}
    parse(line.rstrip(b"\n"))  # the host takes it for an honest agent's


def test_events_arrive_in_order(tmp_path: Path) -> None:
    port = tmp_path / "port"
    port.touch()
    events = Events(port)
    for step in range(3):
        events.emit("note", step, f"n{step}")
    events.close()
    assert [e["text"] for e in lines(port.read_bytes())] == ["n0", "n1", "n2"]


def test_an_absent_port_is_not_created_and_the_loss_is_told_later(tmp_path: Path) -> None:
    port = tmp_path / "port"
    events = Events(port)
    events.emit("note", 1, "lost")
    events.emit("note", 2, "lost too")
    assert not port.exists()
    assert events.lost == 2
    port.touch()
    events.emit("note", 3, "here")
    events.emit("note", 4, "again")
    events.close()
    assert [(e["text"], e["data"]) for e in lines(port.read_bytes())] == [
        ("here", {"lost": 2}),
        ("again", {}),
    ]


def test_a_port_that_nobody_reads_costs_a_bounded_wait_and_tears_no_later_line(tmp_path: Path) -> None:
    port = tmp_path / "fifo"
    os.mkfifo(port)
    events = Events(port, write_s=0.3)
    events.emit("note", 0, "no reader at all")
    assert events.lost == 1
    reader = os.open(port, os.O_RDONLY | os.O_NONBLOCK)
    begun = time.monotonic()
    sent = 0
    while events.lost < 5:  # fills the pipe, then loses
        sent += 1
        events.emit("note", sent, "x" * 5000)
        assert sent < 100
    assert time.monotonic() - begun < 5
    raw = os.read(reader, 1 << 20)
    events.emit("note", 999, "after")
    raw += os.read(reader, 1 << 20)
    os.close(reader)
    events.emit("note", 1000, "the reader went away")
    events.close()
    good = []
    for line in raw.splitlines():
        try:
            good.append(json.loads(line))
        except ValueError:
            continue
    assert good[-1]["step"] == 999
    assert good[-1]["data"]["lost"] >= 1
    assert len(good) >= sent - 6


def test_events_without_a_port_go_nowhere() -> None:
    Events(None).emit("note", 1, "x")


def test_the_log_line_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    Events(None).emit("note", 1, "a\x1b[2J\nb\ud800")
    assert capsys.readouterr().err.rstrip("\n").isprintable()
