"""The one door to libvirt. Typed, blocking, safe to call from several threads.

libvirt waits for a QEMU's monitor without a limit of its own, so every call has one here. When it passes, the
QEMU that was asked is killed by its pid, which also makes the call return in the thread it was left in.
"""

from __future__ import annotations

import contextlib
import json
import queue
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar

from appliance.cell import processes
from appliance.cell.libvirt_driver import libvirt, libvirt_qemu, open_driver
from appliance.cell.limited import Limited, OverdueError
from appliance.cell.port import Port
from appliance.errors import GuestChannelError, LabError
from appliance.model import printable

T = TypeVar("T")
# Limits in seconds. None is ever reached by a libvirt that works: on two cores busy with guests, what takes
# milliseconds was delayed by up to 2 s.
QUERY_S: Final = 20.0  # answered from libvirt's own memory
MONITOR_S: Final = 30.0  # QEMU answers in milliseconds; stopping it first waits for its writes to the disk
START_S: Final = 120.0  # 0.1 s; libvirt gives QEMU 30 s and more, with its memory, to open the monitor
DESTROY_S: Final = 60.0  # 2 s; libvirt asks for up to 15 s before it kills, and waits as long again
AGENT_SLACK_S: Final = (
    45.0  # beyond the reply's own limit: 30 s for libvirt's lock of a domain, 5 s to find in step
)
CLOSE_S: Final = 30.0
OnHang = Callable[[str, str], None]


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


