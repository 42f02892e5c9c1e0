"""Baselines are deleted only when nobody needs them, and a crash midway leaves nothing half there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell.baseline import DISK, RAM, RECORD, STATE, BaselineStore, Site, check_files, making
from appliance.cell.baseline import places as places_module
from appliance.cell.baseline.places import MARK, file_system, marked, memory_root
from appliance.cell.baseline.sparse import digest
from appliance.cell.ledger import Kind
from appliance.cell.sweep import Ground, find_strays, remove
from appliance.errors import CapacityError, ConfigError, ConflictError, NotFoundError, ResetError
from tests.fakes.cells import Host, fake_overlay, host
from tests.fakes.saved import machine, publish_one


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


@pytest.fixture
def store(h: Host) -> BaselineStore:
    return BaselineStore(h.shop)


def overlay_on(h: Host, layer: Path, cell: str = "c1", name: str = "target-1-0a0b0c0d") -> Path:
    top = h.paths.cells / cell / name / "disk.qcow2"
    top.parent.mkdir(parents=True)
    fake_overlay(top, layer)
    return top


def test_baselines_are_found_by_name(h: Host, store: BaselineStore) -> None:
    made = publish_one(h, "clean")
    assert store.get("clean") == made
    for name in ("none", "../baselines/clean", "", ".clean"):
        with pytest.raises(NotFoundError, match="there is no baseline"):
            store.get(name)


def test_a_name_is_given_once_and_refused_before_anything_is_done(h: Host) -> None:
    with making(h.shop, "clean", "make-1"), making(h.shop, "other", "make-2"):
        rows = h.ledger.things()
        with pytest.raises(ConflictError, match="clean is being made"), making(h.shop, "clean", "make-3"):
            raise AssertionError
        assert h.ledger.things() == rows
    publish_one(h, "clean")
    with pytest.raises(ConflictError, match="clean already"), making(h.shop, "clean", "make-4"):
        raise AssertionError


# -- deleting --------------------------------------------------------------------------------------------


def test_one_that_nobody_needs_is_deleted_whole(h: Host, store: BaselineStore) -> None:
    made = publish_one(h, "clean")
    assert store.dependants(made) == ()
    store.delete(made)
    assert list(h.paths.baselines.iterdir()) == []
    assert h.ledger.things() == []
    assert store.owners_in_use() == set()
    with pytest.raises(NotFoundError):
        store.delete(made)


def test_what_a_child_builds_on_stays(h: Host, store: BaselineStore) -> None:
    first = publish_one(h, "first")
    second = publish_one(h, "second", parent=first)
    third = publish_one(h, "third", parent=second)
    for made, needed_by in ((first, ("second", "third")), (second, ("third",))):
        with pytest.raises(ConflictError, match=f"baseline {needed_by[0]} builds on it") as e:
            store.delete(made)
        assert all(name in str(e.value.fields["dependants"]) for name in needed_by)
    for made in (third, second, first):
        store.delete(made)


def test_what_a_machine_or_a_standby_runs_on_stays(h: Host, store: BaselineStore) -> None:
    made = publish_one(h, "clean")
    for cell in ("c1", "standby"):
        top = overlay_on(h, made.path(DISK), cell)
        with pytest.raises(ConflictError, match=f"machine target-1-0a0b0c0d of {cell} runs on it"):
            store.delete(made)
        shutil.rmtree(top.parent)
    overlay_on(h, h.paths.baselines / "another" / DISK)
    store.delete(made)


def test_a_machine_that_is_being_made_may_be_of_it(h: Host, store: BaselineStore) -> None:
    made = publish_one(h, "clean")
    overlay_on(h, made.path(DISK)).write_bytes(b"")
    with pytest.raises(ConflictError, match="is being made"):
        store.delete(made)


def test_what_is_held_stays_until_it_is_released(h: Host, store: BaselineStore) -> None:
    made, other = publish_one(h, "clean"), publish_one(h, "other")
    store.hold([made], "t1")
    store.hold([made, other], "c1")
    with pytest.raises(ConflictError, match="c1 uses it; t1 uses it"):
        store.delete(made)
    store.release("t1")
    with pytest.raises(ConflictError, match="c1 uses it"):
        store.delete(made)
    store.release("c1")
    store.delete(made)
    with pytest.raises(NotFoundError, match="deleted"):
        store.hold([made], "t2")


def test_a_machine_made_while_we_looked_saves_its_baseline(
    h: Host, store: BaselineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came between the look and the rename: the baseline comes back under its name, whole."""
    made = publish_one(h, "clean")
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == made.folder:
            overlay_on(h, made.path(DISK))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ConflictError, match="runs on it"):
        store.delete(made)
    assert store.get("clean") == made
    store.verify(made)
    assert h.ledger.things() == []


