"""RAM and disk baselines: which machine can have which, and what each is held against."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from appliance.cell import overlay
from appliance.cell.baseline import (
    DISK,
    NVRAM,
    RAM,
    STATE,
    DiskBaseline,
    RamBaseline,
    baseline_key,
    check_files,
    make,
    making,
    prove,
    read,
    restore,
    template,
)
from appliance.cell.baseline.cold import cold_checks
from appliance.cell.domain import domain_xml
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import GuestFacts
from appliance.cell.snapshot import snapshot
from appliance.cell.spec import MachineSpec
from appliance.errors import CapacityError, ConflictError, LabError, PrerequisiteError
from appliance.model import Accelerator, Firmware
from tests.fakes.cells import Host, host
from tests.fakes.machine import FACTS, NVRAM_TEMPLATE, incarnation
from tests.fakes.saved import machine, publish_one
from tests.golden.cases import domain_spec

GPU = "0000:01:00.0"
BOOTED = NVRAM_TEMPLATE.upper()  # firmware writes as soon as it boots


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(template, "_SETTLE_S", 0.0)
    monkeypatch.setattr(template, "_SHUTDOWN_S", 1.0)
    with host(monkeypatch) as made:
        yield made


def with_uefi(h: Host) -> MachineSpec:
    return machine(h, firmware=Firmware.UEFI)


def with_gpu(h: Host) -> MachineSpec:
    return machine(h, devices=(GPU,), firmware=Firmware.UEFI)


def obeys(h: Host, name: str = "target-1") -> None:
    """The guest powers off when it is told to."""
    guest = h.guest(name)

    def systemctl(argv: list[str], _stdin: bytes) -> tuple[int, bytes, bytes]:
        if argv[1] == "poweroff":
            h.libvirt.power_off(name)
        return 0, b"", b""

    guest.programs["/usr/bin/systemctl"] = systemctl
    guest.programs["/bin/sync"] = lambda _argv, _stdin: (0, b"", b"")


# -- the rule is in the types ----------------------------------------------------------------------------


def test_no_ram_baseline_of_a_machine_with_devices_can_be_written_down(h: Host) -> None:
    made = publish_one(h, "clean")
    assert isinstance(made, RamBaseline)
    with pytest.raises(ValidationError, match="passed-through"):
        RamBaseline(**{**dict(made), "machine": with_gpu(h)})
    with pytest.raises(ValidationError, match="flash"):
        RamBaseline(**{**dict(made), "machine": machine(h, firmware=Firmware.UEFI)})
    cold = publish_one(h, "cold", kind="disk", firmware=Firmware.UEFI)
    assert DiskBaseline(**{**dict(cold), "machine": with_gpu(h)}).machine.devices == (GPU,)


def test_a_machine_with_devices_has_uefi(h: Host) -> None:
    with pytest.raises(ValidationError, match="has UEFI firmware"):
        MachineSpec(**{**dict(machine(h)), "devices": (GPU,)})


@pytest.mark.parametrize("part", [DISK, NVRAM])
def test_a_record_that_lacks_a_file_is_not_read(h: Host, part: str) -> None:
    """Or what is missing would be made anew, and nothing would be left to compare it with."""
    made = publish_one(h, "cold", kind="disk", firmware=Firmware.UEFI)
    record = made.folder / "baseline.json"
    told = json.loads(record.read_text())
    del told["files"][part]
    record.write_text(json.dumps(told))
    assert read(made.folder) is None


def test_a_record_that_claims_one_is_not_read(h: Host) -> None:
    made = publish_one(h, "clean")
    record = made.folder / "baseline.json"
    text = record.read_text()
    changed = re.sub(
        r'"devices": ?\[\],\s*"firmware": "bios"', f'"devices": ["{GPU}"], "firmware": "uefi"', text
    )
    assert changed != text
    record.write_text(changed)
    assert read(made.folder) is None


def test_a_kind_is_no_other(h: Host) -> None:
    for kind, other in (("ram", "disk"), ("disk", "ram"), ("ram", "tape")):
        made = publish_one(h, f"is-{kind}-not-{other}", kind=kind)
        record = made.folder / "baseline.json"
        record.write_text(record.read_text().replace(f'"kind": "{kind}"', f'"kind": "{other}"'))
        assert read(made.folder) is None


@pytest.mark.parametrize("bad", ["01:00.0", "0000:01:00.8", "0000:01:20.0", "0000:01:00.0 ", "vfio", "../x"])
def test_a_device_is_a_pci_address(h: Host, bad: str) -> None:
    with pytest.raises(ValidationError):
        MachineSpec(**{**dict(machine(h)), "devices": (bad,)})


def test_asking_for_one_is_a_conflict_with_the_reason_and_nothing_is_made(h: Host) -> None:
    with pytest.raises(ConflictError, match="cannot be saved") as e:
        make(h.shop, with_gpu(h), "c1", "k" * 64, lambda _m: None)
    assert GPU in e.value.message
    assert "disk baseline" in e.value.hint
    assert h.libvirt.done == []
    assert list(h.paths.baselines.iterdir()) == []


def test_a_snapshot_of_its_ram_is_a_conflict_and_the_machine_goes_on(h: Host) -> None:
    cell = h.cell("target-1")
    clone = cell.machine("target-1")
    clone.spec = clone.spec.model_copy(update={"machine": with_gpu(h)})
    for parent, kind in ((publish_one(h, "warm"), None), (publish_one(h, "cold", kind="disk"), "ram")):
        with pytest.raises(ConflictError, match="no RAM baseline"):
            snapshot(h.shop, cell, "target-1", parent, "new", kind)  # type: ignore[arg-type]
    assert clone.state is DomainState.RUNNING
    cell.close()


def test_so_is_one_of_a_machine_with_flash(h: Host) -> None:
    with pytest.raises(ConflictError, match="flash no RAM file holds") as e:
        make(h.shop, with_uefi(h), "c1", "k" * 64, lambda _m: None)
    assert "disk baseline" in e.value.hint
    assert h.libvirt.done == []


def test_devices_and_kind_are_part_of_the_key(h: Host) -> None:
    keys = {
        baseline_key(m, Accelerator.TCG, {}, "r", kind)
        for m in (machine(h), with_uefi(h), with_gpu(h))
        for kind in ("ram", "disk")
    }
    assert len(keys) == 6


def test_the_firmware_is_part_of_the_key_of_who_has_any(h: Host) -> None:
    def keys() -> list[str]:
        machines = (machine(h), with_uefi(h))
        return [baseline_key(m, Accelerator.TCG, h.shop.versions(m), "r", "disk") for m in machines]

    before = keys()
    h.uefi.code.write_bytes(b"an update of the firmware")
    after = keys()
    assert before[0] == after[0]
    assert before[1] != after[1]
    assert set(h.shop.versions(with_uefi(h))) == {"libvirt", "qemu", "uefi"}


# -- a disk baseline from making to proof ----------------------------------------------------------------


def made_cold(h: Host) -> DiskBaseline:
    obeys(h)
    spec = machine(h)
    made = make(h.shop, spec, "c1", "k" * 64, lambda _m: None, kind="disk", created_by="cell")
    assert isinstance(made, DiskBaseline)
    return made


def test_it_is_the_disk_of_a_guest_that_was_shut_down(h: Host) -> None:
    made = made_cold(h)
    assert set(made.files) == {DISK}
    assert made.created_by == "cell"
    assert made.expected.boot_id == "b0"
    assert made.expected.nonce == h.guest("target-1").file("/run/hotcell-baseline").read_text()
    assert made.expected.chain == (made.path(DISK), made.machine.image.disk)
    check_files(made, read=True)
    assert (h.libvirt.domains, h.ledger.things()) == ({}, [])
    assert read(made.folder) == made


def test_a_guest_that_does_not_shut_down_gives_none(h: Host) -> None:
    h.guest("target-1").programs["/usr/bin/systemctl"] = lambda _a, _i: (0, b"", b"")
    with pytest.raises(LabError, match="power off"):
        make(h.shop, machine(h), "c1", "k" * 64, lambda _m: None, kind="disk")
    assert (h.libvirt.domains, h.ledger.things()) == ({}, [])
    assert list(h.paths.baselines.iterdir()) == []


@pytest.mark.parametrize("way", ["make", "snapshot"])
def test_a_machine_that_is_killed_while_it_powers_off_is_no_baseline(h: Host, way: str) -> None:
    """Its disk may be torn, and nothing that boots from it would show that."""
    obeys(h)

    def killed(_argv: list[str], _stdin: bytes) -> tuple[int, bytes, bytes]:
        h.libvirt.lose("target-1")
        return 0, b"", b""

    h.guest("target-1").programs["/usr/bin/systemctl"] = killed
    ways: dict[str, Callable[[], object]] = {
        "make": lambda: make(h.shop, machine(h), "c1", "k" * 64, lambda _m: None, kind="disk"),
        "snapshot": lambda: snapshot(
            h.shop, h.cell("target-1"), "target-1", publish_one(h, "warm"), "cold", "disk"
        ),
    }
    with pytest.raises(LabError, match="its disk may be torn"):
        ways[way]()
    assert {p.name for p in h.paths.baselines.iterdir()} <= {"warm"}


def honest_host(monkeypatch: pytest.MonkeyPatch, chain: tuple[Path, ...]) -> None:
    monkeypatch.setattr(overlay, "backing_chain", lambda top: (top, *chain))


def test_a_reset_boots_on_a_new_overlay_without_any_saved_ram(h: Host) -> None:
    made = made_cold(h)
    clone = restore(h.shop, made, "c1")
    assert clone.spec.ram_file is None
    assert not clone.spec.incoming
    assert clone.state is DomainState.RUNNING
    assert not clone.plugged
    clone.destroy()
    with (made.folder / DISK).open("r+b") as f:
        (made.folder / DISK).chmod(0o600)
        f.seek(80)
        f.write(b"X")
    with pytest.raises(LabError, match="not what was saved"):
        restore(h.shop, made, "c1")


FRESH: dict[str, object] = {**FACTS, "boot_id": "b1", "nonce": ""}


@pytest.mark.parametrize(
    ("facts", "failed"),
    [
        (FRESH, set()),
        ({**FRESH, "boot_id": "b0"}, {"boot id is a new one"}),
        ({**FRESH, "boot_id": ""}, {"boot id is a new one"}),
        ({**FRESH, "nonce": "n0"}, {"RAM holds no nonce of an earlier boot"}),
        ({**FRESH, "nonce": "another"}, {"RAM holds no nonce of an earlier boot"}),
        ({**FRESH, "ram_sentinel": "i1"}, {"no RAM sentinel of an earlier run"}),
        ({**FRESH, "disk_sentinel": "i1"}, {"no disk sentinel of an earlier run"}),
        ({**FRESH, "reseeded": False}, {"the random generator was reseeded"}),
    ],
)
def test_what_a_booted_machine_is_held_against(h: Host, facts: dict[str, object], failed: set[str]) -> None:
    expected = publish_one(h, "cold", kind="disk").expected
    checks = list(cold_checks(GuestFacts.model_validate(facts), expected))  # type: ignore[arg-type]
    assert {c.name for c in checks if not c.passed} == failed
    assert len(checks) == 5


def test_a_proof_of_it_goes_through_the_same_door(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """One check is left that no host in memory can pass: QEMU has the overlay open."""
    made = made_cold(h)
    honest_host(monkeypatch, made.expected.chain)
    clone = restore(h.shop, made, "c1")
    h.guest("target-1").facts = dict(FRESH)
    proof = prove(clone, made, 0.0)
    assert {c.name for c in proof.checks if not c.passed} <= {"QEMU has this overlay open"}
    assert proof.baseline == made.id
    honest_host(monkeypatch, (Path("/elsewhere"), *made.expected.chain[1:]))
    h.guest("target-1").facts = dict(FRESH)
    assert "backing chain" in prove(clone, made, 0.0).failures
    h.guest("target-1").facts = {"boot_id": 5}
    assert "guest answers" in prove(clone, made, 0.0).failures
    clone.destroy()


def test_a_booted_machine_that_maps_saved_ram_is_withheld(
    h: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mmap

    made = made_cold(h)
    honest_host(monkeypatch, made.expected.chain)
    clone = restore(h.shop, made, "c1")
    (tmp_path / RAM).write_bytes(bytes(4096))
    with (tmp_path / RAM).open("r+b") as f, mmap.mmap(f.fileno(), 4096):
        proof = prove(clone, made, 0.0)  # the QEMUs in memory have this process's id
    assert "no baseline RAM is mapped" in {c.name for c in proof.checks if not c.passed}
    clone.destroy()


def test_a_snapshot_of_the_disk_shuts_the_guest_down_and_builds_on_its_parent(h: Host) -> None:
    cell = h.cell("target-1")
    obeys(h)
    parent = publish_one(h, "warm")
    made = snapshot(h.shop, cell, "target-1", parent, "cold", "disk")
    assert (made.kind, made.parent, made.created_by) == ("disk", "warm", "request")
    assert made.expected.chain == (made.path(DISK), *parent.expected.chain)
    assert cell.machines == {}
    with pytest.raises(ConflictError, match="already"):
        snapshot(h.shop, h.cell("target-1", cell_id="c2"), "target-1", parent, "cold", "disk")


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_a_second_snapshot_of_a_name_is_a_conflict_and_its_machine_goes_on(h: Host, kind: str) -> None:
    cell = h.cell("target-1")
    clone, parent = cell.machine("target-1"), publish_one(h, "warm")
    asked = list(h.guest("target-1").calls)
    with (
        making(h.shop, "new", "c2"),
        pytest.raises(ConflictError, match="new is being made"),
    ):
        snapshot(h.shop, cell, "target-1", parent, "new", kind)  # type: ignore[arg-type]
    assert clone.state is DomainState.RUNNING
    assert h.guest("target-1").calls == asked
    cell.close()


def test_a_snapshot_whose_ram_may_not_fit_on_the_disk_leaves_its_machine_alone(h: Host) -> None:
    cell = h.cell("target-1")
    clone, parent = cell.machine("target-1"), publish_one(h, "warm")
    huge = clone.spec.machine.model_copy(update={"memory_mib": 1 << 40})
    clone.spec = clone.spec.model_copy(update={"machine": huge})
    asked = list(h.guest("target-1").calls)
    with pytest.raises(CapacityError, match="not enough disk for the RAM of new"):
        snapshot(h.shop, cell, "target-1", parent, "new", "ram")
    assert clone.state is DomainState.RUNNING
    assert h.guest("target-1").calls == asked
    assert [p.name for p in h.paths.baselines.iterdir()] == ["warm"]
    cell.close()


def test_only_what_is_in_use_needs_room_for_all_of_its_ram(h: Host) -> None:
    """A RAM file has holes, and a template that finds the disk full is no loss."""
    huge = machine(h, memory_mib=1 << 40)
    with making(h.shop, "new", "c1", huge):
        pass
    with (
        pytest.raises(CapacityError, match="not enough disk"),
        making(h.shop, "new", "c1", huge, in_use=True),
    ):
        pass
    assert list(h.paths.baselines.iterdir()) == []


# -- what UEFI firmware remembers ------------------------------------------------------------------------


def made_with_uefi(h: Host) -> DiskBaseline:
    obeys(h)

    def boots(template: Incarnation) -> None:
        assert template.spec.nvram is not None
        template.spec.nvram.write_bytes(BOOTED)

    made = make(h.shop, with_uefi(h), "c1", "k" * 64, boots, kind="disk")
    assert isinstance(made, DiskBaseline)
    return made


def nvram_of(clone: Incarnation) -> Path:
    assert clone.spec.nvram is not None
    return clone.spec.nvram


def test_nvram_is_part_of_the_baseline_and_every_machine_has_a_copy(h: Host) -> None:
    made = made_with_uefi(h)
    assert set(made.files) == {DISK, NVRAM}
    assert made.path(NVRAM).read_bytes() == BOOTED
    assert made.path(NVRAM).stat().st_mode & 0o777 == 0o400
    assert (h.ledger.things(), read(made.folder)) == ([], made)
    first = restore(h.shop, made, "c1")
    nvram_of(first).write_bytes(b"what a subject left")
    second = restore(h.shop, made, "c1")
    assert nvram_of(second).read_bytes() == made.path(NVRAM).read_bytes()
    assert nvram_of(second).stat().st_mode & 0o777 == 0o600
    for clone in (first, second):
        clone.destroy()
        assert not nvram_of(clone).exists()
    made.path(NVRAM).chmod(0o600)
    made.path(NVRAM).write_bytes(BOOTED[:-1] + b"x")
    with pytest.raises(LabError, match=r"nvram\.fd is not what was saved"):
        restore(h.shop, made, "c1")


def test_a_snapshot_of_the_disk_takes_the_nvram_along(h: Host) -> None:
    parent = made_with_uefi(h)
    cell = h.cell("target-1")
    clone = cell.machine("target-1")
    nvram = clone.folder / "nvram.fd"
    nvram.write_bytes(b"what was there when it was saved")
    clone.spec = clone.spec.model_copy(update={"machine": parent.machine, "nvram": nvram})
    with pytest.raises(ConflictError, match="no RAM baseline"):
        snapshot(h.shop, cell, "target-1", parent, "warm", "ram")
    made = snapshot(h.shop, cell, "target-1", parent, "later", "disk")
    assert made.path(NVRAM).read_bytes() == b"what was there when it was saved"
    assert made.expected.chain == (made.path(DISK), *parent.expected.chain)


def test_a_snapshot_that_could_not_be_started_leaves_its_machine_alone(h: Host) -> None:
    parent = made_with_uefi(h)
    cell = h.cell("target-1")
    clone = cell.machine("target-1")
    clone.spec = clone.spec.model_copy(update={"machine": parent.machine})
    h.uefi.variables.write_bytes(b"variables of the other kind of firmware")
    with pytest.raises(PrerequisiteError, match="other UEFI firmware"):
        snapshot(h.shop, cell, "target-1", parent, "later", "disk")
    assert cell.machine("target-1").state is DomainState.RUNNING
    cell.close()


def nvram_checks(h: Host, clone: Incarnation, made: DiskBaseline) -> set[str]:
    """Names of the failed checks that are about NVRAM, with the file held open as a QEMU would."""
    h.guest("target-1").facts = dict(FRESH)
    with nvram_of(clone).open("rb"):  # the QEMUs in memory have this process's id
        return {c.name for c in prove(clone, made, 0.0).checks if "NVRAM" in c.name and not c.passed}


def test_nvram_is_proved(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    made = made_with_uefi(h)
    honest_host(monkeypatch, made.expected.chain)
    clone = restore(h.shop, made, "c1")
    nvram_of(clone).write_bytes(b"the firmware writes as soon as it boots")
    assert nvram_checks(h, clone, made) == set()
    nvram_of(clone).rename(clone.folder / "aside")
    nvram_of(clone).write_bytes(b"another file in its place")
    assert nvram_checks(h, clone, made) == {"NVRAM is the file made for this incarnation"}
    h.guest("target-1").facts = dict(FRESH)
    assert "QEMU has this NVRAM open" in prove(clone, made, 0.0).failures
    clone.destroy()


def test_a_machine_that_started_with_other_nvram_is_withheld(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_with_uefi(h)
    honest_host(monkeypatch, made.expected.chain)
    for nvram in (None, made.path(DISK)):
        clone = h.shop.prepare(
            made.machine, "c1", backing=made.path(DISK), nvram=nvram, ram=None, incoming=False
        )
        clone.start()
        clone.resume()
        assert nvram_checks(h, clone, made) == {"NVRAM was the baseline's"}
        clone.destroy()


# -- the machine -----------------------------------------------------------------------------------------


def test_a_machine_without_a_ram_file_has_the_same_ram_block(h: Host) -> None:
    """So that its memory can be handed over to a twin with a file."""
    spec = domain_spec("template-tcg").model_copy(update={"ram_file": None})
    text = domain_xml(spec)
    assert "memory-backend-ram,id=hc.ram,size=512M" in text
    assert "mem-path" not in text
    assert "share" not in text


def test_devices_are_passed_through(h: Host) -> None:
    spec = domain_spec("template-tcg")
    with_device = spec.model_copy(
        update={"machine": spec.machine.model_copy(update={"devices": ("0000:41:1f.7",)})}
    )
    device = ET.fromstring(domain_xml(with_device)).find("devices/hostdev")
    assert device is not None
    assert device.attrib == {"mode": "subsystem", "type": "pci", "managed": "yes"}
    address = device.find("source/address")
    assert address is not None
    assert address.attrib == {"domain": "0x0000", "bus": "0x41", "slot": "0x1f", "function": "0x7"}
    assert ET.fromstring(domain_xml(spec)).find("devices/hostdev") is None


def test_ram_and_state_are_not_looked_for_in_a_disk_baseline(h: Host) -> None:
    made = publish_one(h, "cold", kind="disk")
    for part in (RAM, STATE):
        assert not made.path(part).exists()
    assert isinstance(incarnation(h.paths.cells, h.libvirt, h.ledger), Incarnation)
