"""What must hold after every strike. Each check gives faults in words; none is an empty list."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path

from appliance.cell import processes
from appliance.cell.standby import STANDBY
from appliance.cli.client import Client
from appliance.errors import HotcellError
from appliance.evidence.bundle import verify
from appliance.evidence.keys import public_key, public_path
from appliance.host.clock import WaitError, wait_until
from appliance.service import BaselineView, CellView, ExecView, ResetView
from tests.torture.rig import Rig

_TRIAL_S = 400.0


def _settled(rig: Rig, client: Client) -> list[str]:
    """Every trial ends, every cell can be closed, what was saved can be deleted."""
    faults = []
    for trial in rig.trials(client).values():
        if not trial.state.ended:
            try:
                rig.ended(client, trial.id, _TRIAL_S)
            except WaitError as e:
                faults.append(e.message)
    for cell in client.get(list[CellView], "cells"):
        with contextlib.suppress(HotcellError):  # the sweep below tells what is left of it
            client.delete(CellView, f"cells/{cell.id}")
    faults += [f"cell {c.id} cannot be closed" for c in client.get(list[CellView], "cells")]
    for baseline in client.get(list[BaselineView], "baselines"):
        if baseline.name.startswith("snap-"):
            try:
                client.delete(BaselineView, f"baselines/{baseline.name}")
            except HotcellError as e:
                faults.append(f"baseline {baseline.name} cannot be deleted: {e.message}")
    return faults


def _evidence(rig: Rig, client: Client, created: Collection[str], verified: set[str]) -> list[str]:
    """Every trial that was accepted has ended as a bundle that verifies, and no folder is left open."""
    faults = []
    known = rig.trials(client)
    faults += [f"trial {t} was accepted and is not known" for t in created if t not in known]
    key = public_key(public_path(rig.paths.signing_key))
    for bundle in rig.paths.bundles.iterdir():
        if bundle.name not in verified:
            report = verify(bundle, key)
            faults += [f"bundle {bundle.name}: {f.fault} {f.path}: {f.detail}" for f in report.faults]
            verified.add(bundle.name)
            if bundle.name not in known:
                faults.append(f"bundle {bundle.name} is not in the index")
    faults += [
        f"trial {t.id} is {t.state} without a bundle: {t.reason}" for t in known.values() if t.bundle is None
    ]
    return faults + [f"open trial {p.name} is left" for p in rig.paths.open_trials.iterdir()]


def after_point(rig: Rig, created: Collection[str], verified: set[str]) -> list[str]:
    """All of it, with a server that serves."""
    with rig.client() as client:
        faults = _settled(rig, client) + [f"stray: {s}" for s in rig.sweep(client)]
        # What is left of a standby that its pool lost is a stray; the other rows of standbys are in use.
        faults += [f"row left: {r}" for r in rig.rows() if r[2] != STANDBY]
        faults += [f"folder left: {p}" for p in rig.paths.cells.iterdir() if p.name != STANDBY]
        faults += [
            f"half-made baseline left: {p}" for p in rig.paths.baselines.iterdir() if p.name.startswith(".")
        ]
        faults += _exports(rig)
        return faults + _evidence(rig, client, created, verified)


def _exports(rig: Rig) -> list[str]:
    """Half-written exports that are left; whole ones are the user's, and removed here."""
    for folder in rig.exports.glob("out-*"):
        shutil.rmtree(folder)
    return [f"half-written export left: {p}" for p in rig.exports.iterdir() if p.name.startswith(".")]


def works(rig: Rig, *, with_trial: bool) -> list[str]:
    """The next thing that is asked succeeds: a proved reset of a machine that answers, or a whole trial."""
    with rig.client() as client:
        if with_trial:
            view = rig.ended(client, rig.trial(client).id, _TRIAL_S)
            return [] if view.state == "sealed" else [f"the next trial was {view.state}: {view.reason}"]
        cell = rig.open_cell(client)
        machine = f"cells/{cell.id}/machines/target-1"
        reset = client.post(ResetView, f"{machine}/reset")
        done = client.post(ExecView, f"{machine}/exec", {"argv": ["/bin/true"]})
        client.delete(CellView, f"cells/{cell.id}")
        faults = [] if reset.proved else ["the next reset was not proved"]
        return faults if done.rc == 0 else [*faults, f"the machine after it answered {done.rc}"]


def nothing_runs(rig: Rig, limit_s: float) -> list[str]:
    """Without a server: no machine and no capture of this home, and nobody lives in a server's namespace."""

    def left() -> list[str]:
        found = [f"QEMU {p.pid}" for p in processes.qemu_below(rig.paths.home)]
        found += [f"capture {p.pid} of {f}" for f, p in processes.captures_below(rig.paths.home).items()]
        return found + [f"process {p.pid} in a sealed namespace" for p in _inside(rig.life)]

    with contextlib.suppress(WaitError):
        wait_until(lambda: not left(), limit_s, "everything to be gone", 0.05)
    faults = [f"still there {limit_s:.0f} s after: {x}" for x in left()]
    rig.life = 0  # its number may become another namespace's
    return faults


def _inside(namespace: int) -> list[processes.Process]:
    found: list[processes.Process] = []
    if not namespace:
        return found
    for process in processes.processes():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process.pid}/ns/net").stat().st_ino == namespace:
                found.append(process)
    return found


def at_the_end(rig: Rig) -> list[str]:
    """After a server was stopped as a user stops it: nothing at all is left but baselines and evidence."""
    faults = nothing_runs(rig, 10)
    faults += [f"row left: {r}" for r in rig.rows()]
    for folder in (rig.paths.cells, rig.paths.open_trials):
        faults += [f"left: {p}" for p in folder.iterdir()]
    return faults + [f"left: {p}" for p in (rig.paths.api_socket, rig.paths.server_file) if p.exists()]
