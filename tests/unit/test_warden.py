"""The warden: why it cuts, what it cuts, and that it says so. Real processes and real links, no machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell import netlink, warden
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.warden import Warden, cut, watch
from appliance.errors import LabError
from appliance.host.paths import Paths
from tests.fakes.namespace import add_tap, in_namespace, master_of
from tests.fakes.qemu import look_alike

DOMAINS = ("hc-c1-origin-00000001", "hc-c1-target-1-00000002")


# -- the reason ----------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def test_the_end_of_the_pipe_is_a_reason(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"....")
    os.close(pipe[1])
    assert watch(pipe[0], 5) == "the control process is gone"


def test_silence_is_a_reason_after_the_limit_and_not_before(pipe: tuple[int, int]) -> None:
    began = time.monotonic()
    assert watch(pipe[0], 0.3) == "no heartbeat for 0 s"
    assert 0.3 <= time.monotonic() - began < 3


def test_each_heartbeat_gives_the_whole_limit_again(pipe: tuple[int, int]) -> None:
    began = time.monotonic()
    threads = [threading.Timer(0.2 * n, os.write, (pipe[1], b".")) for n in range(1, 5)]
    for t in threads:
        t.start()
    assert watch(pipe[0], 0.5)
    assert time.monotonic() - began > 1.2
    for t in threads:
        t.join()


@pytest.mark.parametrize("said", [b"q", b"..q", b"q.", b"...q..."])
def test_goodbye_is_none(pipe: tuple[int, int], said: bytes) -> None:
    os.write(pipe[1], said)
    assert watch(pipe[0], 1) == ""


# -- the cut -------------------------------------------------------------------------------------------


class Home:
    """A home directory with rows and processes that look like QEMUs."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root / "h", root / "c").make()
        self.qemus: list[subprocess.Popen[bytes]] = []
        self.pids = self.paths.libvirt / "run" / "qemu"
        self.pids.mkdir(parents=True)

    def qemu(self, domain: str, pid: int | None = None) -> None:
        """Start one and leave its pid file; ``pid`` makes the file name another process."""
        self.qemus.append(look_alike("-name", f"guest={domain},debug-threads=on"))
        (self.pids / f"{domain}.pid").write_text(str(pid or self.qemus[-1].pid))

    def alive(self) -> list[bool]:
        time.sleep(0.1)
        return [p.poll() is None for p in self.qemus]

    def end(self) -> None:
        for p in self.qemus:
            p.kill()
            p.wait()

    def report(self) -> dict[str, object]:
        last: dict[str, object] = json.loads(self.paths.warden_log.read_text().splitlines()[-1])
        return last


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    made.end()


@in_namespace
def test_links_are_cut_and_machines_killed(tmp_path: Path) -> None:
    home = Home(tmp_path)
    try:
        ledger = Ledger(home.paths.ledger)
        netlink.create_bridge("hcb1", "hca1")
        ledger.enter(Kind.BRIDGE, "hcb1", "c1")
        for domain, tap in zip(DOMAINS, ("hct1", "hct2"), strict=True):
            add_tap(tap)
            netlink.plug(tap, "hcb1", "52:54:00:77:00:0b")
            assert master_of(tap) == "hcb1"
            home.qemu(domain)
            ledger.enter(Kind.TAP, tap, "c1")
            ledger.enter(Kind.DOMAIN, domain, "c1")
        add_tap("other")
        netlink.plug("other", "hcb1", "52:54:00:77:00:15")
        report = cut(home.paths, "a test")
        assert (report["links_cut"], report["machines_killed"], report["failures"]) == (2, 2, [])
        assert report["reason"] == "a test"
        assert master_of("hct1") is None
        assert master_of("hct2") is None
        assert master_of("other") == "hcb1", "what is not in the ledger is not ours"
        assert home.alive() == [False, False]
    finally:
        home.end()


