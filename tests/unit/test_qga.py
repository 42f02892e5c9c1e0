"""The guest agent's replies are hostile input: whatever comes, one of three things comes out."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from appliance.cell import qga as module
from appliance.cell.qga import GuestResult, Qga
from appliance.errors import GuestChannelError, GuestTamperError, GuestTimeoutError
from tests.fakes.machine import FakeGuest

ANYTHING: TypeAdapter[object] = TypeAdapter(object)


def saying(*replies: str) -> Qga:
    """An agent that gives these replies, then the last one again and again."""
    left = list(replies)
    return Qga(lambda _request, _timeout: left.pop(0) if len(left) > 1 else left[0], "origin")


def returning(value: object) -> str:
    return json.dumps({"return": value})


def exited(**fields: object) -> Qga:
    """An agent whose one program ended with this status."""
    status = {"exited": True, "exitcode": 0} | {k.replace("_", "-"): v for k, v in fields.items()}
    return saying(returning({"pid": 7}), returning(status))


# -- honest agents -------------------------------------------------------------------------------------


def test_an_exit_status_and_both_streams_come_back() -> None:
    out, err = base64.b64encode(b"a\xff").decode(), base64.b64encode(b"b").decode()
    assert exited(exitcode=3, out_data=out, err_data=err).exec(["/x"]) == GuestResult(
        3, b"a\xff", b"b", False
    )


def test_a_signal_is_128_and_its_number() -> None:
    agent = saying(returning({"pid": 7}), returning({"exited": True, "signal": 9}))
    assert agent.exec(["/x"]).rc == 137


@pytest.mark.parametrize("stream", ["out", "err"])
def test_a_cut_stream_is_told(stream: str) -> None:
    assert exited(**{f"{stream}_truncated": True}).exec(["/x"]).truncated
    much = base64.b64encode(b"x" * (module.MAX_OUTPUT + 1)).decode()
    done = exited(**{f"{stream}_data": much}).exec(["/x"])
    assert done.truncated
    assert max(len(done.stdout), len(done.stderr)) == module.MAX_OUTPUT


def test_a_program_that_prints_megabytes_is_no_tampering() -> None:
    much = base64.b64encode(bytes(5 << 20)).decode()
    assert exited(out_data=much).exec(["/x"]).truncated


def test_fields_of_a_newer_agent_are_no_tampering() -> None:
    assert exited(something_new=[1, {"a": 2}]).exec(["/x"]).rc == 0


def test_a_request_holds_arguments_as_arguments() -> None:
    seen: list[dict[str, object]] = []

    def channel(request: str, timeout_s: int, /) -> str:
        seen.append(json.loads(request))
        return returning({"pid": 7}) if len(seen) == 1 else returning({"exited": True, "exitcode": 0})

    Qga(channel, "origin").python("print(1)", '"; rm -rf /', timeout_s=5)
    arguments = seen[0]["arguments"]
    assert isinstance(arguments, dict)
    assert arguments["path"] == "/usr/bin/python3"
    assert arguments["arg"] == ["-I", "-", '"; rm -rf /']
    assert base64.b64decode(arguments["input-data"]) == b"print(1)"


@pytest.mark.parametrize("size", [0, 1, 32 * 1024 - 1, 32 * 1024, 32 * 1024 + 1, 200_000])
def test_pieces_of_a_file_make_the_file(tmp_path: Path, size: int) -> None:
    guest, data = FakeGuest(tmp_path), bytes(i * 7 % 256 for i in range(size))
    Qga(guest, "origin").write_file("/home/x", data, mode=0o640, owner="subject:subject")
    assert guest.file("/home/x").read_bytes() == data
    assert guest.file("/home/x").stat().st_mode & 0o777 == 0o640
    assert guest.owners["/home/x"] == "subject:subject"
    assert guest.calls.count("guest-file-write") == -(-size // (32 * 1024))


def test_a_short_write_is_an_error_and_the_handle_is_closed(tmp_path: Path) -> None:
    guest = FakeGuest(tmp_path)
    guest.broken = lambda c: returning({"count": 5, "eof": False}) if c == "guest-file-write" else None
    with pytest.raises(GuestChannelError, match="not written whole"):
        Qga(guest, "origin").write_file("/x", b"123456")
    assert "guest-file-close" in guest.calls


def test_a_file_that_cannot_be_given_away_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuestChannelError, match="invalid user"):
        Qga(FakeGuest(tmp_path), "origin").write_file("/x", b"1", owner="nobody-here")


def test_a_program_that_never_ends_is_given_up() -> None:
    clock = iter(range(100))
    agent = Qga(
        lambda request, _t: returning(
            {"pid": 7} if "guest-exec-status" not in request else {"exited": False}
        ),
        "origin",
        clock=lambda: float(next(clock)),
    )
    with pytest.raises(GuestTimeoutError, match="longer than 3 s") as told:
        agent.exec(["/bin/sleep", "9"], timeout_s=3, poll_s=0.001)
    assert told.value.pid == 7
    assert isinstance(told.value, GuestChannelError), "for whoever runs a program of ours, it is silence"


def test_silence_is_a_channel_error_and_no_ping() -> None:
    def silent(_request: str, _timeout_s: int, /) -> str:
        raise GuestChannelError("nothing came")

    agent = Qga(silent, "origin")
    assert not agent.ping()
    with pytest.raises(GuestChannelError, match="nothing came"):
        agent.exec(["/x"])


def test_garbage_is_no_ping() -> None:
    assert not saying("{{{").ping()
    assert saying(returning({})).ping()


# -- dishonest ones ------------------------------------------------------------------------------------

BOMB = "[" * 200_000 + "]" * 200_000
TAMPERED = {
    "not JSON": "%%%",
    "nothing": "",
    "100 MB": "x" * 100_000_000,
    "nested": BOMB,
    "nested in return": '{"return": ' + BOMB + "}",
    "number of 5,000 digits": '{"return": {"pid": ' + "9" * 5000 + "}}",
    "pid of 4,000 digits": '{"return": {"pid": ' + "9" * 4000 + "}}",
    "pid as text": returning({"pid": "7"}),
    "pid as float": returning({"pid": 7.0}),
    "pid as bool": returning({"pid": True}),
    "pid zero": returning({"pid": 0}),
    "pid negative": returning({"pid": -1}),
    "pid missing": returning({}),
    "return as list": returning([7]),
    "return as null": returning(None),
    "NaN": '{"return": {"pid": NaN}}',
}


@pytest.mark.parametrize("reply", TAMPERED.values(), ids=list(TAMPERED))
def test_what_no_honest_agent_sends_is_tampering(reply: str) -> None:
    with pytest.raises(GuestTamperError) as e:
        saying(reply).exec(["/x"])
    assert len(str(e.value)) < 600
    assert str(e.value).isprintable()


STATUSES = {
    "exited as text": {"exited": "true"},
    "exited missing": {"exitcode": 0},
    "exit status of 256": {"exited": True, "exitcode": 256},
    "exit status as text": {"exited": True, "exitcode": "0"},
    "signal of 65": {"exited": True, "signal": 65},
    "output not base64": {"exited": True, "exitcode": 0, "out-data": "%%%%"},
    "output cut base64": {"exited": True, "exitcode": 0, "out-data": "QQ="},
    "output not ASCII": {"exited": True, "exitcode": 0, "err-data": "ä" * 4},
    "output as list": {"exited": True, "exitcode": 0, "out-data": [1]},
    "truncated as number": {"exited": True, "exitcode": 0, "out-truncated": 1},
}


@pytest.mark.parametrize("status", STATUSES.values(), ids=list(STATUSES))
def test_a_status_that_no_honest_agent_gives_is_tampering(status: dict[str, object]) -> None:
    with pytest.raises(GuestTamperError):
        saying(returning({"pid": 7}), returning(status)).exec(["/x"])


@pytest.mark.parametrize("handle", ["7", -1, 1 << 53, None, 1.5, True, []])
def test_a_file_handle_that_is_no_number_is_tampering(handle: object) -> None:
    with pytest.raises(GuestTamperError):
        saying(returning(handle)).write_file("/x", b"1")


@pytest.mark.parametrize("count", [-1, 65, "1", None, {}])
def test_a_count_of_filesystems_is_bounded(count: object) -> None:
    with pytest.raises(GuestTamperError):
        saying(returning(count)).freeze_filesystems()


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps({"error": {"class": "x", "desc": "\x1b[2J\n\u202eevil" * 100}}),
        json.dumps({"error": "\x00\x07"}),
        json.dumps([1, 2]),
        json.dumps("\x1b]0;owned\x07"),
        "{}",
        "null",
    ],
)
def test_an_error_object_is_a_refusal_whose_words_are_printable(reply: str) -> None:
    with pytest.raises(GuestChannelError) as e:
        saying(reply).exec(["/x"])
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 400


# -- anything ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=12), x, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["exited", "exitcode", "signal", "out-data", "err-data", "out-truncated", "pid", "count"]
)
NEAR = st.dictionaries(FIELDS, JSON | st.just(True) | st.just(0) | st.just("QQ=="), max_size=6)
REPLY = st.one_of(
    st.text(max_size=200),
    JSON.map(json.dumps),
    st.one_of(JSON, NEAR).map(returning),
    NEAR.map(lambda x: json.dumps({"error": x})),
)
ACTIONS: list[Callable[[Qga], object]] = [
    lambda q: q.exec(["/x"], timeout_s=0, poll_s=0),
    lambda q: q.write_file("/x", b"12345"),
    lambda q: q.freeze_filesystems(),
    lambda q: q.start(["/x"]),
    lambda q: q.ping(),
]


@settings(max_examples=400, deadline=None)
@given(replies=st.lists(REPLY, min_size=1, max_size=5), action=st.sampled_from(ACTIONS))
def test_only_two_errors_or_a_valid_value_ever_come_out(
    replies: list[str], action: Callable[[Qga], object]
) -> None:
    try:
        value = action(saying(*replies))
    except (GuestChannelError, GuestTamperError) as e:
        assert str(e).isprintable()  # noqa: PT017 - both ways are good
    else:
        assert value is None or isinstance(value, (GuestResult, int, bool))
        if isinstance(value, GuestResult):
            assert 0 <= value.rc <= 255
