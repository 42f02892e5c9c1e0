"""One incarnation of a machine: its domain, tap, overlay and sockets, from ledger row to removal.

An incarnation is started paused and unplugged, and nothing but :meth:`plug` joins it to its segment.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from appliance.cell import netlink, overlay
from appliance.cell.domain import DomainSpec, domain_xml
from appliance.cell.ledger import Kind, Ledger
from appliance.cell.libvirt_door import DomainState, Libvirt
from appliance.cell.port import Port
from appliance.cell.processes import kill_domain_process, signal_domain_process
from appliance.cell.qga import Qga
from appliance.cell.spec import MachineSpec, bridge_name, tap_name
from appliance.errors import HotcellError, LabError
from appliance.host.clock import wait_until
from appliance.host.firmware import require_uefi
from appliance.host.paths import Paths
from appliance.model import Accelerator, Firmware


class OwnFile(NamedTuple):
    """A file that was made for one incarnation, before it started."""

    what: str
    path: Path
    inode: int

    @classmethod
    def made(cls, what: str, path: Path) -> OwnFile:
        """The one that lies there now."""
        return cls(what, path, path.stat().st_ino)


class Incarnation:
    """One life of a machine. Create with :func:`prepare`, then :meth:`start`."""

    def __init__(self, spec: DomainSpec, cell: str, number: str, libvirt: Libvirt, ledger: Ledger) -> None:
        self.spec = spec
        self.cell = cell
        self.id = number
        self.folder = spec.overlay.parent
        self.plugged = False
        self.was_plugged = False
        self.pid: int | None = None
        self._port: Port | None = None
        self.own_files = [OwnFile.made("overlay", spec.overlay)]
        self.nvram_sha256 = ""  # as it was before the machine started
        if spec.nvram is not None:
            self.own_files.append(OwnFile.made("NVRAM", spec.nvram))
            self.nvram_sha256 = hashlib.sha256(spec.nvram.read_bytes()).hexdigest()
        self._libvirt = libvirt
        self._ledger = ledger
        self.qga = Qga(
            lambda request, timeout_s: libvirt.guest_agent(spec.domain, request, timeout_s), spec.machine.name
        )

    @property
    def name(self) -> str:
        """The machine's name in its cell."""
        return self.spec.machine.name

    @property
    def domain(self) -> str:
        """The domain's name."""
        return self.spec.domain

    @property
    def things(self) -> list[tuple[Kind, str]]:
        """Its rows in the ledger, as kind and name."""
        return [
            (Kind.TAP, self.spec.tap),
            (Kind.DOMAIN, self.spec.domain),
            (Kind.FOLDER, str(self.folder)),
        ]

    @property
    def state(self) -> DomainState:
        """What libvirt says now."""
        return self._libvirt.state(self.spec.domain)

    def start(self) -> None:
        """Start paused and unplugged."""
        self._ledger.enter(Kind.TAP, self.spec.tap, self.cell)
        self._ledger.enter(Kind.DOMAIN, self.spec.domain, self.cell)
        self._libvirt.start(domain_xml(self.spec), paused=True)
        # libvirt joins the tap to the bridge; nothing has run yet, so nothing was sent.
        netlink.unplug(self.spec.tap)
        self.pid = self._libvirt.pid(self.spec.domain)
        if self.pid is None:
            raise LabError(f"libvirt wrote no pid file for {self.spec.domain}")

    def open_port(self) -> Port:
        """The host's end of its proof port, which stays open until it hangs up or ends.

        Raises:
            GuestChannelError: nobody listens there.
        """
        if self._port is None:
            self._port = self._libvirt.open_port(self.spec.proof_socket)
        return self._port

    def hang_up(self) -> None:
        """Close the host's end of its proof port; no error if it is closed."""
        if self._port is not None:
            self._port.close()
            self._port = None

    @contextlib.contextmanager
    def destroyed_on_error(self) -> Iterator[None]:
        """Destroy it if what is done inside fails; the error goes on."""
        try:
            yield
        except BaseException:
            # The first error is the one to tell; the ledger knows what is left.
            with contextlib.suppress(LabError):
                self.destroy()
            raise

    def plug(self) -> None:
        """Join the cell's segment."""
        netlink.plug(self.spec.tap, self.spec.bridge, self.spec.machine.mac)
        self.plugged = self.was_plugged = True

    def unplug(self) -> None:
        """Leave the segment; safe at any time."""
        netlink.unplug(self.spec.tap)
        self.plugged = False

    def pause(self) -> None:
        """Stop the virtual CPUs."""
        self._libvirt.suspend(self.spec.domain)

    def resume(self) -> None:
        """Let the virtual CPUs run."""
        self._libvirt.resume(self.spec.domain)

    def qmp(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """One QMP command to this machine's QEMU."""
        return self._libvirt.qmp(self.spec.domain, command, arguments)

    def hmp(self, command: str) -> str:
        """One human monitor command."""
        return self._libvirt.hmp(self.spec.domain, command)

    def watch_end(self) -> contextlib.AbstractContextManager[Callable[[float], bool]]:
        """As :meth:`Libvirt.watch_end`."""
        return self._libvirt.watch_end(self.spec.domain)

    def kill(self) -> bool:
        """SIGKILL its QEMU and nothing more; :meth:`destroy` still has to follow. True if it was sent."""
        return kill_domain_process(self.pid, self.spec.domain)

    def halt(self) -> None:
        """Cut it off and stop it at once (about 5 ms), without libvirt; only its end may follow.

        Raises:
            LabError: its link was not cut.
        """
        # SIGSTOP, not SIGKILL: taking gigabytes of RAM apart would compete with the successor's start.
        signal_domain_process(self.pid, self.spec.domain, signal.SIGSTOP)
        self.unplug()

    def move_to(self, cell: str) -> None:
        """Give it to another cell: its rows change hands in one step, and :meth:`plug` means that segment.

        Raises:
            LabError: it is plugged in, or the ledger cannot be written.
        """
        if self.plugged:
            raise LabError(f"{self.domain} is plugged into cell {self.cell} and cannot move to {cell}")
        self._ledger.hand_over(self.things, cell)
        self.spec = self.spec.model_copy(update={"bridge": bridge_name(cell)})
        self.cell = cell

    def wait_for_agent(self, limit_s: float) -> None:
        """Wait until the qga answers.

        Raises:
            LabError: it did not in time, or the machine went down; the message ends with its console.
        """

        def answers() -> bool:
            if self.state is DomainState.GONE:
                raise LabError(f"{self.domain} went down while starting; console:\n{self.console_tail()}")
            return self.qga.ping(timeout_s=5)

        wait_until(answers, limit_s, f"the qga of {self.name} to answer", interval=0.02)

    def written(self) -> int:
        """Bytes that this machine made the host store: its overlay and its serial console."""
        return overlay.used_bytes(self.spec.overlay) + overlay.used_bytes(self.spec.serial_log)

    def console_tail(self, limit: int = 2000) -> str:
        """The end of the serial console, for error messages. Guest text: printable only."""
        try:
            with self.spec.serial_log.open("rb") as f:
                f.seek(max(0, self.spec.serial_log.stat().st_size - limit))
                text = f.read(limit).decode(errors="replace")
        except OSError:
            return ""
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)

    def destroy(self, *, keep_folder: bool = False) -> None:
        """End it and remove what it had; may be repeated. What is seen gone is struck from the ledger.

        Raises:
            LabError: a step failed; the others were tried all the same.
        """
        steps = [self.unplug, self._end_domain, self._remove_tap]
        failures: list[Exception] = []
        for step in steps if keep_folder else [*steps, self.remove_folder]:
            try:
                step()
            except (HotcellError, OSError) as e:
                failures.append(e)
        if failures:
            raise LabError(f"{self.domain} is not wholly gone: {failures[0]}") from failures[0]

    def _end_domain(self) -> None:
        self.hang_up()
        # SIGKILL first: libvirt's own destroy gives QEMU seconds to exit, and nothing in it is worth that.
        kill_domain_process(self.pid, self.spec.domain)
        self._libvirt.destroy(self.spec.domain)
        wait_until(lambda: self.state is DomainState.GONE, 30, f"{self.domain} to be gone", interval=0.02)
        self._ledger.strike(Kind.DOMAIN, self.spec.domain)

    def _remove_tap(self) -> None:
        netlink.delete_link(self.spec.tap)
        self._ledger.strike(Kind.TAP, self.spec.tap)

    def remove_folder(self) -> None:
        """Remove overlay, sockets and console."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._ledger.strike(Kind.FOLDER, str(self.folder))


def prepare(
    machine: MachineSpec,
    cell: str,
    *,
    owner: str,
    backing: Path,
    nvram: Path | None,
    ram_file: Path | None,
    incoming: bool,
    accelerator: Accelerator,
    paths: Paths,
    libvirt: Libvirt,
    ledger: Ledger,
) -> Incarnation:
    """Make the folder and the overlay of a new incarnation; nothing runs yet, and nothing is left on failure.

    A machine with UEFI gets a copy of ``nvram``, or without one of what its firmware starts with.

    Raises:
        CommandError: the overlay could not be made (a full disk, a missing layer).
        PrerequisiteError: the machine needs UEFI firmware and the host has none.
        OSError: the NVRAM could not be copied.
    """
    uefi = require_uefi() if machine.firmware is Firmware.UEFI else None
    number = secrets.token_hex(4)
    folder = paths.cells / cell / f"{machine.name}-{number}"
    ledger.enter(Kind.FOLDER, str(folder), cell)
    folder.mkdir(parents=True, mode=0o700)
    top, flash = folder / "disk.qcow2", folder / "nvram.fd"
    try:
        overlay.create_overlay(top, backing)
        if uefi is not None:
            flash.write_bytes((nvram or uefi.variables).read_bytes())
            flash.chmod(0o600)
    except BaseException:
        shutil.rmtree(folder)
        ledger.strike(Kind.FOLDER, str(folder))
        raise
    spec = DomainSpec(
        domain=f"hc-{cell}-{machine.name}-{number}",
        uuid=str(uuid.uuid4()),
        owner=owner,
        machine=machine,
        accelerator=accelerator,
        overlay=top,
        uefi_code=uefi.code if uefi else None,
        nvram=flash if uefi else None,
        ram_file=ram_file,
        incoming=incoming,
        bridge=bridge_name(cell),
        tap=tap_name(cell, number),
        events_socket=folder / "events",
        proof_socket=folder / "proof",
        serial_log=folder / "console.log",
    )
    return Incarnation(spec, cell, number, libvirt, ledger)