@pytest.mark.parametrize("dies_in", ["rename", "rmtree"])
def test_a_crash_while_deleting_leaves_all_or_what_a_sweep_takes(
    h: Host, store: BaselineStore, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    made = publish_one(h, "clean")

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr({"rename": "pathlib.Path.rename", "rmtree": "shutil.rmtree"}[dies_in], dies)
        with pytest.raises(KeyboardInterrupt):
            store.delete(made)
    fresh = BaselineStore(h.shop)  # another process, after the crash
    assert fresh.all() == ([made] if dies_in == "rename" else [])
    ground = Ground(h.paths, h.libvirt, h.ledger, links=False)  # type: ignore[arg-type]
    done = remove(find_strays(ground, set), ground)
    assert all(s.removed for s in done)
    assert done
    assert fresh.all() == ([made] if dies_in == "rename" else [])
    assert h.ledger.things() == []
    assert len(list(h.paths.baselines.iterdir())) == (1 if dies_in == "rename" else 0)


def test_a_sweep_meanwhile_leaves_it_alone(
    h: Host, store: BaselineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publish_one(h, "clean")
    ground = Ground(h.paths, h.libvirt, h.ledger, links=False)  # type: ignore[arg-type]
    found: list[object] = []
    rmtree = shutil.rmtree

    def look(path: Path) -> None:
        found.append(find_strays(ground, store.owners_in_use))
        rmtree(path)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", look)
        store.delete(made)
    assert found == [[]]


# -- on tmpfs --------------------------------------------------------------------------------------------


@pytest.fixture
def memory(h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(places_module, "file_system", lambda _path: "tmpfs")
    root = memory_root(h.paths, tmp_path)
    assert root is not None
    h.shop.memory = root
    return root


def test_ram_lies_on_tmpfs_and_goes_with_its_baseline(h: Host, store: BaselineStore, memory: Path) -> None:
    made = publish_one(h, "clean")
    assert {p.name for p in made.folder.iterdir()} == {DISK, RECORD}
    assert {p.name for p in made.path(RAM).parent.iterdir()} == {RAM, STATE}
    assert made.path(RAM).parent.parent == memory
    store.verify(made)
    assert h.ledger.things() == []
    store.delete(made)
    assert [p.name for p in memory.iterdir()] == [MARK]
    assert h.ledger.things() == []


def test_after_a_reboot_it_is_lost_and_says_so(h: Host, store: BaselineStore, memory: Path) -> None:
    made = publish_one(h, "clean")
    shutil.rmtree(made.path(RAM).parent)
    with pytest.raises(ResetError, match="has lost ram"):
        store.verify(made)
    store.delete(made)
    assert store.all() == []


def test_a_making_that_fails_leaves_nothing_on_tmpfs(h: Host, memory: Path) -> None:
    def fail(site: Site) -> None:
        (site.memory / RAM).write_bytes(b"x")
        assert {t.name for t in h.ledger.things()} == {str(site.folder), str(site.memory)}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), making(h.shop, "clean", "make-1", machine(h)) as site:
        fail(site)
    assert [p.name for p in memory.iterdir()] == [MARK]
    assert h.ledger.things() == []


def test_a_sweep_takes_ours_on_tmpfs_and_nothing_else(h: Host, memory: Path, tmp_path: Path) -> None:
    ground = Ground(h.paths, h.libvirt, h.ledger, links=False)  # type: ignore[arg-type]
    stranger = tmp_path / "stranger"
    for folder in (memory / "half-made", stranger):
        folder.mkdir()
        h.ledger.enter(Kind.FOLDER, str(folder), "make-1")
    h.ledger.enter(Kind.FOLDER, str(memory / "gone-with-a-reboot"), "make-1")
    done = {s.name: s for s in remove(find_strays(ground, set), ground)}
    assert done[str(memory / "half-made")].removed
    assert done[str(memory / "gone-with-a-reboot")].removed
    assert "not touched" in done[str(stranger)].problem
    assert stranger.exists()


def test_ram_that_no_baseline_has_is_dropped_at_the_start(
    h: Host, store: BaselineStore, memory: Path
) -> None:
    made = publish_one(h, "clean")
    (memory / "left-behind").mkdir()
    assert store.drop_lost_memory() == [memory / "left-behind"]
    assert store.drop_lost_memory() == []
    store.verify(made)


def test_a_crash_right_after_it_was_published_costs_no_ram(
    h: Host, store: BaselineStore, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row still stands; the folder is the baseline's, and no half of one."""
    ground = Ground(h.paths, h.libvirt, h.ledger, links=False)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(h.ledger, "strike", lambda *_: None)
        made = publish_one(h, "clean")
    row = (Kind.FOLDER, str(made.path(RAM).parent))
    assert row in {(t.kind, t.name) for t in h.ledger.things()}
    assert all(s.removed for s in remove(find_strays(ground, set), ground))
    store.verify(made)
    assert store.drop_lost_memory() == []
    assert h.ledger.things() == []


def test_no_room_on_tmpfs_is_told_before_anything_is_made(
    h: Host, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = machine(h, memory_mib=1 << 30)
    with pytest.raises(CapacityError, match="the RAM of clean"), making(h.shop, "clean", "c", huge):
        raise AssertionError
    assert h.ledger.things() == []


def test_the_folder_has_to_be_a_tmpfs(h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_root(h.paths, None) is None
    with pytest.raises(ConfigError, match="not a directory"):
        memory_root(h.paths, tmp_path / "none")
    monkeypatch.setattr(places_module, "file_system", lambda _path: "ext4")
    with pytest.raises(ConfigError, match="ext4"):
        memory_root(h.paths, tmp_path)


def test_a_folder_that_others_can_write_is_not_taken(h: Host, memory: Path, tmp_path: Path) -> None:
    memory.chmod(0o777)
    with pytest.raises(ConfigError, match="ours alone"):
        memory_root(h.paths, tmp_path)
    assert not marked(h.paths, memory / "x"), "nor is its mark believed"
    memory.chmod(0o700)
    assert marked(h.paths, memory / "x")
    (memory / MARK).write_text("/another/home\n")
    assert not marked(h.paths, memory / "x")


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"2 1 0:2 / {tmp_path} rw shared:1 - tmpfs tmpfs rw\n"
        f"3 2 0:3 / {tmp_path}/with\\040space rw - ramfs none rw\n"
        f"4 2 0:4 / {tmp_path} rw - btrfs none rw\n"
    )
    (tmp_path / "with space").mkdir()
    assert file_system(tmp_path / "with space", mounts) == "ramfs"
    assert file_system(tmp_path, mounts) == "btrfs", "the later mount lies on top"
    assert file_system(Path("/"), mounts) == "ext4"


# -- the layers below --------------------------------------------------------------------------------------


def rebuilt(path: Path) -> None:
    """Another image in the same place, as a build of the same inputs with newer packages makes it."""
    path.unlink()
    path.write_bytes(b"QFI\xfb another")


def altered(path: Path) -> None:
    stat = path.stat()
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", [rebuilt, altered, Path.unlink])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_layer_below_that_changed_is_noticed_before_use(
    h: Host, change: Callable[[Path], None], depth: int
) -> None:
    """The image's disk, and the layer of the baseline that this one is chained on."""
    child = publish_one(h, "child", parent=publish_one(h, "parent"))
    check_files(child, read=True)
    assert [p.name for p in child.below] == ["disk.qcow2", "disk.qcow2"]
    layer = child.expected.chain[depth]
    assert layer in child.below
    change(layer)
    with pytest.raises(ResetError, match="layer"):
        check_files(child)


def test_an_image_that_was_only_copied_back_is_read_and_good(h: Host) -> None:
    made = publish_one(h, "clean")
    disk = made.machine.image.disk
    real = made.below[disk].model_copy(update={"sha256": digest(disk)})
    made = made.model_copy(update={"below": {disk: real}})
    content = disk.read_bytes()
    disk.unlink()
    disk.write_bytes(content)
    check_files(made)
