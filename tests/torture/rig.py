"""A real server on a home of its own, and what a campaign asks of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from appliance.cell import processes
from appliance.cell.processes import Process
from appliance.cli.client import Client, connect
from appliance.errors import HotcellError
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.service import (
    BaselineView,
    CellRequest,
    CellView,
    ExportView,
    HealthView,
    LimitOverrides,
    SweepView,
    TrialPage,
    TrialRequest,
    TrialView,
)

ROOT = Path(__file__).resolve().parents[2]
_START_S, _STOP_S = 180.0, 120.0


class Rig:
    """One home, at most one server at a time. ``life`` is the network namespace of the last one."""

    def __init__(self, paths: Paths, log: Path) -> None:
        self.paths = paths
        self.log = log
        self.clock = log.with_name("clock")
        self.exports = log.with_name("exports")
        self.exports.mkdir(exist_ok=True)
        self.server: subprocess.Popen[bytes] | None = None
        self.warden = 0
        self.life = 0
        self.starts = 0

    # -- the server -----------------------------------------------------------------------------------

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a server and do not wait for it."""
        environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent / 'clock'}:{ROOT}"}
        environment |= {"HOTCELL_TORTURE_CLOCK": str(self.clock), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [*self.argv(), "serve", "--port", "0"], stdout=log, stderr=log, env=environment, cwd=ROOT
            )
        self.starts += 1
        return self.server

    def argv(self) -> list[str]:
        """The command line of this home."""
        home, cache = str(self.paths.home), str(self.paths.cache)
        return [sys.executable, "-m", "appliance.cli", "--home", home, "--cache", cache]

    def up(self) -> None:
        """Make sure that a server serves."""
        if self.server is not None and self.server.poll() is None and self.paths.server_file.exists():
            return
        server = self.spawn()

        def serves() -> bool:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}: {self.tail()}")
            return self.answers()

        wait_until(serves, _START_S, "the server to serve", 0.05)
        self.life = Path(f"/proc/{server.pid}/ns/net").stat().st_ino
        with self.client() as client:
            self.warden = int(str(client.get(dict[str, object], "host")["warden_pid"]))

    def answers(self) -> bool:
        """Whether the server that we started answers."""
        try:
            told = json.loads(self.paths.server_file.read_text())
            if self.server is None or told["pid"] != self.server.pid:
                return False
            with self.client() as client:
                client.get(HealthView, "health")
        except (OSError, ValueError, KeyError, HotcellError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL the server."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server = None

    def stop(self) -> int | None:
        """End the server as a user does; its exit status."""
        if self.server is None:
            return None
        self.server.send_signal(signal.SIGTERM)
        try:
            status = self.server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the server did not stop within {_STOP_S:.0f} s: {self.tail()}") from None
        self.server = None
        return status

    def tail(self) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""

    # -- asking ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the server."""
        with connect(self.paths) as client:
            yield client

    def background(self, job: Callable[[Client], object]) -> Job:
        """Ask something in a thread."""
        return Job(self, job)

    def saved(self, client: Client) -> str:
        """The name of the target's own baseline."""
        found = client.get(list[BaselineView], "baselines")
        return next(b.name for b in found if b.name.startswith("target-1-"))

    def exported(self, client: Client) -> Path:
        """An export of it, made once."""
        folder = self.exports / "whole"
        if not folder.exists():
            client.post(ExportView, f"baselines/{self.saved(client)}/export", {"to": str(folder)})
        return folder

    def open_cell(self, client: Client) -> CellView:
        """A cell by hand."""
        return client.post(CellView, "cells", CellRequest())

    def trial(self, client: Client, scenario: str = "replicate", seed: int = 0) -> TrialView:
        """Ask for a trial of the quickest control; the limit is for a machine that was struck and never answers."""
        limits = LimitOverrides(wall_s=60)
        asked = TrialRequest(subject="claimer", scenario=scenario, seed=seed, limits=limits)
        return client.post(TrialView, "trials", asked)

    def ended(self, client: Client, trial: str, limit_s: float) -> TrialView:
        """A trial once it has ended."""

        def over() -> TrialView | None:
            seen = client.get(TrialView, f"trials/{trial}")
            return seen if seen.state.ended else None

        return wait_until(over, limit_s, f"trial {trial} to end", 0.1)

    def trials(self, client: Client) -> dict[str, TrialView]:
        """Every trial of this home."""
        found: dict[str, TrialView] = {}
        while True:
            page = client.get(TrialPage, "trials", limit=1000, offset=len(found))
            found |= {t.id: t for t in page.items}
            if len(found) >= page.total or not page.items:
                return found

    def sweep(self, client: Client) -> list[str]:
        """What a dry sweep finds."""
        view = client.post(SweepView, "sweep", {"dry_run": True})
        return [f"{s.kind} {s.name} ({s.detail})" for s in view.strays]

    # -- looking from outside -------------------------------------------------------------------------

    def qemus(self) -> list[Process]:
        """Machines of this home that run, without libvirt's probes."""
        return [p for p in processes.qemu_below(self.paths.libvirt) if not processes.is_probe(p)]

    def rows(self) -> list[tuple[str, str, str]]:
        """The ledger's rows: kind, name, owner."""
        with contextlib.closing(sqlite3.connect(f"file:{self.paths.ledger}?mode=ro", uri=True)) as db:
            return [
                (str(k), str(n), str(o)) for k, n, o in db.execute("SELECT kind, name, owner FROM things")
            ]

    def journal(self, trial: str) -> str:
        """A trial's journal, open or sealed."""
        for folder in (self.paths.open_trials, self.paths.bundles):
            with contextlib.suppress(OSError):
                return (folder / trial / "journal.jsonl").read_text(errors="replace")
        return ""

    def forget(self, pattern: str) -> None:
        """Remove baselines, so that they have to be made anew."""
        for folder in self.paths.baselines.glob(pattern):
            shutil.rmtree(folder)


class Job:
    """A request in flight. ``error`` is what the client was told, if it was refused or broken off."""

    def __init__(self, rig: Rig, job: Callable[[Client], object]) -> None:
        self.error = ""
        self.began = time.monotonic()

        def run() -> None:
            try:
                with rig.client() as client:
                    job(client)
            except Exception as e:  # noqa: BLE001 - a strike may make it fail in any way; the checks judge
                self.error = f"{type(e).__name__}: {e}"

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it has been answered."""
        return not self._thread.is_alive()

    def wait(self, limit_s: float) -> bool:
        """Wait for the answer; whether it came."""
        self._thread.join(limit_s)
        return self.over
