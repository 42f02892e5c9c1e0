"""Real processes, detached as libvirt detaches them; a copy of ``sleep`` plays the QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Run in a process of its own: being a subreaper is for life.
_SCRIPT = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from appliance.cell import reaper

    def detached(program):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            grandchild = os.fork()
            if grandchild == 0:
                os.execv(program, [program, "60"])
            os.write(tell, str(grandchild).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return int(os.read(told, 20))

    def gone(pid, limit=5.0):
        end = time.monotonic() + limit
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.01)
        return not Path(f"/proc/{pid}").exists()

    def named(pid, name):
        while Path(f"/proc/{pid}/comm").read_text().strip() != name:
            time.sleep(0.01)

    qemu, other = sys.argv[1:]
"""


def run(tmp_path: Path, body: str) -> str:
    qemu, other = tmp_path / "qemu-system-x86_64", tmp_path / "other"
    for path in (qemu, other):
        shutil.copy("/bin/sleep", path)
    script = textwrap.dedent(_SCRIPT) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script, qemu, other], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_detached_qemu_falls_to_us_and_is_fetched(tmp_path: Path) -> None:
    assert "True" in run(
        tmp_path,
        """
        reaper.start(); reaper.start()
        pid = detached(qemu); named(pid, "qemu-system-x86")
        assert f"PPid:\\t{os.getpid()}\\n" in Path(f"/proc/{pid}/status").read_text()
        os.kill(pid, signal.SIGKILL)
        print(gone(pid))
        """,
    )


def test_who_started_a_child_fetches_it(tmp_path: Path) -> None:
    """Also a QEMU that was not detached, as libvirt's own short-lived ones, and whatever else falls to us."""
    run(
        tmp_path,
        """
        reaper.start()
        own = subprocess.Popen([qemu, "60"])
        orphan = detached(other); named(orphan, "other")
        pid = detached(qemu); named(pid, "qemu-system-x86")
        for each in (own.pid, orphan, pid):
            os.kill(each, signal.SIGKILL)
        assert gone(pid), "others that have ended hide no QEMU"
        time.sleep(0.3)
        assert Path(f"/proc/{orphan}/stat").read_text().split()[2] == "Z"
        assert own.wait() == -signal.SIGKILL
        """,
    )


def test_a_process_without_children_has_nothing_to_fetch(tmp_path: Path) -> None:
    run(tmp_path, "assert not reaper.a_child_has_ended() and reaper.fetch() == 0")


@pytest.mark.parametrize("pid", [os.getpid(), 1, 1 << 30])
def test_what_is_no_orphan_is_left_alone(pid: int) -> None:
    from appliance.cell import reaper

    assert not reaper._is_orphan(pid)
