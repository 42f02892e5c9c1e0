"""The doctor: judging facts, reading a made-up sysfs, and a look at the host the test runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.config import HostSettings
from appliance.host import accelerator, doctor, facts, pci
from appliance.host.accelerator import AcceleratorReport, Attempt
from appliance.host.capacity import HostCapacity
from appliance.host.doctor import DoctorReport, Finding
from appliance.host.facts import PROGRAMS, HostFacts
from appliance.host.paths import Paths
from appliance.model import Accelerator

GIB = 1 << 30
KVM = AcceleratorReport(
    wanted="auto",
    chosen=Accelerator.KVM,
    kvm_device=True,
    attempts=(Attempt(accelerator=Accelerator.KVM, guest="micro", passed=True, seconds=0.3, problem=""),),
    qemu="QEMU 7.2",
    boot_id="b",
)
TCG = KVM.model_copy(update={"chosen": Accelerator.TCG, "kvm_device": False, "attempts": ()})
GOOD = HostFacts(
    euid=0,
    kernel="6.1",
    cpu_flags=frozenset({"avx2"}),
    accelerator=KVM,
    accelerator_problem="",
    programs={name: "1.0" for name, _, _ in PROGRAMS},
    libvirt_driver="/usr/lib/x/libvirt_driver_qemu.so",
    libvirt_version="9.0.0",
    netns_problem="",
    bridge_problem="",
    tun_problem="",
    nftables_problem="",
    capture_problem="",
    capacity=HostCapacity(
        cores=8, memory_total=64 * GIB, memory_available=60 * GIB, disk_total=500 * GIB, disk_free=400 * GIB
    ),
    cache_free=400 * GIB,
    iommu_groups=0,
    devices=(),
    uefi="/usr/share/OVMF/OVMF_CODE_4M.fd",
    clock_source="tsc",
    wall_clock=1_800_000_000.0,
)


def judged(**changes: object) -> dict[str, Finding]:
    found = doctor.judge(GOOD.model_copy(update=changes), HostSettings())
    return {f.name: f for f in found}


def test_a_good_host_is_fit_and_needs_nothing() -> None:
    report = DoctorReport(findings=doctor.judge(GOOD, HostSettings()))
    assert [f for f in report.findings if f.status != "ok" or f.hint] == []
    assert report.fit
    assert report.summary == "this host can run trials"


@pytest.mark.parametrize(
    ("changes", "name", "status", "says"),
    [
        ({"euid": 1000}, "root", "fail", "user id 1000"),
        ({"accelerator": TCG}, "accelerator", "warn", "TCG"),
        ({"accelerator": None, "accelerator_problem": "no QEMU"}, "accelerator", "fail", "no QEMU"),
        ({"accelerator": KVM.model_copy(update={"chosen": None})}, "accelerator", "fail", "neither"),
        ({"cpu_flags": frozenset()}, "avx2", "fail", "no"),
        ({"programs": {}}, "qemu-img", "fail", "missing"),
        ({"programs": {}}, "nft", "warn", "missing"),
        ({"libvirt_driver": ""}, "libvirt", "fail", "no QEMU driver"),
        ({"netns_problem": "not permitted"}, "network namespaces", "fail", "not permitted"),
        ({"bridge_problem": "not supported"}, "bridge", "fail", "not supported"),
        ({"tun_problem": "no such device"}, "tap", "fail", "no such device"),
        ({"nftables_problem": "no such file"}, "nftables rules", "warn", "no such file"),
        ({"capture_problem": "not permitted"}, "packet capture", "fail", "not permitted"),
        ({"cache_free": 20 * GIB}, "disk of the cache", "warn", "20.0 GiB"),
        ({"cache_free": 2 * GIB}, "disk of the cache", "fail", "2.0 GiB"),
        ({"wall_clock": 0.0}, "clock", "fail", "before 2025"),
    ],
)
def test_each_lack_is_named_with_its_remedy(
    changes: dict[str, object], name: str, status: str, says: str
) -> None:
    finding = judged(**changes)[name]
    assert finding.status == status
    assert says in finding.found
    assert finding.needed
    assert finding.hint


@pytest.mark.parametrize(("available", "status"), [(20, "ok"), (8, "warn"), (3, "fail")])
def test_memory_is_judged_by_what_the_settings_ask_for(available: int, status: str) -> None:
    capacity = GOOD.capacity.model_copy(update={"memory_available": available * GIB})
    assert judged(capacity=capacity)["memory"].status == status


def test_a_single_fail_makes_the_host_unfit_and_is_named() -> None:
    report = DoctorReport(findings=tuple(judged(euid=1, cache_free=20 * GIB).values()))
    assert not report.fit
    assert report.summary == "this host cannot run trials yet: root"


def test_a_host_without_nftables_runs_trials() -> None:
    programs = {name: version for name, version in GOOD.programs.items() if name != "nft"}
    found = judged(programs=programs, nftables_problem="nft is not installed")
    report = DoctorReport(findings=tuple(found.values()))
    assert report.fit
    assert report.summary == "this host can run trials; it could do better at: nft, nftables rules"
    assert all("containment measures" in found[name].needed for name in ("nft", "nftables rules"))


def test_the_library_is_read_and_a_fault_of_it_named(tmp_path: Path) -> None:
    assert doctor.library(HostSettings()).status == "ok"
    (tmp_path / "subjects").mkdir()
    (tmp_path / "subjects/mine.toml").write_text('name = "mine"\nsummary = "x"\nbrain = "llm"\n')
    settings = HostSettings(library_dirs=(tmp_path,))
    assert "1 of them of your own" in doctor.library(settings).found
    (tmp_path / "subjects/mine.toml").write_text('name = "mine"\nsummary = "x"\nbrian = "llm"\n')
    bad = doctor.library(settings)
    assert (bad.status, bool(bad.hint)) == ("fail", True)
    assert f"{tmp_path}/subjects/mine.toml: unknown key `brian` (did you mean `brain`?)" in bad.found
    (tmp_path / "subjects/mine.toml").write_text('name = "mine"\nsummary = "x"\nbrain = "script:no"\n')
    assert "key `brain`: found 'script:no'" in doctor.library(settings).found


def test_rendering_shows_needed_and_remedy_only_where_something_lacks() -> None:
    lines = doctor.render(DoctorReport(findings=tuple(judged(euid=1).values())))
    assert lines[0].startswith("fail  root")
    assert lines[1].strip() == "needed: root"
    assert lines[2].strip() == "what to do: use sudo"
    assert sum("what to do" in line for line in lines) == 1


# --- sysfs ------------------------------------------------------------------------------------------


def add_device(
    sysfs: Path,
    address: str,
    cls: str,
    ids: str,
    group: int | None,
    driver: str | None = None,
    *,
    reset: bool = True,
) -> None:
    folder = sysfs / "bus/pci/devices" / address
    folder.mkdir(parents=True)
    vendor, device = ids.split(":")
    (folder / "class").write_text(f"0x{cls}\n")
    (folder / "vendor").write_text(f"0x{vendor}\n")
    (folder / "device").write_text(f"0x{device}\n")
    if group is not None:
        (sysfs / f"kernel/iommu_groups/{group}").mkdir(parents=True, exist_ok=True)
        (folder / "iommu_group").symlink_to(sysfs / f"kernel/iommu_groups/{group}")
    if reset:
        (folder / "reset").touch()
    if driver:
        (folder / "driver").symlink_to(sysfs / f"bus/pci/drivers/{driver}")


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A bridge and an NVIDIA card (GPU and audio) in group 7, another GPU without a group, a NIC in 9."""
    root = tmp_path / "sys"
    add_device(root, "0000:00:01.0", "060400", "8086:1901", 7, "pcieport")
    add_device(root, "0000:01:00.0", "030200", "10de:2335", 7, "vfio-pci")
    add_device(root, "0000:01:00.1", "040300", "10de:22ba", 7)
    add_device(root, "0000:02:00.0", "030000", "1002:73bf", None, "amdgpu")
    add_device(root, "0000:03:00.0", "020000", "8086:1533", 9, "igb")
    return root


