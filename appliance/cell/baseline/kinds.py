"""The two kinds of baselines, and the rule which machine can have which: no value of these types breaks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from appliance.cell.proof import Expected
from appliance.cell.spec import MachineSpec
from appliance.errors import ConflictError
from appliance.model import Accelerator, Firmware, Frozen, PciAddress

RAM, STATE, DISK, NVRAM = "ram", "state", "disk.qcow2", "nvram.fd"
BaselineKind = Literal["ram", "disk"]
CreatedBy = Literal["trial", "cell", "request", "import"]


class FileFact(Frozen):
    """A file's content and the signs by which a later change is noticed without reading it again."""

    sha256: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class ColdExpected(Frozen):
    """What a ``disk`` baseline recorded of its template, to hold a machine that booted anew against."""

    boot_id: str
    nonce: str
    chain: tuple[Path, ...]


class Saved(Frozen):
    """What every baseline has. ``key`` is what it was made from; equal key, equal baseline.

    ``below`` are the layers under its disk that lie elsewhere, down to the image's.
    """

    key: str
    machine: MachineSpec
    accelerator: Accelerator
    files: dict[str, FileFact]
    below: dict[Path, FileFact]
    created: float
    seconds: float
    versions: dict[str, str]
    folder: Path
    label: str = ""
    parent: str = ""
    created_by: CreatedBy = "trial"

    @property
    def id(self) -> str:
        """Its name: the label if it was given one, else machine and the first digits of the key."""
        return self.label or f"{self.machine.name}-{self.key[:12]}"

    def path(self, part: str) -> Path:
        """Where one of its files lies."""
        return self.folder / part


class RamBaseline(Saved):
    """Memory, device state and disk: a reset goes on where the machine was saved.

    A machine for which there is a :func:`why_cold` cannot have such a baseline.
    ``memory`` is the folder of RAM and state, if that is not the baseline's own.
    """

    kind: Literal["ram"] = "ram"
    expected: Expected
    memory: Path | None = None

    @model_validator(mode="after")
    def _can_be_saved(self) -> RamBaseline:
        if why := why_cold(self.machine.devices, self.machine.firmware):
            raise ValueError(f"no RAM baseline of a machine with {why}")
        return self

    def path(self, part: str) -> Path:
        """Where one of its files lies."""
        return (self.memory or self.folder) / part if part in (RAM, STATE) else self.folder / part


class DiskBaseline(Saved):
    """The disk, and with UEFI the NVRAM, of a machine that was shut down: a reset boots it anew."""

    kind: Literal["disk"] = "disk"
    expected: ColdExpected


Baseline = RamBaseline | DiskBaseline


def why_cold(devices: Sequence[PciAddress], firmware: Firmware) -> str:
    """Why such a machine can only be put back by booting it; "" if its RAM can be saved too.

    Of passed-through devices nobody can read the state. Flash is memory of its own, which no RAM file holds.
    """
    if devices:
        return f"passed-through devices ({', '.join(devices)}), whose state cannot be saved"
    return "UEFI firmware, whose flash no RAM file holds" if firmware is Firmware.UEFI else ""


def parts(kind: BaselineKind, firmware: Firmware) -> tuple[str, ...]:
    """The files that a baseline has of its own, beside its record."""
    if kind == "ram":
        return (RAM, STATE, DISK)
    return (DISK, NVRAM) if firmware is Firmware.UEFI else (DISK,)


def require_kind(machine: MachineSpec, kind: BaselineKind) -> None:
    """Refuse a RAM baseline of a machine that cannot have one; it is never silently made a disk baseline.

    Raises:
        ConflictError: the machine has passed-through devices, or UEFI firmware.
    """
    if kind == "ram" and (why := why_cold(machine.devices, machine.firmware)):
        raise ConflictError(
            f"{machine.name} has {why}: no RAM baseline of it is possible",
            hint="ask for a disk baseline; a reset then boots it anew",
        )
