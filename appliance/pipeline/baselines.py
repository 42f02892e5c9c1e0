"""The baselines' desk: looking at them, deleting, exporting and importing them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from appliance.cell.baseline import Baseline, BaselineStore, check_files
from appliance.cell.baseline.exporting import export
from appliance.cell.baseline.importing import import_
from appliance.errors import HostError, ResetError
from appliance.pipeline import views
from appliance.pipeline.conduct import Bench
from appliance.service import BaselineDetail, BaselineView, ExportView, TransferView


class BaselineDesk:
    """Every call may come from any thread."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        bench.shelf.store.spare = self._spare
        self._lock = threading.Lock()
        self._transfers: dict[str, TransferView] = {}

    @property
    def _store(self) -> BaselineStore:
        return self._bench.shelf.store

    def views(self) -> list[BaselineView]:
        """All of them, oldest first."""
        return [views.baseline_view(b) for b in self._store.all()]

    def show(self, name: str) -> BaselineDetail:
        """Everything that is known about one."""
        baseline = self._store.get(name)
        problem = ""
        try:
            check_files(baseline)
        except ResetError as e:
            problem = e.message
        return views.baseline_detail(baseline, self._store.dependants(baseline), problem)

    def delete(self, name: str) -> BaselineView:
        """Delete one that nobody needs. A standby of it is nobody's, and makes way."""
        baseline = self._store.get(name)
        view = views.baseline_view(baseline)
        self._store.delete(baseline)
        return view

    def _spare(self, baseline: Baseline) -> None:
        """Keep standbys as before, but none of this one."""
        self._bench.standbys.drop(baseline.id)

    def export(self, name: str, to: Path) -> ExportView:
        """Write one to a new folder on this host."""
        began = time.monotonic()
        baseline = self._store.get(name)
        with self._store.owner("export") as owner, self._transfer(owner, "export", name) as progress:
            self._store.hold([baseline], owner)
            try:
                manifest = export(self._bench.shop, baseline, to, owner, progress)
            finally:
                self._store.release(owner)
        return ExportView(
            name=name, folder=str(to), files=len(manifest.files),
            size=sum(f.size for f in manifest.files.values()), seconds=time.monotonic() - began,
        )  # fmt: skip

    def import_(self, folder: Path, name: str | None) -> BaselineView:
        """Make an exported one of this home."""
        with (
            self._store.owner("import") as owner,
            self._transfer(owner, "import", name or folder.name) as progress,
        ):
            return views.baseline_view(import_(self._bench.shop, folder, name, owner, progress))

    def transfers(self) -> list[TransferView]:
        """Exports and imports that go on now."""
        with self._lock:
            return list(self._transfers.values())

    @contextmanager
    def _transfer(
        self, owner: str, verb: Literal["export", "import"], name: str
    ) -> Iterator[Callable[[int, int], None]]:
        def progress(done: int, total: int) -> None:
            with self._lock:
                self._transfers[owner] = TransferView(verb=verb, name=name[:80], done=done, total=total)

        progress(0, 0)
        try:
            yield progress
        except OSError as e:
            raise HostError(
                f"the {verb} of {name} broke off: {e}",
                hint="check free space and permissions; nothing of it is left",
            ) from e
        finally:
            with self._lock:
                del self._transfers[owner]
