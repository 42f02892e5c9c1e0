"""Which machines a pool of standbys holds, and which of its things nobody holds any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable

from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind, Ledger

_OF_MACHINES = (Kind.DOMAIN, Kind.TAP, Kind.FOLDER)


class Custody:
    """Safe from several threads; ``changed`` is its pool's, and told whatever changes.

    A machine is held from when it is made until it is handed over or destroyed. ``making`` is the id of the
    baseline of which one is being made, or "": that may have rows before it is held.
    """

    def __init__(self, owner: str, ledger: Ledger, changed: threading.Condition) -> None:
        self._owner = owner
        self._ledger = ledger
        self._changed = changed
        self._held: dict[Incarnation, str] = {}  # by the id of the baseline, as those that withstood
        self._lost: dict[Incarnation, str] = {}
        self.making = ""

    def hold(self, machine: Incarnation, baseline_id: str) -> None:
        """It is made; from now on it is known by itself."""
        with self._changed:
            self._held[machine] = baseline_id

    def let_go(self, machine: Incarnation) -> None:
        """It was handed over."""
        with self._changed:
            self._held.pop(machine)
            self._changed.notify_all()

    def made(self) -> None:
        """Nothing is being made now: what was is held, destroyed or lost."""
        with self._changed:
            self.making = ""
            self._changed.notify_all()

    def destroy(self, machines: Iterable[Incarnation]) -> None:
        """End machines that are held. What withstands is lost: it is tried again, and the sweep may take it."""
        for machine in machines:
            gone = False
            with contextlib.suppress(Exception):  # whatever it was, the next one ends too
                machine.destroy()
                gone = True
            with self._changed:
                baseline_id = self._held.pop(machine)
                if not gone:
                    self._lost[machine] = baseline_id
                self._changed.notify_all()

    def destroy_lost(self) -> None:
        """Try again what withstood."""
        with self._changed:
            again, self._lost = self._lost, {}
            self._held |= again
        self.destroy(again)

    def wait_none_of(self, baseline_id: str, limit_s: float) -> None:
        """Wait until none of this baseline is held or being made, but not for longer."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.making != baseline_id and baseline_id not in self._held.values(), limit_s
            )

    def lost(self) -> set[tuple[Kind, str]]:
        """Rows of machines that nobody holds: what is left of those that could not be destroyed.

        Such a machine is never used again, so the answer stays true. While one is being made, only what is
        known to be lost is told.

        Raises:
            LabError: the ledger cannot be read.
        """
        with self._changed:
            rows = {
                (t.kind, t.name) for t in self._ledger.things(owner=self._owner) if t.kind in _OF_MACHINES
            }
            if self.making:
                return rows & {thing for machine in self._lost for thing in machine.things}
            return rows - {thing for machine in self._held for thing in machine.things}
