"""What stops everything, and what is done afterwards: the kill switch, a lost warden, re-arming, the sweep."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TypeVar

from appliance.cell.cell import Cell
from appliance.cell.ledger import Kind
from appliance.cell.processes import kill_domain_process
from appliance.cell.warden import Warden
from appliance.errors import ConflictError, HotcellError
from appliance.pipeline.cells import CellDesk
from appliance.pipeline.conduct import Bench
from appliance.pipeline.process import sweep_view
from appliance.pipeline.trials import TrialDesk
from appliance.service import KillView, SweepView

T = TypeVar("T")
_MAKING_S = 60.0
# Cutting a link takes 5 descriptors and ending a process 2; they must be there when everything else used all up.
_SPARE = 32


class Switches:
    """Guards the laboratory from the moment it is made; every call may come from any thread."""

    def __init__(self, bench: Bench, warden: Warden, trials: TrialDesk, cells: CellDesk) -> None:
        self._bench = bench
        self._warden = warden
        self._trials = trials
        self._cells = cells
        self._spare: list[int] = []
        self._keep_descriptors()
        warden.guard(self._unguarded)
        bench.shop.libvirt.guard(self._hung)

    def kill(self, reason: str) -> KillView:
        """Cut all links first, then end all trials and machines; nothing is accepted until ``rearm``.

        Whatever fails is told in the view and keeps nothing else from being cut or stopped.
        """
        began = time.monotonic()
        self._trials.accepting = False
        self._give_back_descriptors()
        cells = self._cells.all()
        cuts = [(cell, cell.condemn()) for cell in cells]
        problems = [problem for cell, cut in cuts if (problem := cut.problem(cell.id))]
        ended = self._trials.abort_all(f"kill switch: {reason}")
        tried = _Tries(problems)
        tried.call(self._bench.shelf.stop_making)
        killed = self._kill_machines(cells, tried)
        tried.call(self._bench.standbys.drop_all)
        for cell in cells:
            if self._trials.trial_of(cell.id) is None:
                tried.call(lambda c=cell: self._cells.remove(c))  # type: ignore[misc]
        # Again: the first time, a QEMU that was just being started could not be told yet.
        killed |= self._kill_machines(self._cells.all(), tried)
        return KillView(
            reason=reason, links_cut=sum(cut.links for _, cut in cuts), machines_stopped=len(killed),
            trials_ended=ended, seconds=time.monotonic() - began, problems=tuple(problems),
        )  # fmt: skip

    def _kill_machines(self, cells: Iterable[Cell], tried: _Tries) -> set[str]:
        """SIGKILL every QEMU that is known or written down, whatever is done with it; the domains it was sent to.

        The ledger also knows templates, standbys in the making and machines that just change hands.
        """
        libvirt, killed = self._bench.shop.libvirt, set[str]()

        def kill(domain: str, pid: int | None) -> None:
            if kill_domain_process(pid, domain):
                killed.add(domain)

        standbys = self._bench.standbys.ready().values()
        for machine in [*(m for c in cells for m in c.machines.values()), *standbys]:
            tried.call(lambda m=machine: kill(m.domain, m.pid))  # type: ignore[misc]
        rows = tried.call(lambda: self._bench.shop.ledger.things(Kind.DOMAIN)) or []
        for row in rows:
            tried.call(lambda n=row.name: kill(n, libvirt.pid(n)))  # type: ignore[misc]
        return killed

    def _keep_descriptors(self) -> None:
        self._spare += [
            os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(_SPARE - len(self._spare))
        ]

    def _give_back_descriptors(self) -> None:
        while self._spare:
            os.close(self._spare.pop())

    def _unguarded(self) -> None:
        """The warden is gone: it cut the cells since we were silent, or was killed. Nothing goes on unwatched."""
        self._trials.accepting = False
        try:
            self._trials.abort_all(
                "the warden has ended: the cells were cut, or nobody watches", failure=True
            )
        finally:
            self.kill("the warden has ended")

    def _hung(self, domain: str, what: str) -> None:
        """libvirt could not command a machine, which was killed then: a trial that it takes part in is void.

        One that was never plugged in does not yet: whoever restores or wakes it gets the error, and replaces it.
        """
        if any(m.domain == domain and not m.was_plugged for c in self._cells.all() for m in c.everything):
            return
        reason = f"libvirt did not {what} in time: its QEMU was killed"
        for owner in [t.owner for t in self._bench.shop.ledger.things(Kind.DOMAIN) if t.name == domain]:
            with suppress(HotcellError):  # a link that is not cut is the runner's to report
                self._trials.abort(owner, reason, failure=True)

    def rearm(self) -> None:
        """Accept trials again.

        Raises:
            ConflictError: there is no warden any more.
        """
        if not self._warden.alive:
            raise ConflictError("the warden has ended", hint="stop the server and start it again")
        self._keep_descriptors()
        self._trials.accepting = True

    def sweep(self, dry_run: bool) -> SweepView:
        """Strays of this home."""
        shop, lost = self._bench.shop, self._bench.standbys.lost
        return sweep_view(self._bench.paths, shop.libvirt, shop.ledger, self._in_use, lost, dry_run=dry_run)

    def _in_use(self) -> set[str]:
        return (
            {c.id for c in self._cells.all()} | self._bench.shelf.cells_in_use() | self._bench.standbys.in_use
        )

    def end(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours, let the warden go.

        The warden is dismissed only if nothing withstood and nothing is still under way; else it is left alone,
        and cuts and kills what there is.
        """
        self._give_back_descriptors()
        problems: list[str] = []
        tried = _Tries(problems)
        tried.call(self._bench.standbys.drop_all)  # or the room of what ends is used to make more of them
        tried.call(self._trials.close)
        for cell in self._cells.all():
            with suppress(Exception):  # the sweep takes what is left
                self._cells.remove(cell)
        tried.call(lambda: self._bench.shelf.stop_making(_MAKING_S))
        tried.call(self._bench.standbys.close)
        shop = self._bench.shop
        swept = tried.call(
            lambda: sweep_view(self._bench.paths, shop.libvirt, shop.ledger, set, dry_run=False)
        )
        failed = swept is None or any(s.outcome == "failed" for s in swept.strays)
        making = self._bench.shelf.cells_in_use() | self._bench.standbys.in_use
        under_way = self._cells.busy() or self._trials.load().running or making
        if failed or under_way:
            self._warden.leave_alone()
        else:
            self._warden.dismiss()
        shop.libvirt.close()
        shop.ledger.close()


class _Tries:
    """Calls of which none keeps the next from being made; ``problems`` gets what they raise."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def call(self, function: Callable[[], T]) -> T | None:
        """What ``function`` returns, or None."""
        try:
            return function()
        except Exception as e:  # noqa: BLE001 - it is told, and what is left to be stopped comes first
            self._problems.append(e.message if isinstance(e, HotcellError) else f"{type(e).__name__}: {e}")
            return None
