"""What the laboratory is doing when it is struck: each action begins it, waits for its moment, and says when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from appliance.cli.client import Client
from appliance.errors import HotcellError
from appliance.host.clock import WaitError, wait_until
from appliance.service import BaselineView, CellView, ExportView, ResetView
from tests.torture.points import Point
from tests.torture.rig import Job, Rig

_EVENT_S = 300.0
# Longer than any limit of the laboratory's own: what is not over then hangs.
ACTION_S = 600.0


class Acting:
    """An action in flight. ``trial`` is the id of the trial it asked for, "" if it is none."""

    def __init__(self, trial: str = "", job: Job | None = None) -> None:
        self.trial = trial
        self.job = job


def begin(rig: Rig, point: Point) -> Acting:
    """Have the laboratory begin, and return at the point's moment."""
    acting = _ACTIONS[point.action](rig, point)
    time.sleep(point.delay)
    return acting


def _start(rig: Rig, _point: Point) -> Acting:
    rig.stop()
    rig.spawn()
    return Acting()


def _restart(rig: Rig, _point: Point) -> Acting:
    """A server that has to clear up after one that was killed with its machines running."""
    rig.up()
    with rig.client() as client:
        rig.open_cell(client)
    os.kill(rig.warden, signal.SIGKILL)
    rig.kill()
    rig.spawn()
    return Acting()


def _open(rig: Rig, _point: Point) -> Acting:
    rig.up()
    return Acting(job=rig.background(rig.open_cell))


def _with_cell(rig: Rig, job: Callable[[Client, str], object]) -> Acting:
    rig.up()
    with rig.client() as client:
        cell = rig.open_cell(client).id
    return Acting(job=rig.background(lambda c: job(c, cell)))


def _reset(rig: Rig, point: Point) -> Acting:
    """One machine, or in every third point all of the cell as a group."""
    machine = ("origin", "target-1", "")[point.number % 3]
    if point.kind == "qga":  # the machine first loses its agent, then is reset
        rig.up()
        with rig.client() as client:
            rig.open_cell(client)
        return Acting()
    if not machine:
        return _with_cell(rig, lambda c, cell: c.post(list[ResetView], f"cells/{cell}/reset"))
    return _with_cell(rig, lambda c, cell: c.post(ResetView, f"cells/{cell}/machines/{machine}/reset"))


def _snapshot(rig: Rig, point: Point) -> Acting:
    """In every third point of the disk only: the guest is shut down, and boots from it."""
    body = {"name": f"snap-{point.number}", "kind": ("ram", "ram", "disk")[point.number % 3]}
    return _with_cell(
        rig, lambda c, cell: c.post(BaselineView, f"cells/{cell}/machines/target-1/snapshot", body)
    )


def _export(rig: Rig, point: Point) -> Acting:
    rig.up()
    with rig.client() as client:
        path = f"baselines/{rig.saved(client)}/export"
    body = {"to": str(rig.exports / f"out-{point.number}")}
    return Acting(job=rig.background(lambda c: c.post(ExportView, path, body)))


def _take_in(rig: Rig, client: Client, point: Point) -> BaselineView:
    body = {"folder": str(rig.exported(client)), "name": f"snap-{point.number}"}
    return client.post(BaselineView, "baselines/import", body)


def _import(rig: Rig, point: Point) -> Acting:
    rig.up()
    with rig.client() as client:
        rig.exported(client)
    return Acting(job=rig.background(lambda c: _take_in(rig, c, point)))


def _delete(rig: Rig, point: Point) -> Acting:
    rig.up()
    with rig.client() as client:
        name = _take_in(rig, client, point).name
    return Acting(job=rig.background(lambda c: c.delete(BaselineView, f"baselines/{name}")))


def _close(rig: Rig, _point: Point) -> Acting:
    return _with_cell(rig, lambda c, cell: c.delete(CellView, f"cells/{cell}"))


def _trial(rig: Rig, point: Point) -> Acting:
    return _at_event(rig, point, "replicate")


def _baseline(rig: Rig, point: Point) -> Acting:
    """The world's baseline, the quickest to make: it boots, is warmed and saved while the trial waits."""
    rig.up()
    rig.forget("world-*")
    return _at_event(rig, point, "replicate-world")


def _at_event(rig: Rig, point: Point, scenario: str) -> Acting:
    rig.up()
    with rig.client() as client:
        trial = rig.trial(client, scenario, point.number).id
        wanted = f'"event": "{point.event}"'

        def moment() -> bool:
            if wanted in rig.journal(trial):
                return True
            with contextlib.suppress(HotcellError):
                return rig.trials(client)[trial].state.ended
            return False

        with contextlib.suppress(WaitError):
            wait_until(moment, _EVENT_S, f"{point.event} of {trial}", 0.01)
    return Acting(trial)


_ACTIONS: dict[str, Callable[[Rig, Point], Acting]] = {
    "start": _start, "restart": _restart, "open": _open, "reset": _reset, "snapshot": _snapshot,
    "close": _close, "baseline": _baseline, "trial": _trial, "seal": _trial, "export": _export,
    "import": _import, "delete": _delete,
}  # fmt: skip
