"""Who was given room on this host: decided and written down in one step, so that two never get the same room.

A grant is made for a cell before anything of it exists, and holds at its full size until the cell is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from appliance.cell.baseline import Baseline, DiskBaseline
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.config.settings import GuestSettings
from appliance.errors import ConflictError
from appliance.host.capacity import HostCapacity, held_memory
from appliance.pipeline.admission import (
    OVERHEAD_MIB,
    Decision,
    Held,
    Need,
    Verdict,
    decide,
    free_after_promises,
    refusal,
)

_MIB = 1 << 20


class Standbys(Protocol):
    """The machines that stand by; what of a pool is needed here."""

    def ready(self) -> Mapping[str, Incarnation]:
        """What stands by now."""

    def give_up(self, why: str) -> int:
        """Destroy them all until they are tried again; returns how many there were."""

    def try_again(self) -> None:
        """Make again what there was no room for."""


class Grants:
    """Every call may come from any thread. ``cells`` are all open cells by id, also those without a grant."""

    def __init__(
        self,
        rules: GuestSettings,
        measure: Callable[[], HostCapacity],
        cells: Mapping[str, Cell],
        standbys: Standbys,
    ) -> None:
        self._rules = rules
        self._measure = measure
        self._cells = cells
        self._standbys = standbys
        self._granted: dict[str, Need] = {}
        self._by_hand: list[str] = []
        self._lock = threading.Lock()
        self._waits = ""
        self.on_release: Callable[[], None] = lambda: None

    def request(self, cell: str, need: Need) -> Decision:
        """Give room to a cell that is about to be opened, if there is room for it now."""
        with self._lock:
            try:
                decision = decide(need, self._measure(), self._held(), self._rules)
            except OSError as e:
                return Decision(verdict=Verdict.WAIT, reason=f"this host cannot be measured: {e}")
            if decision.verdict is Verdict.ADMIT:
                self._granted[cell] = need
            elif self._by_hand:
                named = f"{decision.reason} (cells opened by hand hold room too: {', '.join(self._by_hand)})"
                return decision.model_copy(update={"reason": named})
            return decision

    def require(self, cell: str, need: Need) -> None:
        """As :meth:`request`, for a cell opened by hand: it never waits, and standbys make way for it.

        Raises:
            CapacityError: there is no room now, or never will be.
        """
        decision = self.request(cell, need)
        given_up = self._standbys.give_up("given up for a cell") if decision.pressed else 0
        if given_up:
            decision = self.request(cell, need)
        if decision.verdict is not Verdict.ADMIT:
            if given_up:  # and it made too little room
                self._standbys.try_again()
            raise refusal(decision, need, self._measure())
        with self._lock:
            self._by_hand.append(cell)

    def require_possible(self, need: Need) -> None:
        """Refuse what would not fit if nothing of ours ran.

        Raises:
            CapacityError: it would never fit; the figures are in the message and the fields.
        """
        with self._lock:
            host = self._measure()
            decision = decide(need, host, self._held(), self._rules)
        if decision.verdict is Verdict.NEVER:
            raise refusal(decision, need, host)

    def release(self, cell: str) -> None:
        """The cell is gone; safe when repeated."""
        with self._lock:
            released = self._granted.pop(cell, None)
            self._by_hand = [c for c in self._by_hand if c != cell]
        if released is not None:
            waited = bool(self._waits)
            self.on_release()
            if not waited:  # else the room is for who waited
                self._standbys.try_again()

    def owners(self) -> set[str]:
        """The cells that hold a grant."""
        with self._lock:
            return set(self._granted)

    def standbys_hold(self) -> bool:
        """Whether any machine stands by, so that giving them up would free something."""
        return bool(self._standbys.ready())

    def give_up_standbys(self) -> None:
        """End all machines that stand by: somebody waits for their memory."""
        self._standbys.give_up("given up for a trial")

    def somebody_waits(self, reason: str, *, started: bool = False) -> None:
        """Note why somebody waits for memory; "" if nobody does.

        Standbys are tried again when nobody waits any more, but not if a trial has just ``started``: they would
        compete with its preflight.
        """
        over = bool(self._waits) and not reason and not started
        self._waits = reason
        if over:
            self._standbys.try_again()

    def room_for_standby(self, baseline: Baseline) -> str:
        """Why there is no room for one more machine of this baseline that stands by, or "".

        A paused machine does not grow, so a clone takes only what it holds before it works. One that boots has
        memory of its own, all of it. It never takes what is promised to running machines, nor anything while
        somebody waits for room.
        """
        machine = baseline.machine
        if self._waits:
            return f"a trial waits: {self._waits}"
        need_mib = OVERHEAD_MIB + (machine.memory_mib if isinstance(baseline, DiskBaseline) else 0)
        with self._lock:
            free = free_after_promises(self._measure(), self._held(), self._rules)
        if free < need_mib * _MIB:
            free_mib = max(0, free) // _MIB
            return f"{machine.name} standing by needs {need_mib} MiB, {free_mib} MiB free after promises"
        return ""

    def require_within(self, cell: str, need: Need) -> None:
        """Refuse that a cell's machines become more than what it was given room for.

        Raises:
            ConflictError: they would take more memory or virtual CPUs.
        """
        with self._lock:
            granted = self._granted.get(cell)
        if granted is None:
            return
        for what, unit, asked, have in (
            ("memory", " MiB", need.memory // _MIB, granted.memory // _MIB),
            ("virtual CPUs", "", need.vcpus, granted.vcpus),
        ):
            if asked > have:
                raise ConflictError(
                    f"cell {cell} would have {asked}{unit} of {what}, and was given room for {have}{unit}",
                    hint="choose a baseline of a machine that is no larger",
                )

    def _held(self) -> Held:
        # What templates hold while a granted cell's baselines are made is not counted: their RAM is a shared file,
        # which stays available if it is on a disk, and is on the careful side if it is on a tmpfs. What a trial has
        # written as evidence is not counted as held either: it is promised in full until the trial ends.
        granted = list(self._granted.items())
        memory = disk = 0
        for cell_id, need in granted:
            cell = self._cells.get(cell_id)
            held = _held_by(cell.everything) if cell is not None else (0, 0)
            memory += min(held[0], need.memory)
            disk += min(held[1], need.disk)
        needs = [need for _, need in granted]
        return Held(
            sets=len(needs),
            vcpus=sum(n.vcpus for n in needs),
            memory=sum(n.memory for n in needs),
            memory_held=memory,
            disk=sum(n.disk for n in needs),
            disk_held=disk,
            standby=_held_by(list(self._standbys.ready().values()))[0],
        )


def _held_by(machines: Sequence[Incarnation]) -> tuple[int, int]:
    """Memory, each at most its full size, and disk that these hold now. Bytes."""
    full = [(m.spec.machine.memory_mib + OVERHEAD_MIB) * _MIB for m in machines]
    memory = [held_memory(m.pid) or 0 if m.pid else 0 for m in machines]
    return sum(map(min, full, memory)), sum(m.written() for m in machines)
