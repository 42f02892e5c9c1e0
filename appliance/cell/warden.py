"""The warden: a small separate process that cuts the cell when the control process dies or hangs.

It holds the read end of a pipe. End of file, or no heartbeat for the limit, and it takes every tap of the
ledger off its bridge, kills every QEMU of the ledger, and writes why. It runs in the sealed namespace
(inherited), opens the ledger read-only and never opens libvirt.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from appliance.cell import netlink
from appliance.cell.processes import kill_domain_process
from appliance.errors import HotcellError
from appliance.host import command
from appliance.host.clock import wait_until
from appliance.host.paths import Paths

HEARTBEAT_S = 1.0
# A host whose two cores are both busy with guests was seen to delay the server by 2 s.
LIMIT_S = 10.0
_GOODBYE = b"q"
_CUT_S = 30.0


class Warden:
    """The server's side: starts the process, feeds it, and tells whether it lives."""

    def __init__(self, paths: Paths, *, limit_s: float = LIMIT_S) -> None:
        read_end, self._pipe = os.pipe()
        where = (str(paths.home), str(paths.cache))
        argv = [sys.executable, "-m", "appliance.cell.warden", str(read_end), *where, str(limit_s)]
        self._process = command.spawn(argv, pass_fds=(read_end,))
        os.close(read_end)
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._lost = False
        self._on_loss: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._beat, name="warden-heartbeat", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the process watches."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def guard(self, on_loss: Callable[[], None]) -> None:
        """Have ``on_loss`` called, in a thread of ours, once the process has ended without being dismissed.

        Then it has cut the cells (we were silent for too long) or was killed; nothing may go on unwatched.
        """
        with self._lock:
            self._on_loss = on_loss
            lost = self._lost
        if lost:
            on_loss()

    def dismiss(self) -> None:
        """Tell it that all is over and wait for its end; nothing is cut."""
        self._done.set()
        self._thread.join(5)
        with contextlib.suppress(OSError):  # it has gone already
            os.write(self._pipe, _GOODBYE)
        os.close(self._pipe)
        command.end(self._process, grace=5)

    def leave_alone(self) -> None:
        """Go silent without a goodbye: it cuts every link and kills every machine of the ledger. Waits for that."""
        self._done.set()
        self._thread.join(5)
        os.close(self._pipe)
        with contextlib.suppress(HotcellError):  # it outlives us then, and goes on
            wait_until(lambda: not self.alive, _CUT_S, "the warden to cut", interval=0.05)

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_S):
            try:
                os.write(self._pipe, b".")
            except OSError:
                with self._lock:
                    self._lost = True
                    on_loss = self._on_loss
                if on_loss is not None:
                    on_loss()
                return


def watch(pipe: int, limit_s: float) -> str:
    """Wait for a reason to cut; "" means that the server said goodbye."""
    while True:
        if not select.select([pipe], [], [], limit_s)[0]:
            return f"no heartbeat for {limit_s:.0f} s"
        data = os.read(pipe, 4096)
        if not data:
            return "the control process is gone"
        if _GOODBYE in data:
            return ""


def cut(paths: Paths, reason: str) -> dict[str, object]:
    """Unplug every tap, then kill every QEMU of the ledger; one failure never stops the rest."""
    began, failures, taps, killed = time.time(), list[str](), 0, 0
    try:
        rows = _rows(paths.ledger)
    except sqlite3.Error as e:
        failures.append(f"the ledger cannot be read ({e}): everything below this home is cut")
        rows = _rows_without_ledger(paths)
    for kind, name in rows:
        if kind != "tap":
            continue
        try:
            netlink.unplug(name)
            taps += 1
        except (HotcellError, OSError) as e:
            failures.append(f"{name}: {e}")
    cut_s = time.time() - began
    for kind, name in rows:
        if kind == "domain":
            try:
                pid = int((paths.domain_pids / f"{name}.pid").read_text())
                killed += kill_domain_process(pid, name)
            except (OSError, ValueError) as e:
                failures.append(f"{name}: {e}")
    return {
        "at": began, "reason": reason, "links_cut": taps, "cut_s": round(cut_s, 4),
        "machines_killed": killed, "seconds": round(time.time() - began, 4), "failures": failures,
    }  # fmt: skip


def _rows(ledger: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=5) as db:
        return [(str(k), str(n)) for k, n in db.execute("SELECT kind, name FROM things ORDER BY id DESC")]


def _rows_without_ledger(paths: Paths) -> list[tuple[str, str]]:
    """What libvirt's own files below this home tell: its domains. A killed QEMU takes its tap along."""
    return [("domain", p.stem) for p in paths.domain_pids.glob("*.pid")]


def main(argv: list[str]) -> int:
    """``PIPE HOME CACHE LIMIT``: watch, and cut if there is a reason."""
    pipe, paths, limit_s = int(argv[0]), Paths(Path(argv[1]), Path(argv[2])), float(argv[3])
    reason = watch(pipe, limit_s)
    if reason:
        report = cut(paths, reason)
        with paths.warden_log.open("a") as f:
            f.write(json.dumps(report) + "\n")
            f.flush()
            os.fsync(f.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
