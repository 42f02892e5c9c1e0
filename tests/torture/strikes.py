"""What is done to whom at a point's moment, and what has to be put right again afterwards by hand."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from appliance.cell import processes
from appliance.cell.processes import Process
from appliance.errors import HotcellError
from appliance.host.clock import WaitError, wait_until
from appliance.service import CellView
from tests.torture.disk import LoopDisk
from tests.torture.points import Point
from tests.torture.rig import Rig

# A victim that does not exist at the drawn moment is waited for as long; then the point is a miss, and says so.
_VICTIM_S = 4.0
# A jump of the wall clock: an hour and a bit over a day, both ways.
_JUMPS = (3600.0, -3600.0, 90_000.0, -90_000.0)
# Kinds after which the server is gone, or refuses to go on.
NEEDS_START = frozenset({"server", "server-and-warden", "warden", "disk-full", "read-only", "clock"})


class Struck(NamedTuple):
    """Who was struck, in words; "" if nobody was there."""

    whom: str


def strike(rig: Rig, disk: LoopDisk | None, point: Point) -> Struck:
    """Do it."""
    return _STRIKES[point.kind](rig, disk, point)


def _server(rig: Rig, _disk: LoopDisk | None, _point: Point) -> Struck:
    pid = rig.server.pid if rig.server else 0
    rig.kill()
    return Struck(f"server {pid}" if pid else "")


def _server_and_warden(rig: Rig, disk: LoopDisk | None, point: Point) -> Struck:
    """The warden first, so that nothing cuts the machines: only the next start can find them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(rig.warden, signal.SIGKILL)
    return Struck(f"warden {rig.warden}, {_server(rig, disk, point).whom}")


def _warden(rig: Rig, _disk: LoopDisk | None, _point: Point) -> Struck:
    os.kill(rig.warden, signal.SIGKILL)
    return Struck(f"warden {rig.warden}")


def _signal_one(find: Callable[[], list[Process]], point: Point, number: signal.Signals) -> Process | None:
    """Signal one of those that are there, the drawn one; one that ends meanwhile is no victim."""

    def hit() -> Process | None:
        found = sorted(find())
        victim = found[int(point.pick * len(found))] if found else None
        return victim if victim and processes.send(victim, number) else None

    with contextlib.suppress(WaitError):
        return wait_until(hit, _VICTIM_S, "a victim", 0.01)
    return None


def _qemu(rig: Rig, _disk: LoopDisk | None, point: Point) -> Struck:
    victim = _signal_one(rig.qemus, point, signal.SIGKILL)
    return Struck(f"QEMU {_name(victim)}" if victim else "")


def _hang(rig: Rig, _disk: LoopDisk | None, point: Point) -> Struck:
    victim = _signal_one(rig.qemus, point, signal.SIGSTOP)
    return Struck(f"QEMU {_name(victim)}" if victim else "")


def _name(qemu: Process) -> str:
    return next((a.split(b",")[0].decode() for a in qemu.argv if a.startswith(b"guest=")), str(qemu.pid))


def _tcpdump(rig: Rig, _disk: LoopDisk | None, point: Point) -> Struck:
    captures = processes.captures_below
    victim = _signal_one(lambda: list(captures(rig.paths.home).values()), point, signal.SIGKILL)
    return Struck(f"tcpdump {victim.pid}" if victim else "")


def _qga(rig: Rig, _disk: LoopDisk | None, point: Point) -> Struck:
    """From within: the agent is told to stop itself, so the answer to that never comes."""
    with rig.client() as client:
        cells = client.get(list[CellView], "cells")
        if not cells or not cells[0].machines:
            return Struck("")
        machine = cells[0].machines[int(point.pick * len(cells[0].machines))]
        body = {"argv": ["/usr/bin/systemctl", "stop", "qemu-guest-agent"], "timeout_s": 5}
        with contextlib.suppress(HotcellError):
            client.post(dict[str, object], f"cells/{cells[0].id}/machines/{machine}/exec", body)
    return Struck(f"qga of {machine}")


def _full(_rig: Rig, disk: LoopDisk | None, point: Point) -> Struck:
    if disk is None:
        return Struck("")
    leave = int(point.pick * (1 << 20))
    disk.fill(leave)
    return Struck(f"disk, {leave >> 10} KiB left")


def _read_only(_rig: Rig, disk: LoopDisk | None, _point: Point) -> Struck:
    if disk is None:
        return Struck("")
    disk.break_it()
    return Struck("disk, read-only" if disk.read_only else "")


def _clock(rig: Rig, _disk: LoopDisk | None, point: Point) -> Struck:
    jump = _JUMPS[int(point.pick * len(_JUMPS))]
    rig.clock.write_text(str(jump))
    return Struck(f"clock {jump:+.0f} s")


_STRIKES: dict[str, Callable[[Rig, LoopDisk | None, Point], Struck]] = {
    "server": _server, "server-and-warden": _server_and_warden, "warden": _warden, "qemu": _qemu,
    "hang": _hang, "tcpdump": _tcpdump, "qga": _qga, "disk-full": _full, "read-only": _read_only,
    "clock": _clock,
}  # fmt: skip
