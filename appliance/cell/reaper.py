"""Fetches the ends of QEMU processes at once, so that nobody waits for one that is dead.

libvirt detaches every QEMU from itself, and a process without its parent falls to the nearest subreaper, or to
process 1. One that nobody has fetched counts as alive: libvirt waits for it, and a container's process 1 may fetch
late or never (2 s where this was measured, of the 2.1 s that ending a machine took). Hence this process is its own
subreaper; see PR_SET_CHILD_SUBREAPER in prctl(2) and https://www.libvirt.org/internals/command.html.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

from appliance.cell.processes import pids, status
from appliance.host.prctl import PR_SET_CHILD_SUBREAPER, prctl

_TICK_S: Final = 0.05  # asking the kernel whether any child has ended takes microseconds
_NOT_OURS_S: Final = 1.0  # looking who it is takes milliseconds; somebody else's is looked at no oftener
_lock = threading.Lock()
_thread: threading.Thread | None = None


def start() -> None:
    """Begin, once a process and for its whole life.

    Raises:
        HostError: the kernel refuses.
    """
    global _thread  # being a subreaper is a property of the process, too
    with _lock:
        if _thread is not None:
            return
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        _thread = threading.Thread(target=_run, name="reaper", daemon=True)
        _thread.start()


def _run() -> None:
    pause = _TICK_S
    while True:
        time.sleep(pause)
        pause = _TICK_S if not a_child_has_ended() or fetch() else _NOT_OURS_S


def a_child_has_ended() -> bool:
    """Whether any child waits to be fetched, by whomever."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def fetch() -> int:
    """Fetch every QEMU that was detached, fell to this process and has ended; returns how many there were.

    No other child is touched: who started it waits for it.
    """
    fetched = 0
    for pid in pids():
        if _is_orphan(pid):
            try:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
                fetched += 1
            except ChildProcessError:  # another thread was quicker
                continue
    return fetched


def _is_orphan(pid: int) -> bool:
    """A child that ended, was a QEMU, and whose session is not ours: libvirt keeps those that it waits for in it."""
    if (found := status(pid)) is None:
        return False
    name, (state, parent, _group, session, *_) = found
    return (
        (state, int(parent)) == (b"Z", os.getpid())
        and int(session) != os.getsid(0)
        and name.startswith(b"qemu-system")
    )
