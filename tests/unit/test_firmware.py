"""Which UEFI firmware a host has is read from what its packages describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import PrerequisiteError
from appliance.host.firmware import require_uefi, uefi_firmware


def describe(folder: Path, name: str, **changes: Any) -> str:
    """A description as edk2's packages have it, of a file that is there."""
    folder.mkdir(exist_ok=True)
    code = folder / f"{name}.fd"
    code.write_bytes(b"firmware")
    told: dict[str, Any] = {
        "interface-types": ["uefi"],
        "mapping": {"device": "flash", "executable": {"filename": str(code), "format": "raw"}},
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["acpi-s3"],
    }
    (folder / f"{name}.json").write_text(json.dumps(told | changes))
    return str(code)


def test_only_what_a_machine_can_start_with_is_found(tmp_path: Path) -> None:
    good = describe(tmp_path, "60-good")
    describe(tmp_path, "40-secure", features=["secure-boot", "requires-smm"])
    describe(tmp_path, "50-bios", **{"interface-types": ["bios"]})
    describe(tmp_path, "50-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    describe(tmp_path, "50-memory", mapping={"device": "memory", "filename": good})
    Path(describe(tmp_path, "50-gone")).unlink()
    for number, text in enumerate(("", "{", "[]", "null", '{"targets": 5}', '{"interface-types": ["uefi"]}')):
        (tmp_path / f"10-bad-{number}.json").write_text(text)
    (tmp_path / "20-folder.json").mkdir()
    assert uefi_firmware((tmp_path, tmp_path / "missing")) == (good,)


def test_files_are_in_the_order_of_their_names_whichever_folder_they_are_in(tmp_path: Path) -> None:
    second, first = describe(tmp_path / "a", "60-a"), describe(tmp_path / "b", "50-b")
    assert uefi_firmware((tmp_path / "a", tmp_path / "b")) == (first, second)


def test_a_host_without_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no UEFI firmware") as e:
        require_uefi((tmp_path,))
    assert "apt-get install ovmf" in e.value.hint
    describe(tmp_path, "60-good")
    require_uefi((tmp_path,))
