"""Calls that may never return, and the door to libvirt when its calls do not."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.cell import libvirt_door, limited
from appliance.cell.domain import OWNER_NS
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.limited import Limited, OverdueError
from appliance.errors import GuestChannelError, LabError
from appliance.host.clock import wait_until
from tests.fakes.qemu import look_alike

DOMAIN = "hc-c1-origin-0a1b2c3d"


def threads(name: str) -> int:
    return sum(t.name == name for t in threading.enumerate())


def test_a_call_gives_what_it_gives_and_raises_what_it_raises() -> None:
    calls = Limited("test-calls")
    assert calls.call(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 / 0, 5)
    assert calls.overdue == 0
    wait_until(lambda: threads("test-calls") == 0, 5, "the threads to end")


def test_a_call_that_hangs_is_left_behind_and_forgotten_once_it_returns() -> None:
    calls, let_go = Limited("test-hangs"), threading.Event()
    began = time.monotonic()
    with pytest.raises(OverdueError, match=r"within 0\.05 s"):
        calls.call(let_go.wait, 0.05)
    assert time.monotonic() - began < 2
    assert calls.overdue == threads("test-hangs") == 1
    assert calls.call(lambda: 7, 5) == 7
    let_go.set()
    wait_until(lambda: calls.overdue == 0 and threads("test-hangs") == 0, 5, "the thread to end")


def test_threads_that_hang_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "MOST_OVERDUE", 3)
    calls, let_go = Limited("test-many"), threading.Event()
    for _ in range(10):
        with pytest.raises(OverdueError):
            calls.call(let_go.wait, 0.01)
    assert threads("test-many") == 3
    with pytest.raises(OverdueError, match="3 earlier calls"):
        calls.call(lambda: 7, 5)
    let_go.set()
    wait_until(lambda: calls.overdue == 0, 5, "the threads to end")
    assert calls.call(lambda: 7, 5) == 7


# -- the door ------------------------------------------------------------------------------------------


class Stuck:
    """A libvirt whose QEMU is stopped: what asks its monitor waits until the process is gone."""

    def __init__(self, qemu: subprocess.Popen[bytes]) -> None:
        self.qemu = qemu
        for name in ("suspend", "resume", "destroy", "state", "monitor"):
            setattr(self, name, self.wait)

    def wait(self, *_anything: object) -> str:
        self.qemu.wait()
        return "{}"

    def lookupByName(self, _name: str) -> Stuck:  # noqa: N802 - libvirt's own name
        return self

    def createXML(self, _xml: str, _flags: int) -> Stuck:  # noqa: N802
        self.wait()
        return self


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    process = look_alike("-name", f"guest={DOMAIN},debug-threads=on")
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def door(tmp_path: Path, qemu: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> Libvirt:
    for name in ("QUERY_S", "MONITOR_S", "START_S", "DESTROY_S", "AGENT_SLACK_S"):
        monkeypatch.setattr(libvirt_door, name, 0.2)
    stuck = Stuck(qemu)
    monkeypatch.setattr(
        libvirt_door,
        "libvirt_qemu",
        SimpleNamespace(
            qemuMonitorCommand=stuck.wait, qemuAgentCommand=stuck.wait, VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP=1
        ),
    )
    (tmp_path / "run" / "qemu").mkdir(parents=True)
    (tmp_path / "run" / "qemu" / f"{DOMAIN}.pid").write_text(str(qemu.pid))
    return Libvirt(stuck, tmp_path)


CALLS: dict[str, Callable[[Libvirt], Any]] = {
    "start": lambda d: d.start(f"<domain><name>{DOMAIN}</name></domain>", paused=True),
    "state": lambda d: d.state(DOMAIN),
    "suspend": lambda d: d.suspend(DOMAIN),
    "resume": lambda d: d.resume(DOMAIN),
    "destroy": lambda d: d.destroy(DOMAIN),
    "qmp": lambda d: d.qmp(DOMAIN, "query-status"),
    "hmp": lambda d: d.hmp(DOMAIN, "info network"),
    "guest agent": lambda d: d.guest_agent(DOMAIN, '{"execute":"guest-ping"}', 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_hangs_is_an_error_and_its_qemu_is_killed(
    door: Libvirt, qemu: subprocess.Popen[bytes], name: str
) -> None:
    told: list[tuple[str, str]] = []
    door.guard(lambda domain, what: told.append((domain, what)))
    expected = GuestChannelError if name == "guest agent" else LabError
    with pytest.raises(expected, match=r"no answer within 0\.2 s"):
        CALLS[name](door)
    assert qemu.wait(5) == -signal.SIGKILL
    assert [domain for domain, _ in told] == [DOMAIN]
    wait_until(lambda: threads("libvirt-call") == 0, 5, "the hung call to return by itself")


def test_another_process_in_the_place_of_the_qemu_is_spared(
    door: Libvirt, tmp_path: Path, qemu: subprocess.Popen[bytes]
) -> None:
    """A pid file that outlived its QEMU may name anything by now."""
    bystander = look_alike("-name", "guest=hc-c1-origin-ffffffff")
    (tmp_path / "run" / "qemu" / f"{DOMAIN}.pid").write_text(str(bystander.pid))
    with pytest.raises(LabError):
        door.suspend(DOMAIN)
    assert bystander.poll() is None
    assert qemu.poll() is None
    bystander.kill()
    bystander.wait()


def test_calls_on_no_single_domain_have_a_limit_and_kill_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libvirt_door, "QUERY_S", 0.1)
    monkeypatch.setattr(libvirt_door, "CLOSE_S", 0.1)
    let_go = threading.Event()
    hangs = SimpleNamespace(
        listAllDomains=lambda _flags: let_go.wait(), getLibVersion=let_go.wait, close=let_go.wait
    )
    door = Libvirt(hangs, tmp_path)
    door.guard(lambda domain, what: pytest.fail(f"{domain} {what}"))
    for call in (lambda: door.list_domains(OWNER_NS), door.versions):
        with pytest.raises(LabError, match="no answer"):
            call()
    door.close()
    let_go.set()


def test_a_reply_of_the_monitor_still_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: subprocess.Popen[bytes]
) -> None:
    answer = json.dumps({"return": {"status": "running"}})
    monkeypatch.setattr(libvirt_door, "libvirt_qemu", SimpleNamespace(qemuMonitorCommand=lambda *_: answer))
    assert Libvirt(Stuck(qemu), tmp_path).qmp(DOMAIN, "query-status") == {"status": "running"}
