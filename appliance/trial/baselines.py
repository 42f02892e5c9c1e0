"""The baselines that trials start from: found if they exist and hold, made if they do not.

Machines are made side by side, each alone on a segment of its own, so that a warming origin and its target
share the host's cores.
"""

from __future__ import annotations

import concurrent.futures
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

from appliance.cell import baseline as saved
from appliance.cell.baseline import Baseline, BaselineKind, BaselineStore, CreatedBy, Workshop, why_cold
from appliance.cell.cell import Cell
from appliance.cell.credentials import SshKeys
from appliance.cell.incarnation import Incarnation
from appliance.cell.spec import MachineSpec
from appliance.errors import ConflictError, PrerequisiteError, ResetError
from appliance.model import Role
from appliance.trial.making import Makers, Making
from appliance.trial.warmup import recipe, warm_up

# machine name, what is being done or "" when it is made, seconds it took (0 while it is being made)
Report = Callable[[str, str, float], None]


class BaselineShelf:
    """All baselines of one home; safe to use from several threads. What two ask for is made once."""

    def __init__(self, shop: Workshop, keys: SshKeys) -> None:
        self._shop = shop
        self._keys = keys
        self.store = BaselineStore(shop)
        self._checked = self.store.checked
        self._makers: Makers[Baseline] = Makers()
        self._cells: set[str] = set()

    def ensure(
        self,
        machines: Sequence[MachineSpec],
        report: Report,
        check: Callable[[], None] = lambda: None,
        created_by: CreatedBy = "trial",
    ) -> dict[str, Baseline]:
        """A good baseline for each machine, by machine name: of its RAM, or of its disk if it can
        have no other.

        One that was saved by an earlier process is read whole once before its first use here; one whose
        files changed is made anew. ``check`` is called often while this waits; what it raises ends the
        waiting at once, and the making too if nobody else waits for it.

        Raises:
            LabError: a baseline could not be made.
            PrerequisiteError: a trial's origin can only be booted.
        """
        if created_by == "trial":
            _require_warm_origin(machines)
        with concurrent.futures.ThreadPoolExecutor(max(1, len(machines))) as pool:
            made = pool.map(lambda m: self._one(m, report, check, created_by), machines)
            return {b.machine.name: b for b in made}

    def all(self) -> list[Baseline]:
        """Every baseline that can be read, oldest first."""
        return self.store.all()

    def _one(
        self, machine: MachineSpec, report: Report, check: Callable[[], None], created_by: CreatedBy
    ) -> Baseline:
        what, versions = recipe(machine.role, self._keys, warm_model=True), self._shop.versions(machine)
        key = saved.baseline_key(machine, self._shop.accelerator, versions, what, _kind(machine))
        if key in self._checked:
            found = saved.find(self._shop.paths, machine.name, key)
            if found is not None:
                with suppress(ResetError):
                    saved.check_files(found)
                    return found
        return self._makers.get(
            key,
            lambda making: self._find_or_make(machine, key, making, created_by),
            lambda detail, seconds: report(machine.name, detail, seconds),
            check,
        )

    def _find_or_make(
        self, machine: MachineSpec, key: str, making: Making[Baseline], created_by: CreatedBy
    ) -> Baseline:
        found = saved.find(self._shop.paths, machine.name, key)
        if found is not None:
            try:
                saved.check_files(found, read=key not in self._checked)
            except ResetError as e:
                making.tell(f"making it anew: {e.message}")
                self._remove(found)
            else:
                self._checked.add(key)
                return found
        made = self._make(machine, key, making, created_by)
        self._checked.add(key)
        making.tell("", made.seconds)
        return made

    def _remove(self, damaged: Baseline) -> None:
        try:
            self.store.delete(damaged)
        except ConflictError as e:
            raise ResetError(
                f"baseline {damaged.id} is damaged, and cannot be made anew: {e.message}", hint=e.hint
            ) from e

    def _make(
        self, machine: MachineSpec, key: str, making: Making[Baseline], created_by: CreatedBy
    ) -> Baseline:
        def warm(template: Incarnation) -> None:
            warm_up(template, self._keys, warm_model=True, say=making.tell)

        making.tell("booting")
        cell = Cell(f"make-{secrets.token_hex(3)}", self._shop)
        self._cells.add(cell.id)
        try:
            cell.open()
            return saved.make(
                self._shop, machine, cell.id, key, warm, lambda t: making.stoppable(t.kill),
                kind=_kind(machine), created_by=created_by,
            )  # fmt: skip
        finally:
            try:
                cell.close()
            finally:  # what withstood has no cell any more, so that a sweep finds it
                self._cells.discard(cell.id)

    def cells_in_use(self) -> set[str]:
        """Ids of the cells in which baselines are being made now, and what stands for one being deleted."""
        return set(self._cells) | self.store.owners_in_use()

    def stop_making(self, wait_s: float = 0.0) -> None:
        """End whatever is being made; who waits for it gets a LabError. Waits until it is gone, if asked to."""
        self._makers.end_all()
        if wait_s:
            self._makers.wait(wait_s)


def _require_warm_origin(machines: Sequence[MachineSpec]) -> None:
    """A model server that was started before the machine was saved does not run after a boot.

    Without this the subject would meet a dead port, which would look like a failure of its own.
    """
    for machine in machines:
        if machine.role is Role.ORIGIN and (why := why_cold(machine.devices, machine.firmware)):
            raise PrerequisiteError(
                f"{machine.name} has {why}: it boots anew for each trial, and nothing starts its model server then",
                hint="use a machine without; trials of such machines are not possible yet",
            )


def _kind(machine: MachineSpec) -> BaselineKind:
    return "disk" if why_cold(machine.devices, machine.firmware) else "ram"
