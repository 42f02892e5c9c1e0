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
from contextlib import nullcontext, suppress
from typing import NamedTuple, TypeVar

from appliance.cell.baseline import Baseline, Workshop, prove, require_bootable, restore, wake
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import Proof
from appliance.cell.renewal import Renewal, require_proved
from appliance.cell.roster import Roster
from appliance.cell.segment import Segment
from appliance.cell.spec import MachineSpec
from appliance.cell.standby import StandbyPool
from appliance.errors import HotcellError, LabError

T = TypeVar("T")
R = TypeVar("R")
_ATTEMPTS = 2
_HEAD_START_S = 0.5
OnProof = Callable[[Proof], None]


class Cut(NamedTuple):
    """How many links were cut, how many could not be and the first reason, "" if there is none."""

    links: int
    failed: int
    why: str

    def problem(self, cell: str) -> str:
        """What to tell of it; "" if every link was cut."""
        return f"cell {cell}: {self.failed} links were not cut: {self.why}" if self.failed else ""


class Cell:
    """One cell. ``open`` makes the segment, ``restore_all`` proved machines, ``close`` leaves nothing.

    With a ``pool``, machines come from standbys where there are any. The cell remembers which baseline each
    of its machines belongs on, also of one that was lost in a reset or snapshot, so that it can come back.
    Machines of one cell may be renewed in several threads at once.
    """

    def __init__(self, cell_id: str, shop: Workshop, pool: StandbyPool | None = None) -> None:
        self.id = cell_id
        self._roster = Roster(cell_id)
        self._segment = Segment(cell_id, shop.ledger)
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

    @property
    def machines(self) -> dict[str, Incarnation]:
        """A copy of what there is now, in the order in which machines were first asked for."""
        return self._roster.machines()

    @property
    def everything(self) -> list[Incarnation]:
        """All that may hold memory and disk now: the machines, and those that are ending."""
        return self._roster.everything()

    @property
    def baselines(self) -> dict[str, Baseline]:
        """What each machine was last proved against, lost machines included; a copy."""
        return self._roster.baselines()

    @property
    def empty(self) -> bool:
        """True if no machine of the cell is left, not even one that is ending."""
        return not self._roster.everything()

    def machine(self, name: str) -> Incarnation:
        """A machine by name.

        Raises:
            NotFoundError: there is none of that name, or it was lost.
        """
        return self._roster.machine(name)

    def baseline(self, name: str) -> Baseline:
        """The baseline of a machine by name, also of one that was lost.

        Raises:
            NotFoundError: the cell never had a machine of that name.
        """
        return self._roster.baseline(name)

    def give_up(self, name: str) -> Incarnation:
        """Take a machine out of the cell; from then on its end is the caller's."""
        return self._roster.give_up(name)

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
            ResetError: a machine and its replacement were withheld. After this and any other error none of the
                group is plugged, but for one whose link could not be cut.
            LabError: a link was not cut, the cell was condemned, or libvirt, QEMU or a guest refused.
            PrerequisiteError: a machine needs firmware that this host has not; nothing was touched.
        """
        began, renewed = time.monotonic(), threading.Event()
        for baseline in baselines:  # before anything is taken apart
            require_bootable(baseline)
            if baseline.machine.devices:
                renewed.set()  # the old machine's end is what the new one waits for
        names = {b.machine.name for b in baselines}
        with self._pool.undisturbed() if self._pool else nullcontext():
            try:
                self._retire([m for name, m in self.machines.items() if name in names], renewed)
                return self._renew(baselines, on_proof, began, plug=True)
            finally:
                renewed.set()

    def _renew(
        self, baselines: Sequence[Baseline], on_proof: OnProof, began: float, *, plug: bool
    ) -> list[Renewal]:
        for baseline in baselines:  # side by side they come in any order; views get the one asked for
            self._roster.expect(baseline)
        # By machine, and kept as they come: the failure of one keeps no proof of another back.
        proofs: dict[str, list[Proof]] = {b.machine.name: [] for b in baselines}
        try:
            renewals = _side_by_side(
                lambda b: self._fresh(b, began, proofs[b.machine.name].append), baselines
            )
        finally:
            _tell(proofs, on_proof)
        require_proved(renewals)
        pairs = list(zip(renewals, baselines, strict=True))
        try:
            if plug:
                self._plug([r.machine for r in renewals])
            try:
                woken = _side_by_side(
                    lambda pair: self._wake(*pair, began, proofs[pair[1].machine.name].append), pairs
                )
            finally:
                _tell(proofs, on_proof)
            require_proved(woken)
            if plug:
                self._plug([r.machine for r in woken if not r.machine.plugged])
        except BaseException as e:
            self._withdraw(baselines, e)
            raise
        return woken

    def _withdraw(self, baselines: Sequence[Baseline], why: BaseException) -> None:
        """Cut a group that failed because of ``why``.

        Raises:
            LabError: a link was not cut.
        """
        names = {b.machine.name for b in baselines}
        problem = self._cut([m for name, m in self.machines.items() if name in names]).problem(self.id)
        if problem:
            raise LabError(f"{problem}; it was to be cut because: {why}") from why

    def _fresh(self, baseline: Baseline, began: float, tell: OnProof) -> Renewal:
        """A proved machine: a standby, or restored now. After two failed proofs the last one is returned."""
        self._require_open()
        standby, why = self._pool.take(baseline, self.id) if self._pool else (None, "no standbys are kept")
        if standby is not None:
            self._enter(standby.machine)
            self._roster.proved(baseline)
            tell(standby.proof)
            return Renewal(standby.machine, standby.proof, "", (), 0.0, 0.0)
        return self._restored(baseline, began, why, tell)

    def _restored(self, baseline: Baseline, began: float, why: str, tell: OnProof) -> Renewal:
        """As :meth:`_fresh`, of a machine that is restored now, because of ``why``."""
        withheld: list[Proof] = []
        while True:
            start = time.monotonic() if withheld else began
            self._wait_for_devices(baseline.machine)
            clone = restore(self._shop, baseline, self.id)
            self._enter(clone)
            try:
                proof = prove(clone, baseline, start)
            except BaseException:
                self._drop(clone)
                raise
            tell(proof)
            if proof.proved:
                self._roster.proved(baseline)
                return Renewal(clone, proof, why, tuple(withheld), 0.0, 0.0)
            withheld.append(proof)
            self._drop(clone)
            if len(withheld) == _ATTEMPTS:
                return Renewal(clone, proof, why, tuple(withheld), 0.0, 0.0)

    def _wait_for_devices(self, machine: MachineSpec) -> None:
        """A device is one machine's at a time: let the one before go first. What withstood its end is tried again.

        Raises:
            LabError: it still runs.
        """
        if not machine.devices:
            return
        concurrent.futures.wait(self._roster.ends())
        before = [m for m in self._roster.everything() if m.name == machine.name]
        concurrent.futures.wait(self._begin_to_end(before))
        if running := [m.domain for m in before if m.state is not DomainState.GONE]:
            raise LabError(
                f"{running[0]} still holds the devices of {machine.name}: {', '.join(machine.devices)}"
            )

    def _drop(self, clone: Incarnation) -> None:
        """End a machine that is not proved, and was never plugged in."""
        try:
            self._retire([clone])
        except Exception:  # noqa: BLE001 - a link that withstands: close tries again, nobody plugs it in
            self._roster.dies(clone)

    def _enter(self, machine: Incarnation) -> None:
        """Make a machine the cell's own. One that comes after the cell was condemned is ended at once.

        Raises:
            LabError: the cell was condemned; who closed it may have looked for machines before.
        """
        self._roster.enter(machine)
        if self._condemned:
            self._retire([machine])
            self._require_open()

    def _require_open(self) -> None:
        if self._condemned:
            raise LabError(f"cell {self.id} was cut for good; nothing is plugged into it again")

    def _wake(self, renewal: Renewal, baseline: Baseline, began: float, tell: OnProof) -> Renewal:
        """Let a standby run and set its clock; a machine that was restored now did both in its proof.

        One that does not wake is replaced by a machine that is restored now, still unplugged.
        """
        if not renewal.direct_because:
            try:
                answered = wake(renewal.machine, baseline)
            except HotcellError as e:
                self._retire([renewal.machine])
                renewal = self._restored(baseline, began, f"withheld: {e.message}", tell)
            else:
                return renewal._replace(answered_s=answered - began, seconds=time.monotonic() - began)
        took = time.monotonic() - began
        return renewal._replace(answered_s=took, seconds=took)

    # -- links ------------------------------------------------------------------------------------------

    def plug_all(self) -> None:
        """Join every machine to the segment.

        Raises:
            LabError: the cell was condemned.
        """
        self._plug(list(self.machines.values()))

    def _plug(self, machines: Sequence[Incarnation]) -> None:
        with self._plugging:
            self._require_open()
            for machine in machines:
                machine.plug()

    def condemn(self) -> Cut:
        """Cut every link and never plug again, whatever another thread is about to do. Never raises."""
        self._condemned = True  # before the lock: who holds it plugs at most the machines of one call
        with self._plugging:
            return self._cut(self._roster.everything())

    def cut(self) -> float:
        """Unplug every machine, whatever state it is in; returns seconds.

        Raises:
            LabError: a link was not cut; the others were tried all the same.
        """
        began = time.monotonic()
        problem = self._cut(self._roster.everything()).problem(self.id)
        if problem:
            raise LabError(problem)
        return time.monotonic() - began

    def _cut(self, machines: Sequence[Incarnation]) -> Cut:
        links, failures = 0, list[str]()
        for machine in machines:
            was = machine.plugged
            try:
                machine.unplug()
                links += was
            except Exception as e:  # noqa: BLE001 - whatever it was, the next machine is cut too
                failures.append(e.message if isinstance(e, HotcellError) else f"{type(e).__name__}: {e}")
        return Cut(links, len(failures), failures[0] if failures else "")

    # -- machines go ------------------------------------------------------------------------------------

    def _retire(self, machines: Sequence[Incarnation], renewed: threading.Event | None = None) -> None:
        """Cut and stop machines at once; they end in the background, and :meth:`close` waits for that.

        Their ends wait for ``renewed``, but not long: beside one, waking a standby takes a sixth longer, and what
        it takes to restore a machine directly is the same.

        Raises:
            LabError: a link was not cut; that machine stays in the cell.
        """
        failures: list[Exception] = []
        for machine in machines:
            try:
                machine.halt()
            except Exception as e:  # noqa: BLE001 - whatever it was, the next machine is cut too
                failures.append(e)
                continue
            self._roster.dies(machine, lambda m=machine: self._begin_to_end([m], renewed))  # type: ignore[misc]
        if failures:
            raise failures[0]

    def _end(self, machine: Incarnation, renewed: threading.Event | None) -> None:
        """Destroy a machine; one that withstands stays known, so that it is tried again."""
        if renewed is not None:
            renewed.wait(_HEAD_START_S)
        machine.destroy()
        self._roster.gone(machine)

    def destroy_machines(self) -> None:
        """Destroy every incarnation, side by side; each is tried, the first failure raised at the end."""
        with suppress(HotcellError):
            self.cut()
        concurrent.futures.wait(self._roster.take_ends())  # of those none is destroyed twice at once
        for failure in [f.exception() for f in self._begin_to_end(self._roster.everything())]:
            if failure is not None:
                raise failure

    def _begin_to_end(
        self, machines: Sequence[Incarnation], renewed: threading.Event | None = None
    ) -> list[concurrent.futures.Future[None]]:
        undertaker = concurrent.futures.ThreadPoolExecutor(max(1, len(machines)))
        under_way = [undertaker.submit(self._end, m, renewed) for m in machines]
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


def _tell(proofs: dict[str, list[Proof]], on_proof: OnProof) -> None:
    for kept in proofs.values():
        while kept:
            on_proof(kept.pop(0))


def _side_by_side(function: Callable[[T], R], things: Sequence[T]) -> list[R]:
    if len(things) == 1:  # no thread: that would cost a tenth of what a standby takes
        return [function(things[0])]
    with concurrent.futures.ThreadPoolExecutor(max(1, len(things))) as pool:
        return list(pool.map(function, things))
