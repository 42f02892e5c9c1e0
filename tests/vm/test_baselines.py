"""Real machines saved as baselines: chained, of both kinds, deleted, and taken elsewhere and back."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell.baseline import (
    DISK,
    RAM,
    Baseline,
    BaselineKind,
    BaselineStore,
    DiskBaseline,
    RamBaseline,
    Workshop,
    exporting,
    importing,
)
from appliance.cell.baseline.places import MARK, memory_root
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import Proof
from appliance.cell.qcow2 import read_header
from appliance.cell.snapshot import snapshot
from appliance.errors import ConfigError, ConflictError, LabError, ResetError
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(500)]
NAME = "target-1"
Save = Callable[..., Baseline]
LATE = b"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\nExecStop=/bin/sleep 60\n"


@pytest.fixture
def store(shop: Workshop) -> BaselineStore:
    return BaselineStore(shop)


@pytest.fixture
def save(shop: Workshop, store: BaselineStore) -> Iterator[Save]:
    """A function that saves a cell's target, the last first deleted at the end: nothing may stand in the way."""
    made: list[Baseline] = []

    def make(cell: Cell, parent: Baseline, label: str, kind: BaselineKind | None = None) -> Baseline:
        made.append(snapshot(shop, cell, NAME, parent, label, kind))
        return made[-1]

    yield make
    for baseline in reversed(made):
        if baseline.folder.exists():
            shutil.rmtree(baseline.folder)


def back_to(cell: Cell, baseline: Baseline) -> Incarnation:
    """The machine after a reset to this baseline."""
    proofs: list[Proof] = []
    cell.reset([baseline], proofs.append)
    assert [p.proved for p in proofs] == [True], [p.failures for p in proofs]
    assert proofs[0].baseline == baseline.id
    return cell.machine(NAME)


def text(machine: Incarnation, path: str) -> str:
    """A guest's file, or "" if there is none."""
    return machine.qga.exec(["/bin/cat", path]).text


def boot_id(machine: Incarnation) -> str:
    return text(machine, "/proc/sys/kernel/random/boot_id").strip()


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


def test_baselines_keep_memory_and_disk_build_on_one_another_and_go_in_order(
    open_cell: OpenCell, baselines: dict[str, Baseline], store: BaselineStore, save: Save
) -> None:
    cell = open_cell(NAME)
    first_of_all = baselines[NAME]
    cell.machine(NAME).qga.write_file("/dev/shm/kept", b"in memory")
    cell.machine(NAME).qga.write_file("/root/kept", b"on disk")
    first = save(cell, first_of_all, "first")
    assert cell.machines == {}
    back_to(cell, first)
    second = save(cell, first, "second")
    assert (second.parent, second.created_by, second.kind) == ("first", "request", "ram")
    assert second.expected.chain == (second.path(DISK), *first.expected.chain)
    machine = back_to(cell, second)
    assert text(machine, "/dev/shm/kept") + text(machine, "/root/kept") == "in memoryon disk"
    assert read_header(machine.spec.overlay).backing == str(second.path(DISK))
    # Dirt after the snapshot goes; the machine of the first baseline never had any of it.
    machine.qga.write_file("/root/dirt", b"x")
    assert text(back_to(cell, second), "/root/dirt") == ""
    assert text(back_to(cell, first_of_all), "/root/kept") == ""

    back_to(cell, second)
    with pytest.raises(ConflictError, match="baseline second builds on it"):
        store.delete(first)
    with pytest.raises(ConflictError, match=f"machine {NAME}-[0-9a-f]{{8}} of {cell.id} runs on it"):
        store.delete(second)
    cell.destroy_machines()
    store.delete(second)
    store.delete(first)
    assert not {"first", "second"} & {p.name for p in first.folder.parent.iterdir()}


def test_a_taken_name_is_refused_and_nothing_is_lost(
    open_cell: OpenCell, baselines: dict[str, Baseline], shop: Workshop
) -> None:
    cell = open_cell(NAME)
    with pytest.raises(ConflictError, match="already"):
        snapshot(shop, cell, NAME, baselines[NAME], baselines[NAME].folder.name)
    assert cell.machine(NAME).qga.ping()
    assert baselines[NAME].folder.exists()


