"""Four ways back to a clean machine, each with a machine of its own and the same three steps.

``wake`` gives the running machine that is to be dirtied, ``reset`` brings a clean one and says how long each
step took, ``rest`` pauses it and waits until nothing of it works in the background: while one way is
measured, the machines of the others stand still.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from appliance.cell import netlink
from appliance.cell.baseline import Baseline
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.errors import LabError
from appliance.host.capacity import sample_process
from appliance.host.clock import wait_until
from appliance.trial.warmup import warm_up
from bench.common.ordinary import Ordinary, prepare_ordinary
from bench.common.recorder import Milestones, milestones
from bench.common.resets import COLD, DIRECT, INTERNAL, STANDBY, Reset
from bench.common.rig import Rig

_BOOT_S = 300.0
_QUIET_S = 90.0
LABEL = "clean"


class Way(Protocol):
    """One way with one machine."""

    def wake(self) -> Incarnation:
        """The machine as it runs, to be dirtied."""

    def reset(self) -> Reset:
        """A clean, plugged machine that answers."""

    def rest(self) -> float:
        """Pause it; returns the seconds until what went on in the background had ended."""

    def close(self) -> None:
        """Leave nothing."""


def anonymous(pid: int | None) -> int:
    """Bytes of a process that belong to no file: what a clone takes from the host beside its baseline.

    The unique set also counts the pages of a baseline's RAM file that only this clone happens to have mapped.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise LabError(f"process {pid} has no anonymous memory")


def _measured(machine: Incarnation, steps: Milestones) -> Reset:
    sample = sample_process(machine.pid or 0)
    if sample is None:
        raise LabError(f"{machine.domain} has no process right after its reset")
    return Reset(steps, anonymous(machine.pid), sample.own)


def _require_joined(machine: Incarnation) -> None:
    """Whatever a way claims, its machine's tap has to be on its bridge."""
    links = netlink.view().links
    bridge = next(link.number for link in links if link.name == machine.spec.bridge)
    if not any(link.name == machine.spec.tap and link.master == bridge for link in links):
        raise LabError(f"{machine.domain} is not plugged in after its reset")


class Restored:
    """Ours: restored directly, or from a standby."""

    def __init__(self, rig: Rig, baseline: Baseline, cell_id: str, *, standby: bool) -> None:
        self._rig = rig
        self._baseline = baseline
        self._pool = rig.pool if standby else None
        self._cell = Cell(cell_id, rig.shop, self._pool)
        self._cell.open()
        self._cell.restore_all([baseline], lambda _p: None)
        self._cell.plug_all()
        if self._pool:
            rig.stand_by(baseline)
        self.rest()

    def wake(self) -> Incarnation:
        """See :class:`Way`."""
        machine = self._cell.machine(self._baseline.machine.name)
        machine.resume()
        return machine

    def reset(self) -> Reset:
        """See :class:`Way`."""
        self._rig.door.events.clear()
        requested = time.monotonic()
        renewal = self._cell.reset([self._baseline], lambda _p: None)[0]
        returned = time.monotonic()
        if self._pool and renewal.direct_because:
            raise LabError(f"no standby was taken: {renewal.direct_because}")
        machine = renewal.machine
        steps = milestones(self._rig.door.events, machine.domain, machine.spec.tap, requested, returned)
        reset = _measured(machine, steps)
        if renewal.withheld or not machine.qga.ping():
            raise LabError(f"{machine.domain}: {len(renewal.withheld)} withheld, or it fell silent again")
        _require_joined(machine)
        return reset

    def rest(self) -> float:
        """See :class:`Way`."""
        began = time.monotonic()
        self._cell.machine(self._baseline.machine.name).pause()
        if self._pool and not self._pool.wait_ready(_QUIET_S):
            raise LabError(f"no standby came: {self._pool.missing()}")
        wait_until(self._alone, _QUIET_S, "the machine's predecessor to be gone", interval=0.05)
        return time.monotonic() - began

    def _alone(self) -> bool:
        return len(self._rig.shop.ledger.things(Kind.FOLDER, owner=self._cell.id)) == 1

    def close(self) -> None:
        """See :class:`Way`."""
        self._cell.close()


class Reverted:
    """libvirt's own internal snapshot of an ordinary domain that was booted and warmed as a baseline is."""

    def __init__(self, rig: Rig, baseline: Baseline, cell_id: str) -> None:
        began = time.monotonic()
        self._rig = rig
        self._cell = Cell(cell_id, rig.shop)
        self._cell.open()
        self._machine = machine = prepare_ordinary(rig.shop, baseline.machine, cell_id)
        machine.start()
        machine.plug()
        machine.resume()
        machine.wait_for_agent(_BOOT_S)
        warm_up(machine, rig.keys, warm_model=True, say=lambda _what: None)
        self.made_s = time.monotonic() - began
        rig.door.save_internally(machine.domain, LABEL)
        machine.pause()

    def wake(self) -> Incarnation:
        """See :class:`Way`."""
        self._machine.resume()
        return self._machine

    def reset(self) -> Reset:
        """See :class:`Way`."""
        machine = self._machine
        self._rig.door.events.clear()
        requested = time.monotonic()
        self._rig.door.revert_internally(machine.domain, LABEL)
        reverted = time.monotonic() - requested
        machine.read_pid()
        machine.wait_for_agent(_BOOT_S)
        answered = time.monotonic() - requested
        _require_joined(machine)
        return _measured(machine, _plain(reverted, answered))

    def rest(self) -> float:
        """See :class:`Way`."""
        self._machine.pause()
        return 0.0

    def close(self) -> None:
        """See :class:`Way`."""
        self._machine.destroy()
        self._cell.close()


class Booted:
    """A cold boot from a fresh overlay of the image. Ending the machine before is left out, in its favour."""

    def __init__(self, rig: Rig, baseline: Baseline, cell_id: str) -> None:
        self._rig = rig
        self._baseline = baseline
        self._cell = Cell(cell_id, rig.shop)
        self._cell.open()
        self._machine: Ordinary | None = None

    def wake(self) -> Incarnation:
        """See :class:`Way`."""
        raise LabError("nothing is dirtied before a cold boot: it starts from the image")

    def reset(self) -> Reset:
        """See :class:`Way`."""
        requested = time.monotonic()
        machine = self._machine = prepare_ordinary(self._rig.shop, self._baseline.machine, self._cell.id)
        machine.start()
        machine.plug()
        machine.resume()
        started = time.monotonic() - requested
        machine.wait_for_agent(_BOOT_S)
        answered = time.monotonic() - requested
        _require_joined(machine)
        return _measured(machine, _plain(started, answered))

    def rest(self) -> float:
        """See :class:`Way`."""
        began = time.monotonic()
        if self._machine is not None:
            self._machine.destroy()
            self._machine = None
        return time.monotonic() - began

    def close(self) -> None:
        """See :class:`Way`."""
        self.rest()
        self._cell.close()


def _plain(resumed: float, answered: float) -> Milestones:
    return Milestones(
        began=None, started=None, loaded=None, resumed=resumed, answered=answered, proved=answered,
        plugged=answered, ready=answered, returned=answered,
    )  # fmt: skip


def make_way(name: str, rig: Rig, baseline: Baseline, cell_id: str) -> Way:
    """A way by its name."""
    if name == COLD:
        return Booted(rig, baseline, cell_id)
    if name == INTERNAL:
        return Reverted(rig, baseline, cell_id)
    return Restored(rig, baseline, cell_id, standby={DIRECT: False, STANDBY: True}[name])
