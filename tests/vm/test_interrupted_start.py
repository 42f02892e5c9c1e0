"""A libvirt that is killed while it starts a QEMU leaves a status without a process; the next one gets over it."""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell import processes
from appliance.host.clock import wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]
NAME = "hc-c1-target-1-0a1b2c3d"
XML = f"""
<domain type="qemu"><name>{NAME}</name><memory unit="MiB">64</memory>
<os><type arch="x86_64" machine="q35">hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator><memballoon model="none"/></devices></domain>"""
START = """
import sys; from pathlib import Path; from appliance.cell.libvirt_door import Libvirt
Libvirt.open_embedded(Path(sys.argv[1])).start(sys.argv[2], paused=True)
print("started", flush=True); sys.stdin.read()"""
CLEAR = """
import sys, time; from pathlib import Path; from appliance.cell.libvirt_door import Libvirt
began = time.monotonic(); door = Libvirt.open_embedded(Path(sys.argv[1])); door.destroy(sys.argv[2])
while door.state(sys.argv[2]) != "gone": time.sleep(0.05)
print(time.monotonic() - began); door.close()"""


@pytest.fixture
def root() -> Iterator[Path]:
    made = Path(f"/var/tmp/hcis{secrets.token_hex(3)}")
    made.mkdir()
    yield made
    for qemu in processes.qemu_below(made):
        processes.send(qemu, signal.SIGKILL)
    shutil.rmtree(made)


@pytest.mark.parametrize("qemu", ["is gone", "goes on"])
def test_a_machine_whose_start_was_interrupted_is_cleared_away_at_once(root: Path, qemu: str) -> None:
    """As it is found after SIGKILL between the start of QEMU and the moment in which libvirt knows its pid."""
    libvirt = subprocess.Popen(
        [sys.executable, "-c", START, root, XML], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert libvirt.stdout is not None
    assert libvirt.stdout.readline() == b"started\n"
    libvirt.kill()
    libvirt.communicate()
    (process,) = [p for p in processes.qemu_below(root) if processes.is_domain(p, NAME)]
    status = root / "run" / "qemu" / f"{NAME}.xml"
    status.write_text(re.sub(r"(<domstatus [^>]*pid=)'\d+'", r"\1'0'", status.read_text(), count=1))
    assert "pid='0'" in status.read_text()
    if qemu == "is gone":
        processes.send(process, signal.SIGKILL)
        wait_until(lambda: processes.gone(process), 20, "QEMU to end")

    done = subprocess.run(
        [sys.executable, "-c", CLEAR, root, NAME], capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20, "libvirt itself waits 30 s for a monitor"
    assert not list((root / "run").rglob(f"{NAME}*"))
    assert processes.gone(process)
