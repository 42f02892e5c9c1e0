"""What libvirt wrote down of its machines, put right before it reads that again.

The status of a machine whose start was interrupted names no process: libvirt then waits 30 s for the monitor of a
QEMU that may be gone, and holds the machine's lock meanwhile. And if another process has got the pid of a QEMU that
is gone, libvirt waits as long and then kills that process.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.cell import processes

# Beyond the kernel's largest (PID_MAX_LIMIT, 2**22): libvirt finds at once that there is no such process.
NOBODY: Final = (1 << 22) + 1
_PID = re.compile(rb"(<domstatus [^>]*\bpid=')(-?\d+)(')")


def put_right(root: Path) -> list[str]:
    """Have the status of every machine below libvirt's ``root`` name its QEMU, or nobody; returns whose was changed.

    Where libvirt runs, in another process, nothing is touched.

    Raises:
        OSError: a status cannot be read or written.
    """
    if not any(_wrong(root)):
        return []
    with _held(root / "run" / "qemu" / "driver.pid") as ours:
        changed = list(_wrong(root)) if ours else []
        for path, content in changed:
            _replace(path, content)
    return [path.stem for path, _ in changed]


def _wrong(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Each status that names another process than its QEMU, with what it should be."""
    written = sorted((root / "run" / "qemu").glob("*.xml"))
    alive = processes.qemu_below(root) if written else []
    for path in written:
        text = path.read_bytes()
        pid = next((p.pid for p in alive if processes.is_domain(p, path.stem)), NOBODY)
        right = _PID.sub(rb"\g<1>%d\g<3>" % pid, text, count=1)
        if right != text:
            yield path, right


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[bool]:
    """Hold the lock that libvirt holds while it runs; whether it could be had."""
    with lock.open("ab") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".part")
    try:
        beside.write_bytes(content)
        beside.chmod(0o600)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
