"""UEFI firmware that this host's QEMU can start, as its packages describe it.

https://www.qemu.org/docs/master/interop/firmware.html (the schema: docs/interop/firmware.json in QEMU)
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from appliance.errors import PrerequisiteError

# A file in an earlier folder takes the place of one of the same name in a later, also if it is empty.
FOLDERS: Final = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
HINT: Final = "apt-get install ovmf"
_MACHINE: Final = "pc-q35-7.2"
_SECURE: Final = {"secure-boot", "requires-smm"}


class Uefi(NamedTuple):
    """``code`` is mapped read-only by every machine; ``variables`` is what a new machine's NVRAM starts as."""

    code: Path
    variables: Path

    @property
    def fingerprint(self) -> str:
        """sha256 of both files, in hex."""
        return hashlib.sha256(self.code.read_bytes() + self.variables.read_bytes()).hexdigest()


def find_uefi(folders: tuple[Path, ...] = FOLDERS) -> Uefi | None:
    """The first firmware, in QEMU's order, for x86-64 with variables in a file and without Secure Boot."""
    by_name = {path.name: path for folder in reversed(folders) for path in folder.glob("*.json")}
    found = (_described(by_name[name]) for name in sorted(by_name))
    return next((uefi for uefi in found if uefi and uefi.code.is_file() and uefi.variables.is_file()), None)


def require_uefi(folders: tuple[Path, ...] = FOLDERS) -> Uefi:
    """As :func:`find_uefi`, for what cannot do without.

    Raises:
        PrerequisiteError: the host has none.
    """
    found = find_uefi(folders)
    if found is None:
        raise PrerequisiteError(
            f"no UEFI firmware without Secure Boot is described in {' or '.join(map(str, folders))}",
            hint=f"{HINT}; machines with passed-through devices need it",
        )
    return found


def require_same_kind(size: int, what: str) -> None:
    """Refuse variables of so many bytes if they are not those of this host's kind of firmware.

    Raises:
        PrerequisiteError: they are of another size, so the firmware would not find them; or there is no firmware.
    """
    wanted = require_uefi().variables.stat().st_size
    if size != wanted:
        raise PrerequisiteError(
            f"{what} was saved with other UEFI firmware: its NVRAM has {size} bytes, that of this host {wanted}",
            hint="install the same kind of OVMF (2 MiB or 4 MiB), or make it anew here",
        )


def _described(path: Path) -> Uefi | None:
    """What one description names; None if it is not what is looked for, or nothing that can be read."""
    try:
        told: dict[str, Any] = json.loads(path.read_bytes())
        mapping = told["mapping"]
        fits = (
            "uefi" in told["interface-types"]
            and mapping["device"] == "flash"
            and mapping.get("mode", "split") == "split"
            and {mapping[part]["format"] for part in ("executable", "nvram-template")} == {"raw"}
            and not _SECURE & set(told["features"])
            and any(_runs_on(target) for target in told["targets"])
        )
        if not fits:
            return None
        return Uefi(Path(mapping["executable"]["filename"]), Path(mapping["nvram-template"]["filename"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs_on(target: dict[str, Any]) -> bool:
    kinds = target["machines"]
    return target["architecture"] == "x86_64" and any(fnmatch.fnmatchcase(_MACHINE, kind) for kind in kinds)
