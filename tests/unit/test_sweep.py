"""The sweep removes what is ours and nothing else, and one failure never stops the rest."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.cell import sweep
from appliance.cell.baseline import RECORD, read
from appliance.cell.ledger import Kind, Thing
from appliance.cell.libvirt_door import DomainState
from appliance.cell.processes import started
from appliance.cell.sweep import Ground, Stray, find_strays, remove
from tests.fakes.cells import Host, host
from tests.fakes.qemu import look_alike
from tests.fakes.saved import publish_one


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


def ground(h: Host, *, links: bool = True) -> Ground:
    return Ground(h.paths, h.libvirt, h.ledger, links)  # type: ignore[arg-type]


def strays(h: Host, *in_use: str) -> list[Stray]:
    return find_strays(ground(h), lambda: set(in_use))


def removed(h: Host, found: list[Stray]) -> list[Stray]:
    return remove(found, ground(h))


def kinds(found: list[Stray]) -> list[str]:
    return sorted(s.kind for s in found)


def test_a_clean_host_has_no_strays(h: Host) -> None:
    assert strays(h) == []
    assert removed(h, []) == []


def test_what_a_crash_leaves_is_found_and_removed(h: Host) -> None:
    h.cell("origin", "target-1").plug_all()
    found = strays(h)
    assert kinds(found) == sorted(
        ["anchor", "bridge", "domain", "domain", "folder", "folder", "tap", "tap"]
    )  # fmt: skip
    assert all(s.removed for s in removed(h, found))
    assert h.left == []
    assert not list(h.paths.cells.iterdir())
    assert strays(h) == []


def test_links_go_before_machines_and_machines_before_what_they_use(h: Host) -> None:
    h.cell("origin")
    order = [s.kind for s in removed(h, strays(h))]
    assert order.index("tap") < order.index("domain") < order.index("bridge") < order.index("folder")


def test_what_is_in_use_is_left_alone(h: Host) -> None:
    cell, other = h.cell("origin", cell_id="c1"), h.cell("origin", cell_id="c2")
    assert {s.owner for s in strays(h, "c1")} == {"c2"}
    removed(h, strays(h, "c1"))
    assert cell.machine("origin").state is DomainState.RUNNING
    assert cell.machine("origin").folder.exists()
    assert other.machine("origin").state is DomainState.GONE
    assert strays(h, "c1") == []


def test_a_domain_without_our_tag_is_somebody_elses(h: Host) -> None:
    h.libvirt.domains["guest-of-somebody"] = DomainState.RUNNING
    assert strays(h) == []


def test_a_tagged_domain_without_a_row_is_ours(h: Host) -> None:
    h.cell("origin")
    domain = next(iter(h.libvirt.domains))
    for thing in h.ledger.things():
        h.ledger.strike(thing.kind, thing.name)
    found = strays(h)
    assert [(s.kind, s.name) for s in found if s.kind == "domain"] == [("domain", domain)]
    removed(h, found)
    assert h.libvirt.domains == {}


def test_a_folder_without_a_row_is_found_by_its_place(h: Host) -> None:
    lost = h.paths.cells / "c9" / "origin-00000000"
    lost.mkdir(parents=True)
    (lost / "disk.qcow2").write_bytes(b"x")
    (h.paths.cells / "c9" / "a-file").write_text("x")
    found = strays(h)
    assert kinds(found) == ["folder", "folder"]
    assert all(s.removed for s in removed(h, found))
    assert not list(h.paths.cells.iterdir())
    assert strays(h, "c9") == []


@pytest.mark.parametrize(
    "place", ["outside", "home itself", "bundles", "dots", "images", "cells itself", "root"]
)
def test_a_folder_elsewhere_is_never_touched(
    h: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A row is trusted to name things below the places of machines only: a wrong one must not cost evidence."""
    gone: list[object] = []
    # Should the guard fail, nothing is lost by it. The name is replaced, not the module's function, which
    # the fixture's own temporary folder needs.
    monkeypatch.setattr(sweep, "shutil", SimpleNamespace(rmtree=gone.append))
    keep = {
        "outside": tmp_path / "precious", "home itself": h.paths.home, "bundles": h.paths.bundles / "t1",
        "dots": h.paths.cells / "x" / ".." / ".." / "bundles" / "t1", "images": h.paths.images / "d",
        "cells itself": h.paths.cells, "root": Path("/"),
    }[place]  # fmt: skip
    (h.paths.bundles / "t1").mkdir()
    keep.mkdir(parents=True, exist_ok=True)
    h.ledger.enter(Kind.FOLDER, str(keep), "c1")
    done = removed(h, [s for s in strays(h) if s.name == str(keep)])
    assert [s.removed for s in done] == [False]
    assert "not touched" in done[0].problem
    assert gone == []
    assert any(t.name == str(keep) for t in h.ledger.things()), "its row stays"


