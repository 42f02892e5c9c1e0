"""A cell: machines on a segment of their own inside the sealed namespace.

The order is always: segment, machines restored unplugged, every proof, and only then plug. A machine whose
proof fails is withheld and destroyed, and one replacement is made; without a proof for every machine of the
group, none is plugged.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from appliance.cell.baseline import Baseline, Workshop, prove, restore, set_clock
from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import Proof
from appliance.cell.segment import Segment
from appliance.cell.standby import StandbyPool
from appliance.errors import GuestChannelError, HotcellError, LabError, NotFoundError, ResetError

T = TypeVar("T")
R = TypeVar("R")
OnProof = Callable[[Proof], None]
_ATTEMPTS = 2
_WAKE_S = 10


class Renewal(NamedTuple):
    """How one machine came to its new incarnation. Seconds from the request.

    ``direct_because`` is "" if a standby was taken. ``withheld`` are proofs of machines that were destroyed
    for it; ``answered_s`` is when the guest answered, ``seconds`` when its clock was set too.
    """

    machine: Incarnation
    proof: Proof
    direct_because: str
    withheld: tuple[Proof, ...]
    answered_s: float
    seconds: float


class Cell:
    """One cell. ``open`` makes the segment, ``restore_all`` proved machines, ``close`` leaves nothing.

    With a ``pool``, machines come from standbys where there are any.
    """

    def __init__(self, cell_id: str, shop: Workshop, pool: StandbyPool | None = None) -> None:
        self.id = cell_id
        self.machines: dict[str, Incarnation] = {}
        self._names: list[str] = []
        self._segment = Segment(cell_id, shop.ledger)
        self._dying: dict[str, Incarnation] = {}
        self._ends: list[concurrent.futures.Future[None]] = []
        self._condemned = False
        self._plugging = threading.Lock()
        self._shop = shop
        self._pool = pool

    @property
    def bridge(self) -> str:
        """Name of the segment's bridge."""
        return self._segment.bridge

    def open(self) -> None:
        """Make the segment. Nothing is on it yet."""
        self._segment.open()

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

    # -- machines come ----------------------------------------------------------------------------------

    def restore_all(self, baselines: Sequence[Baseline], on_proof: OnProof) -> list[Renewal]:
        """A proved machine of each baseline, side by side; all run and stay unplugged.

        ``on_proof`` gets every proof, those of withheld machines too.

        Raises:
            ResetError: a machine and its replacement were withheld.
            LabError: libvirt, QEMU or a guest refused.
        """
        return self._renew(baselines, on_proof, time.monotonic(), plug=False)

    def reset(self, baselines: Sequence[Baseline], on_proof: OnProof) -> list[Renewal]:
        """Replace machines of this cell as a group: all are cut and stopped at once, and new ones plugged in
        only when each is proved. The old ones end in the background.

        Raises:
            ResetError: a machine and its replacement were withheld; none of the group is plugged.
            LabError: a link was not cut, the cell was condemned, or libvirt, QEMU or a guest refused.
        """
        began = time.monotonic()
        self._retire([self.machines[b.machine.name] for b in baselines if b.machine.name in self.machines])
        return self._renew(baselines, on_proof, began, plug=True)

    def _renew(
        self, baselines: Sequence[Baseline], on_proof: OnProof, began: float, *, plug: bool
    ) -> list[Renewal]:
        if len(baselines) == 1:  # no thread: that would cost a tenth of what a standby takes
            renewals = [self._fresh(baselines[0], began)]
        else:
            renewals = _side_by_side(lambda b: self._fresh(b, began), baselines)
        self._names += [b.machine.name for b in baselines if b.machine.name not in self._names]
        # Side by side they came in any order; people and views get them in the order they were asked for.
        self.machines = {n: self.machines[n] for n in self._names if n in self.machines}
        for renewal in renewals:
            for proof in renewal.withheld:
                on_proof(proof)
            if renewal.proof.proved:
                on_proof(renewal.proof)
        bad = [r for r in renewals if not r.proof.proved]
        if bad:
            raise ResetError(
                "withheld: "
                + "; ".join(f"{r.proof.machine} ({r.proof.failures})" for r in bad)
                + "; and so was what replaced it",
                hint="the machines were destroyed; the baseline is checked before its next use",
            )
        if plug:
            self._plug([r.machine for r in renewals])
        if len(renewals) == 1:
            return [self._wake(renewals[0], baselines[0], began)]
        return _side_by_side(lambda n: self._wake(renewals[n], baselines[n], began), range(len(renewals)))

    def _fresh(self, baseline: Baseline, began: float) -> Renewal:
        """A proved machine: a standby, or restored now. After two failed proofs the last one is returned."""
        standby, why = self._pool.take(baseline, self.id) if self._pool else (None, "no standbys are kept")
        if standby is not None:
            self.machines[standby.machine.name] = standby.machine
            return Renewal(standby.machine, standby.proof, "", (), 0.0, 0.0)
        withheld: list[Proof] = []
        while True:
            start = time.monotonic() if withheld else began
            clone = restore(self._shop, baseline, self.id)
            self.machines[clone.name] = clone
            proof = prove(clone, baseline, start)
            if proof.proved:
                return Renewal(clone, proof, why, tuple(withheld), 0.0, 0.0)
            withheld.append(proof)
            try:
                self._retire([clone])
            except HotcellError:  # a link that withstands: close tries again, and nobody plugs it in
                self._dying[clone.id] = self.machines.pop(clone.name)
            if len(withheld) == _ATTEMPTS:
                return Renewal(clone, proof, why, tuple(withheld), 0.0, 0.0)

    def _wake(self, renewal: Renewal, baseline: Baseline, began: float) -> Renewal:
        """Let a standby run and set its clock; a machine that was restored now did both in its proof."""
        machine = renewal.machine
        if not renewal.direct_because:
            machine.resume()
            if not machine.qga.ping(_WAKE_S):
                raise GuestChannelError(f"{machine.name} of {self.id} does not answer after it stood by")
        answered = time.monotonic() - began
        if not renewal.direct_because:
            set_clock(machine, baseline)
        return renewal._replace(answered_s=answered, seconds=time.monotonic() - began)

    # -- links ------------------------------------------------------------------------------------------

    def plug_all(self) -> None:
        """Join every machine to the segment.

        Raises:
            LabError: the cell was condemned.
        """
        self._plug(list(self.machines.values()))

    def _plug(self, machines: Sequence[Incarnation]) -> None:
        with self._plugging:
            if self._condemned:
                raise LabError(f"cell {self.id} was cut for good; nothing is plugged into it again")
            for machine in machines:
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
        for machine in [*self.machines.values(), *self._dying.values()]:
            try:
                machine.unplug()
            except HotcellError as e:
                failures.append(e)
        if failures:
            raise LabError(f"cell {self.id}: {len(failures)} links were not cut: {failures[0]}")
        return time.monotonic() - began

    # -- machines go ------------------------------------------------------------------------------------

    def _retire(self, machines: Sequence[Incarnation]) -> None:
        """Cut and stop machines at once; they end in the background, and :meth:`close` waits for that.

        Raises:
            LabError: a link was not cut; that machine stays in the cell.
        """
        failures = []
        for machine in machines:
            try:
                machine.halt()
            except HotcellError as e:
                failures.append(e)
                continue
            self._dying[machine.id] = machine
            if self.machines.get(machine.name) is machine:
                del self.machines[machine.name]
            self._ends = [*(f for f in self._ends if not f.done()), *self._begin_to_end([machine])]
        if failures:
            raise failures[0]

    def _end(self, machine: Incarnation) -> None:
        """Destroy a machine; one that withstands stays known, so that it is tried again."""
        machine.destroy()
        self._dying.pop(machine.id, None)
        if self.machines.get(machine.name) is machine:
            del self.machines[machine.name]

    def destroy_machines(self) -> None:
        """Destroy every incarnation, side by side; each is tried, the first failure raised at the end."""
        with suppress(HotcellError):
            self.cut()
        concurrent.futures.wait(self._ends)  # of those under way none is destroyed twice at once
        machines = [*self.machines.values(), *self._dying.values()]
        self._ends = []
        for failure in [f.exception() for f in self._begin_to_end(machines)]:
            if failure is not None:
                raise failure

    def _begin_to_end(self, machines: Sequence[Incarnation]) -> list[concurrent.futures.Future[None]]:
        undertaker = concurrent.futures.ThreadPoolExecutor(max(1, len(machines)))
        under_way = [undertaker.submit(self._end, m) for m in machines]
        undertaker.shutdown(wait=False)  # its threads go when they are done
        return under_way

    def close(self) -> None:
        """Destroy the machines and the segment; nothing of the cell is left."""
        try:
            self.destroy_machines()
        finally:
            self._segment.close()
            folder = self._shop.paths.cells / self.id
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _side_by_side(function: Callable[[T], R], things: Sequence[T]) -> list[R]:
    with concurrent.futures.ThreadPoolExecutor(max(1, len(things))) as pool:
        return list(pool.map(function, things))
