"""Pulling the plug on a real server: cut at once, void afterwards, nothing left. And a few points of the campaign.

This module runs before the others of its tier, and asks a server for everything: once this process has opened
libvirt on a home, no server can.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell import processes
from appliance.host.clock import wait_until
from appliance.host.paths import Paths
from appliance.model import TrialState
from tests.torture.campaign import Campaign, table
from tests.torture.points import Point, campaign
from tests.torture.rig import Rig

pytestmark = [pytest.mark.trial, pytest.mark.timeout(1800)]
# All but the disk, which needs a file system of its own, each at what is quick to bring about; and the server at what
# is done with baselines. The long campaign does all, everywhere.
KINDS = ("server", "server-and-warden", "warden", "qemu", "hang", "tcpdump", "qga", "clock")
QUICK = ("restart", "open", "reset", "trial", "seal")
OF_BASELINES = ("snapshot", "export", "import", "delete")


@pytest.fixture(scope="module")
def rig(home: Paths) -> Iterator[Rig]:
    folder = home.home.with_name(f"{home.home.name}-torture")  # beside it: exports are as large as baselines
    folder.mkdir()
    made = Rig(home, folder / "server.log")
    yield made
    made.stop()
    shutil.rmtree(folder)


def started(paths: Paths) -> bool:
    return any('"event": "started"' in p.read_text() for p in paths.open_trials.glob("*/journal.jsonl"))


def test_kill_9_of_the_server_in_the_middle_of_a_trial(rig: Rig, home: Paths) -> None:
    rig.up()
    with rig.log.open("ab") as log:
        client = subprocess.Popen(
            [*rig.argv(), "run", "idle", "--no-serve", "--limit", "wall_s=240"], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: started(home), 900, "the subject to run")
        trial = next(home.open_trials.iterdir()).name
        mine = [q for q in rig.qemus() if any(f"guest=hc-{trial}".encode() in a for a in q.argv)]
        assert len(mine) == 2
        rig.kill()
        wait_until(lambda: not rig.qemus(), 20, "the warden to stop the machines")
        wait_until(lambda: not processes.captures_below(home.home), 10, "the capture to end with its server")
        assert client.wait(60) not in (0, None)
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
    last = json.loads(home.warden_log.read_text().splitlines()[-1])
    assert last["reason"] == "the control process is gone"
    assert last["links_cut"] >= 2
    rig.up()
    with rig.client() as asking:
        newest = rig.trials(asking)[trial]
        assert newest.state is TrialState.VOID
        assert "control process" in newest.reason
        assert newest.bundle is not None
        assert Path(newest.bundle).is_dir()
        assert rig.sweep(asking) == []


def points() -> list[Point]:
    drawn = campaign(20261121, 200, KINDS)
    quick = [next(p for p in drawn if p.kind == kind and p.action in QUICK) for kind in KINDS]
    return quick + [next(p for p in drawn if (p.kind, p.action) == ("server", a)) for a in OF_BASELINES]


def test_a_few_points_of_the_campaign(rig: Rig) -> None:
    run = Campaign(rig, disk=None, trial_every=1)
    assert run.prepare() == []
    results = [run.run(point) for point in points()]
    told = "\n".join(r.line for r in results)
    assert not [r for r in results if r.faults], f"{told}\n{rig.tail()}"
    assert sum(bool(r.struck) for r in results) >= len(results) - 1, f"too few found anybody:\n{told}"
    assert table(results)
    assert run.finish() == []