def test_gpus_are_found_by_class_with_driver_and_group(sysfs: Path) -> None:
    found = [d for d in pci.pci_devices(sysfs) if d.display]
    assert [(d.address, d.driver, d.group) for d in found] == [
        ("0000:01:00.0", "vfio-pci", 7),
        ("0000:02:00.0", "amdgpu", None),
    ]
    assert "NVIDIA 10de:2335" in found[0].label
    assert pci.iommu_group_count(sysfs) == 2


def test_bridges_do_not_count_as_members_of_a_group(sysfs: Path) -> None:
    members = pci.group_members(7, pci.pci_devices(sysfs))
    assert [d.address for d in members] == ["0000:01:00.0", "0000:01:00.1"]


def test_a_card_alone_in_its_group_is_fine_and_one_without_is_not(sysfs: Path) -> None:
    found = doctor.judge(GOOD.model_copy(update={"devices": pci.pci_devices(sysfs)}), HostSettings())
    nvidia, amd = (f for f in found if f.name == "GPU")
    assert nvidia.status == "ok"
    assert "group 7, driver vfio-pci" in nvidia.found
    assert amd.status == "warn"
    assert "no IOMMU group" in amd.found


def test_a_card_needs_uefi_firmware_and_nothing_else_does(sysfs: Path) -> None:
    without = GOOD.model_copy(update={"uefi": ""})
    assert "UEFI firmware" not in {f.name for f in doctor.judge(without, HostSettings())}
    with_card = without.model_copy(update={"devices": pci.pci_devices(sysfs)})
    found = next(f for f in doctor.judge(with_card, HostSettings()) if f.name == "UEFI firmware")
    assert (found.status, "apt-get install ovmf" in found.hint) == ("warn", True)


