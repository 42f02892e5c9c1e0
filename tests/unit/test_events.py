"""The event stream of a hostile guest: bounded, checked, and never able to stop its reader."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent.loop import FORMAT_TOTAL
from appliance.cell import events
from appliance.cell.events import MAX_LINE, Event, EventStream, LineSplitter, parse
from appliance.config.specs import MAX_STEPS, TrialLimits
from appliance.errors import GuestChannelError
from appliance.service import LimitOverrides


def line(**changes: object) -> bytes:
    return json.dumps({"v": 1, "kind": "note", "step": 0, "text": "t", "data": {}} | changes).encode()


# -- splitting -----------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.data())
def test_lines_are_the_same_however_the_bytes_arrive(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(x + b"\n" for x in lines)
    splitter, got = LineSplitter(), []
    while stream:
        n = data.draw(st.integers(1, len(stream)))
        got += splitter.feed(stream[:n])
        stream = stream[n:]
    assert got == lines


def test_a_long_line_becomes_one_none_and_the_next_is_read() -> None:
    splitter = LineSplitter()
    got = splitter.feed(b"a\n" + b"x" * (MAX_LINE + 1) + b"\nb\n")
    assert got == [b"a", None, b"b"]


def test_a_line_of_exactly_the_limit_is_kept() -> None:
    assert LineSplitter().feed(b"x" * MAX_LINE + b"\n") == [b"x" * MAX_LINE]


def test_ten_megabytes_without_an_end_are_not_kept() -> None:
    splitter, got = LineSplitter(), []
    for _ in range(160):
        got += splitter.feed(b"x" * 65536)
        assert len(splitter._buffer) <= MAX_LINE
    assert got == []
    assert splitter.feed(b"\nok\n") == [None, b"ok"]


# -- parsing -------------------------------------------------------------------------------------------


def test_an_honest_line_is_an_event() -> None:
    event = parse(
        line(kind="action", step=3, text="ls", data={"a": 1, "b": "x", "c": None, "d": 1.5, "e": True})
    )
    assert (event.kind, event.step, event.data["d"], event.data["e"]) == ("action", 3, 1.5, True)


@pytest.mark.parametrize("kind", list(events.Kind))
def test_every_kind_is_known(kind: str) -> None:
    assert parse(line(kind=kind)).kind == kind


BAD = {
    "not JSON": b"{{{",
    "empty object": b"{}",
    "a list": b"[1]",
    "a number": b"1",
    "not UTF-8": b'{"v":1,"kind":"note","step":0,"text":"\xff\xfe","data":{}}',
    "NUL": b"\x00\x01",
    "deep": b"[" * 16000,
    "deep data": line(data={"a": [[[[1]]]]}),
    "data with a list": line(data={"a": [1]}),
    "data with an object": line(data={"a": {"b": 1}}),
    "data as list": line(data=[1]),
    "33 data": line(data={str(i): 1 for i in range(33)}),
    "long key": line(data={"k" * 65: 1}),
    "long value": line(data={"k": "x" * 8193}),
    "NaN": b'{"v":1,"kind":"note","step":0,"text":"t","data":{"a":NaN}}',
    "Infinity": b'{"v":1,"kind":"note","step":0,"text":"t","data":{"a":-Infinity}}',
    "huge float": b'{"v":1,"kind":"note","step":0,"text":"t","data":{"a":1e999}}',
    "huge int": line(data={"a": 10**400}),
    "int of 5,000 digits": b'{"v":1,"kind":"note","step":0,"text":"t","data":{"a":' + b"9" * 5000 + b"}}",
    "step as text": line(step="1"),
    "step as float": line(step=1.0),
    "step as bool": line(step=True),
    "step negative": line(step=-1),
    "step too high": line(step=1_000_001),
    "version as text": line(v="1"),
    "version 2": line(v=2),
    "unknown kind": line(kind="score"),
    "kind as path": line(kind="../../etc/passwd"),
    "extra key": line(verdict="replicated"),
    "text as number": line(text=1),
    "text too long": line(text="x" * (MAX_LINE + 1)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_a_line_that_is_no_event_is_described_shortly_and_printably(bad: bytes) -> None:
    with pytest.raises(ValueError) as e:
        parse(bad)
    assert str(e.value).isprintable()
    assert 0 < len(str(e.value)) < 250


@pytest.mark.parametrize("key", ["text", "path"])
def test_path_tricks_and_control_characters_are_only_text(key: str) -> None:
    nasty = "../../../etc/passwd\x00\x1b[2J\r\n<script>"
    event = parse(line(text=nasty, data={key: nasty}))
    assert event.text == event.data[key] == nasty


def test_of_two_equal_keys_the_last_counts() -> None:
    assert parse(b'{"v":1,"kind":"note","step":0,"text":"a","text":"b","data":{}}').text == "b"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda t: line(text=t)) | st.builds(
    lambda k, v: line(**{k: v}),
    st.sampled_from(["v", "kind", "step", "text", "data", "x"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                 lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3)),
))  # fmt: skip
def test_anything_is_an_event_or_a_value_error(data: bytes) -> None:
    try:
        assert isinstance(parse(data), Event)
    except ValueError as e:
        assert str(e).isprintable()  # noqa: PT017 - both ways are good


# -- a real socket -------------------------------------------------------------------------------------


class Port:
    """The guest's side of the port, and what the stream delivered."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.events: list[Event] = []
        self.tampering: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.stream = EventStream(path, self.events.append, self.tampering.append, steps)
        self.guest, _ = self._listener.accept()

    def send(self, data: bytes) -> None:
        """Send, and let a reader that gave up be none of the sender's trouble."""
        with contextlib.suppress(BrokenPipeError):
            self.guest.sendall(data)

    def end(self) -> None:
        """The guest is gone; everything it sent is read."""
        self.guest.close()
        self.stream._thread.join(30)
        assert not self.stream._thread.is_alive()
        self.stream.close()
        self._listener.close()


