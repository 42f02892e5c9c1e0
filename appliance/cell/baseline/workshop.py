"""What making and restoring machines needs, in one value."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from appliance.cell.incarnation import Incarnation, prepare
from appliance.cell.ledger import Ledger
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.spec import MachineSpec
from appliance.errors import ConflictError
from appliance.host.firmware import require_uefi
from appliance.host.paths import Paths
from appliance.model import Accelerator, Firmware


class Workshop:
    """What making and restoring machines needs, in one value."""

    def __init__(
        self,
        paths: Paths,
        libvirt: Libvirt,
        ledger: Ledger,
        accelerator: Accelerator,
        owner: str,
        memory: Path | None = None,
    ) -> None:
        self.paths = paths
        self.libvirt = libvirt
        self.ledger = ledger
        self.accelerator = accelerator
        self.owner = owner
        self.memory = memory  # where RAM files lie, if not in the home
        self._names: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def reserve(self, name: str) -> Iterator[None]:
        """Keep the name of a baseline that is being made from all others, for the length of a block.

        Raises:
            ConflictError: a baseline of that name is being made already.
        """
        with self._lock:
            if name in self._names:
                raise ConflictError(
                    f"a baseline {name} is being made already",
                    hint="choose another name, or wait for that one",
                )
            self._names.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._names.discard(name)

    def versions(self, machine: MachineSpec) -> dict[str, str]:
        """Of what runs a machine: libvirt, QEMU, and the UEFI firmware that it has, by the digest of its files.

        Raises:
            PrerequisiteError: the machine needs UEFI firmware and the host has none.
        """
        firmware = {"uefi": require_uefi().fingerprint[:12]} if machine.firmware is Firmware.UEFI else {}
        return self.libvirt.versions() | firmware

    def prepare(
        self,
        machine: MachineSpec,
        cell: str,
        *,
        backing: Path,
        nvram: Path | None = None,
        ram: Path | None,
        incoming: bool,
    ) -> Incarnation:
        """A new incarnation, not started. Without a RAM file its memory is its own, and is lost with it."""
        return prepare(
            machine, cell, owner=self.owner, backing=backing, nvram=nvram, ram_file=ram, incoming=incoming,
            accelerator=self.accelerator, paths=self.paths, libvirt=self.libvirt, ledger=self.ledger,
        )  # fmt: skip

    def prepare_twin(self, machine: Incarnation, ram: Path) -> Incarnation:
        """A machine that will take over ``machine``'s state and disk, and keep its RAM in ``ram``."""
        spare = self.prepare(
            machine.spec.machine, machine.cell, backing=machine.spec.overlay, ram=ram, incoming=True
        )
        spare.spec.overlay.unlink()
        spec = spare.spec.model_copy(update={"overlay": machine.spec.overlay, "share_ram": True})
        twin = Incarnation(spec, machine.cell, spare.id, self.libvirt, self.ledger)
        twin.folder = spare.folder
        return twin
