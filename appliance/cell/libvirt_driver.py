"""libvirt's embedded QEMU driver: its configuration, its event loop, and how it is opened.

The driver (https://libvirt.org/drvqemu.html#driver-instances) needs no daemon: all state lies below a root directory
of ours, QEMU processes and taps in the namespace of this process. Only one process may hold a root; QEMU survives
its death and the next opening finds it again.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Final

# Read once, while the library is imported, which is why only this file imports it. By default every warning and every
# error, also those we expect (a domain that is gone), goes to standard error. What goes wrong is raised to us anyway;
# to see libvirt's own log, set the variable to e.g. "1:file:/tmp/libvirt.log", and LIBVIRT_DEBUG=1.
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")

import libvirt
import libvirt_qemu

from appliance.cell import libvirt_status, reaper
from appliance.cell.limited import Limited, OverdueError
from appliance.errors import ConflictError, HostError

__all__ = ["OPEN_S", "libvirt", "libvirt_qemu", "open_driver"]
# libvirtd's defaults would try to drop root, label files and use private mount namespaces: all of that
# belongs to a system daemon and fails or hides files here.
_QEMU_CONF: Final = """\
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
namespaces = []
remember_owner = 0
seccomp_sandbox = 1
clear_emulator_capabilities = 0
"""
OPEN_S: Final = 120.0  # 2 s; QEMU is started to be asked for its capabilities
_pump_lock = threading.Lock()
_pump: threading.Thread | None = None


def open_driver(root: Path) -> Any:
    """A connection to the driver on ``root``, which is created and configured if needed.

    Raises:
        ConflictError: another process holds this root.
        HostError: the driver is missing, refuses to start, or does not come up within 120 s.
    """
    etc = root / "etc"
    etc.mkdir(parents=True, exist_ok=True, mode=0o700)
    (etc / "qemu.conf").write_text(_QEMU_CONF)
    libvirt_status.put_right(root)
    _start_pump()
    reaper.start()
    try:
        return Limited("libvirt-open").call(lambda: libvirt.open(f"qemu:///embed?root={root}"), OPEN_S)
    except OverdueError as e:
        raise HostError(
            f"libvirt's embedded QEMU driver did not open: {e}", hint="run `hotcell doctor`"
        ) from e
    except libvirt.libvirtError as e:
        text = str(e)
        if "pid file" in text or "lock" in text.lower():
            raise ConflictError(
                f"another process already runs machines under {root}",
                hint="use the running server (`hotcell health`), or choose another --home",
            ) from e
        raise HostError(
            f"libvirt's embedded QEMU driver did not open: {text}", hint="run `hotcell doctor`"
        ) from e


def _start_pump() -> None:
    global _pump  # libvirt's event loop is one per process by its own design
    with _pump_lock:
        if _pump is not None:
            return
        libvirt.virEventRegisterDefaultImpl()
        # Without a handler libvirt writes every error to fd 2 as well.
        libvirt.registerErrorHandler(lambda _ctx, _error: None, None)

        def loop() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        _pump = threading.Thread(target=loop, name="libvirt-events", daemon=True)
        _pump.start()
