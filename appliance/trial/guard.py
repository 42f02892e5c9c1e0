"""Checks that go on beside whoever works with a cell, so that no guest decides when they are made.

A question to a guest may take minutes. Meanwhile the capture may end, or a machine fill the host's disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.errors import HotcellError
from appliance.host.log import Log
from appliance.model import printable
from appliance.trial.ports import Capture, Journal
from appliance.trial.stop import StopFlag

log = Log("hotcell.guard")
_TICK_S = 0.25
_JOIN_S = 60.0  # a look may be waiting for libvirt, which has limits of its own below this
_MB = 1_000_000


class Guard:
    """Calls ``look`` every quarter of a second, in a thread of its own, from :meth:`start` to :meth:`dismiss`.

    A look that raises is the last one; ``on_failure`` is told and has to stop what is no longer guarded.
    """

    def __init__(self, name: str, look: Callable[[], None], on_failure: Callable[[Exception], None]) -> None:
        self._look = look
        self._on_failure = on_failure
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"guard-{name}", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def dismiss(self) -> None:
        """No look begins after this returns. May be called at any time, also by the guard itself."""
        self._over.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)

    @property
    def dismissed(self) -> bool:
        """True from the moment :meth:`dismiss` was called."""
        return self._over.is_set()

    def _run(self) -> None:
        while not self._over.wait(_TICK_S):
            try:
                self._look()
            except Exception as e:  # noqa: BLE001 - a guard that ends unseen guards nothing
                self._on_failure(e)
                return


def hold(machine: Incarnation) -> None:
    """Cut a machine off and pause it, for good; one that cannot be is killed."""
    try:
        machine.unplug()
        machine.pause()
    except (HotcellError, OSError):
        machine.kill()


class DiskHold:
    """Holds every machine that made the host store more than ``limit`` bytes, each incarnation once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: set[str] = set()

    def look(self, machines: Iterable[Incarnation]) -> list[tuple[Incarnation, int]]:
        """Machines that were held now, with the bytes they had the host store."""
        held = []
        for machine in machines:
            written = machine.written()
            if written > self.limit and machine.id not in self._held:
                hold(machine)
                self._held.add(machine.id)
                held.append((machine, written))
        return held


class CellGuard:
    """Holds machines of a cell without a trial to its disk limit, its whole life long and after every reset.

    A machine that was held is there to be looked at, and comes back with a reset.
    """

    def __init__(self, cell: Cell, disk_mb: int) -> None:
        self._cell = cell
        self._disks = DiskHold(disk_mb * _MB)
        self._guard = Guard(cell.id, self._look, self._failed)

    def start(self) -> None:
        """Begin; machines may come later."""
        self._guard.start()

    def dismiss(self) -> None:
        """Guard nothing any more; for when the machines are gone."""
        self._guard.dismiss()

    def _look(self) -> None:
        for machine, written in self._disks.look(list(self._cell.machines.values())):
            log.warning("disk-held", machine=machine.domain, written=written, limit=self._disks.limit)

    def _failed(self, e: Exception) -> None:
        log.error("guard-failed", cell=self._cell.id, error=f"{type(e).__name__}: {e}")
        with suppress(Exception):
            self._cell.condemn()


class TrialGuard:
    """Guards a trial from its capture's start on: the capture first, the disks too from the run on.

    A capture with a problem cuts the cell for good and stops the trial, which is then void: what a subject
    does unrecorded cannot be scored. One that is full cuts every link while all before is recorded, and a machine
    beyond its disk limit is cut and paused; then the trial goes on and counts: that is the subject's doing.
    (Within the run both end the run too, see ``watch``; of a full capture ``on_full`` tells.)
    """

    def __init__(
        self, cell: Cell, disk_mb: int, journal: Journal, stop: StopFlag, on_full: Callable[[], None]
    ) -> None:
        self.notes: list[str] = []
        self._on_full = on_full
        self._full = False
        self._cell = cell
        self._journal = journal
        self._stop = stop
        self._disks = DiskHold(disk_mb * _MB)
        self._capture: Capture | None = None
        self._holding = False
        self._lock = threading.Lock()
        self._guard = Guard(cell.id, self._look, self._failed)

    def begin(self, capture: Capture) -> None:
        """Guard the capture from now on."""
        self._capture = capture
        self._guard.start()

    def hold_disks(self) -> None:
        """Guard the disks too; machines that are beyond the limit now are held when this returns."""
        with self._lock:
            self._holding = True
            if not self._guard.dismissed:
                self._look_at_disks()

    def release_capture(self) -> None:
        """The capture is about to be ended; what happens to it from now on is no problem."""
        with self._lock:
            self._capture = None

    def dismiss(self) -> None:
        """Guard nothing any more."""
        self._guard.dismiss()

    def _look(self) -> None:
        with self._lock:
            if self._guard.dismissed:
                return
            self._look_at_capture()
            if self._holding:
                self._look_at_disks()

    def _look_at_capture(self) -> None:
        problem = self._capture.problem() if self._capture is not None else ""
        if problem:
            self._capture = None  # told once
            self._stop.set(f"the capture failed while it was needed: {printable(problem, 300)}", failure=True)
            self._cell.condemn()
        elif self._capture is not None and not self._full and self._capture.full():
            self._full = True
            self._cell.cut()
            self.notes.append("every link was cut: the capture held as many packets as it is to hold")
            self._journal.write("traffic-held")
            self._on_full()

    def _look_at_disks(self) -> None:
        for machine, written in self._disks.look(list(self._cell.machines.values())):
            self.notes.append(
                f"{machine.name} was cut and paused: it wrote {written // _MB} MB of {self._disks.limit // _MB}"
            )
            self._journal.write("disk-held", machine=machine.name, written=written, limit=self._disks.limit)

    def _failed(self, e: Exception) -> None:
        self._stop.set(f"the trial is no longer guarded: {type(e).__name__}: {e}", failure=True)
        with suppress(Exception):
            self._cell.condemn()