def test_a_link_in_a_folders_place_is_removed_and_not_followed(h: Host, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    link = h.paths.cells / "c9" / "origin-0"
    link.parent.mkdir()
    link.symlink_to(precious)
    assert all(s.removed for s in removed(h, strays(h)))
    assert not link.is_symlink()
    assert precious.exists()


@pytest.mark.parametrize(
    "refused", [("net", "delete_link"), ("libvirt", "destroy origin"), ("libvirt", "destroy")], ids=str
)
def test_one_failure_never_stops_the_rest(h: Host, refused: tuple[str, str]) -> None:
    h.cell("origin", "target-1")
    getattr(h, refused[0]).refuse.add(refused[1])
    found = strays(h)
    done = removed(h, found)
    assert len(done) == len(found)
    failed = [s for s in done if not s.removed]
    assert failed
    assert all("refused by the test" in s.problem for s in failed)
    assert {(t.kind, t.name) for t in h.ledger.things()} == {(s.kind, s.name) for s in failed}
    getattr(h, refused[0]).refuse.clear()
    assert all(s.removed for s in removed(h, strays(h)))
    assert h.left == []


def test_a_thing_that_is_gone_already_only_loses_its_row(h: Host) -> None:
    h.ledger.enter(Kind.TAP, "hctdead", "c1")
    h.ledger.enter(Kind.DOMAIN, "hc-c1-origin-dead", "c1")
    h.ledger.enter(Kind.FOLDER, str(h.paths.cells / "c1" / "origin-dead"), "c1")
    assert all(s.removed for s in removed(h, strays(h)))
    assert h.ledger.things() == []


# -- rows and things, the four ways they can fit ---------------------------------------------------------


def test_a_link_without_a_row_in_our_namespace_is_ours(h: Host) -> None:
    """The namespace is this process's own: whatever bridge or tap is in it, we made."""
    h.net.links |= {"hcb9": "bridge", "hct9": "tun", "eth0": "physical"}
    found = strays(h)
    assert {(s.kind, s.name) for s in found} == {("bridge", "hcb9"), ("tap", "hct9")}
    assert all(s.removed for s in removed(h, found))
    assert set(h.net.links) == {"lo", "eth0"}, "another link breaks the seal, and is not ours to remove"


def test_a_sweep_outside_of_the_seal_touches_no_link(h: Host) -> None:
    """There the name of a row means somebody else's link; ours went with its namespace."""
    h.net.links |= {"hct1": "tun", "docker0": "bridge"}
    h.ledger.enter(Kind.TAP, "hct1", "c1")
    outside = ground(h, links=False)
    found = find_strays(outside, set)
    assert [s.name for s in found] == ["hct1"]
    assert all(s.removed for s in remove(found, outside))
    assert {"hct1", "docker0"} <= set(h.net.links)
    assert h.ledger.things() == []


@pytest.mark.parametrize("row", [False, True])
def test_a_half_made_baseline_is_removed_with_and_without_a_row(h: Host, row: bool) -> None:
    good, half = h.paths.baselines / "origin-0123", h.paths.baselines / ".origin-0123-0a1b2c3d"
    for folder in (good, half):
        folder.mkdir()
        (folder / "ram").write_bytes(b"x")
    if row:
        h.ledger.enter(Kind.FOLDER, str(half), "make-1")
    assert strays(h, "make-1") == ([] if row else strays(h))
    assert [(s.kind, s.name) for s in strays(h)] == [("folder", str(half))]
    assert all(s.removed for s in removed(h, strays(h)))
    assert not half.exists()
    assert (good / "ram").exists()


@pytest.mark.parametrize("content", [b"", bytes(4096), b'{"kind": "ram", "key', b"\xff\xfe"])
def test_a_baseline_whose_record_was_lost_is_removed_and_its_name_is_free(h: Host, content: bytes) -> None:
    """What a power cut, or a file system's repair after it, makes of a record."""
    good, lost = publish_one(h, "good"), publish_one(h, "lost")
    (lost.folder / RECORD).write_bytes(content)
    assert strays(h, "c1") == [], "a server that is at work may use its files"
    assert [(s.kind, s.name) for s in strays(h)] == [("folder", str(lost.folder))]
    assert all(s.removed for s in removed(h, strays(h)))
    assert [p.name for p in h.paths.baselines.iterdir()] == ["good"]
    assert read(good.folder) == good
    assert publish_one(h, "lost").folder == lost.folder


@pytest.mark.parametrize(
    "content", [b"{}", b'{"kind": "of a later version"}', b"[]", b"[" * 10_000 + b"]" * 10_000, None]
)
def test_a_record_that_is_only_not_understood_is_left_alone(h: Host, content: bytes | None) -> None:
    record = publish_one(h, "later").folder / RECORD
    record.unlink()
    if content is not None:
        record.write_bytes(content)
    assert strays(h) == []


def test_a_lost_record_is_left_alone_while_another_baseline_builds_on_its_disk(h: Host) -> None:
    parent = publish_one(h, "parent")
    child = publish_one(h, "child", parent=parent)
    (parent.folder / RECORD).write_bytes(b"")
    assert strays(h) == []
    shutil.rmtree(child.folder)
    assert [s.name for s in strays(h)] == [str(parent.folder)]


def test_one_that_was_made_anew_while_we_looked_is_left_alone(h: Host) -> None:
    lost = publish_one(h, "lost")
    (lost.folder / RECORD).write_bytes(b"")
    found = strays(h)
    anew = publish_one(h, "lost")
    assert ["again" in s.problem for s in removed(h, found)] == [True]
    assert read(anew.folder) == anew


def test_a_crash_while_a_lost_baseline_is_removed_leaves_a_stray(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = publish_one(h, "lost").folder
    (lost / RECORD).write_bytes(b"")

    def dies(folder: Path) -> None:
        (folder / RECORD).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            removed(h, strays(h))
    assert not lost.exists()
    assert all(s.removed for s in removed(h, strays(h)))
    assert list(h.paths.baselines.iterdir()) == []


def test_a_row_without_its_half_made_baseline_is_struck(h: Host) -> None:
    h.ledger.enter(Kind.FOLDER, str(h.paths.baselines / ".gone-0a1b2c3d"), "make-1")
    assert all(s.removed for s in removed(h, strays(h)))
    assert h.ledger.things() == []


def test_a_cell_that_opens_while_we_look_is_no_stray(h: Host) -> None:
    """Its owner is asked for a second time, after the rows were read."""
    open_cells: list[set[str]] = [set(), {"c1"}]
    h.cell("origin")
    assert find_strays(ground(h), lambda: open_cells.pop(0)) == []


def test_a_cell_that_closes_while_we_look_is_no_stray(h: Host) -> None:
    open_cells: list[set[str]] = [{"c1"}, set()]
    h.cell("origin")
    assert find_strays(ground(h), lambda: open_cells.pop(0)) == []


def test_a_folder_that_goes_while_we_look_is_no_stray(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = h.paths.cells / "c9" / "origin-0"
    lost.mkdir(parents=True)
    rows = h.ledger.things

    def things() -> list[Thing]:
        if lost.exists():
            lost.rmdir()
        return rows()

    monkeypatch.setattr(h.ledger, "things", things)
    assert strays(h) == []


# -- processes, with real ones that only look like QEMU --------------------------------------------------


def fake_qemu(h: Host, *arguments: str, root: Path | None = None) -> subprocess.Popen[bytes]:
    """A process whose name and arguments are those of a QEMU below a libvirt root."""
    return look_alike(*arguments, name=f"{root or h.paths.libvirt}/qemu-system-x86_64")


def ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        return process.wait(5) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for p in started:
        p.kill()
        p.wait()


def test_a_qemu_that_nobody_knows_is_ended(h: Host, processes: list[subprocess.Popen[bytes]]) -> None:
    """What an interrupted capability probe of libvirt leaves, and what a lost domain does."""
    socket = f"{h.paths.libvirt}/lib/qemu/capabilities.monitor.sock"
    processes += [fake_qemu(h, "-machine", "none,accel=kvm:tcg", socket), fake_qemu(h, f"x={socket}")]
    found = strays(h)
    assert kinds(found) == ["process", "process"]
    assert sum("capability probe" in s.name for s in found) == 1
    assert all(s.removed for s in removed(h, found))
    assert all(ended(p) for p in processes)


def test_a_qemu_of_another_root_is_not_ours(
    h: Host, processes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    processes.append(fake_qemu(h, f"x={tmp_path}/monitor.sock", root=tmp_path))
    processes.append(fake_qemu(h, f"x={h.paths.libvirt}-other/monitor.sock", root=tmp_path))
    assert strays(h) == []


def test_a_qemu_that_is_just_being_started_is_spared(
    h: Host, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Between QEMU's start and libvirt's listing there is a moment in which only the row tells whose it is."""
    h.ledger.enter(Kind.DOMAIN, "hc-c1-origin-0a1b2c3d", "c1")
    root = f"x={h.paths.libvirt}/x"
    processes.append(fake_qemu(h, "-name", "guest=hc-c1-origin-0a1b2c3d,debug-threads=on", root))
    assert strays(h, "c1") == []
    assert kinds(strays(h)) == ["domain", "process"], (
        "without its cell it is a stray, as domain and as process"
    )


def test_a_process_of_an_exchanged_pid_is_not_killed(h: Host) -> None:
    bystander = subprocess.Popen(["/bin/sleep", "60"])
    try:
        name = f"{bystander.pid} {started(bystander.pid)} qemu"
        stray = Stray(kind="process", name=name, owner="", removed=False, problem="")
        removed(h, [stray])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_the_name_of_a_process_that_is_none_is_a_problem_not_a_crash(h: Host) -> None:
    done = removed(h, [Stray(kind="process", name="x y", owner="", removed=False, problem="")])
    assert not done[0].removed
    done = removed(h, [Stray(kind="spaceship", name="x", owner="", removed=False, problem="")])
    assert not done[0].removed
    assert list(sweep._cell_folders(h.paths)) == []


# -- captures, with real processes that only look like tcpdump -------------------------------------------


def fake_capture(h: Host, file: Path, name: str = "tcpdump") -> subprocess.Popen[bytes]:
    return look_alike("-i", "hcb1", "-w", str(file), name=name)


@pytest.mark.parametrize("row", ["with a row", "without"])
def test_a_capture_that_nobody_owns_is_ended(
    h: Host, processes: list[subprocess.Popen[bytes]], row: str
) -> None:
    file = h.paths.open_trials / "t1" / "segment.pcap"
    processes.append(fake_capture(h, file))
    if row == "with a row":
        h.ledger.enter(Kind.CAPTURE, str(file), "t1")
        assert strays(h, "t1") == [], "while its trial runs it is none"
    found = strays(h)
    assert [(s.kind, s.name) for s in found] == [("capture", str(file))]
    assert all(s.removed for s in removed(h, found))
    assert ended(processes[0])
    assert h.ledger.things() == []
    assert strays(h) == []


def test_a_capture_that_is_gone_only_loses_its_row(h: Host) -> None:
    h.ledger.enter(Kind.CAPTURE, str(h.paths.open_trials / "t1" / "segment.pcap"), "t1", "1 2")
    assert all(s.removed for s in removed(h, strays(h)))
    assert h.ledger.things() == []


def test_a_capture_of_another_home_is_not_ours(
    h: Host, processes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    beside = h.paths.home.with_name(h.paths.home.name + "-other")
    processes.append(fake_capture(h, tmp_path / "open" / "t1" / "segment.pcap"))
    processes.append(fake_capture(h, beside / "open" / "t1" / "segment.pcap"))
    processes.append(fake_capture(h, h.paths.open_trials / "t1" / "segment.pcap", name="dumpcap"))
    assert strays(h) == []
