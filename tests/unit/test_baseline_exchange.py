"""Export and import: what comes back is what was saved, holes stay holes, and nothing wrong gets in."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cell.baseline import (
    DISK,
    NVRAM,
    RAM,
    STATE,
    Baseline,
    BaselineStore,
    check_files,
    exporting,
    importing,
    making,
    sparse,
)
from appliance.cell.baseline.manifest import MANIFEST
from appliance.cell.baseline.places import MARK
from appliance.cell.qcow2 import read_header
from appliance.errors import (
    ConfigError,
    ConflictError,
    HotcellError,
    NotFoundError,
    PrerequisiteError,
    ResetError,
)
from appliance.host import capacity
from appliance.model import Accelerator, Firmware
from tests.fakes.cells import Host, host
from tests.fakes.machine import DIGEST
from tests.fakes.saved import MIB, publish_one, with_image


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        with_image(made, monkeypatch)
        yield made


def out(h: Host, saved: Baseline, to: Path) -> Path:
    exporting.export(h.shop, saved, to, "export-1", lambda _done, _total: None)
    return to


def in_(h: Host, folder: Path, name: str | None = None) -> Baseline:
    return importing.import_(h.shop, folder, name, "import-1", lambda _done, _total: None)


def sums(saved: Baseline) -> dict[str, str]:
    return {n: f.sha256 for n, f in saved.files.items() if n in (RAM, STATE)}


def nothing_left(h: Host, *names: str) -> None:
    assert h.ledger.things() == []
    assert sorted(p.name for p in h.paths.baselines.iterdir()) == sorted(names)


# -- the way out and in ----------------------------------------------------------------------------------


def test_what_was_exported_comes_back(h: Host, tmp_path: Path) -> None:
    made = publish_one(h, "clean")
    seen: list[tuple[int, int]] = []
    target = tmp_path / "out"
    exporting.export(h.shop, made, target, "export-1", lambda done, total: seen.append((done, total)))
    assert {p.name for p in target.iterdir()} == {RAM, STATE, DISK, MANIFEST}
    assert seen[-1][0] == seen[-1][1] == sum(f.size for f in made.files.values())
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    back = in_(h, target, "back")
    check_files(back, read=True)
    assert sums(back) == sums(made)
    assert (back.id, back.created_by, back.parent, back.kind) == ("back", "import", "", "ram")
    assert back.machine.memory_mib == MIB
    assert back.expected.chain == (back.path(DISK), *made.expected.chain[1:])
    assert back.expected.model_dump(exclude={"chain", "ram_file"}) == made.expected.model_dump(
        exclude={"chain", "ram_file"}
    )
    assert back.key != made.key, "no trial takes it for what it made itself"
    nothing_left(h, "clean", "back")


def test_holes_stay_holes_both_ways(h: Host, tmp_path: Path) -> None:
    made = publish_one(h, "clean")
    target = out(h, made, tmp_path / "out")
    back = in_(h, target, "back")
    for path in (target / RAM, back.path(RAM)):
        assert path.stat().st_size == MIB << 20
        assert path.stat().st_blocks * 512 < 1 << 20


def test_holes_need_no_room(h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    have = capacity.host_capacity(h.paths.home)
    few = have.model_copy(update={"disk_free": MIB << 18})
    monkeypatch.setattr(capacity, "host_capacity", lambda _path: few)
    check_files(in_(h, target, "back"), read=True)


def test_zeros_that_a_copy_wrote_out_become_holes_again(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    content = (target / RAM).read_bytes()
    (target / RAM).unlink()
    (target / RAM).write_bytes(content)
    assert (target / RAM).stat().st_blocks * 512 >= MIB << 20
    assert in_(h, target, "back").path(RAM).stat().st_blocks * 512 < 1 << 20


def test_a_chain_goes_along_and_stands_on_this_homes_files(h: Host, tmp_path: Path) -> None:
    first = publish_one(h, "first")
    third = publish_one(h, "third", parent=publish_one(h, "second", parent=first))
    target = out(h, third, tmp_path / "out")
    for name in ("third", "second", "first"):  # what it stood on is not needed any more
        shutil.rmtree(h.paths.baselines / name)
    back = in_(h, target)
    assert back.id == "third"
    folder = back.folder
    image = back.machine.image.disk
    assert back.expected.chain == (folder / DISK, folder / "layer-1.qcow2", folder / "layer-2.qcow2", image)
    for layer, below in zip(back.expected.chain, back.expected.chain[1:], strict=False):
        assert read_header(layer).backing == str(below)
    assert set(back.files) == {RAM, STATE, DISK, "layer-1.qcow2", "layer-2.qcow2"}
    check_files(back, read=True)
    again = in_(h, out(h, back, tmp_path / "again"), "again")
    assert len(again.expected.chain) == 4, "an imported one can be exported too"


def test_nvram_travels_with_its_disk(h: Host, tmp_path: Path) -> None:
    made = publish_one(h, "cold", kind="disk", firmware=Firmware.UEFI)
    target = out(h, made, tmp_path / "out")
    assert {p.name for p in target.iterdir()} == {DISK, NVRAM, MANIFEST}
    back = in_(h, target, "back")
    assert back.machine.firmware is Firmware.UEFI
    assert back.files[NVRAM].sha256 == made.files[NVRAM].sha256
    check_files(back, read=True)
    flip(NVRAM)(target)
    with pytest.raises(ConfigError, match=r"nvram\.fd: expected"):
        in_(h, target, "flipped")
    for changes in (
        {"firmware": "bios"},
        {"files": {DISK: read_json(target)["files"][DISK]}, "firmware": "bios", "devices": ["0000:01:00.0"]},
        {"files": {DISK: read_json(target)["files"][DISK]}},
        {"files": {**read_json(target)["files"], NVRAM: {"sha256": DIGEST, "size": (8 << 20) + 1}}},
    ):
        again = out(h, made, tmp_path / f"out-{secrets.token_hex(3)}")
        edit(again, **changes)
        with pytest.raises(ConfigError, match=r"has the files|larger than|has UEFI"):
            in_(h, again, "wrong")
    nothing_left(h, "back", "cold")


def test_no_import_hands_a_device_of_this_host_to_a_guest(h: Host, tmp_path: Path) -> None:
    """The addresses are those of the host that it was saved on: here they may be the disk or the network."""
    target = out(h, publish_one(h, "cold", kind="disk", firmware=Firmware.UEFI), tmp_path / "out")
    edit(target, devices=["0000:00:1f.6"])
    with pytest.raises(PrerequisiteError, match=r"0000:00:1f\.6.*something else here"):
        in_(h, target, "back")
    nothing_left(h, "cold")


def test_nvram_of_other_firmware_is_refused(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "cold", kind="disk", firmware=Firmware.UEFI), tmp_path / "out")
    h.uefi.variables.write_bytes(bytes(4096))
    with pytest.raises(
        PrerequisiteError, match=r"other UEFI firmware: its NVRAM has 17 bytes.* this host 4096"
    ):
        in_(h, target, "back")
    nothing_left(h, "cold")


def test_a_disk_baseline_travels_to_any_processor_and_accelerator(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "cold", kind="disk"), tmp_path / "out")
    assert {p.name for p in target.iterdir()} == {DISK, MANIFEST}
    edit(target, accelerator="kvm", versions={"qemu": "9.9.9"}, host_cpu="0" * 64)
    back = in_(h, target, "back")
    assert (back.kind, set(back.files)) == ("disk", {DISK})


def test_one_of_the_laboratorys_own_making_gets_another_name(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "target-1-0123456789ab"), tmp_path / "out")
    assert in_(h, target).id == "imported-target-1-0123456789ab"
    with pytest.raises(ConflictError, match="own baselines"):
        in_(h, target, "origin-0123456789ab")


def test_on_tmpfs_the_ram_of_an_import_lies_there(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    h.shop.memory = tmp_path / "memory"
    h.shop.memory.mkdir()
    back = in_(h, target, "back")
    assert back.path(RAM).parent.parent == h.shop.memory
    assert back.path(DISK).parent == h.paths.baselines / "back"
    assert back.expected.ram_file == back.path(RAM)  # type: ignore[union-attr]
    check_files(back, read=True)
    nothing_left(h, "clean", "back")


# -- what is refused -------------------------------------------------------------------------------------


def read_json(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_text()))


def edit(folder: Path, **changes: Any) -> None:
    (folder / MANIFEST).write_text(json.dumps(read_json(folder) | changes))


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


def rename_file(name: str) -> Callable[[Path], None]:
    """The manifest calls a file something else."""

    def change(folder: Path) -> None:
        files = read_json(folder)["files"]
        files[name] = files.pop(STATE)
        edit(folder, files=files)

    return change


def bigger(folder: Path) -> None:
    files = read_json(folder)["files"]
    edit(folder, files=files | {RAM: files[RAM] | {"size": files[RAM]["size"] + 4096}})


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.chmod(0o600)
        with path.open("r+b") as f:
            f.seek(-1, os.SEEK_END)
            last = f.read(1)
            f.seek(-1, os.SEEK_END)
            f.write(bytes([last[0] ^ 1]))

    return change


def cut(folder: Path) -> None:
    os.truncate(folder / RAM, (MIB << 20) - 4096)


def link(folder: Path) -> None:
    (folder / STATE).rename(folder / "elsewhere")
    (folder / STATE).symlink_to("elsewhere")


def pipe(folder: Path) -> None:
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)


def external(folder: Path) -> None:
    """A layer that has its data in a file of its choice: the header says so, and so does the manifest."""
    data = bytearray((folder / DISK).read_bytes())
    data[4:8], data[72:80] = (3).to_bytes(4), (4).to_bytes(8)
    (folder / DISK).chmod(0o600)
    (folder / DISK).write_bytes(data)
    files = read_json(folder)["files"]
    files[DISK] |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit(folder, files=files)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (edited(versions={"qemu": "8.1.0", "libvirt": "9.0.0"}), PrerequisiteError, "8.1.0, here is 7.2.0"),
        (edited(accelerator="kvm"), PrerequisiteError, "kvm, here is tcg"),
        (edited(image_digest="e" * 64), NotFoundError, "e" * 64),
        (edited(image_disk_sha256="e" * 64), PrerequisiteError, "other packages"),
        (edited(recipe="world"), NotFoundError, "world"),
        (edited(kind="disk"), ConfigError, "disk baseline"),
        (edited(devices=["0000:01:00.0"]), ConfigError, "passed-through"),
        (edited(format=2), ConfigError, "format"),
        (edited(surprise=1), ConfigError, "surprise"),
        (edited(layers=["disk.qcow2", "layer-1.qcow2"]), ConfigError, "layer-1"),
        (edited(layers=["layer-1.qcow2"]), ConfigError, "layers have to be"),
        (edited(expected={}), ConfigError, "expected"),
        (edited(expected={"chain": ["/etc/shadow"]}), ConfigError, "expected"),
        (edited(name="../up"), ConfigError, "name"),
        (edited(machine="/etc"), ConfigError, "machine"),
        (rename_file("../../etc/cron.d/x"), ConfigError, "files"),
        (rename_file("/etc/passwd"), ConfigError, "files"),
        (rename_file("manifest.json"), ConfigError, "files"),
        (lambda f: (f / MANIFEST).write_text("{"), ConfigError, MANIFEST),
        (lambda f: (f / MANIFEST).unlink(), ConfigError, MANIFEST),
        (lambda f: os.truncate(f / MANIFEST, 5 << 20), ConfigError, MANIFEST),
        (lambda f: (f / STATE).unlink(), ConfigError, "state"),
        (flip(RAM), ConfigError, "ram: expected"),
        (flip(STATE), ConfigError, "state: expected"),
        (flip(DISK), ConfigError, "disk.qcow2: expected"),
        (cut, ConfigError, "ram: expected"),
        (bigger, ConfigError, "another size"),
        (link, ConfigError, "state"),
        (pipe, ConfigError, "not a plain file"),
        (external, ConfigError, "elsewhere"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_of_it_stays(
    h: Host, tmp_path: Path, change: Callable[[Path], object], error: type[HotcellError], told: str
) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    change(target)
    with pytest.raises(error, match=told.replace(".", r"\.")):
        in_(h, target, "back")
    nothing_left(h, "clean")


def test_another_processor_is_refused_under_kvm_only(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    edit(target, host_cpu="0" * 64)
    in_(h, target, "under-tcg")
    h.shop.accelerator = Accelerator.KVM
    edit(target, accelerator="kvm")
    with pytest.raises(PrerequisiteError, match="processor"):
        in_(h, target, "under-kvm")


def test_a_taken_name_is_refused(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    with pytest.raises(ConflictError, match="clean already"):
        in_(h, target)
    for bad in ("A", "-x", "x" * 41, "a/b", ".."):
        with pytest.raises(ConfigError, match="not a name"):
            in_(h, target, bad)
    nothing_left(h, "clean")


def test_a_name_that_is_being_made_is_refused_before_anything_is_copied(
    h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    monkeypatch.setattr(importing, "copy", lambda *_: pytest.fail("it was copied"))
    with making(h.shop, "twice", "c1"), pytest.raises(ConflictError, match="twice is being made"):
        in_(h, target, "twice")
    nothing_left(h, "clean")


def test_a_source_by_another_path_is_refused(h: Host, tmp_path: Path) -> None:
    target = out(h, publish_one(h, "clean"), tmp_path / "out")
    (tmp_path / "link").symlink_to(target)
    for folder in (
        tmp_path / "link",
        tmp_path / "none",
        target / MANIFEST,
        target / ".." / "out",
        Path("out"),
    ):
        with pytest.raises(ConfigError, match="absolute path"):
            in_(h, folder, "back")


def test_an_export_goes_to_a_new_plain_place_only(h: Host, tmp_path: Path) -> None:
    made = publish_one(h, "clean")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    bad = [
        Path("out"), tmp_path, tmp_path / "none" / "out", tmp_path / ".." / "out", tmp_path / "link" / "out",
        h.paths.home / "out", h.paths.baselines / "out", h.paths.cache / "out", tmp_path / "dangling",
        made.folder,
    ]  # fmt: skip
    for target in bad:
        with pytest.raises(ConfigError):
            out(h, made, target)
    nothing_left(h, "clean")


@pytest.mark.parametrize("part", [RAM, STATE, DISK])
def test_a_damaged_baseline_is_not_exported(h: Host, tmp_path: Path, part: str) -> None:
    made = publish_one(h, "clean")
    flip(part)(made.folder)
    with pytest.raises(ResetError, match=part):
        out(h, made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    nothing_left(h, "clean")


def test_a_damaged_layer_below_is_not_exported(h: Host, tmp_path: Path) -> None:
    first = publish_one(h, "first")
    second = publish_one(h, "second", parent=first)
    flip(DISK)(first.folder)
    with pytest.raises(ResetError, match="layer-1"):
        out(h, second, tmp_path / "out")
    shutil.rmtree(first.folder)
    with pytest.raises(ResetError, match="no baseline is left"):
        out(h, second, tmp_path / "out")


def test_a_crash_midway_leaves_what_a_sweep_knows_as_ours(
    h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is there before the folder, and the folder carries our mark; nothing has the final name."""
    from appliance.cell.baseline.places import marked

    seen: list[Path] = []

    def dies(source: Path, target: Path, progress: object) -> tuple[str, int]:
        seen.append(target.parent)
        assert [t.name for t in h.ledger.things()] == [str(target.parent)]
        assert marked(h.paths, target.parent)
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "copy", dies)
    with pytest.raises(KeyboardInterrupt):
        out(h, publish_one(h, "clean"), tmp_path / "out")
    assert seen
    assert seen[0].parent == tmp_path
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out" / MARK).exists()


def test_while_it_is_exported_its_owner_is_known(h: Host) -> None:
    store = BaselineStore(h.shop)
    with store.owner("export") as owner:
        assert store.owners_in_use() == {owner}
    assert store.owners_in_use() == set()


# -- copying ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_a_copy_is_the_file_to_the_last_byte(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    found = sparse.copy(tmp_path / "a", tmp_path / "b", lambda _at: None)
    assert found == (hashlib.sha256(content).hexdigest(), size)
    assert (tmp_path / "b").read_bytes() == content


@pytest.mark.parametrize("at", [0, 4096, (1 << 20) - 3, (5 << 20) - 7])
def test_data_between_holes_stays_in_its_place(tmp_path: Path, at: int) -> None:
    with (tmp_path / "a").open("wb") as f:
        f.seek(at)
        f.write(b"DATA")
        f.truncate(6 << 20)
    sha256, _ = sparse.copy(tmp_path / "a", tmp_path / "b", lambda _at: None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_a_copy_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"y")
    with pytest.raises(FileExistsError):
        sparse.copy(tmp_path / "a", tmp_path / "b", lambda _at: None)