class Libvirt:
    """A connection to the driver; every domain it starts is transient."""

    def __init__(self, connection: Any, root: Path) -> None:
        self._conn = connection
        self.root = root
        self._limited = Limited("libvirt-call")
        self._on_hang: OnHang = lambda _domain, _what: None

    def guard(self, on_hang: OnHang) -> None:
        """Have ``on_hang(domain, what)`` called when a call on a domain hung, after its QEMU was killed.

        It comes in the thread that made the call, before the error is raised there.
        """
        self._on_hang = on_hang

    @classmethod
    def open_embedded(cls, root: Path) -> Self:
        """Open the embedded driver on ``root``, which is created and configured if needed.

        Raises:
            ConflictError: another process holds this root.
            HostError: the driver is missing, refuses to start, or does not come up within 120 s.
        """
        return cls(open_driver(root), root)

    def close(self) -> None:
        """Close the connection. Domains keep running; the caller has ended them or means to keep them."""
        with contextlib.suppress(OverdueError):  # what hangs there ends with this process
            self._limited.call(self._conn.close, CLOSE_S)

    def versions(self) -> dict[str, str]:
        """Versions of the library and of QEMU, as dotted strings."""
        library = self._call("tell its version", self._conn.getLibVersion, QUERY_S)
        qemu = self._call("tell QEMU's version", self._conn.getVersion, QUERY_S)
        return {"libvirt": _dotted(library), "qemu": _dotted(qemu)}

    def start(self, xml: str, *, paused: bool) -> None:
        """Start a transient domain.

        Raises:
            LabError: libvirt refused (the text is libvirt's), or QEMU did not come up in time and was killed.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        self._call("start a domain", lambda: self._conn.createXML(xml, flags), START_S, _name_in(xml))

    def state(self, name: str) -> DomainState:
        """Present state of a domain by exact name."""
        try:
            code = self._bounded(
                f"tell the state of {name}", lambda: self._conn.lookupByName(name).state()[0], QUERY_S, name
            )
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
        self._call(f"suspend {name}", lambda: self._conn.lookupByName(name).suspend(), MONITOR_S, name)

    def resume(self, name: str) -> None:
        """Let the virtual CPUs run."""
        self._call(f"resume {name}", lambda: self._conn.lookupByName(name).resume(), MONITOR_S, name)

    def destroy(self, name: str) -> None:
        """End a domain and remove its log; one that is gone already is no error."""
        try:
            self._bounded(f"destroy {name}", lambda: self._conn.lookupByName(name).destroy(), DESTROY_S, name)
        except libvirt.libvirtError as e:
            # The domain may end by itself between look-up and destroy.
            if self.state(name) is not DomainState.GONE:
                raise LabError(f"libvirt does not destroy {name}: {e}") from e
        # libvirt keeps one of about 8 KiB for every domain that ever was, and ours are never twice the same.
        (self.root / "log" / "qemu" / f"{name}.log").unlink(missing_ok=True)

    @contextlib.contextmanager
    def watch_end(self, name: str) -> Iterator[Callable[[float], bool]]:
        """Watch how a domain ends. The function that is given waits up to so many seconds for its end to be told,
        and says whether the guest had powered itself off: a QEMU that was killed has not.

        https://libvirt.org/html/libvirt-libvirt-domain.html#virDomainEventStoppedDetailType

        Raises:
            LabError: libvirt knows no such domain.
        """
        told: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def lifecycle(_connection: Any, _domain: Any, event: int, detail: int, _opaque: Any) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                told.put(detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)

        def powered_off(limit_s: float) -> bool:
            with contextlib.suppress(queue.Empty):
                return told.get(timeout=limit_s)
            return False

        def register() -> int:
            domain, kind = self._conn.lookupByName(name), libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
            return int(self._conn.domainEventRegisterAny(domain, kind, lifecycle, None))

        number = self._call(f"watch {name}", register, QUERY_S, name)
        try:
            yield powered_off
        finally:
            self._call("end a watch", lambda: self._conn.domainEventDeregisterAny(number), QUERY_S)

    def list_domains(self, owner_ns: str) -> list[DomainFact]:
        """All live domains with their owner tags."""

        def look() -> list[tuple[str, str]]:
            found = []
            for domain in self._conn.listAllDomains(0):
                with contextlib.suppress(libvirt.libvirtError):  # ended while we looked
                    found.append((str(domain.name()), _owner(domain, owner_ns)))
            return found

        listed = self._call("list domains", look, QUERY_S)
        return [DomainFact(name, owner, self.pid(name)) for name, owner in listed]

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
            MONITOR_S,
            name,
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
                MONITOR_S,
                name,
            )
        )

    def guest_agent(self, name: str, request: str, timeout_s: int) -> str:
        """Send one line to the qga and return its reply unparsed. libvirt bounds a reply to 10 MiB.

        Raises:
            GuestChannelError: no reply in time, the channel is closed, or the agent answered with an error.
        """
        try:
            return str(
                self._bounded(
                    f"ask the qga of {name}",
                    lambda: libvirt_qemu.qemuAgentCommand(
                        self._conn.lookupByName(name), request, timeout_s, 0
                    ),
                    timeout_s + AGENT_SLACK_S,
                    name,
                    GuestChannelError,
                )
            )
        except libvirt.libvirtError as e:
            # libvirt has no code of its own for an error reply, whose text is the guest's.
            refused = "unable to execute QEMU agent command" in str(e)
            verb = f"refused {json.loads(request)['execute']}" if refused else "does not answer"
            raise GuestChannelError(f"the qga of {name} {verb}: {printable(str(e), 300)}", domain=name) from e

    def open_port(self, path: Path) -> Port:
        """The host's end of a domain's port that lies at ``path``.

        Raises:
            GuestChannelError: nobody listens there.
        """
        return Port(path)

    def _call(self, what: str, function: Callable[[], T], limit_s: float, domain: str = "") -> T:
        """As :meth:`_bounded`, with libvirt's own errors as ours."""
        try:
            return self._bounded(what, function, limit_s, domain)
        except libvirt.libvirtError as e:
            raise LabError(f"libvirt could not {what}: {e}") from e

    def _bounded(
        self,
        what: str,
        function: Callable[[], T],
        limit_s: float,
        domain: str,
        error: type[LabError] = LabError,
    ) -> T:
        """What a call of libvirt gives. A domain that it hangs on is killed, and whoever guards us is told."""
        try:
            return self._limited.call(function, limit_s)
        except OverdueError as e:
            if domain:
                processes.kill_domain_process(self.pid(domain), domain)
                self._on_hang(domain, what)
            raise error(
                f"libvirt did not {what}: {e}",
                hint="its QEMU was killed; see the host's load and the machine's console" if domain else "",
                domain=domain,
            ) from e


def _name_in(xml: str) -> str:
    try:
        return ET.fromstring(xml).findtext("name") or ""  # noqa: S314 - our own text
    except ET.ParseError:
        return ""  # libvirt will say what is wrong with it


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
