"""What a machine is, before anything of it exists. Pure values and naming rules.

Addresses are fixed by role on the cell's own segment 10.77.0.0/24 (fd77::/64): two cells never share
a segment, so the same address can live in both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from appliance.build import Image
from appliance.errors import UserError
from appliance.model import Firmware, Frozen, Name, PciAddress, Role, Sha256

SEGMENT = "10.77.0"
SEGMENT6 = "fd77::"
WORLD_HOST = 1
ORIGIN_HOST = 11
FIRST_TARGET_HOST = 21


class GuestImage(Frozen):
    """The part of a built image that a machine needs to run.

    ``digest`` names the inputs, ``disk_sha256`` the bits: packages may differ between two builds of the same
    inputs, and a saved state belongs to the bits.
    """

    recipe: Name
    digest: Sha256
    disk: Path
    disk_sha256: Sha256
    kernel: Path
    initrd: Path
    cmdline: str = "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet"

    @classmethod
    def of(cls, image: Image) -> GuestImage:
        """What a machine needs of a built image.

        Raises:
            BuildError: its manifest is not what a build writes.
        """
        record = image.record
        return cls(
            recipe=image.recipe, digest=image.digest, disk=image.disk, kernel=image.kernel,
            initrd=image.initrd, cmdline=record.kernel_cmdline,
            disk_sha256=next(f.sha256 for f in record.files if f.name == image.disk.name),
        )  # fmt: skip


class MachineSpec(Frozen):
    """One machine of a cell. Memory in MiB; ``devices`` are host functions passed through to it.

    One with devices has UEFI firmware.
    """

    name: Name
    role: Role
    image: GuestImage
    memory_mib: int = Field(ge=64)
    vcpus: int = Field(ge=1)
    devices: tuple[PciAddress, ...] = ()
    firmware: Firmware = Firmware.BIOS

    @model_validator(mode="after")
    def _firmware_fits(self) -> MachineSpec:
        check_firmware(self.devices, self.firmware)
        return self

    @property
    def host_number(self) -> int:
        """Last octet of the machine's address."""
        return host_number(self.name, self.role)

    @property
    def address(self) -> str:
        """IPv4 address on the segment."""
        return f"{SEGMENT}.{self.host_number}"

    @property
    def address6(self) -> str:
        """IPv6 unique local address on the segment (RFC 4193)."""
        return f"{SEGMENT6}{self.host_number}"

    @property
    def mac(self) -> str:
        """Locally administered MAC; part of the baseline, since a guest keeps it in RAM."""
        return f"52:54:00:77:00:{self.host_number:02x}"

    @property
    def kernel_args(self) -> str:
        """Kernel command line: the image's own plus the keys that hotcell-net.service reads."""
        return (
            f"{self.image.cmdline} hotcell.name={self.name} hotcell.addr={self.address}/24 "
            f"hotcell.gw={SEGMENT}.{WORLD_HOST}"
        )


def check_firmware(devices: Sequence[PciAddress], firmware: Firmware) -> None:
    """The rule which firmware goes with which devices.

    Raises:
        ValueError: it is broken.
    """
    if devices and firmware is not Firmware.UEFI:
        raise ValueError("a machine with passed-through devices has UEFI firmware")


def host_number(name: str, role: Role) -> int:
    """Last octet for a machine: world 1, origin 11, target-N 20+N.

    Raises:
        UserError: a target's name is not ``target-1`` ... ``target-99``.
    """
    if role is Role.WORLD:
        return WORLD_HOST
    if role is Role.ORIGIN:
        return ORIGIN_HOST
    number = name.removeprefix("target-")
    if not number.isdecimal() or not 1 <= int(number) <= 99:
        raise UserError(
            f"machine name {name!r} is not target-1 ... target-99", hint="number the targets from 1"
        )
    return FIRST_TARGET_HOST - 1 + int(number)


def short_id(*parts: str) -> str:
    """Eight hex digits that stand for ``parts``: for tap and bridge names, which may hold 15 characters."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def bridge_name(cell_id: str) -> str:
    """Name of a cell's bridge."""
    return f"hcb{short_id('bridge', cell_id)}"


def anchor_name(cell_id: str) -> str:
    """Name of the port that keeps a cell's bridge carrying while no machine is plugged."""
    return f"hca{short_id('anchor', cell_id)}"


def tap_name(cell_id: str, incarnation: str) -> str:
    """Name of the tap of one incarnation of a machine."""
    return f"hct{short_id('tap', cell_id, incarnation)}"
