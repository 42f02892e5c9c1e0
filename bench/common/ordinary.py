"""An ordinary libvirt domain of the same machine: RAM of its own, no memory file, no waiting for a state.

What conventional ways of resetting work on, to be compared with under equal conditions.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from appliance.cell import netlink
from appliance.cell.baseline import Workshop
from appliance.cell.domain import QEMU_NS, DomainSpec, domain_xml
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Kind
from appliance.cell.spec import MachineSpec
from appliance.errors import LabError


def ordinary_xml(spec: DomainSpec) -> str:
    """The machine's XML without any argument of ours to QEMU. Pure."""
    root = ET.fromstring(domain_xml(spec))
    for extra in root.findall(f"{{{QEMU_NS}}}commandline"):
        root.remove(extra)
    return ET.tostring(root, encoding="unicode")


class Ordinary(Incarnation):
    """One life of an ordinary domain."""

    def start(self) -> None:
        """Start paused and unplugged, as the appliance's own machines are."""
        self._ledger.enter(Kind.TAP, self.spec.tap, self.cell)
        self._ledger.enter(Kind.DOMAIN, self.spec.domain, self.cell)
        self._libvirt.start(ordinary_xml(self.spec), paused=True)
        netlink.unplug(self.spec.tap)
        self.read_pid()

    def read_pid(self) -> None:
        """A revert may have started another QEMU.

        Raises:
            LabError: there is none.
        """
        self.pid = self._libvirt.pid(self.spec.domain)
        if self.pid is None:
            raise LabError(f"libvirt wrote no pid file for {self.spec.domain}")


def prepare_ordinary(shop: Workshop, machine: MachineSpec, cell: str) -> Ordinary:
    """A machine on a fresh overlay of its image, not started."""
    made = shop.prepare(machine, cell, backing=machine.image.disk, ram=None, incoming=False)
    return Ordinary(made.spec, cell, made.id, shop.libvirt, shop.ledger)
