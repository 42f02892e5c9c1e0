"""Baselines: found by what they were made from, used only if their files are what was saved."""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell import migration
from appliance.cell.baseline import (
    DISK,
    RAM,
    RECORD,
    STATE,
    Baseline,
    Site,
    baseline_key,
    check_files,
    find,
    making,
    prove,
    publish,
    read,
    record_expected,
    restore,
    restoring,
    template,
    wake,
)
from appliance.cell.baseline import record as record_module
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.proof import SCRIPT_SHA256
from appliance.errors import ConflictError, LabError, ResetError
from appliance.model import Accelerator
from tests.fakes.cells import Host, host
from tests.fakes.machine import FACTS, incarnation, machine_spec

VERSIONS = {"libvirt": "9.0.0", "qemu": "7.2.0"}


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(template, "_SETTLE_S", 0.0)
    with host(monkeypatch) as made:
        yield made


def saved(h: Host, name: str = "origin", key: str = "k" * 64) -> Baseline:
    """A published baseline with small files."""
    with making(h.shop, f"{name}-{key[:12]}", "make-1") as site:
        for part in (RAM, STATE, DISK):
            (site.folder / part).write_bytes(part.encode() * 100)
        record = h.baseline(name).model_copy(update={"key": key, "folder": site.final})
        return publish(record, site.folder)


def test_a_published_baseline_is_found_and_good(h: Host) -> None:
    made = saved(h)
    assert find(h.paths, "origin", made.key) == made
    check_files(made)
    check_files(made, read=True)
    assert {p.name for p in made.folder.iterdir()} == {RAM, STATE, DISK, RECORD}
    assert all((made.folder / part).stat().st_mode & 0o777 == 0o400 for part in (RAM, STATE, DISK))
    assert h.ledger.things() == []
    assert [p.name for p in h.paths.baselines.iterdir()] == [made.folder.name]


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"X")


