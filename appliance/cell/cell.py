"""A cell: machines on a segment of their own inside the sealed namespace.

The order is always: bridge, machines restored unplugged, every proof, and only then plug. One machine that
cannot be proved keeps all of them unplugged.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from appliance.cell import netlink
from appliance.cell.baseline import Baseline, Workshop, prove, restore
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.proof import Proof
from appliance.cell.spec import anchor_name, bridge_name
from appliance.errors import HotcellError, LabError, NotFoundError, ResetError

OnProof = Callable[[Proof], None]


class Cell:
    """One cell. ``open`` makes the segment, ``restore_all`` proved machines, ``close`` leaves nothing."""

    def __init__(self, cell_id: str, shop: Workshop) -> None:
        self.id = cell_id
        self.bridge = bridge_name(cell_id)
        self._anchor = anchor_name(cell_id)
        self.machines: dict[str, Incarnation] = {}
        self._condemned = False
        self._plugging = threading.Lock()
        self._shop = shop

    def open(self) -> None:
        """Make the segment. Nothing is on it yet."""
        self._shop.ledger.enter(Kind.BRIDGE, self.bridge, self.id)
        self._shop.ledger.enter(Kind.ANCHOR, self._anchor, self.id)
        netlink.create_bridge(self.bridge, self._anchor)

    def machine(self, name: str) -> Incarnation:
        """A machine by name.

        Raises:
            NotFoundError: there is none of that name.
        """
        try:
            return self.machines[name]
        except KeyError:
            raise NotFoundError(
                f"cell {self.id} has no machine {name!r}",
                hint=f"it has: {', '.join(sorted(self.machines)) or 'none'}",
            ) from None

    def restore_all(self, baselines: Sequence[Baseline], on_proof: OnProof) -> list[Proof]:
        """Restore and prove one incarnation of each baseline, side by side; all stay unplugged.

        Raises:
            ResetError: a machine is not proved; it was destroyed, and the others stay unplugged.
        """
        with concurrent.futures.ThreadPoolExecutor(max(1, len(baselines))) as pool:
            proofs = list(pool.map(self._restore_one, baselines))
        for proof in proofs:
            on_proof(proof)
        bad = [p for p in proofs if not p.proved]
        for proof in bad:
            with suppress(HotcellError):  # what cannot be destroyed stays in the cell, and close tries again
                self._end(proof.machine)
        if bad:
            raise ResetError(
                "withheld: " + "; ".join(f"{p.machine} ({p.failures})" for p in bad),
                hint="the machine was destroyed; the baseline is checked before its next use",
            )
        return proofs

    def _restore_one(self, baseline: Baseline) -> Proof:
        began = time.monotonic()
        clone = restore(self._shop, baseline, self.id)
        self.machines[clone.name] = clone
        return prove(clone, baseline, began)

    def replace(self, baseline: Baseline, on_proof: OnProof) -> Proof:
        """Reset one machine: the old incarnation is destroyed, a proved one takes its place, unplugged."""
        self._end(baseline.machine.name)
        return self.restore_all([baseline], on_proof)[0]

    def _end(self, name: str) -> None:
        """Destroy a machine; one that withstands stays known, so that it is tried again."""
        machine = self.machines.get(name)
        if machine is not None:
            machine.destroy()
            self.machines.pop(name, None)

    def plug_all(self) -> None:
        """Join every machine to the segment.

        Raises:
            LabError: the cell was condemned.
        """
        with self._plugging:
            if self._condemned:
                raise LabError(f"cell {self.id} was cut for good; nothing is plugged into it again")
            for machine in self.machines.values():
                machine.plug()

    def condemn(self) -> float:
        """Cut every link and never plug again, whatever another thread is about to do; returns seconds."""
        self._condemned = True  # before the lock: who holds it plugs at most the machines of one call
        with self._plugging:
            return self.cut()

    def cut(self) -> float:
        """Unplug every machine, whatever state it is in; returns seconds.

        Raises:
            LabError: a link was not cut; the others were tried all the same.
        """
        began = time.monotonic()
        failures = []
        for machine in list(self.machines.values()):
            try:
                machine.unplug()
            except HotcellError as e:
                failures.append(e)
        if failures:
            raise LabError(f"cell {self.id}: {len(failures)} links were not cut: {failures[0]}")
        return time.monotonic() - began

    def destroy_machines(self) -> None:
        """Destroy every incarnation, side by side; each is tried, the first failure raised at the end."""
        with suppress(HotcellError):
            self.cut()
        names = list(self.machines)
        with concurrent.futures.ThreadPoolExecutor(max(1, len(names))) as pool:
            failures = [f.exception() for f in [pool.submit(self._end, n) for n in names]]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Destroy the machines and the segment; nothing of the cell is left."""
        try:
            self.destroy_machines()
        finally:
            for kind, name in ((Kind.ANCHOR, self._anchor), (Kind.BRIDGE, self.bridge)):
                netlink.delete_link(name)
                self._shop.ledger.strike(kind, name)
            folder = self._shop.paths.cells / self.id
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
