"""The host's end of a proof port: one bounded line at a time, from a guest that may send anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell.port import Port
from appliance.errors import GuestChannelError, GuestTamperError


class Guest:
    """The guest's end, as QEMU listens for it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "p"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(1)

        self.ends: list[socket.socket | Port] = []

    def joined(self) -> tuple[Port, socket.socket]:
        port = Port(self.path)
        end = self.listener.accept()[0]
        self.ends += [port, end]
        return port, end


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    for end in (made.listener, *made.ends):
        end.close()


def test_lines_go_both_ways(guest: Guest) -> None:
    port, end = guest.joined()
    port.send("i1 1.5")
    assert end.recv(100) == b"i1 1.5\n"
    for piece in (b'{"a"', b": 1}", b"\n"):
        end.sendall(piece)
    assert port.read(100, 5) == '{"a": 1}'
    port.close()
    assert end.recv(100) == b""


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"x" * 101, "longer than 100 bytes"),
        (b"x" * 101 + b"\n", "longer than 100 bytes"),
        (b"a\nb", "1 bytes follow"),
        (b"a\n\n", "1 bytes follow"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_what_our_script_never_sends_is_tampering(guest: Guest, sent: bytes, told: str) -> None:
    port, end = guest.joined()
    end.sendall(sent)
    with pytest.raises(GuestTamperError, match=told):
        port.read(100, 5)


def test_a_guest_that_says_nothing_or_half_a_line_has_not_answered(guest: Guest) -> None:
    port, end = guest.joined()
    end.sendall(b"half")
    with pytest.raises(GuestChannelError, match="no answer on the port within 0 s"):
        port.read(100, 0.05)


def test_a_machine_that_is_gone_is_told(guest: Guest) -> None:
    port, end = guest.joined()
    end.close()
    with pytest.raises(GuestChannelError, match="was closed"):
        port.read(100, 5)
    with pytest.raises(GuestChannelError, match="takes nothing: Broken pipe"):
        port.send("x")
    port.close()
    with pytest.raises(GuestChannelError, match="broke off"):
        port.read(100, 5)


def test_a_port_where_nobody_listens_is_told(tmp_path: Path) -> None:
    with pytest.raises(GuestChannelError, match="cannot be opened: No such file"):
        Port(tmp_path / "p")