def same_content(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def flip(path: Path) -> None:
    """In place, and with the times set back: only ctime tells."""
    stat = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as f:
        f.write(b"X")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def times_back(path: Path, change: Callable[[Path], None]) -> None:
    """Change a file and set the times back that can be: only ctime tells, if anything does."""
    stat = path.stat()
    path.chmod(0o600)
    change(path)
    path.chmod(0o400)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def shorter(path: Path) -> None:
    times_back(path, lambda p: os.truncate(p, p.stat().st_size - 1))


def longer(path: Path) -> None:
    times_back(path, lambda p: os.truncate(p, p.stat().st_size + 1))


def emptied(path: Path) -> None:
    times_back(path, lambda p: os.truncate(p, 0))


def last_bit(path: Path) -> None:
    def change(p: Path) -> None:
        content = bytearray(p.read_bytes())
        content[-1] ^= 1
        with p.open("r+b") as f:
            f.write(content)

    times_back(path, change)


def through_a_mapping(path: Path) -> None:
    def change(p: Path) -> None:
        with p.open("r+b") as f, mmap.mmap(f.fileno(), 0) as mapped:
            mapped[10] ^= 1

    times_back(path, change)


def hole(path: Path) -> None:
    """Data gives way to a hole; the size stays."""
    times_back(path, lambda p: subprocess.run(["fallocate", "-p", "-o", "0", "-l", "64", p], check=True))  # type: ignore[arg-type]


def swapped(path: Path) -> None:
    """Another file in its place, of its size and its times, as a rename would put it there."""
    stat, other = path.stat(), path.with_name("other")
    other.write_bytes(b"Y" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)


def linked(path: Path) -> None:
    path.rename(path.with_name("other"))
    rewrite(path.with_name("other"))
    path.symlink_to("other")


@pytest.mark.parametrize("part", [RAM, STATE, DISK])
@pytest.mark.parametrize(
    "change",
    [
        Path.unlink, rewrite, flip, shorter, longer, emptied, last_bit, through_a_mapping, hole, swapped, linked,
    ],
)  # fmt: skip
def test_a_file_that_changed_is_not_used(h: Host, part: str, change: Callable[[Path], None]) -> None:
    made = saved(h)
    change(made.folder / part)
    with pytest.raises(ResetError, match=part):
        check_files(made)
    with pytest.raises(ResetError):
        restore(h.shop, made, "c1")
    assert h.left == []


@pytest.mark.parametrize("part", [RAM, STATE, DISK])
def test_two_files_that_changed_places_are_not_used(h: Host, part: str) -> None:
    made = saved(h)
    other = DISK if part != DISK else RAM
    (made.folder / part).rename(made.folder / "x")
    (made.folder / other).rename(made.folder / part)
    (made.folder / "x").rename(made.folder / other)
    with pytest.raises(ResetError):
        check_files(made)


def test_content_is_what_counts_when_it_is_read(h: Host) -> None:
    """A record that was made to fit the changed file's signs is found out by reading."""
    made = saved(h)
    last_bit(made.folder / RAM)
    stat = (made.folder / RAM).stat()
    signs = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    forged = made.model_copy(update={"files": {**made.files, RAM: made.files[RAM].model_copy(update=signs)}})
    check_files(forged)
    with pytest.raises(ResetError, match="ram is not what was saved"):
        check_files(forged, read=True)


def test_a_file_that_was_only_moved_about_is_read_and_good(h: Host) -> None:
    made = saved(h)
    same_content(made.folder / DISK)
    check_files(made)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe\x00", b"[" * 10_000, None])
def test_a_record_that_is_none_counts_as_no_baseline(h: Host, content: bytes | None) -> None:
    made = saved(h)
    record = made.folder / RECORD
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    assert read(made.folder) is None
    assert find(h.paths, "origin", made.key) is None
    assert saved(h).folder == made.folder, "and is replaced by the next that is made"


def test_another_homes_baseline_is_not_ours(h: Host, tmp_path: Path) -> None:
    """A copied home: its records name the first home's files."""
    made = saved(h)
    copy = tmp_path / made.folder.name
    shutil.copytree(made.folder, copy)
    assert read(copy) is None
    assert read(made.folder) == made


def test_a_key_of_the_same_beginning_is_another_baseline(h: Host) -> None:
    made = saved(h)
    assert find(h.paths, "origin", made.key[:12] + "x" * 52) is None


def test_a_good_baseline_is_never_replaced(h: Host) -> None:
    made = saved(h)
    with pytest.raises(ConflictError, match="already"):
        saved(h)
    check_files(made, read=True)
    assert h.ledger.things() == []
    assert len(list(h.paths.baselines.iterdir())) == 1


def test_one_that_came_meanwhile_is_a_conflict_and_stays(h: Host) -> None:
    with making(h.shop, f"origin-{'k' * 12}", "make-1") as site:
        for part in (RAM, STATE, DISK):
            (site.folder / part).write_bytes(b"another")
        other = site.final.with_name(".other")
        shutil.copytree(site.folder, other)
        record = h.baseline("origin").model_copy(update={"key": "k" * 64, "folder": site.final})
        made = publish(record, other)
        with pytest.raises(ConflictError, match="already"):
            publish(record, site.folder)
    check_files(made, read=True)


def test_a_record_is_on_the_disk_before_its_baseline_has_a_name(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after this leaves a whole baseline, one before it none."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        done.append("half-made" if path.name.startswith(".") else path.name)
        if path.name == RECORD:
            assert path.read_text().endswith("}"), "all of it is synced"
        fsync(fd)

    def renamed(self: Path, target: Path) -> Path:
        done.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    made = saved(h)
    assert done == [RAM, STATE, DISK, RECORD, "half-made", "renamed", h.paths.baselines.name]
    assert read(made.folder) == made


def test_a_making_that_fails_leaves_nothing(h: Host) -> None:
    with pytest.raises(ZeroDivisionError), making(h.shop, "origin-x", "make-1") as site:  # noqa: PT012 - the block is what fails
        assert [t.name for t in h.ledger.things()] == [str(site.folder)], "its row came first"
        (site.folder / RAM).write_bytes(b"x")
        raise ZeroDivisionError
    assert list(h.paths.baselines.iterdir()) == []
    assert h.ledger.things() == []


@pytest.mark.parametrize(
    "changed",
    [
        lambda: baseline_key(machine_spec("target-1"), Accelerator.TCG, VERSIONS, "r"),
        lambda: baseline_key(
            machine_spec().model_copy(update={"memory_mib": 1024}), Accelerator.TCG, VERSIONS, "r"
        ),
        lambda: baseline_key(machine_spec(), Accelerator.KVM, VERSIONS, "r"),
        lambda: baseline_key(machine_spec(), Accelerator.TCG, {**VERSIONS, "qemu": "8.0.0"}, "r"),
        lambda: baseline_key(machine_spec(), Accelerator.TCG, VERSIONS, "r2"),
    ],
    ids=["machine", "memory", "accelerator", "qemu", "recipe"],
)
def test_the_key_changes_with_what_a_baseline_depends_on(changed: Callable[[], str]) -> None:
    assert changed() != baseline_key(machine_spec(), Accelerator.TCG, VERSIONS, "r")
    assert changed() == changed()


def test_the_key_changes_with_the_hosts_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = baseline_key(machine_spec(), Accelerator.TCG, VERSIONS, "r")
    monkeypatch.setattr(record_module, "_cpu_model", lambda: "another")
    assert baseline_key(machine_spec(), Accelerator.TCG, VERSIONS, "r") != before


# -- facts and proof -------------------------------------------------------------------------------------


@pytest.fixture
def machine(h: Host) -> Incarnation:
    made = incarnation(h.paths.cells, h.libvirt, h.ledger)
    made.start()
    made.resume()
    return made


def test_what_is_recorded_is_what_a_clone_is_held_against(
    h: Host, machine: Incarnation, tmp_path: Path
) -> None:
    site = Site(tmp_path / ".b", tmp_path / "b", tmp_path / ".b", tmpfs=False)
    expected = record_expected(machine, site, (Path("/image/disk"),))
    assert h.guest("origin").file("/run/hotcell-baseline").read_text() == expected.nonce
    assert expected.chain == (tmp_path / "b" / DISK, Path("/image/disk"))
    assert expected.ram_file == tmp_path / "b" / RAM
    assert (expected.boot_id, expected.processes) == ("b0", ("init 1 1",))


def test_the_process_list_has_to_settle(h: Host, machine: Incarnation, tmp_path: Path) -> None:
    lists = [["init 1 1", "udev 9 9"], ["init 1 1", "udev 9 9", "udev 10 10"], ["init 1 1"], ["init 1 1"]]
    guest = h.guest("origin")
    guest._facts = lambda _arg: FACTS | {"processes": lists.pop(0) if len(lists) > 1 else lists[0]}  # type: ignore
    assert record_expected(machine, Site(tmp_path, tmp_path, tmp_path, tmpfs=False), ()).processes == (
        "init 1 1",
    )


@pytest.mark.parametrize("script", [SCRIPT_SHA256, "of another version", ""])
def test_a_clone_is_proved_whether_our_own_script_waits_in_it_or_not(
    h: Host, machine: Incarnation, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(restoring, "host_checks", lambda _clone, _expected: iter(()))
    made = h.baseline("origin")
    expected = made.expected.model_copy(update={"script": script, "processes": ("init 1 1",)})
    made = made.model_copy(update={"expected": expected})
    proof = prove(machine, made, 0.0, will_stand_by=True)
    assert proof.proved, proof.failures
    guest = h.guest("origin")
    assert ("guest-exec" in guest.calls) is (script != SCRIPT_SHA256)
    assert guest.hung_up == 0, "it stands by, and waits for its clock"
    machine.pause()
    before = time.monotonic()
    assert before < wake(machine, made) < time.monotonic()
    assert machine.state is DomainState.RUNNING
    assert (guest.clock > 0) is (guest.hung_up == 1) is (script == SCRIPT_SHA256)


@pytest.mark.parametrize("state", ["silent", "tampering", "gone"])
def test_a_guest_that_does_not_answer_is_a_failed_check(
    h: Host, machine: Incarnation, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(restoring, "host_checks", lambda _clone, _expected: iter(()))
    if state == "tampering":
        h.guest("origin").facts = {"boot_id": 5}
    elif state == "gone":
        h.libvirt.power_off("origin")
        machine.spec.serial_log.write_bytes(b"Kernel panic\n\x1b[2J")
    else:
        monkeypatch.setattr(
            machine, "wait_for_agent", lambda _limit: (_ for _ in ()).throw(LabError("silent"))
        )
    proof = prove(machine, h.baseline("origin"), 0.0)
    assert not proof.proved
    assert [c.name for c in proof.checks] == ["guest answers"]
    assert proof.failures.isprintable()


# -- state through a socket, with QEMU's side played ------------------------------------------------------


def test_state_is_saved_from_the_stream_that_qemu_sends(machine: Incarnation, tmp_path: Path) -> None:
    asked: list[str] = []

    def qmp(command: str, arguments: dict[str, object] | None = None) -> object:
        asked.append(command)
        if command == "migrate":
            assert arguments is not None
            path = str(arguments["uri"]).removeprefix("unix:")

            def send() -> None:
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(path)
                    s.sendall(b"state" * 50_000)

            threading.Thread(target=send).start()
        return {"status": "completed"}

    machine.qmp = qmp  # type: ignore[method-assign]
    assert migration.save_state(machine, tmp_path / "state", limit_s=10) == 250_000
    assert (tmp_path / "state").read_bytes() == b"state" * 50_000
    assert asked == ["migrate-set-capabilities", "migrate", "query-migrate"]
    assert not (machine.folder / "state.sock").exists()


def test_a_qemu_that_sends_nothing_is_a_lab_error(machine: Incarnation, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="could not save"):
        migration.save_state(machine, tmp_path / "state", limit_s=0.2)


def test_a_stream_that_does_not_end_is_cut(
    machine: Incarnation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM that was not left out would fill the disk."""
    monkeypatch.setattr(migration, "_MAX_STATE", 1 << 20)

    def qmp(command: str, arguments: dict[str, object] | None = None) -> object:
        if command == "migrate":
            assert arguments is not None
            path = str(arguments["uri"]).removeprefix("unix:")

            def send() -> None:
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(path)
                    try:
                        for _ in range(1000):
                            s.sendall(bytes(65536))
                    except OSError:
                        return

            threading.Thread(target=send).start()
        return {"status": "active"}

    machine.qmp = qmp  # type: ignore[method-assign]
    with pytest.raises(LabError, match="does not end"):
        migration.save_state(machine, tmp_path / "state", limit_s=10)
    assert (tmp_path / "state").stat().st_size <= 1 << 20


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, ""),
        ({"error-desc": "No space left on device"}, ": No space left on device"),
        ({"error-desc": "\x1b[2J" + "x" * 1000}, ": \ufffd[2J" + "x" * 196 + "..."),
    ],
    ids=["nothing", "a reason", "too much"],
)
def test_a_migration_that_fails_is_a_lab_error_with_qemus_reason(
    machine: Incarnation, tmp_path: Path, told: dict[str, str], said: str
) -> None:
    def qmp(command: str, arguments: dict[str, object] | None = None) -> object:
        if command == "migrate":
            assert arguments is not None
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(arguments["uri"]).removeprefix("unix:"))
        return {"status": "failed", **told}

    machine.qmp = qmp  # type: ignore[method-assign]
    with pytest.raises(LabError) as e:
        migration.save_state(machine, tmp_path / "state", limit_s=5)
    assert e.value.message == f"query-migrate of {machine.name}: failed{said}"


def test_a_clone_that_does_not_listen_is_a_lab_error(machine: Incarnation, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"x")
    with pytest.raises(LabError, match="could not load"):
        migration.load_state(machine, tmp_path / "state", limit_s=1)


def test_a_restore_that_breaks_leaves_nothing(h: Host) -> None:
    """In memory nobody listens for the state: the clone is started, and then destroyed."""
    with pytest.raises(LabError, match="could not load"):
        restore(h.shop, saved(h), "c1")
    assert ("start", h.libvirt.done[0][1]) in h.libvirt.done
    assert h.libvirt.domains == {}
    assert h.ledger.things() == []