def test_a_card_that_cannot_be_reset_is_named(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:01:00.0", "038000", "1234:1111", 3, "vfio-pci", reset=False)
    found = doctor.judge(GOOD.model_copy(update={"devices": pci.pci_devices(tmp_path)}), HostSettings())
    card = next(f for f in found if f.name == "GPU")
    assert card.status == "warn"
    assert "no way to reset it" in card.found


def test_a_card_that_shares_its_group_with_a_stranger_is_named(sysfs: Path) -> None:
    add_device(sysfs, "0000:04:00.0", "020000", "8086:1533", 7)
    found = doctor.judge(GOOD.model_copy(update={"devices": pci.pci_devices(sysfs)}), HostSettings())
    card = next(f for f in found if "10de" in f.found)
    assert card.status == "warn"
    assert "shares its group with 0000:04:00.0" in card.found


def test_what_sysfs_cannot_tell_is_left_out_not_guessed(sysfs: Path, tmp_path: Path) -> None:
    (sysfs / "bus/pci/devices/0000:03:00.0/class").write_text("garbage")
    (sysfs / "bus/pci/devices/0000:09:00.0").mkdir()
    assert len(pci.pci_devices(sysfs)) == 4
    assert pci.pci_devices(tmp_path / "nothing") == ()
    assert pci.iommu_group_count(tmp_path / "nothing") == 0


# --- gathering --------------------------------------------------------------------------------------


def test_gathering_never_raises_and_leaves_nothing_behind(
    paths: Paths, sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "probe_accelerator", lambda *_, **__: TCG)
    links = sorted(p.name for p in Path("/sys/class/net").iterdir())
    found = facts.gather(paths, sysfs=sysfs)
    assert found.accelerator == TCG
    assert len(found.devices) == 5
    assert sorted(p.name for p in Path("/sys/class/net").iterdir()) == links
    assert DoctorReport.model_validate_json(
        DoctorReport(findings=doctor.judge(found, HostSettings())).model_dump_json()
    ).findings


def test_a_host_without_qemu_is_a_finding_not_a_crash(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "QEMU", "no-such-qemu")
    found = facts.gather(paths)
    assert found.accelerator is None
    assert "no-such-qemu is not installed" in found.accelerator_problem


def test_a_program_whose_version_cannot_be_read_is_still_present() -> None:
    assert facts._version("true", ()) == "present"
    assert facts._version("no-such-program", ()) == ""


def test_problems_from_outside_are_one_printable_line() -> None:
    assert facts._try("sh", "-c", "printf 'a\\033[31m\\nb' >&2; exit 1") == "a\ufffd[31m"
    assert facts._try("sh", "-c", "exit 4") == "exit status 4"
    assert facts._try("true") == ""
