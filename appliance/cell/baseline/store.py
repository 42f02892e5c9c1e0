"""The baselines of one home: found by name, held by who needs them, deleted only when nobody does."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.cell.baseline.kinds import DISK, Baseline, RamBaseline
from appliance.cell.baseline.places import MARK
from appliance.cell.baseline.record import check_files, read, read_all
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.ledger import Kind
from appliance.cell.qcow2 import read_header
from appliance.errors import ConflictError, LabError, NotFoundError


class BaselineStore:
    """Every call may come from any thread. ``checked`` holds the keys of what this process has read whole.

    ``spare`` is called before a baseline is deleted that no cell, trial or baseline needs. It ends its standbys,
    which are nobody's, and waits for one that is just being made: that may have no overlay to be seen by yet.
    """

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._lock = threading.RLock()
        self._holders: dict[str, set[str]] = {}
        self._owners: set[str] = set()
        self.checked: set[str] = set()
        self.spare: Callable[[Baseline], None] = lambda _baseline: None

    # -- finding --------------------------------------------------------------------------------------

    def all(self) -> list[Baseline]:
        """Every baseline that can be read, oldest first."""
        return read_all(self._shop.paths)

    def get(self, name: str) -> Baseline:
        """A baseline by name.

        Raises:
            NotFoundError: there is none of that name.
        """
        everything = self.all()
        found = next((b for b in everything if b.id == name), None)
        if found is None:
            known = ", ".join(b.id for b in everything) or "none"
            raise NotFoundError(f"there is no baseline {name!r}", hint=f"there are: {known}")
        return found

    def verify(self, baseline: Baseline) -> None:
        """Make sure that its files are what was saved; they are read whole once in this process.

        Raises:
            ResetError: a file is missing or its content changed.
        """
        check_files(baseline, read=baseline.key not in self.checked)
        self.checked.add(baseline.key)

    # -- who needs it ---------------------------------------------------------------------------------

    def hold(self, baselines: Iterable[Baseline], holder: str) -> None:
        """Keep baselines from being deleted until :meth:`release`; ``holder`` is a cell's or trial's id.

        Raises:
            NotFoundError: one was deleted meanwhile.
        """
        with self._lock:
            for baseline in baselines:
                if read(baseline.folder) is None:
                    raise NotFoundError(f"the baseline {baseline.id} was deleted", hint="ask again")
                self._holders.setdefault(baseline.id, set()).add(holder)

    def release(self, holder: str) -> None:
        """Let go of everything that ``holder`` held."""
        with self._lock:
            for holders in self._holders.values():
                holders.discard(holder)

    def dependants(self, baseline: Baseline) -> tuple[str, ...]:
        """What keeps a baseline from being deleted, in words; sorted."""
        with self._lock:
            holders = {f"{h} uses it" for h in self._holders.get(baseline.id, ())}
        children = {f"baseline {b.id} builds on it" for b in self.children(baseline)}
        return tuple(sorted({*holders, *children, *self._machines_on(baseline)}))

    def children(self, baseline: Baseline) -> list[Baseline]:
        """Baselines that have this one's disk below their own."""
        layer = baseline.path(DISK)
        return [b for b in self.all() if layer in b.expected.chain and b.folder != baseline.folder]

    def _machines_on(self, baseline: Baseline) -> Iterator[str]:
        """Machines, standbys too, whose overlay stands on it; from the files, whoever made them."""
        layer = str(baseline.path(DISK))
        for top in self._shop.paths.cells.glob("*/*/disk.qcow2"):
            cell, machine = top.parts[-3:-1]
            try:
                below = read_header(top).backing
            except LabError:
                if top.exists():  # just being made: of what, is not written yet
                    yield f"machine {machine} of {cell} is being made"
                continue
            if below == layer:
                yield f"machine {machine} of {cell} runs on it"

    # -- deleting -------------------------------------------------------------------------------------

    def delete(self, baseline: Baseline) -> None:
        """Delete a baseline.

        It is renamed first, so that a crash leaves nothing that looks like a baseline, and a sweep the rest.

        Raises:
            NotFoundError: it is gone already.
            ConflictError: something depends on it; the message names what.
        """
        if not self._holders.get(baseline.id) and not self.children(baseline):
            self.spare(baseline)
        with self.owner("delete") as owner:
            with self._lock:
                trash = self._hide(baseline, owner)
            memory = baseline.memory if isinstance(baseline, RamBaseline) else None
            for place in (trash, memory):
                if place is not None:
                    if place.exists():
                        shutil.rmtree(place)
                    self._shop.ledger.strike(Kind.FOLDER, str(place))

    def _refuse(self, baseline: Baseline) -> None:
        found = self.dependants(baseline)
        if found:
            raise ConflictError(
                f"baseline {baseline.id} cannot be deleted: {'; '.join(found)}",
                hint="delete baselines that build on it first, and close cells or let trials end",
                dependants=", ".join(found),
            )

    def _hide(self, baseline: Baseline, owner: str) -> Path:
        """Rename it away; from then on no machine can be made of it."""
        if not baseline.folder.exists():
            raise NotFoundError(f"the baseline {baseline.id} was deleted", hint="there is nothing to do")
        self._refuse(baseline)
        trash, ledger = baseline.folder.with_name(f".{baseline.folder.name}-{owner}"), self._shop.ledger
        ledger.enter(Kind.FOLDER, str(trash), owner)
        baseline.folder.rename(trash)
        try:
            self._refuse(baseline)  # a machine may have been made while we looked
        except ConflictError:
            trash.rename(baseline.folder)
            ledger.strike(Kind.FOLDER, str(trash))
            raise
        if isinstance(baseline, RamBaseline) and baseline.memory is not None:
            ledger.enter(Kind.FOLDER, str(baseline.memory), owner)
        return trash

    @contextmanager
    def owner(self, what: str) -> Iterator[str]:
        """A name to write things down under while something is done; a sweep meanwhile leaves them alone."""
        name = f"{what}-{secrets.token_hex(4)}"
        self._owners.add(name)
        try:
            yield name
        finally:
            self._owners.discard(name)

    def owners_in_use(self) -> set[str]:
        """Owners, in the ledger, of what is being deleted, exported or imported now."""
        return set(self._owners)

    def drop_lost_memory(self) -> list[Path]:
        """Remove RAM files on tmpfs that no baseline has; only while nothing is being made. Returns them.

        What a baseline has needs no row: its record names it. A crash at the end of a making leaves one.
        """
        root = self._shop.memory
        if root is None:
            return []
        known = {b.memory for b in self.all() if isinstance(b, RamBaseline)}
        for folder in known - {None}:
            self._shop.ledger.strike(Kind.FOLDER, str(folder))
        lost = [p for p in root.iterdir() if p.name != MARK and p not in known]
        for folder in lost:
            shutil.rmtree(folder)
        return lost
