"""Processes that belong to a home, told by the files below it that their command lines name; see proc(5).

A name alone never makes a process ours: another home, or another program, runs the same ones.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process as it was seen. ``start``, in clock ticks since boot, tells it from a later one of its pid."""

    pid: int
    start: int
    argv: tuple[bytes, ...]


def processes() -> Iterator[Process]:
    """Every process of this host that has a command line."""
    for pid in pids():
        if (found := look(pid)) is not None:
            yield found


def pids() -> Iterator[int]:
    """Every process of this host, zombies and kernel threads too."""
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def status(pid: int) -> tuple[bytes, list[bytes]] | None:
    """A process's name, and the fields that follow it in /proc/PID/stat: its state, its parent, and so on."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name stands in brackets and may hold anything, brackets too.
    head, _, fields = stat.rpartition(b")")
    return head.partition(b"(")[2], fields.split()


def look(pid: int) -> Process | None:
    """One process by its pid; None if there is none, or none with a command line (a kernel thread, a zombie)."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    start = started(pid)
    if not argv or start is None:
        return None
    return Process(pid, start, tuple(argv.rstrip(b"\0").split(b"\0")))


def started(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if it has ended, also if nobody has waited for it yet.

    Known at once, while a command line can be read only a moment after its program was started.
    """
    if (found := status(pid)) is None:
        return None
    state, *fields = found[1]
    return None if state in (b"Z", b"X") else int(fields[18])


def qemu_below(folder: Path) -> list[Process]:
    """QEMU processes whose command line names a file below ``folder``; also those that libvirt asks for its
    capabilities."""
    prefix = os.fsencode(folder) + b"/"
    return [
        p
        for p in processes()
        if p.argv[0].rpartition(b"/")[2].startswith(b"qemu-system") and any(prefix in a for a in p.argv)
    ]


def is_probe(process: Process) -> bool:
    """True for a QEMU without a machine, which libvirt starts to ask what it can do."""
    # Our machines have "-display none": only as a machine type does the word tell a probe.
    return any(
        a in (b"-machine", b"-M") and b.partition(b",")[0] == b"none"
        for a, b in itertools.pairwise(process.argv)
    )


def is_domain(process: Process, domain: str) -> bool:
    """True for a QEMU that libvirt started for exactly this domain name."""
    names = (f"guest={domain}".encode(), f"guest={domain},".encode())
    return any(a == names[0] or a.startswith(names[1]) for a in process.argv)


def is_domain_process(pid: int, domain: str) -> bool:
    """As :func:`is_domain`, by pid; False if there is no such process."""
    process = look(pid)
    return process is not None and is_domain(process, domain)


def signal_domain_process(pid: int | None, domain: str, number: signal.Signals) -> bool:
    """Send a signal to a QEMU, if ``pid`` still is this domain's. True if it was sent."""
    process = None if pid is None else look(pid)
    return process is not None and is_domain(process, domain) and send(process, number)


def kill_domain_process(pid: int | None, domain: str) -> bool:
    """SIGKILL a QEMU, if ``pid`` still is this domain's. True if it was sent."""
    return signal_domain_process(pid, domain, signal.SIGKILL)


def capture_file(process: Process) -> Path | None:
    """The file that a tcpdump writes; None for any other process.

    Until it has become tcpdump, the programs that start it carry its whole command line.
    """
    argv = process.argv
    if not any(a.rpartition(b"/")[2] == b"tcpdump" for a in argv):
        return None
    written = [b for a, b in itertools.pairwise(argv) if a == b"-w"]
    return Path(os.fsdecode(written[0])) if written else None


def captures_below(folder: Path) -> dict[Path, Process]:
    """Packet captures that write a file below ``folder``, by that file."""
    found = {}
    for process in processes():
        path = capture_file(process)
        if path is not None and folder in path.parents:
            found[path] = process
    return found


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to exactly this process. False if it is gone, or its pid is another's by now."""
    try:
        # A descriptor holds on to the process: between the look and the signal its pid cannot change hands.
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if gone(process):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def gone(process: Process) -> bool:
    """True once it has ended (a zombie that nobody has waited for yet has too)."""
    return started(process.pid) != process.start
