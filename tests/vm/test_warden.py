"""Pulling the plug on the control process cuts the cell: nothing is ever opened because something failed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from appliance.cell.baseline import Baseline, Workshop
from appliance.cell.cell import Cell
from appliance.cell.libvirt_door import DomainState
from appliance.cell.warden import Warden
from appliance.host.clock import wait_until
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def report_of(shop: Workshop) -> dict[str, object]:
    lines = shop.paths.warden_log.read_text().splitlines()
    last: dict[str, object] = json.loads(lines[-1])
    return last


def test_a_dead_server_is_a_cut_cell(
    open_cell: OpenCell, shop: Workshop, baselines: dict[str, Baseline]
) -> None:
    """The warden's pipe closes as it does when its server is killed; links go first, then the machines."""
    del baselines
    cell = open_cell("origin", "target-1")
    shop.paths.warden_log.unlink(missing_ok=True)
    warden = Warden(shop.paths)
    time.sleep(1)
    abandon(warden)
    report = report_of(shop)
    assert report["reason"] == "the control process is gone"
    assert report["links_cut"] == 2
    assert report["machines_killed"] == 2
    assert report["failures"] == []
    wait_until(lambda: gone(cell), 15, "both machines to be gone")


def test_a_server_that_hangs_is_cut_off_too(open_cell: OpenCell, shop: Workshop) -> None:
    cell = open_cell("origin")
    shop.paths.warden_log.unlink(missing_ok=True)
    warden = Warden(shop.paths, limit_s=2.5)
    time.sleep(4)
    assert warden.alive, "a server that beats is left alone"
    warden._done.set()  # the heartbeat stops and the pipe stays open, as when the server hangs
    wait_until(shop.paths.warden_log.exists, 15, "the warden's report", 0.01)
    assert str(report_of(shop)["reason"]).startswith("no heartbeat")
    wait_until(lambda: gone(cell), 15, "the machine to be gone")
    warden.dismiss()


def test_goodbye_cuts_nothing(open_cell: OpenCell, shop: Workshop) -> None:
    cell = open_cell("origin")
    shop.paths.warden_log.unlink(missing_ok=True)
    warden = Warden(shop.paths)
    warden.dismiss()
    assert not shop.paths.warden_log.exists()
    assert cell.machine("origin").state is DomainState.RUNNING


def gone(cell: Cell) -> bool:
    return all(m.state is DomainState.GONE for m in cell.machines.values())


def abandon(warden: Warden) -> None:
    """What the death of the server does: the pipe's only writer goes, without a word."""
    warden._done.set()
    warden._thread.join(5)
    os.close(warden._pipe)
    warden._process.wait(30)


def test_the_warden_outlives_ctrl_c(shop: Workshop) -> None:
    """A session of its own: a terminal's interrupt does not reach it before it reaches the server."""
    warden = Warden(shop.paths)
    assert os.getsid(warden.pid) != os.getsid(0)
    assert Path(f"/proc/{warden.pid}/ns/net").stat().st_ino == Path("/proc/self/ns/net").stat().st_ino
    os.kill(warden.pid, 0)
    warden.dismiss()
    with pytest.raises(ProcessLookupError):
        os.kill(warden.pid, signal.SIGCONT)