def test_a_link_that_cannot_be_cut_does_not_save_the_machines(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(home.paths.ledger)
    home.qemu(DOMAINS[0])
    ledger.enter(Kind.DOMAIN, DOMAINS[0], "c1")
    for tap in ("hct1", "hct2"):
        ledger.enter(Kind.TAP, tap, "c1")

    def refuse(tap: str) -> None:
        raise OSError("no netlink") if tap == "hct1" else LabError("refused")

    monkeypatch.setattr(netlink, "unplug", refuse)
    report = cut(home.paths, "a test")
    assert (report["links_cut"], report["machines_killed"]) == (0, 1)
    assert len(report["failures"]) == 2  # type: ignore[arg-type]
    assert home.alive() == [False]


@in_namespace
def test_a_machine_that_is_gone_already_does_not_save_the_others(tmp_path: Path) -> None:
    home = Home(tmp_path)
    try:
        ledger = Ledger(home.paths.ledger)
        for domain in ("hc-c1-gone-00000000", *DOMAINS, "hc-c1-odd-00000000"):
            ledger.enter(Kind.DOMAIN, domain, "c1")
        ledger.enter(Kind.TAP, "hctgone", "c1")
        (home.pids / "hc-c1-odd-00000000.pid").write_text("no number")
        for domain in DOMAINS:
            home.qemu(domain)
        report = cut(home.paths, "a test")
        assert report["machines_killed"] == 2
        assert len(report["failures"]) == 2  # type: ignore[arg-type]
        assert home.alive() == [False, False]
    finally:
        home.end()


def test_a_process_that_is_not_the_domains_is_not_killed(home: Home) -> None:
    ledger = Ledger(home.paths.ledger)
    home.qemu(DOMAINS[0])
    bystander = home.qemus[0]
    (home.pids / f"{DOMAINS[1]}.pid").write_text(str(bystander.pid))  # a pid that was given anew
    ledger.enter(Kind.DOMAIN, DOMAINS[1], "c1")
    assert cut(home.paths, "a test")["machines_killed"] == 0
    assert home.alive() == [True]


@pytest.mark.parametrize("ledger", ["missing", "garbage"])
def test_without_a_readable_ledger_every_machine_of_the_home_is_killed(home: Home, ledger: str) -> None:
    """Fail closed: what cannot be read cannot spare anything."""
    if ledger == "garbage":
        home.paths.ledger.write_bytes(b"no database at all" * 100)
    for domain in DOMAINS:
        home.qemu(domain)
    report = cut(home.paths, "a test")
    assert report["machines_killed"] == 2
    assert "ledger" in str(report["failures"])
    assert home.alive() == [False, False]


# -- the process ---------------------------------------------------------------------------------------


def wait_for(condition: object, limit_s: float = 15) -> None:
    end = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def guarded(home: Home) -> Home:
    """A home with one machine in its ledger."""
    home.qemu(DOMAINS[0])
    Ledger(home.paths.ledger).enter(Kind.DOMAIN, DOMAINS[0], "c1")
    return home


def test_goodbye_cuts_nothing_and_leaves_no_process(guarded: Home) -> None:
    made = Warden(guarded.paths)
    assert made.alive
    made.dismiss()
    assert not made.alive
    assert not guarded.paths.warden_log.exists()
    assert guarded.alive() == [True]


def test_the_death_of_the_server_is_a_cut(guarded: Home) -> None:
    """A server in a process of its own, killed as a crash kills it."""
    code = (
        "import sys, time; from pathlib import Path; from appliance.cell.warden import Warden;"
        "from appliance.host.paths import Paths; w = Warden(Paths(Path(sys.argv[1]), Path(sys.argv[2])));"
        "print(w.pid, flush=True); time.sleep(60)"
    )
    project = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-c", code, str(guarded.paths.home), str(guarded.paths.cache)]
    server = subprocess.Popen(argv, cwd=project, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    pid = int(server.stdout.readline())
    time.sleep(1)
    server.send_signal(signal.SIGKILL)
    server.wait()
    server.stdout.close()
    wait_for(guarded.paths.warden_log.exists)
    assert guarded.report()["reason"] == "the control process is gone"
    assert guarded.report()["machines_killed"] == 1
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def test_a_server_that_stands_still_is_a_cut_and_learns_of_it(
    guarded: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warden, "HEARTBEAT_S", 4.0)
    lost = threading.Event()
    made = Warden(guarded.paths, limit_s=1.0)
    made.guard(lost.set)
    wait_for(guarded.paths.warden_log.exists)
    assert "no heartbeat" in str(guarded.report()["reason"])
    assert guarded.alive() == [False]
    wait_for(lost.is_set)
    assert not made.alive
    late = threading.Event()
    made.guard(late.set)
    assert late.is_set(), "who asks afterwards is told as well"
    made.dismiss()


def test_a_warden_that_is_killed_is_missed(guarded: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "HEARTBEAT_S", 0.1)
    lost = threading.Event()
    made = Warden(guarded.paths)
    made.guard(lost.set)
    os.kill(made.pid, signal.SIGKILL)
    assert lost.wait(10)
    made.dismiss()


def test_a_dismissed_warden_is_not_missed(guarded: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warden, "HEARTBEAT_S", 0.05)
    lost = threading.Event()
    made = Warden(guarded.paths)
    made.guard(lost.set)
    time.sleep(0.3)
    made.dismiss()
    time.sleep(0.2)
    assert not lost.is_set()


def test_left_alone_it_cuts_what_there_is_and_ends(home: Home) -> None:
    ledger = Ledger(home.paths.ledger)
    home.qemu(DOMAINS[0])
    ledger.enter(Kind.DOMAIN, DOMAINS[0], "c1")
    warden = Warden(home.paths)
    warden.leave_alone()
    assert not warden.alive
    report = home.report()
    assert (report["reason"], report["machines_killed"]) == ("the control process is gone", 1)
    assert home.alive() == [False]
