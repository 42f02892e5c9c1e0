"""The campaign's own eyes: what it must not overlook after a strike."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell.ledger import Kind, Ledger
from appliance.host.paths import Paths
from tests.fakes.qemu import look_alike
from tests.torture import checks, strikes
from tests.torture.points import Point
from tests.torture.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="hct", dir="/tmp") as home:
        yield Rig(Paths(Path(home) / "h", tmp_path / "c").make(), tmp_path / "server.log")


def test_a_clean_home_has_no_faults(rig: Rig) -> None:
    Ledger(rig.paths.ledger).close()
    assert checks.at_the_end(rig) == []
    assert checks.nothing_runs(rig, 0.1) == []


def test_a_machine_and_a_capture_that_were_left_are_seen(rig: Rig) -> None:
    left = [
        look_alike("-name", "guest=hc-c1-origin-0a1b2c3d", f"x={rig.paths.libvirt}/monitor"),
        look_alike("-w", str(rig.paths.open_trials / "t1" / "segment.pcap"), name="tcpdump"),
    ]
    try:
        faults = checks.nothing_runs(rig, 0.1)
    finally:
        for process in left:
            process.kill()
            process.wait()
    assert [f"QEMU {left[0].pid}" in f or f"capture {left[1].pid}" in f for f in faults] == [True, True]
    assert checks.nothing_runs(rig, 0.1) == []


def test_a_process_in_the_dead_servers_namespace_is_seen(rig: Rig) -> None:
    rig.life = Path("/proc/self/ns/net").stat().st_ino
    faults = checks.nothing_runs(rig, 0.1)
    assert any(f"process {os.getpid()} in a sealed namespace" in f for f in faults)
    assert checks.nothing_runs(rig, 0.1) == [], "its number may be another's by the next look"


@pytest.mark.parametrize("what", ["row", "cell", "trial", "socket"])
def test_what_is_left_at_the_end_is_seen(rig: Rig, what: str) -> None:
    ledger = Ledger(rig.paths.ledger)
    if what == "row":
        ledger.enter(Kind.TAP, "hct1", "c1")
    elif what == "cell":
        (rig.paths.cells / "c1").mkdir()
    elif what == "trial":
        (rig.paths.open_trials / "t1").mkdir()
    else:
        rig.paths.api_socket.touch()
    assert len(checks.at_the_end(rig)) == 1


def test_the_drawn_victim_is_struck_and_nobody_else(rig: Rig) -> None:
    running = [
        look_alike("-name", f"guest=hc-c1-m{n}-0a1b2c3d", f"{rig.paths.libvirt}/m{n}") for n in range(3)
    ]
    other = look_alike("-name", "guest=hc-c1-origin-0a1b2c3d", "/somewhere/else")
    try:
        pids = sorted(p.pid for p in running)
        struck = strikes.strike(rig, None, Point(1, "qemu", "open", "", 0.0, 0.5))
        assert "hc-c1-m" in struck.whom
        ended = [p.pid for p in running if p.pid == pids[1] and p.wait(10) == -signal.SIGKILL]
        assert ended == [pids[1]]
        assert [p.poll() for p in (*running, other) if p.pid != pids[1]] == [None] * 3
    finally:
        for process in (*running, other):
            process.kill()
            process.wait()


def test_a_strike_at_nobody_is_a_miss(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes, "_VICTIM_S", 0.1)
    for kind in ("qemu", "hang", "tcpdump", "server", "disk-full", "read-only"):
        assert strikes.strike(rig, None, Point(1, kind, "trial", "started", 0.0, 0.5)).whom == ""
