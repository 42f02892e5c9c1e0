"""The capture on a real bridge, in a network namespace of its own (root and tcpdump, no guests).

Each test body runs in a forked child that leaves for a fresh namespace: this process stays where it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.cell import processes
from appliance.cell.ledger import Kind, Ledger, Thing
from appliance.errors import CaptureError
from appliance.evidence import flows
from appliance.evidence.capture import KNOWN_ETHERTYPE, Capture
from appliance.host import command
from appliance.host.clock import wait_until
from tests.fakes.namespace import in_child, leave

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace"),
    pytest.mark.skipif(shutil.which("tcpdump") is None, reason="needs tcpdump"),
]
MACS = {"one": "52:54:00:00:00:11", "two": "52:54:00:00:00:21"}
ONE, TWO = (flows.Endpoint(mac, ()) for mac in MACS.values())
EVER = flows.Window(0, 1e12)
Body = Callable[[Path], None]


def on_a_bridge(body: Body) -> Body:
    """Run a test in a child in a namespace with a bridge ``br0`` between two ends, ``one`` and ``two``."""
    return in_child(body, make_bridge)


def capture(interface: str, path: Path, **settings: Any) -> Capture:
    """A capture of trial t1 with a ledger of its own, beside the file."""
    return Capture(interface, path, Ledger(path.with_name("ledger.db")), "t1", **settings)


def rows(path: Path) -> list[Thing]:
    """What the ledger beside the file says."""
    return Ledger(path.with_name("ledger.db")).things()


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def make_bridge() -> None:
    leave()
    ip("link add br0 address 52:54:00:00:00:01 type bridge mcast_snooping 0")
    for name, mac in MACS.items():
        ip(f"link add {name} address {mac} type veth peer name {name}-port")
        ip(f"link set {name}-port master br0")
        for end in (name, f"{name}-port"):
            ip(f"link set {end} up")
    ip("link set br0 up")


def send(src: str, dst: str, count: int, size: int = 100) -> None:
    def raw(name: str) -> bytes:
        return bytes.fromhex(MACS[name].replace(":", ""))

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind((src, 0))
        for _ in range(count):
            s.send(raw(dst) + raw(src) + b"\x88\xb6" + b"x" * (size - 14))


def arrived(pcap: Path, src: flows.Endpoint, dst: flows.Endpoint, window: flows.Window) -> int:
    """How many packets from one end to the other the capture shows, neighbour discovery left out."""
    (traffic,) = flows.read(pcap, [window], [src, dst])
    return sum(f.packets for f in flows.between(traffic, src, dst) if f.proto not in flows.NEIGHBOUR)


@on_a_bridge
def test_forwarded_packets_are_captured_between_two_known_frames(tmp_path: Path) -> None:
    pcap = tmp_path / "segment.pcap"
    with capture("br0", pcap) as c:
        c.start()
        send("one", "two", 500)
        send("two", "one", 20, size=1400)
        assert c.problem() == ""
        health = c.finish()
    assert health.healthy, health
    assert health.packets >= 522
    window = flows.Window(health.started, health.ended)
    assert arrived(pcap, ONE, TWO, window) == 500
    assert arrived(pcap, TWO, ONE, window) == 20
    (traffic,) = flows.read(pcap, [window], [ONE, TWO])
    assert sum(f.size for f in flows.between(traffic, TWO, ONE)) == 20 * 1400
    assert c.finish() is health


@on_a_bridge
def test_no_guest_sees_the_known_frame(tmp_path: Path) -> None:
    ears = []
    for name in MACS:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KNOWN_ETHERTYPE))
        s.bind((name, KNOWN_ETHERTYPE))
        s.settimeout(0.5)
        ears.append(s)
    with capture("br0", tmp_path / "segment.pcap") as c:
        assert c.start().finish().healthy
    for s in ears:
        with pytest.raises(TimeoutError):
            s.recv(100)


@on_a_bridge
def test_an_interface_that_is_missing_or_down_is_a_capture_error(tmp_path: Path) -> None:
    ip("link set two down")
    for name in ("nothing", "two"):
        with pytest.raises(CaptureError, match=name):
            capture(name, tmp_path / "segment.pcap", wait_s=1.0).start()


@on_a_bridge
def test_a_capture_that_was_killed_is_not_healthy(tmp_path: Path) -> None:
    with capture("br0", tmp_path / "segment.pcap") as c:
        c.start()
        assert c._process is not None
        c._process.kill()
        c._process.wait()
        assert "ended early" in c.problem()
        health = c.finish()
    assert (health.first_seen, health.last_seen, health.healthy) == (True, False, False)
    assert "ended early" in health.problem


@on_a_bridge
def test_a_capture_that_stands_still_is_not_healthy(tmp_path: Path) -> None:
    with capture("br0", tmp_path / "segment.pcap", wait_s=1.0) as c:
        c.start()
        assert c._process is not None
        c._process.send_signal(signal.SIGSTOP)
        health = c.finish()
    assert (health.last_seen, health.healthy) == (False, False)


@on_a_bridge
def test_an_interface_that_goes_away_is_not_healthy(tmp_path: Path) -> None:
    with capture("br0", tmp_path / "segment.pcap", wait_s=1.0) as c:
        c.start()
        ip("link delete br0")
        health = c.finish()
    assert (health.last_seen, health.healthy) == (False, False)


@on_a_bridge
def test_a_flood_ends_the_capture_and_does_not_fill_the_disk(tmp_path: Path) -> None:
    pcap, limit = tmp_path / "segment.pcap", 200_000
    with capture("br0", pcap, max_bytes=limit) as c:
        c.start()
        send("one", "two", 5000, size=300)
        deadline = time.monotonic() + 5
        while not c.problem() and time.monotonic() < deadline:
            time.sleep(0.05)
        health = c.finish()
    assert pcap.stat().st_size <= limit
    assert "outgrew its limit" in health.problem
    assert not health.healthy
    (traffic,) = flows.read(pcap, [EVER], [ONE, TWO])
    assert traffic.packets > 500


@on_a_bridge
def test_a_capture_that_is_full_is_still_whole(tmp_path: Path) -> None:
    """There is room left for the moment in which the segment is cut, so what came before can be believed."""
    with capture("br0", tmp_path / "segment.pcap", max_bytes=400_000) as c:
        c.start()
        send("one", "two", 500, size=300)
        assert not c.full()
        send("one", "two", 600, size=300)
        wait_until(c.full, 5, "the capture to be full")
        assert c.problem() == ""
        assert c.finish().healthy


@on_a_bridge
def test_a_burst_is_not_dropped(tmp_path: Path) -> None:
    pcap = tmp_path / "segment.pcap"
    with capture("br0", pcap) as c:
        c.start()
        send("one", "two", 20_000, size=1500)
        health = c.finish()
    assert health.healthy, health
    assert arrived(pcap, ONE, TWO, EVER) == 20_000


@on_a_bridge
def test_nothing_is_left_running(tmp_path: Path) -> None:
    c = capture("br0", tmp_path / "segment.pcap")
    with c:
        c.start()
        assert c._process is not None
        pid = c._process.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    assert rows(c.path) == []


@on_a_bridge
def test_the_row_is_there_before_the_process_and_names_it_afterwards(tmp_path: Path) -> None:
    pcap = tmp_path / "segment.pcap"
    c = capture("br0", pcap)
    spawn, before = command.spawn, list[list[Thing]]()

    def look_first(*args: Any, **rest: Any) -> Any:
        before.append(rows(pcap))
        return spawn(*args, **rest)

    command.spawn = look_first
    with c:
        c.start()
        assert [(t.kind, t.name, t.owner, t.detail) for t in before[0]] == [
            (Kind.CAPTURE, str(pcap), "t1", "")
        ]
        (row,) = rows(pcap)
        found = processes.captures_below(tmp_path)[pcap]
        assert row.detail == f"{found.pid} {found.start}"
        assert c._process is not None
        assert found.pid == c._process.pid
        assert c.finish().healthy
        assert rows(pcap) == []


@on_a_bridge
def test_a_capture_that_does_not_start_leaves_no_row(tmp_path: Path) -> None:
    c = capture("nothing", tmp_path / "segment.pcap", wait_s=1.0)
    with pytest.raises(CaptureError):
        c.start()
    assert rows(c.path) == []
