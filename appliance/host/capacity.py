"""What the host has and what processes use. The one module that imports ``psutil``.

Memory in bytes, CPU in seconds. A process that has gone gives None, never an exception: it may end
between two lines of ours at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from appliance.errors import CapacityError
from appliance.model import Frozen

_GIB = 1 << 30
# Start times come from clock ticks since boot plus the boot time, which chrony may move a little.


class HostCapacity(Frozen):
    """The host's size and what of it is free now. Bytes."""

    cores: int
    memory_total: int
    memory_available: int
    disk_total: int
    disk_free: int


class ProcessSample(Frozen):
    """One look at one process. ``own`` is its unique set size: what ends with it."""

    cpu_s: float
    rss: int
    own: int
    disk_read: int
    disk_write: int
    create_time: float


class Footprint(Frozen):
    """What this very process holds; growth over many trials is a leak."""

    rss: int
    cpu_s: float
    fds: int
    threads: int
    children: int


def host_capacity(path: Path) -> HostCapacity:
    """Size of the host; disk figures are of the file system that ``path`` is or will be on.

    ``cores`` counts those this process may use, which a container or taskset can narrow.
    """
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(os.fspath(_existing(path)))
    return HostCapacity(
        cores=len(os.sched_getaffinity(0)),
        memory_total=memory.total,
        memory_available=memory.available,
        disk_total=disk.total,
        disk_free=disk.free,
    )


def require_room(path: Path, *, memory: int, disk: int, purpose: str) -> None:
    """Refuse before anything is started that would not fit. Bytes.

    Raises:
        CapacityError: memory or disk is short; the message says of what, how much, and what is free.
    """
    have = host_capacity(path)
    if memory > have.memory_available:
        raise CapacityError(
            _short("memory", purpose, memory, have.memory_available),
            hint="stop other machines, or lower [guests] in hotcell.toml",
            needed=memory,
            free=have.memory_available,
        )
    if disk > have.disk_free:
        raise CapacityError(
            f"{_short('disk', purpose, disk, have.disk_free)} on the file system of {path}",
            hint="free disk space, or choose another folder with HOTCELL_HOME or HOTCELL_CACHE",
            needed=disk,
            free=have.disk_free,
        )


def _short(what: str, purpose: str, needed: int, free: int) -> str:
    return f"not enough {what} for {purpose}: needs {needed / _GIB:.1f} GiB, free {free / _GIB:.1f} GiB"


def sample_process(pid: int) -> ProcessSample | None:
    """One look at a process, or None if it is gone, a zombie, or not ours to look at."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            cpu, memory, io = process.cpu_times(), process.memory_info(), process.io_counters()
            created = process.create_time()
        own = process.memory_full_info().uss
    except (psutil.Error, OSError):
        return None
    return ProcessSample(
        cpu_s=cpu.user + cpu.system,
        rss=memory.rss,
        own=own,
        disk_read=io.read_bytes,
        disk_write=io.write_bytes,
        create_time=created,
    )


def held_memory(pid: int) -> int | None:
    """Memory that a process took out of what the host counts as available, or None if it is gone. Bytes.

    That is its anonymous memory. The unique set size is more: pages of a file that only this process maps
    are in it, and in the page cache, which stays available.
    """
    try:
        memory = psutil.Process(pid).memory_info()
    except (psutil.Error, OSError):
        return None
    return max(0, int(memory.rss - memory.shared))


def own_footprint() -> Footprint:
    """Memory, CPU, open files, threads and child processes of this process."""
    me = psutil.Process()
    with me.oneshot():
        cpu = me.cpu_times()
        return Footprint(
            rss=me.memory_info().rss,
            cpu_s=cpu.user + cpu.system,
            fds=me.num_fds(),
            threads=me.num_threads(),
            children=len(me.children(recursive=True)),
        )


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
