"""The one door to libvirt. Typed, blocking, safe to call from several threads.

The default is the embedded QEMU driver (https://libvirt.org/drvqemu.html#driver-instances): no daemon,
all state below a root directory of ours, QEMU processes and taps in the namespace of this process.
Only one process may hold a root; QEMU survives its death and the next ``open`` finds it again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

# Read once, while the library is imported; by default every warning and every error, also those we expect
# (a domain that is gone), goes to standard error. What goes wrong is raised to us anyway; to see libvirt's
# own log, set the variable to e.g. "1:file:/tmp/libvirt.log".
os.environ.setdefault("LIBVIRT_LOG_OUTPUTS", "4:file:/dev/null")

import libvirt
import libvirt_qemu

from appliance.errors import ConflictError, GuestChannelError, HostError, LabError
from appliance.model import printable

T = TypeVar("T")
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
_pump_lock = threading.Lock()
_pump: threading.Thread | None = None


class DomainState(StrEnum):
    """What libvirt says of a domain; ``gone`` when it has none of that name."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    GONE = "gone"


class DomainFact(NamedTuple):
    """One live domain: its name, its owner tag (empty if it has none of ours) and its process."""

    name: str
    owner: str
    pid: int | None


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


class Libvirt:
    """A connection to the driver; every domain it starts is transient."""

    def __init__(self, connection: Any, root: Path) -> None:
        self._conn = connection
        self.root = root

    @classmethod
    def open_embedded(cls, root: Path) -> Libvirt:
        """Open the embedded driver on ``root``, which is created and configured if needed.

        Raises:
            ConflictError: another process holds this root.
            HostError: the driver is missing or refuses to start.
        """
        etc = root / "etc"
        etc.mkdir(parents=True, exist_ok=True, mode=0o700)
        (etc / "qemu.conf").write_text(_QEMU_CONF)
        _start_pump()
        try:
            return cls(libvirt.open(f"qemu:///embed?root={root}"), root)
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

    def close(self) -> None:
        """Close the connection. Domains keep running; the caller has ended them or means to keep them."""
        self._conn.close()

    def versions(self) -> dict[str, str]:
        """Versions of the library and of QEMU, as dotted strings."""
        return {"libvirt": _dotted(self._conn.getLibVersion()), "qemu": _dotted(self._conn.getVersion())}

    def start(self, xml: str, *, paused: bool) -> None:
        """Start a transient domain.

        Raises:
            LabError: libvirt refused; the text is libvirt's.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        self._call("start a domain", lambda: self._conn.createXML(xml, flags))

    def state(self, name: str) -> DomainState:
        """Present state of a domain by exact name."""
        try:
            domain = self._conn.lookupByName(name)
            code = domain.state()[0]
        except libvirt.libvirtError as e:
            if e.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return DomainState.GONE
            raise LabError(f"libvirt does not tell the state of {name}: {e}") from e
        if code in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
            return DomainState.RUNNING
        if code == libvirt.VIR_DOMAIN_PAUSED:
            return DomainState.PAUSED
        return DomainState.STOPPING

    def suspend(self, name: str) -> None:
        """Stop the virtual CPUs."""
        self._call(f"suspend {name}", lambda: self._conn.lookupByName(name).suspend())

    def resume(self, name: str) -> None:
        """Let the virtual CPUs run."""
        self._call(f"resume {name}", lambda: self._conn.lookupByName(name).resume())

    def destroy(self, name: str) -> None:
        """End a domain; one that is gone already is no error."""
        try:
            self._conn.lookupByName(name).destroy()
        except libvirt.libvirtError as e:
            # The domain may end by itself between look-up and destroy.
            if self.state(name) is not DomainState.GONE:
                raise LabError(f"libvirt does not destroy {name}: {e}") from e

    def list_domains(self, owner_ns: str) -> list[DomainFact]:
        """All live domains with their owner tags."""
        facts = []
        for domain in self._call("list domains", lambda: self._conn.listAllDomains(0)):
            try:
                name = str(domain.name())
                owner = _owner(domain, owner_ns)
            except libvirt.libvirtError:
                continue  # ended while we looked
            facts.append(DomainFact(name, owner, self.pid(name)))
        return facts

    def pid(self, name: str) -> int | None:
        """Process id of a domain's QEMU, from libvirt's own pid file; None if it is gone."""
        try:
            return int((self.root / "run" / "qemu" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def qmp(self, name: str, command: str, arguments: dict[str, object] | None = None) -> Any:
        """One QMP command (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html); returns ``return``.

        Raises:
            LabError: the monitor is gone or refused the command.
        """
        text = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        reply = self._call(
            f"QMP {command} on {name}",
            lambda: libvirt_qemu.qemuMonitorCommand(self._conn.lookupByName(name), text, 0),
        )
        answer = json.loads(reply)
        if "error" in answer:
            raise LabError(f"QMP {command} on {name}: {answer['error'].get('desc', answer['error'])}")
        return answer.get("return")

    def hmp(self, name: str, command: str) -> str:
        """One human monitor command, for what QMP does not offer (``info network``)."""
        flag = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        return str(
            self._call(
                f"monitor {command} on {name}",
                lambda: libvirt_qemu.qemuMonitorCommand(self._conn.lookupByName(name), command, flag),
            )
        )

    def guest_agent(self, name: str, request: str, timeout_s: int) -> str:
        """Send one line to the qga and return its reply unparsed. libvirt bounds a reply to 10 MiB.

        Raises:
            GuestChannelError: no reply in time, the channel is closed, or the agent answered with an error.
        """
        try:
            return str(libvirt_qemu.qemuAgentCommand(self._conn.lookupByName(name), request, timeout_s, 0))
        except libvirt.libvirtError as e:
            # libvirt has no code of its own for an error reply, whose text is the guest's.
            refused = "unable to execute QEMU agent command" in str(e)
            verb = f"refused {json.loads(request)['execute']}" if refused else "does not answer"
            raise GuestChannelError(f"the qga of {name} {verb}: {printable(str(e), 300)}", domain=name) from e

    def _call(self, what: str, function: Callable[[], T]) -> T:
        try:
            return function()
        except libvirt.libvirtError as e:
            raise LabError(f"libvirt could not {what}: {e}") from e


def _owner(domain: Any, owner_ns: str) -> str:
    try:
        xml = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, owner_ns, 0)
    except libvirt.libvirtError as e:
        if e.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return ""
        raise
    start, end = xml.find(">"), xml.rfind("</")
    return str(xml[start + 1 : end]) if 0 <= start < end else ""


def _dotted(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
