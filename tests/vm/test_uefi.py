"""Real machines with UEFI firmware: what it remembers belongs to the baseline, and to nobody's next run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell import baseline as saved
from appliance.cell.baseline import (
    DISK,
    NVRAM,
    Baseline,
    BaselineStore,
    DiskBaseline,
    Workshop,
    exporting,
    importing,
    restoring,
)
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import Proof
from appliance.cell.snapshot import snapshot
from appliance.cell.spec import MachineSpec
from appliance.cell.standby import StandbyPool
from appliance.errors import ConflictError, ResetError
from appliance.host.paths import Paths
from appliance.model import Firmware, Role
from tests.vm.conftest import settle, world_spec

pytestmark = [pytest.mark.vm, pytest.mark.timeout(500)]
NAME = "target-1"
# A variable's file is its attributes (non-volatile, seen while booting and running) and its value.
# https://docs.kernel.org/filesystems/efivarfs.html
_SET = """
import pathlib, subprocess, sys
where = pathlib.Path("/sys/firmware/efi/efivars")
if not any(where.iterdir()):
    subprocess.run(["mount", "-t", "efivarfs", "efivarfs", where], check=True)
name = where / (sys.argv[1] + "-6d2f2c1e-0c0a-4e55-9a6c-3a3b7d5b9f10")
if len(sys.argv) > 2:
    name.write_bytes((7).to_bytes(4, "little") + sys.argv[2].encode())
print(name.read_bytes()[4:].decode() if name.exists() else "", end="")
"""


@pytest.fixture(scope="module")
def spec(vm_paths: Paths) -> MachineSpec:
    return world_spec(vm_paths, NAME, Role.TARGET).model_copy(update={"firmware": Firmware.UEFI})


@pytest.fixture(scope="module")
def booted(shop: Workshop, spec: MachineSpec) -> Iterator[DiskBaseline]:
    """Made from the image as a trial's baselines are."""
    key = saved.baseline_key(spec, shop.accelerator, shop.versions(spec), "uefi", "disk")
    cell = Cell("make-uefi", shop)
    cell.open()
    try:
        made = saved.make(shop, spec, cell.id, key, settle, kind="disk")
    finally:
        cell.close()
    assert isinstance(made, DiskBaseline)
    yield made
    shutil.rmtree(made.folder)


@pytest.fixture
def cell(shop: Workshop) -> Iterator[Cell]:
    made = Cell("c-uefi", shop)
    made.open()
    yield made
    made.close()
    assert shop.ledger.things(owner=made.id) == []


def variable(machine: Incarnation, *arguments: str) -> str:
    """The value of a variable of the machine's firmware; with two arguments it is set first."""
    return machine.qga.python(_SET, *arguments, timeout_s=60).text


def back_to(cell: Cell, baseline: Baseline) -> tuple[Incarnation, Proof]:
    proofs: list[Proof] = []
    cell.reset([baseline], proofs.append)
    assert [p.proved for p in proofs] == [True], [p.failures for p in proofs]
    return cell.machine(NAME), proofs[0]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_firmware_remembers_is_the_baselines_and_its_ram_is_never_saved(
    shop: Workshop, cell: Cell, booted: DiskBaseline
) -> None:
    assert set(booted.files) == {DISK, NVRAM}
    machine, proof = back_to(cell, booted)
    told = {c.name for c in proof.checks}
    assert {"NVRAM was the baseline's", "QEMU has this NVRAM open"} <= told
    assert variable(machine, "Kept") == ""
    assert variable(machine, "Kept", "by the baseline") == "by the baseline"
    kept = snapshot(shop, cell, NAME, booted, "kept", "disk")
    try:
        assert kept.files[NVRAM].sha256 != booted.files[NVRAM].sha256
        machine, _ = back_to(cell, kept)
        assert variable(machine, "Kept") == "by the baseline"
        variable(machine, "Kept", "by the subject")
        variable(machine, "Planted", "by the subject")
        assert digest(machine.folder / "nvram.fd") != kept.files[NVRAM].sha256
        with pytest.raises(ConflictError, match="UEFI firmware"):
            snapshot(shop, cell, NAME, kept, "warm", "ram")
        machine, _ = back_to(cell, kept)
        assert (variable(machine, "Kept"), variable(machine, "Planted")) == ("by the baseline", "")
    finally:
        cell.destroy_machines()
        shutil.rmtree(kept.folder)


def test_one_that_was_taken_elsewhere_boots_stands_by_and_is_swapped_in(
    shop: Workshop, booted: DiskBaseline, tmp_path: Path
) -> None:
    def silent(_done: int, _total: int) -> None:
        pass

    exporting.export(shop, booted, tmp_path / "out", "export-uefi", silent)
    taken = importing.import_(shop, tmp_path / "out", "taken", "import-uefi", silent)
    pool = StandbyPool(shop)
    cell = Cell("c-taken", shop, pool)
    try:
        assert taken.files[NVRAM].sha256 == booted.files[NVRAM].sha256
        cell.open()
        pool.keep(cell.id, [taken])
        assert pool.wait_ready(200), pool.missing()
        (standby,) = pool.ready().values()
        assert (standby.state, standby.plugged) == (DomainState.PAUSED, False)
        (renewal,) = cell.reset([taken], lambda _p: None)
        assert (renewal.machine, renewal.direct_because) == (standby, "")
        assert renewal.proof.proved
        assert standby.plugged
        assert variable(standby, "Kept", "in the firmware of the one that stood by").startswith("in the")
    finally:
        pool.close()
        cell.close()
        BaselineStore(shop).delete(taken)


def test_a_machine_that_started_with_other_nvram_is_withheld(
    shop: Workshop, cell: Cell, booted: DiskBaseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if what the last run left were handed on: every copy gets one byte more than was saved."""
    real: Callable[..., Incarnation] = shop.prepare

    def handed_on(*args: object, nvram: Path, **kwargs: object) -> Incarnation:
        dirty = shop.paths.cells / "dirty.fd"
        data = bytearray(nvram.read_bytes())
        data[-1] ^= 1
        dirty.write_bytes(data)
        try:
            return real(*args, nvram=dirty, **kwargs)
        finally:
            dirty.unlink()

    monkeypatch.setattr(shop, "prepare", handed_on)
    proofs: list[Proof] = []
    with pytest.raises(ResetError, match="NVRAM was the baseline's"):
        cell.reset([booted], proofs.append)
    assert cell.machines == {}
    assert not any(p.proved for p in proofs)


def test_a_byte_of_saved_nvram_that_changed_is_noticed_before_anything_runs(
    shop: Workshop, cell: Cell, booted: DiskBaseline
) -> None:
    path = booted.path(NVRAM)
    before, stat = path.read_bytes(), path.stat()
    path.chmod(0o600)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        with pytest.raises(ResetError, match=r"nvram\.fd is not what was saved"):
            restoring.restore(shop, booted, cell.id)
    finally:
        path.write_bytes(before)
        path.chmod(0o400)
