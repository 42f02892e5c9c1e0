"""What stops everything, and what is done afterwards: the kill switch, a lost warden, re-arming, the sweep."""

from __future__ import annotations

import time
from contextlib import suppress

from appliance.cell.ledger import Kind
from appliance.cell.warden import Warden
from appliance.errors import ConflictError, HotcellError
from appliance.pipeline.cells import CellDesk
from appliance.pipeline.conduct import Bench
from appliance.pipeline.process import sweep_view
from appliance.pipeline.trials import TrialDesk
from appliance.service import KillView, SweepView

_MAKING_S = 60.0


class Switches:
    """Guards the laboratory from the moment it is made; every call may come from any thread."""

    def __init__(self, bench: Bench, warden: Warden, trials: TrialDesk, cells: CellDesk) -> None:
        self._bench = bench
        self._warden = warden
        self._trials = trials
        self._cells = cells
        warden.guard(self._unguarded)
        bench.shop.libvirt.guard(self._hung)

    def kill(self, reason: str) -> KillView:
        """Cut all links first, then end all trials and machines; nothing is accepted until ``rearm``."""
        began = time.monotonic()
        self._trials.accepting = False
        cells = self._cells.all()
        problems: list[str] = []
        links = machines = 0
        for cell in cells:
            links += sum(m.plugged for m in cell.machines.values())
            try:
                cell.condemn()
            except HotcellError as e:
                problems.append(e.message)
        ended = self._trials.abort_all(f"kill switch: {reason}")
        self._bench.shelf.stop_making()
        machines += self._bench.standbys.drop_all()
        for cell in cells:
            for machine in list(cell.machines.values()):
                machines += machine.kill()
            if self._trials.trial_of(cell.id) is None:
                try:
                    self._cells.remove(cell)
                except HotcellError as e:
                    problems.append(e.message)
        return KillView(
            reason=reason, links_cut=links, machines_stopped=machines, trials_ended=ended,
            seconds=time.monotonic() - began, problems=tuple(problems),
        )  # fmt: skip

    def _unguarded(self) -> None:
        """The warden is gone: it cut the cells since we were silent, or was killed. Nothing goes on unwatched."""
        self._trials.accepting = False
        self._trials.abort_all("the warden has ended: the cells were cut, or nobody watches", failure=True)
        self.kill("the warden has ended")

    def _hung(self, domain: str, what: str) -> None:
        """libvirt could not command a machine, which was killed then: a trial that it belongs to is void."""
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
        self._trials.accepting = True

    def sweep(self, dry_run: bool) -> SweepView:
        """Strays of this home."""
        shop = self._bench.shop
        return sweep_view(self._bench.paths, shop.libvirt, shop.ledger, self._in_use, dry_run=dry_run)

    def _in_use(self) -> set[str]:
        return (
            {c.id for c in self._cells.all()} | self._bench.shelf.cells_in_use() | self._bench.standbys.in_use
        )

    def end(self) -> None:
        """Abort what runs, stop all machines, remove all that is ours, let the warden go."""
        self._trials.close()
        for cell in self._cells.all():
            try:
                self._cells.remove(cell)
            except HotcellError:
                continue  # the warden and the next start's sweep take what is left
        self._bench.shelf.stop_making(_MAKING_S)
        self._bench.standbys.close()
        shop = self._bench.shop
        sweep_view(self._bench.paths, shop.libvirt, shop.ledger, set, dry_run=False)
        self._warden.dismiss()
        shop.libvirt.close()
        shop.ledger.close()
