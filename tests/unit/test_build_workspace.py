"""The workspace: nothing of a dead build survives, nothing outside is touched."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from appliance.build import workspace as ws
from appliance.build.pack import debian_packages, kernel_version, need_space, python_packages
from appliance.errors import BuildError, CapacityError
from appliance.host import command

DIGEST = "d" * 64


def test_mounts_below_finds_only_what_is_below_deepest_first() -> None:
    info = (
        "22 1 0:1 / / rw - ext4 /dev/vda rw\n"
        "30 22 0:5 / /c/building/d/root/proc rw - proc proc rw\n"
        "31 30 0:6 / /c/building/d/root/dev/with\\040space rw - tmpfs t rw\n"
        "32 22 0:7 / /c/building-not rw - tmpfs t rw\n"
        "junk\n"
    )
    assert ws.mounts_below(Path("/c/building"), info) == (
        Path("/c/building/d/root/dev/with space"),
        Path("/c/building/d/root/proc"),
    )


def test_a_stray_build_is_removed_and_its_processes_ended(tmp_path: Path) -> None:
    stray = ws.open_workspace(tmp_path, "e" * 64)
    (stray.root / "etc").mkdir(parents=True)
    child = command.spawn([sys.executable, "-c", "import time; time.sleep(600)"], env=stray.environment)
    try:
        other = ws.open_workspace(tmp_path, DIGEST)
        assert child.wait(10) == -9
    finally:
        command.end(child, grace=0)
    assert not stray.folder.exists()
    assert other.folder.is_dir()


def test_a_process_without_the_token_is_left_alone(tmp_path: Path) -> None:
    mine = ws.open_workspace(tmp_path, DIGEST)
    child = command.spawn(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={ws.TOKEN_VARIABLE: "other"}
    )
    try:
        ws.end_processes_of(mine.token)
        assert child.poll() is None
    finally:
        command.end(child, grace=0)


@pytest.mark.parametrize(("stage", "kept"), [(ws.TREE, True), (ws.CONFIGURED, True), ("", False)])
def test_the_same_build_resumes_at_a_boundary_only(tmp_path: Path, stage: str, kept: bool) -> None:
    first = ws.open_workspace(tmp_path, DIGEST)
    first.root.mkdir()
    first.mark(ws.TREE)
    first.mark(stage)
    again = ws.open_workspace(tmp_path, DIGEST)
    assert again.root.exists() is kept
    assert again.reached() == stage
    assert again.token != first.token


def test_a_damaged_owner_note_does_not_stop_the_clean_up(tmp_path: Path) -> None:
    stray = ws.open_workspace(tmp_path, "e" * 64)
    (stray.folder / ws.OWNER).write_text("{")
    ws.open_workspace(tmp_path, DIGEST)
    assert not stray.folder.exists()


def test_remove_does_not_follow_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(outside)
    ws.remove(tmp_path / "tree")
    (tmp_path / "top").symlink_to(outside)
    ws.remove(tmp_path / "top")
    assert not (tmp_path / "tree").exists()
    assert (outside / "keep").exists()


def test_two_builds_do_not_run_at_once(tmp_path: Path) -> None:
    with (
        ws.building_lock(tmp_path, wait_s=0),
        pytest.raises(BuildError, match=f"process {os.getpid()}"),
        ws.building_lock(tmp_path, wait_s=0.1),
    ):
        pass
    with ws.building_lock(tmp_path, wait_s=0):
        pass


def test_a_failed_step_tells_its_last_words_and_what_to_do(tmp_path: Path) -> None:
    workspace = ws.open_workspace(tmp_path, DIGEST)
    with pytest.raises(BuildError, match="status 3") as e:
        ws.run_logged(
            workspace, ["sh", "-c", "echo No space left on device >&2; exit 3"], timeout=10, what="packing"
        )
    assert "No space left" in e.value.message
    assert "free some disk space" in e.value.hint
    assert "No space left" in workspace.log.read_text()


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    workspace = ws.open_workspace(tmp_path, DIGEST)
    with pytest.raises(BuildError, match="longer than"):
        ws.run_logged(workspace, ["sleep", "600"], timeout=0.2, what="sleeping")


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("E: Failed to fetch http://x  Connection refused", "registry"),
        ("Temporary failure resolving 'x'", "registry"),
        ("write error: No space left on device", "disk space"),
        ("segfault", "log"),
    ],
)
def test_explain(said: str, word: str) -> None:
    assert word in ws.explain(said)


def test_too_little_disk_is_refused_beforehand(tmp_path: Path) -> None:
    need_space(tmp_path, 1, "x")
    with pytest.raises(CapacityError, match="GiB free") as e:
        need_space(tmp_path, 1 << 60, "building world")
    assert "HOTCELL_CACHE" in e.value.hint


def test_kernel_version_is_the_newest_by_number(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(BuildError, match="kernel"):
        kernel_version(tmp_path)
    for v in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64"):
        (tmp_path / "boot" / f"vmlinuz-{v}").touch()
    assert kernel_version(tmp_path) == "6.1.0-56-cloud-amd64"


def test_package_lists_come_from_the_tree(tmp_path: Path) -> None:
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: zlib\nStatus: install ok installed\nVersion: 1:2\nDescription: a\n b\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: apt\nStatus: install ok installed\nVersion: 3\n"
    )
    info = tmp_path / "opt/runtime/lib/python3.11/site-packages/torch-2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n\nbody\n")
    assert [(p.name, p.version) for p in debian_packages(tmp_path)] == [("apt", "3"), ("zlib", "1:2")]
    assert [(p.kind, p.version) for p in python_packages(tmp_path)] == [("pypi", "2.13.0+cpu")]
