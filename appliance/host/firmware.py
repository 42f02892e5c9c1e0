"""UEFI firmware that this host's QEMU can start, as its packages describe it.

https://www.qemu.org/docs/master/interop/firmware.html (the schema: docs/interop/firmware.json in QEMU)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from appliance.errors import PrerequisiteError

FOLDERS: Final = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
HINT: Final = "apt-get install ovmf"
_SECURE: Final = {"secure-boot", "requires-smm"}


def uefi_firmware(folders: tuple[Path, ...] = FOLDERS) -> tuple[str, ...]:
    """Files of UEFI firmware for x86-64 with variables in a file and without Secure Boot, in QEMU's order."""
    found = sorted((path.name, path) for folder in folders for path in folder.glob("*.json"))
    files = (_executable(path) for _, path in found)
    return tuple(f for f in files if f and Path(f).is_file())


def require_uefi(folders: tuple[Path, ...] = FOLDERS) -> None:
    """Refuse to go on where no machine with UEFI could start.

    Raises:
        PrerequisiteError: the host has no such firmware.
    """
    if not uefi_firmware(folders):
        raise PrerequisiteError(
            f"no UEFI firmware without Secure Boot is described in {' or '.join(map(str, folders))}",
            hint=f"{HINT}; machines with passed-through devices need it",
        )


def _executable(path: Path) -> str:
    """The file of one description, or "" if it is not what is looked for, or nothing that can be read."""
    try:
        told: dict[str, Any] = json.loads(path.read_bytes())
        fits = (
            "uefi" in told["interface-types"]
            and told["mapping"]["device"] == "flash"
            and not _SECURE & set(told["features"])
            and any(t["architecture"] == "x86_64" for t in told["targets"])
        )
        return str(told["mapping"]["executable"]["filename"]) if fits else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
