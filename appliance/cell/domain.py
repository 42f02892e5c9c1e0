"""Domain XML, as a pure function of a specification (https://libvirt.org/formatdomain.html).

RAM lives in a file (``memory-backend-file``). A template maps it shared, so that the file *is* the
baseline's RAM; a clone maps the same file privately, copy-on-write, and takes only device state
from the saved stream. libvirt has no element for this combination, hence ``qemu:commandline``.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from appliance.cell.spec import MachineSpec
from appliance.model import Accelerator, Frozen

QEMU_NS = "http://libvirt.org/schemas/domain/qemu/1.0"
OWNER_NS = "https://hotcell.invalid/owner/1"
EVENT_PORT = "org.hotcell.events"
PROOF_PORT = "org.hotcell.proof"
QGA_PORT = "org.qemu.guest_agent.0"
RAM_ID = "hc.ram"
# With it libvirt asks QEMU for each of the 400 properties of the CPU, one by one: 0.3 s of a start that takes 0.45 s
# under TCG. Without it two questions tell the same. Element: https://libvirt.org/drvqemu.html#control-of-qemu-xml-capabilities
_SLOW_CPU_QUESTIONS = "cpu-unavailable-features"
ET.register_namespace("qemu", QEMU_NS)
ET.register_namespace("hotcell", OWNER_NS)


class DomainSpec(Frozen):
    """One incarnation of a machine, ready to be started.

    ``incoming`` makes it wait for a stream of state. It then is a clone, which maps ``ram_file`` privately,
    unless ``share_ram`` makes it a twin, which takes RAM from the stream and leaves it in the file. Without a
    ``ram_file`` its RAM is its own, and ends with it. A machine with UEFI runs ``uefi_code`` and keeps its
    variables in ``nvram``.
    """

    domain: str
    uuid: str
    owner: str
    machine: MachineSpec
    accelerator: Accelerator
    overlay: Path
    uefi_code: Path | None = None
    nvram: Path | None = None
    ram_file: Path | None
    incoming: bool
    share_ram: bool = False
    bridge: str
    tap: str
    events_socket: Path
    proof_socket: Path
    serial_log: Path


def _sub(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def domain_xml(spec: DomainSpec) -> str:
    """The XML libvirt starts this incarnation from. Same spec, same text."""
    machine = spec.machine
    root = ET.Element("domain", {"type": "kvm" if spec.accelerator is Accelerator.KVM else "qemu"})
    _sub(root, "name", spec.domain)
    _sub(root, "uuid", spec.uuid)
    owner = _sub(_sub(root, "metadata"), f"{{{OWNER_NS}}}owner", spec.owner)
    owner.set("machine", machine.name)
    _sub(root, "memory", str(machine.memory_mib), unit="MiB")
    _sub(root, "vcpu", str(machine.vcpus), placement="static")
    _boot(root, spec)
    _sub(_sub(root, "features"), "acpi")
    _sub(root, "cpu", mode="host-passthrough" if spec.accelerator is Accelerator.KVM else "maximum")
    _sub(root, "clock", offset="utc")
    # A guest that panics or reboots must stay down: its end is evidence, and a reboot would start
    # an incarnation that nobody proved.
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        _sub(root, event, "destroy")
    _devices(_sub(root, "devices"), spec)
    _memory_arguments(root, spec)
    _sub(_sub(root, f"{{{QEMU_NS}}}capabilities"), f"{{{QEMU_NS}}}del", capability=_SLOW_CPU_QUESTIONS)
    return ET.tostring(root, encoding="unicode")


def _boot(root: ET.Element, spec: DomainSpec) -> None:
    boot = _sub(root, "os")
    _sub(boot, "type", "hvm", arch="x86_64", machine="q35")
    if spec.nvram is not None:  # https://libvirt.org/formatdomain.html#bios-bootloader
        _sub(boot, "loader", str(spec.uefi_code), readonly="yes", type="pflash")
        _sub(boot, "nvram", str(spec.nvram))
    if spec.incoming:
        return  # it goes on from a saved state and never boots; kernel and initrd would take 15 MB of its own memory
    _sub(boot, "kernel", str(spec.machine.image.kernel))
    _sub(boot, "initrd", str(spec.machine.image.initrd))
    _sub(boot, "cmdline", spec.machine.kernel_args)


def _devices(devices: ET.Element, spec: DomainSpec) -> None:
    _sub(devices, "emulator", "/usr/bin/qemu-system-x86_64")
    disk = _sub(devices, "disk", type="file", device="disk")
    # "unsafe" would lose the guest's own flushes, which offline inspection relies on.
    _sub(disk, "driver", name="qemu", type="qcow2", cache="writeback", discard="unmap")
    _sub(disk, "source", file=str(spec.overlay))
    _sub(disk, "target", dev="vda", bus="virtio")
    _sub(devices, "controller", type="usb", model="none")
    nic = _sub(devices, "interface", type="bridge")
    _sub(nic, "source", bridge=spec.bridge)
    _sub(nic, "target", dev=spec.tap)
    _sub(nic, "mac", address=spec.machine.mac)
    _sub(nic, "model", type="virtio")
    # No option ROM: nothing boots from the network, and its presence would be one more thing to migrate.
    _sub(nic, "rom", enabled="no")
    for name, path in ((QGA_PORT, None), (EVENT_PORT, spec.events_socket), (PROOF_PORT, spec.proof_socket)):
        channel = _sub(devices, "channel", type="unix")
        _sub(channel, "source", mode="bind", **({"path": str(path)} if path else {}))
        _sub(channel, "target", type="virtio", name=name)
    serial = _sub(devices, "serial", type="file")
    _sub(serial, "source", path=str(spec.serial_log))
    _sub(_sub(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    for address in spec.machine.devices:
        _passed_through(devices, address)
    _sub(devices, "memballoon", model="none")
    _sub(devices, "panic", model="isa")


def _passed_through(devices: ET.Element, address: str) -> None:
    domain, bus, rest = address.split(":")
    slot, function = rest.split(".")
    device = _sub(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
    _sub(
        _sub(device, "source"), "address",
        domain=f"0x{domain}", bus=f"0x{bus}", slot=f"0x{slot}", function=f"0x{function}",
    )  # fmt: skip


def _memory_arguments(root: ET.Element, spec: DomainSpec) -> None:
    arguments = _sub(root, f"{{{QEMU_NS}}}commandline")
    backend = f"memory-backend-ram,id={RAM_ID},size={spec.machine.memory_mib}M"
    if spec.ram_file is not None:
        share = "off" if spec.incoming and not spec.share_ram else "on"
        path = str(spec.ram_file).replace(",", ",,")  # QEMU's way to write a comma inside an option's value
        backend = backend.replace("-ram,", "-file,", 1) + f",mem-path={path},share={share}"
    argv = [
        "-object",
        backend,
        "-machine",
        f"memory-backend={RAM_ID}",
    ]
    if spec.incoming:
        argv += ["-incoming", "defer"]
    for value in argv:
        _sub(arguments, f"{{{QEMU_NS}}}arg", value=value)