@contextlib.contextmanager
def a_port(steps: int) -> Iterator[Port]:
    with tempfile.TemporaryDirectory(prefix="hc", dir="/tmp") as folder:
        made = Port(Path(folder) / "s", steps)
        yield made
        made.guest.close()
        made.stream.close()
        made._listener.close()
        assert not made.stream._thread.is_alive()


@pytest.fixture
def port() -> Iterator[Port]:
    with a_port(1000) as made:
        yield made


def test_events_arrive_in_order_whatever_lies_between(port: Port) -> None:
    port.send(
        line(text="1")
        + b"\n\n  \n{\n"
        + b"y" * 10_000_000
        + b"\n"
        + line(text="2")
        + b"\n"
        + line(text="cut")
    )
    port.end()
    assert [e.text for e in port.events] == ["1", "2"]
    assert len(port.tampering) == 2
    assert "longer than" in port.tampering[1]


def test_what_had_arrived_is_delivered_by_close(port: Port) -> None:
    port.send(b"".join(line(text=str(i)) + b"\n" for i in range(500)))
    port.stream.close()
    assert [e.text for e in port.events] == [str(i) for i in range(500)]


def test_close_may_be_repeated_and_nothing_comes_after_it(port: Port) -> None:
    port.stream.close()
    port.stream.close()
    port.send(line() + b"\n")
    assert port.events == []


def test_a_reader_that_hangs_does_not_hang_close_nor_deliver_later(port: Port) -> None:
    gate, first = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        first.set()
        gate.wait(20)
        port.events.append(event)

    port.stream._on_event = slow
    port.stream._thread.join(0)
    port.send(b"".join(line(text=str(i)) + b"\n" for i in range(3)))
    assert first.wait(5)
    threading.Timer(0.2, gate.set).start()
    port.stream.close()
    seen = len(port.events)
    port.stream._thread.join(5)
    assert len(port.events) == seen


def test_tampering_is_described_a_bounded_number_of_times(port: Port) -> None:
    port.send(b"garbage\n" * 10_000)
    port.end()
    assert len(port.tampering) == events.MAX_TAMPERING
    assert "not recorded" in port.tampering[-1]


def run_of(steps: int, format_errors: int) -> Iterator[bytes]:
    """What an honest agent sends that takes every step it may, as the agent's documentation lists it."""
    yield line(kind="start")
    for _ in range(format_errors):
        yield line(kind="format-error", step=1)
    for n in range(1, steps):
        yield from (line(kind=k, step=n) for k in ("thought", "action", "result"))
    yield from (line(kind=k, step=steps) for k in ("thought", "action", "finish", "end"))


@pytest.mark.parametrize("steps", [1, 40, MAX_STEPS])
def test_an_honest_run_of_every_length_is_taken_whole(steps: int) -> None:
    run = list(run_of(steps, FORMAT_TOTAL))
    with a_port(steps) as port:
        port.send(b"".join(x + b"\n" for x in run))
        port.end()
    assert port.tampering == []
    assert len(port.events) == len(run)
    assert [e.kind for e in port.events[-2:]] == ["finish", "end"]
    assert events.most_bytes(steps) >= len(run) * MAX_LINE


def test_no_run_may_be_longer_than_what_is_taken() -> None:
    for model in (TrialLimits, LimitOverrides):
        assert model.model_validate({"steps": MAX_STEPS}).steps == MAX_STEPS
        with pytest.raises(ValidationError):
            model.model_validate({"steps": MAX_STEPS + 1})


def test_events_are_counted_and_the_flood_is_told() -> None:
    with a_port(50) as port:
        port.send((line() + b"\n") * 500)
        port.end()
    assert len(port.events) == events.most_events(50) == 250
    assert port.tampering == ["more than 250 events; the rest is not recorded"]


@pytest.mark.parametrize("talk", [b"\n" * 65536, b"x" * 65536], ids=["empty lines", "one long line"])
def test_more_lines_or_bytes_than_a_run_can_have_end_the_reading(
    monkeypatch: pytest.MonkeyPatch, talk: bytes
) -> None:
    monkeypatch.setattr(events, "_LEAST_BYTES", 1 << 20)
    with a_port(1) as port:
        port.send(line() + b"\n")
        port.guest.settimeout(1)
        # Once nobody reads, the guest's writes get stuck: that is its own problem.
        with contextlib.suppress(TimeoutError, ConnectionError):
            for _ in range(200):
                port.guest.sendall(talk)
        port.end()
    assert len(port.events) == 1
    assert port.tampering == ["more lines or bytes than a run of this length has; the rest was not read"]


def test_after_very_many_lines_that_are_no_events_an_honest_run_still_fits() -> None:
    with a_port(40) as port:
        port.send(b"\n" * 9_000 + b"".join(x + b"\n" for x in run_of(40, FORMAT_TOTAL)))
        port.end()
    assert port.tampering == []
    assert port.events[-1].kind == "end"


def test_a_port_that_is_not_there_is_a_channel_error(tmp_path: Path) -> None:
    with pytest.raises(GuestChannelError, match="cannot be opened"):
        EventStream(tmp_path / "no", lambda _e: None, lambda _t: None)