def test_an_exported_chain_comes_back_and_runs_on_from_where_it_was(
    open_cell: OpenCell,
    baselines: dict[str, Baseline],
    shop: Workshop,
    store: BaselineStore,
    save: Save,
    tmp_path: Path,
) -> None:
    cell = open_cell(NAME)
    token = secrets.token_hex(8)
    cell.machine(NAME).qga.write_file("/root/below", token.encode())
    below = save(cell, baselines[NAME], "below")
    back_to(cell, below).qga.write_file("/dev/shm/on-top", token.encode())
    top = save(cell, below, "on-top")
    cell.destroy_machines()
    folder = tmp_path / "taken"
    manifest = exporting.export(shop, top, folder, "export-test", lambda _d, _t: None)
    assert manifest.layers == (DISK, "layer-1.qcow2", "layer-2.qcow2")
    assert (folder / RAM).stat().st_blocks * 512 < (folder / RAM).stat().st_size, "holes are holes still"
    for baseline in (top, below):
        store.delete(baseline)

    back = importing.import_(shop, folder, "back", "import-test", lambda _d, _t: None)
    try:
        assert back.expected.chain[:3] == tuple(back.folder / layer for layer in manifest.layers)
        machine = back_to(cell, back)
        assert text(machine, "/root/below") == text(machine, "/dev/shm/on-top") == token
        assert boot_id(machine) == back.expected.boot_id == top.expected.boot_id
        cell.destroy_machines()
        # What was flipped in the copy does not come in.
        layer = folder / "layer-2.qcow2"
        layer.chmod(0o600)
        flip(layer, layer.stat().st_size - 1)
        with pytest.raises(ConfigError, match=r"layer-2\.qcow2: expected"):
            importing.import_(shop, folder, "flipped", "import-test", lambda _d, _t: None)
        assert not (back.folder.parent / "flipped").exists()
    finally:
        cell.destroy_machines()
        store.delete(back)
    assert shop.ledger.things(owner="import-test") == []


def test_a_disk_baseline_boots_anew_and_carries_a_ram_baseline(
    open_cell: OpenCell, baselines: dict[str, Baseline], save: Save
) -> None:
    cell = open_cell(NAME)
    machine = cell.machine(NAME)
    before = boot_id(machine)
    machine.qga.write_file("/dev/shm/memory", b"lost")
    machine.qga.write_file("/root/kept", b"on disk")
    cold = save(cell, baselines[NAME], "cold", "disk")
    assert isinstance(cold, DiskBaseline)
    assert set(cold.files) == {DISK}
    assert cold.expected.boot_id == before

    first = back_to(cell, cold)
    assert first.spec.ram_file is None
    assert (text(first, "/root/kept"), text(first, "/dev/shm/memory")) == ("on disk", "")
    once = boot_id(first)
    first.qga.write_file("/root/dirt", b"x")
    second = back_to(cell, cold)
    assert text(second, "/root/dirt") == ""
    assert len({before, once, boot_id(second)}) == 3, "each incarnation is a boot of its own"

    # The memory of a machine that booted can be saved: handed over into a file.
    second.qga.write_file("/dev/shm/memory", b"kept now")
    warm = save(cell, cold, "warm", "ram")
    assert isinstance(warm, RamBaseline)
    assert warm.expected.chain == (warm.path(DISK), *cold.expected.chain)
    third = back_to(cell, warm)
    assert (boot_id(third), text(third, "/dev/shm/memory")) == (warm.expected.boot_id, "kept now")


def test_a_machine_that_is_killed_while_it_powers_off_is_no_baseline(
    open_cell: OpenCell, baselines: dict[str, Baseline], shop: Workshop
) -> None:
    cell = open_cell(NAME)
    machine = cell.machine(NAME)
    assert machine.pid is not None
    # A service that holds the guest's end up, so that the kill falls into it.
    machine.qga.write_file("/run/systemd/system/late.service", LATE)
    machine.qga.exec(["/usr/bin/systemctl", "start", "late"])
    late = threading.Timer(3.0, machine.kill)
    late.start()
    try:
        with pytest.raises(LabError, match="its disk may be torn"):
            snapshot(shop, cell, NAME, baselines[NAME], "torn", "disk")
    finally:
        late.cancel()
    assert not (baselines[NAME].folder.parent / "torn").exists()


def test_ram_on_a_tmpfs(
    open_cell: OpenCell, baselines: dict[str, Baseline], shop: Workshop, store: BaselineStore, save: Save
) -> None:
    root = memory_root(shop.paths, Path("/dev/shm"))
    assert root is not None
    shop.memory = root
    cell = open_cell(NAME)
    try:
        made = save(cell, baselines[NAME], "volatile")
        shop.memory = None
        assert made.path(RAM).is_relative_to(root)
        assert not made.path(DISK).is_relative_to(root)
        machine = back_to(cell, made)
        assert f"{made.path(RAM)}\n" in Path(f"/proc/{machine.pid}/maps").read_text()
        cell.destroy_machines()
        store.delete(made)
        assert [p.name for p in root.iterdir()] == [MARK]
    finally:
        shop.memory = None
        shutil.rmtree(root)


@pytest.mark.parametrize("part", [RAM, DISK])
def test_a_byte_that_changed_is_noticed_before_anything_runs(
    open_cell: OpenCell, baselines: dict[str, Baseline], save: Save, part: str
) -> None:
    cell = open_cell(NAME)
    made = save(cell, baselines[NAME], f"byte-{part.partition('.')[0]}")
    path = made.path(part)
    stat = path.stat()
    path.chmod(0o600)
    flip(path, stat.st_size // 2)
    path.chmod(0o400)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ResetError, match=f"{part} is not what was saved"):
        cell.reset([made], lambda _p: None)
    assert cell.machines == {}
    back_to(cell, baselines[NAME])
