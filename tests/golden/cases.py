"""The machines whose domain XML is kept, and what may not change about it silently."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from appliance.cell.domain import DomainSpec
from appliance.model import Accelerator, Firmware
from tests.fakes.machine import machine_spec

_FOLDER = Path("/var/lib/hotcell/cells/t20260101-000000-0a1b2c/origin-0a1b2c3d")
# file name -> machine, clone or template, accelerator
CASES: dict[str, tuple[str, bool, Accelerator]] = {
    "template-tcg": ("origin", False, Accelerator.TCG),
    "clone-tcg": ("origin", True, Accelerator.TCG),
    "template-kvm": ("target-1", False, Accelerator.KVM),
    "clone-kvm": ("target-1", True, Accelerator.KVM),
    "world-tcg": ("world", True, Accelerator.TCG),
    "uefi-kvm": ("target-1", False, Accelerator.KVM),
    "uefi-device-kvm": ("target-1", False, Accelerator.KVM),
}


def domain_spec(case: str) -> DomainSpec:
    """A specification in which nothing depends on the day or the host."""
    name, incoming, accelerator = CASES[case]
    machine, uefi = machine_spec(name), case.startswith("uefi-")
    if uefi:
        devices = ("0000:41:00.0",) if "device" in case else ()
        machine = machine.model_copy(update={"firmware": Firmware.UEFI, "devices": devices})
    return DomainSpec(
        domain=f"hc-t20260101-000000-0a1b2c-{name}-0a1b2c3d", uuid="11111111-2222-4333-8444-555555555555",
        owner="hotcell", machine=machine, accelerator=accelerator, overlay=_FOLDER / "disk.qcow2",
        uefi_code=Path("/usr/share/OVMF/OVMF_CODE_4M.fd") if uefi else None,
        nvram=_FOLDER / "nvram.fd" if uefi else None,
        ram_file=None if uefi else Path("/var/lib/hotcell/baselines/origin-0123456789ab/ram"), incoming=incoming,
        bridge="hcb01234567", tap="hct01234567", events_socket=_FOLDER / "events",
        proof_socket=_FOLDER / "proof",
        serial_log=_FOLDER / "console.log",
    )  # fmt: skip


def indented(xml: str) -> str:
    """One element a line, so that a difference is a line."""
    tree = ET.fromstring(xml)
    ET.indent(tree)
    return ET.tostring(tree, encoding="unicode") + "\n"
