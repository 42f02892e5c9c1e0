"""What lies beside the files of an exported baseline: what they are, and what they need to run.

It holds no path. Whoever imports it decides where things lie; names of files are one of a few.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, StringConstraints, ValidationError, model_validator

from appliance.cell.baseline.kinds import DISK, NVRAM, BaselineKind, parts, why_cold
from appliance.cell.spec import check_firmware
from appliance.errors import ConfigError
from appliance.model import Accelerator, Firmware, Frozen, Name, PciAddress, Role, Sha256

MANIFEST = "manifest.json"
_LIMIT = 4 << 20
_MOST_FLASH = 8 << 20  # QEMU: pc-q35 maps no more below 4 GiB (hw/i386/pc_sysfw.c)
_LAYER = re.compile(r"layer-[1-9][0-9]?\.qcow2")
PartName = Annotated[str, StringConstraints(pattern=rf"^(ram|state|disk\.qcow2|nvram\.fd|{_LAYER.pattern})$")]
_Word = Annotated[str, StringConstraints(max_length=100)]


class ExportedFile(Frozen):
    """One file of the folder."""

    sha256: Sha256
    size: int = Field(ge=0, le=1 << 46)


class Manifest(Frozen):
    """``manifest.json``. ``layers`` are the disk's, from the top down; the last stands on the image."""

    format: Literal[1]
    name: Name
    kind: BaselineKind
    machine: Name
    role: Role
    memory_mib: int = Field(ge=64)
    vcpus: int = Field(ge=1)
    devices: tuple[PciAddress, ...]
    firmware: Firmware = Firmware.BIOS
    recipe: Name
    image_digest: Sha256
    image_disk_sha256: Sha256
    accelerator: Accelerator
    versions: Annotated[dict[_Word, _Word], Field(max_length=16)]
    host_cpu: Sha256
    expected: dict[_Word, JsonValue]
    layers: Annotated[tuple[PartName, ...], Field(min_length=1, max_length=99)]
    files: dict[PartName, ExportedFile]
    created: float

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        wanted = (DISK, *(layer_name(n) for n in range(1, len(self.layers))))
        if self.layers != wanted:
            raise ValueError(f"layers have to be {', '.join(wanted)}")
        files = {*parts(self.kind, self.firmware), *self.layers}
        if set(self.files) != files:
            raise ValueError(f"a {self.kind} baseline with these layers has the files {sorted(files)}")
        check_firmware(self.devices, self.firmware)
        if self.kind == "ram" and (why := why_cold(self.devices, self.firmware)):
            raise ValueError(f"no RAM baseline of a machine with {why}")
        if NVRAM in self.files and self.files[NVRAM].size > _MOST_FLASH:
            raise ValueError(f"{NVRAM} is larger than a machine's flash can be, {_MOST_FLASH} bytes")
        return self


def layer_name(number: int) -> str:
    """File name of a layer below the baseline's own; the one right below it is 1."""
    return f"layer-{number}.qcow2"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported baseline.

    Raises:
        ConfigError: there is none, or it is not what an export writes.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _LIMIT:
            raise ConfigError(
                f"{path} is not the manifest of a baseline", hint="name the folder that `export` made"
            )
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as e:
        reason = "; ".join(_told(e)) if isinstance(e, ValidationError) else e.strerror
        raise ConfigError(f"{path}: {reason}", hint="export the baseline again") from e


def _told(error: ValidationError) -> list[str]:
    return [f"{'.'.join(str(p) for p in e['loc']) or 'manifest'}: {e['msg']}" for e in error.errors()[:3]]
