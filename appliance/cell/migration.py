"""Device state out of and into a QEMU, without its RAM.

``x-ignore-shared`` leaves RAM that lies in a shared file out of the stream, which is then below 1 MiB.
The stream goes through a unix socket, since libvirt's seccomp filter forbids ``exec:``.
Capability: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html (MigrationCapability).
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.cell.incarnation import Incarnation
from appliance.errors import LabError
from appliance.host.clock import wait_until
from appliance.model import printable

_MAX_STATE = 64 << 20


def _without_ram(on: bool) -> dict[str, object]:
    return {"capabilities": [{"capability": "x-ignore-shared", "state": on}]}


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # a time-out is one too
        raise LabError(f"could not {what}: {e.strerror or e}") from e


def save_state(machine: Incarnation, destination: Path, *, limit_s: float = 60) -> int:
    """Write a suspended template's device state to ``destination``; returns its bytes.

    The disk is flushed as part of it: QEMU gives up its block devices before the stream ends.

    Raises:
        LabError: the stream broke off, grew beyond 64 MiB (RAM was not left out) or took too long.
    """
    path = machine.folder / "state.sock"
    deadline = time.monotonic() + limit_s
    with _told(f"save the state of {machine.name}"), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(limit_s)
        machine.qmp("migrate-set-capabilities", _without_ram(True))
        machine.qmp("migrate", {"uri": f"unix:{path}"})
        connection, _ = listener.accept()
        with connection, destination.open("wb") as out:
            connection.settimeout(limit_s)
            total = 0
            while data := connection.recv(1 << 16):
                total += len(data)
                if total > _MAX_STATE or time.monotonic() > deadline:
                    raise LabError(f"device state of {machine.name} does not end ({total} bytes)")
                out.write(data)
    path.unlink()
    _wait_status(machine, "query-migrate", "completed", ("failed", "cancelled"), limit_s)
    return total


def load_state(machine: Incarnation, source: Path, *, limit_s: float = 60) -> None:
    """Feed saved device state to a clone that was started with ``-incoming defer``.

    Raises:
        LabError: QEMU refused the stream.
    """
    path = machine.folder / "state.sock"
    machine.qmp("migrate-set-capabilities", _without_ram(True))
    machine.qmp("migrate-incoming", {"uri": f"unix:{path}"})
    with _told(f"load the state of {machine.name}"), socket.socket(socket.AF_UNIX) as s:
        s.settimeout(limit_s)
        s.connect(str(path))
        s.sendall(source.read_bytes())
    path.unlink(missing_ok=True)
    _wait_loaded(machine, limit_s)


def hand_over(source: Incarnation, twin: Incarnation, *, limit_s: float = 300) -> None:
    """Move a paused machine's whole state, RAM and all, into a waiting twin on the same disk layer.

    Afterwards the twin owns the disk and ``source`` is a husk that can only be destroyed.

    Raises:
        LabError: QEMU refused, or it took too long.
    """
    path = twin.folder / "hand-over.sock"
    for machine in (source, twin):
        machine.qmp("migrate-set-capabilities", _without_ram(False))
    twin.qmp("migrate-incoming", {"uri": f"unix:{path}"})
    # The default of 128 MiB/s is for networks; this stays inside one host.
    source.qmp("migrate-set-parameters", {"max-bandwidth": 32 << 30})
    source.qmp("migrate", {"uri": f"unix:{path}"})
    _wait_status(source, "query-migrate", "completed", ("failed", "cancelled"), limit_s)
    _wait_loaded(twin, limit_s)
    path.unlink(missing_ok=True)


def _wait_loaded(machine: Incarnation, limit_s: float) -> None:
    def loaded() -> bool:
        status = machine.qmp("query-status")
        return isinstance(status, dict) and status.get("status") != "inmigrate"

    wait_until(loaded, limit_s, f"{machine.name} to load its device state", interval=0.005)


def _wait_status(
    machine: Incarnation, command: str, wanted: str, bad: tuple[str, ...], limit_s: float
) -> None:
    def done() -> bool:
        answer = machine.qmp(command)
        facts = answer if isinstance(answer, dict) else {}
        status, why = facts.get("status"), facts.get("error-desc")
        if status in bad:
            reason = f": {printable(str(why))}" if why else ""
            raise LabError(f"{command} of {machine.name}: {status}{reason}")
        return status == wanted

    wait_until(done, limit_s, f"{command} of {machine.name} to say {wanted}", interval=0.01)
