"""Machines that go down, disks that fill, requests that come twice, and stopping at any moment."""

from __future__ import annotations

import time

import pytest

from appliance.cell.libvirt_door import DomainState
from appliance.errors import ConflictError, NotFoundError
from appliance.evidence import capture
from appliance.host.clock import wait_until
from appliance.model import Stopped, TrialState
from appliance.pipeline.lab import Lab
from appliance.service import TrialRequest
from tests.trial.conftest import finish, wait_for

pytestmark = [pytest.mark.trial, pytest.mark.timeout(1800)]


def start_idle(lab: Lab, **limits: float) -> str:
    """A trial whose subject does nothing for long enough to do something to it."""
    request = TrialRequest.model_validate({"subject": "idle", "limits": {"wall_s": 240, **limits}})
    trial = lab.create_trial(request).id
    wait_for(lab, trial, "step")  # the agent's own first word: it runs, and the guest channel is free again
    return trial


def test_an_origin_that_powers_off_ends_the_run_and_counts(lab: Lab) -> None:
    trial = start_idle(lab)
    origin = lab._cells[trial].machine("origin")
    origin.qga.start(["/usr/bin/systemctl", "poweroff", "--force", "--force"])
    ran = finish(lab, trial)
    assert ran.view.state is TrialState.SEALED, ran.view.reason
    assert ran.view.stopped is Stopped.MACHINE_DOWN
    assert ran.card is not None
    assert not ran.card.replicated


def test_an_origin_that_panics_stays_down(lab: Lab) -> None:
    trial = start_idle(lab)
    origin = lab._cells[trial].machine("origin")
    origin.qga.start(
        ["/bin/sh", "-c", "echo 1 > /proc/sys/kernel/panic_on_oops; echo c > /proc/sysrq-trigger"]
    )
    ran = finish(lab, trial)
    assert ran.view.state is TrialState.SEALED, ran.view.reason
    assert ran.view.stopped in (Stopped.MACHINE_DOWN, Stopped.TIME_LIMIT)


def test_a_disk_that_fills_is_stopped_at_the_limit(lab: Lab) -> None:
    trial = start_idle(lab, disk_mb=150)
    origin = lab._cells[trial].machine("origin")
    origin.qga.start(["/bin/dd", "if=/dev/urandom", "of=/root/fill", "bs=1M", "count=600"])
    ran = finish(lab, trial)
    assert ran.view.state is TrialState.SEALED, ran.view.reason
    assert ran.view.stopped is Stopped.DISK_LIMIT


_FLOOD = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    s.sendto(b"x" * 200, ("10.77.0.21", 9))
"""


def test_a_flood_ends_the_run_and_hides_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = start_idle(lab)
    monkeypatch.setattr(
        capture, "_FULL_AT", 0.002
    )  # 5,000 packets: under emulation the real limit takes minutes
    lab._cells[trial].machine("origin").qga.start(["/usr/bin/python3", "-c", _FLOOD])
    ran = finish(lab, trial)
    assert ran.view.state is TrialState.SEALED, ran.view.reason
    assert ran.view.stopped is Stopped.TRAFFIC_LIMIT
    assert ran.card is not None
    assert ran.card.rungs[1].passed, ran.card.rungs[1].finding


def test_a_request_sent_twice_is_one_trial(lab: Lab) -> None:
    key = f"twice-{time.time_ns()}"
    request = TrialRequest(subject="claimer", key=key)
    first = lab.create_trial(request)
    assert lab.create_trial(request).id == first.id
    with pytest.raises(ConflictError, match="another request"):
        lab.create_trial(TrialRequest(subject="idle", key=key))
    lab.abort(first.id)
    assert finish(lab, first.id).view.state is TrialState.ABORTED
    with pytest.raises(ConflictError):
        lab.abort(first.id)


@pytest.mark.parametrize("moment", ["queued", "resetting", "capture-confirmed", "started", "stopping"])
def test_stopping_at_any_moment_leaves_nothing(lab: Lab, moment: str) -> None:
    trial = lab.create_trial(TrialRequest(subject="claimer")).id
    wait_for(lab, trial, moment)
    lab.abort(trial)
    ran = finish(lab, trial)
    assert ran.view.state is TrialState.ABORTED, ran.view.reason
    assert lab.sweep(dry_run=True).strays == ()
    assert lab.machines() == []


def test_the_kill_switch_cuts_stops_and_refuses(lab: Lab) -> None:
    trial = start_idle(lab)
    machines = list(lab._cells[trial].machines.values())
    view = lab.kill("a test")
    assert view.problems == ()
    assert view.links_cut == 2
    assert view.trials_ended == 1
    assert view.seconds < 5
    wait_until(lambda: all(m.state is DomainState.GONE for m in machines), 20, "the machines to be gone")
    with pytest.raises(ConflictError, match="kill switch"):
        lab.create_trial(TrialRequest(subject="claimer"))
    assert finish(lab, trial).view.state is TrialState.ABORTED
    assert lab.rearm().accepting


def test_unknown_names_are_refused_before_anything_starts(lab: Lab) -> None:
    for field in ("subject", "scenario", "policy"):
        body = {"subject": "claimer", field: "no-such-thing"}
        with pytest.raises(NotFoundError, match="no-such-thing"):
            lab.create_trial(TrialRequest.model_validate(body))
    assert lab.health().queue == 0


def test_machines_of_a_running_trial_are_nobodys_toys(lab: Lab) -> None:
    trial = start_idle(lab)
    with pytest.raises(ConflictError, match="belongs to the running trial"):
        lab.exec(trial, "origin", ["/bin/true"], 5)
    lab.abort(trial)
    assert finish(lab, trial).view.state is TrialState.ABORTED


def test_a_cell_opened_by_hand_resets_and_closes(lab: Lab) -> None:
    from appliance.service import CellRequest

    cell = lab.open_cell(CellRequest())
    assert lab.exec(cell.id, "origin", ["/usr/bin/touch", "/root/dirt"], 20).rc == 0
    before = {m.name: m.incarnation for m in lab.machines()}
    reset = lab.reset(cell.id, "origin")
    assert reset.proved
    after = {m.name: m.incarnation for m in lab.machines()}
    assert after["origin"] != before["origin"]
    assert after["target-1"] == before["target-1"]
    assert lab.exec(cell.id, "origin", ["/usr/bin/test", "-e", "/root/dirt"], 20).rc == 1
    probe = lab.probe(cell.id, "origin")
    assert probe.model, probe.problem
    assert not probe.agent
    lab.close_cell(cell.id)
    assert lab.machines() == []
