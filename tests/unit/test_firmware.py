"""Which UEFI firmware a host has is read from what its packages describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import PrerequisiteError
from appliance.host.firmware import Uefi, find_uefi, require_uefi

Q35 = [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}]


def describe(folder: Path, name: str, **changes: Any) -> Uefi:
    """A description as edk2's packages have it, of files that are there."""
    folder.mkdir(exist_ok=True)
    made = Uefi(folder / f"{name}-code.fd", folder / f"{name}-vars.fd")
    made.code.write_bytes(b"code " + name.encode())
    made.variables.write_bytes(b"variables")
    told: dict[str, Any] = {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(made.code), "format": "raw"},
            "nvram-template": {"filename": str(made.variables), "format": "raw"},
        },
        "targets": Q35,
        "features": ["acpi-s3"],
    }
    (folder / f"{name}.json").write_text(json.dumps(told | changes))
    return made


def test_only_what_a_machine_can_start_with_is_found(tmp_path: Path) -> None:
    good = describe(tmp_path, "60-good")
    describe(tmp_path, "40-secure", features=["secure-boot", "requires-smm"])
    describe(tmp_path, "50-bios", **{"interface-types": ["bios"]})
    describe(tmp_path, "50-arm", targets=[{"architecture": "aarch64", "machines": ["virt-*"]}])
    describe(tmp_path, "50-old", targets=[{"architecture": "x86_64", "machines": ["pc-i440fx-*"]}])
    describe(tmp_path, "50-memory", mapping={"device": "memory", "filename": str(good.code)})
    for part in ("executable", "nvram-template"):  # QEMU's flash is told to be raw
        files = {"executable": str(good.code), "nvram-template": str(good.variables)}
        mapping = {k: {"filename": v, "format": "qcow2" if k == part else "raw"} for k, v in files.items()}
        describe(tmp_path, f"50-qcow2-{part}", mapping={"device": "flash", **mapping})
    code_only = {"device": "flash", "executable": {"filename": str(good.code), "format": "raw"}}
    describe(tmp_path, "50-stateless", mapping=code_only)
    describe(tmp_path, "50-no-code").code.unlink()
    describe(tmp_path, "50-no-variables").variables.unlink()
    for number, text in enumerate(("", "{", "[]", "null", '{"targets": 5}', '{"interface-types": ["uefi"]}')):
        (tmp_path / f"10-bad-{number}.json").write_text(text)
    (tmp_path / "20-folder.json").mkdir()
    assert find_uefi((tmp_path, tmp_path / "missing")) == good


def test_the_first_by_name_is_taken_and_an_earlier_folders_file_masks_a_later_ones(tmp_path: Path) -> None:
    own, packaged = tmp_path / "etc", tmp_path / "usr"
    own.mkdir()
    sixty, seventy = describe(packaged, "60-a"), describe(packaged, "70-b")
    assert find_uefi((own, packaged)) == sixty
    (own / "60-a.json").write_text("")
    assert find_uefi((own, packaged)) == seventy
    fifty = describe(own, "50-c")
    assert find_uefi((own, packaged)) == fifty


def test_the_fingerprint_is_of_both_files(tmp_path: Path) -> None:
    uefi = describe(tmp_path, "60-a")
    seen = {uefi.fingerprint}
    uefi.code.write_bytes(b"other code")
    seen.add(uefi.fingerprint)
    uefi.variables.write_bytes(b"other variables")
    seen.add(uefi.fingerprint)
    assert len(seen) == 3


def test_a_host_without_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no UEFI firmware") as e:
        require_uefi((tmp_path,))
    assert "apt-get install ovmf" in e.value.hint
    describe(tmp_path, "60-good")
    require_uefi((tmp_path,))
