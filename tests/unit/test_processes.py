"""Whose a process is: told by the files it names, never by its name alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell import processes
from appliance.cell.processes import Process
from appliance.host.clock import wait_until
from tests.fakes.qemu import look_alike


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    mine: list[subprocess.Popen[bytes]] = []
    yield mine
    for p in mine:
        p.kill()
        p.wait()


def pids(found: list[Process]) -> list[int]:
    return sorted(p.pid for p in found)


def test_qemus_of_a_home_and_of_no_other(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    started += [
        look_alike(f"-chardev=socket,path={tmp_path}/h/run/monitor", name="/usr/bin/qemu-system-x86_64"),
        look_alike(f"{tmp_path}/h/run/monitor", name="qemu-system-aarch64"),
        look_alike(f"{tmp_path}/h-other/run/monitor"),
        look_alike(f"{tmp_path}/h"),
        look_alike(f"{tmp_path}/h/run/monitor", name="qemu-img"),
    ]
    assert pids(processes.qemu_below(tmp_path / "h")) == sorted(p.pid for p in started[:2])


def test_a_capability_probe_is_told_from_a_machine(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    started += [
        look_alike("-machine", "none,accel=kvm:tcg", f"{tmp_path}/x"),
        look_alike("-machine", "pc-q35-7.2,accel=tcg", "-display", "none", f"{tmp_path}/x"),
    ]
    seen = {p.pid: processes.is_probe(p) for p in processes.qemu_below(tmp_path)}
    assert seen == {started[0].pid: True, started[1].pid: False}


def test_a_capture_is_found_by_the_file_it_writes(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    pcap = tmp_path / "open" / "t1" / "segment.pcap"
    started.append(look_alike("-i", "br0", "-w", str(pcap), name="/usr/bin/tcpdump"))
    assert processes.captures_below(tmp_path)[pcap].pid == started[0].pid
    assert processes.captures_below(tmp_path / "open" / "t2") == {}


@pytest.mark.parametrize(
    ("argv", "file"),
    [
        ("setpriv --pdeathsig KILL prlimit --core=0 tcpdump -i b -w /h/x.pcap", "/h/x.pcap"),
        ("/usr/bin/tcpdump -w /h/x.pcap -n", "/h/x.pcap"),
        ("tcpdump -w", None),
        ("tcpdump -r /h/x.pcap", None),
        ("vim -w /h/x.pcap", None),
        ("tail tcpdump.log -w", None),
    ],
)
def test_what_a_capture_writes(argv: str, file: str | None) -> None:
    process = Process(1, 1, tuple(a.encode() for a in argv.split(" ")))
    assert processes.capture_file(process) == (Path(file) if file else None)


def test_a_process_that_is_gone_a_zombie_and_a_kernel_thread_are_none() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: b") Z " in Path(f"/proc/{child.pid}/stat").read_bytes(), 20, "a zombie")
    assert processes.look(child.pid) is None
    child.wait()
    assert processes.look(child.pid) is None
    assert processes.look(os.getpid()) is not None


def test_exactly_the_process_that_was_seen_is_killed(started: list[subprocess.Popen[bytes]]) -> None:
    started.append(look_alike("x"))
    seen = processes.look(started[0].pid)
    assert seen is not None
    assert not processes.send(seen._replace(start=seen.start + 1), signal.SIGKILL), (
        "a later process of that pid"
    )
    assert not processes.gone(seen)
    assert processes.send(seen, signal.SIGKILL)
    wait_until(lambda: processes.gone(seen), 10, "its end")
    assert started[0].wait() == -signal.SIGKILL
    assert not processes.send(seen, signal.SIGKILL)
