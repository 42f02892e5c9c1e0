"""Disks are made with mkfs.ext4 and qemu-img, and read back in user space."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path

import pytest
from dissect.extfs import ExtFS

from appliance.evidence import disk, disk_worker
from appliance.evidence.disk import DiskQuestion
from appliance.trial.records import DiskFinding, WeightFile

CONTENT = bytes(range(256)) * 400  # 102400 bytes: several blocks
OTHER = CONTENT[::-1]


def weight(name: str, content: bytes) -> WeightFile:
    return WeightFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def make_image(folder: Path, tree: Path, size: str = "16M") -> Path:
    raw = folder / "base.raw"
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, raw, size], check=True, capture_output=True)
    base, overlay = folder / "base.qcow2", folder / "overlay.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, base], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay], check=True
    )
    return overlay


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    tree = folder / "tree"
    (tree / "home/subject/system/weights").mkdir(parents=True)
    (tree / "home/subject/system/weights/model.safetensors").write_bytes(CONTENT)
    (tree / "home/subject/renamed.bin").write_bytes(OTHER)
    (tree / "home/subject/same-size").write_bytes(b"x" * len(CONTENT))
    (tree / "home/subject/link").symlink_to("system/weights/model.safetensors")
    (tree / "home/subject/loop").symlink_to("..")
    return make_image(folder, tree)


def find(overlay: Path, *weights: WeightFile) -> DiskFinding:
    return disk.find_weights(overlay, weights, machine="target-1", flushed="fsfreeze", timeout=60)


def test_finds_weights_by_content_through_the_backing_file(overlay: Path) -> None:
    finding = find(overlay, weight("model.safetensors", CONTENT), weight("other.safetensors", OTHER))
    assert finding.problem == ""
    assert {(f.path, f.sha256) for f in finding.weights} == {
        ("/home/subject/system/weights/model.safetensors", hashlib.sha256(CONTENT).hexdigest()),
        ("/home/subject/renamed.bin", hashlib.sha256(OTHER).hexdigest()),
    }
    assert finding.examined >= 8


def test_a_file_of_the_right_size_and_other_content_is_not_found(overlay: Path) -> None:
    assert find(overlay, weight("model.safetensors", b"y" * len(CONTENT))).weights == ()


def test_the_overlay_is_read_and_not_only_its_base(overlay: Path, tmp_path: Path) -> None:
    """Overwrite the file's first block in the overlay only: the content is then another."""
    own = tmp_path / "own.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", overlay, "-F", "qcow2", own], check=True)
    raw = overlay.parent / "base.raw"
    at = raw.read_bytes().index(CONTENT)
    subprocess.run(["qemu-io", "-c", f"write -P 0x41 {at} 4096", own], check=True, capture_output=True)
    finding = find(own, weight("model.safetensors", CONTENT))
    assert (finding.weights, finding.problem) == ((), "")
    changed = b"A" * 4096 + CONTENT[4096:]
    assert len(find(own, weight("model.safetensors", changed)).weights) == 1


def test_a_relative_backing_name_is_followed(overlay: Path) -> None:
    own = overlay.parent / "relative.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", own], check=True
    )
    assert len(find(own, weight("m", CONTENT)).weights) == 1


@pytest.mark.parametrize(
    "features",
    [
        ["-I", "128", "-O", "^64bit,^metadata_csum"],
        ["-I", "256", "-O", "64bit", "-b", "1024"],
        ["-I", "1024", "-b", "4096"],
        ["-t", "ext2", "-b", "2048"],
    ],
)
def test_every_inode_is_seen_with_its_kind_and_size(features: list[str], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "link").symlink_to("a")
    os.mkfifo(tree / "pipe")
    with (tree / "large").open("wb") as f:
        f.truncate(5 << 30)  # a size of more than 32 bits
    for n in range(300):
        (tree / f"a/{n}").write_bytes(b"x" * n)
    raw = tmp_path / "raw"
    subprocess.run(["mkfs.ext4", "-q", *features, "-d", tree, raw, "32M"], check=True, capture_output=True)
    problems: list[str] = []
    with raw.open("rb") as stream:
        fs = ExtFS(stream)
        used = {i.number: i for i in disk_worker.used_inodes(fs, problems.append)}
        nodes = [node for folder in ("", "a") for node in fs.get(folder).iterdir()]
        assert len(nodes) > 300
        for node in nodes:
            assert used[node.inum] == (node.inum, stat.S_IFMT(node.inode.i_mode), node.size)
    assert problems == []


def debugfs(raw: Path, command: str) -> None:
    subprocess.run(["debugfs", "-w", "-R", command, raw], check=True, capture_output=True)


@pytest.fixture
def raw(overlay: Path, tmp_path: Path) -> Path:
    """A copy of the disk, to be changed."""
    copy = tmp_path / "own.raw"
    copy.write_bytes((overlay.parent / "base.raw").read_bytes())
    return copy


def test_a_file_without_a_name_is_found(raw: Path) -> None:
    """As one that was unlinked while a program still has it open."""
    debugfs(raw, "unlink /home/subject/system/weights/model.safetensors")
    finding = find(raw, weight("model.safetensors", CONTENT))
    assert finding.problem == ""
    assert [f.path.startswith("(inode ") for f in finding.weights] == [True]


def test_a_broken_directory_hides_no_file(raw: Path) -> None:
    debugfs(raw, "set_inode_field /home/subject/system block[0] 0xffffff")
    finding = find(raw, weight("model.safetensors", CONTENT))
    assert [f.path.startswith("(inode ") for f in finding.weights] == [True]


def test_an_inode_table_out_of_the_disk_is_a_problem(raw: Path) -> None:
    debugfs(raw, "set_block_group 0 inode_table 0xfffff")
    finding = find(raw, weight("model.safetensors", CONTENT))
    assert finding.weights == ()
    assert finding.problem


def test_a_broken_filesystem_is_a_problem_and_not_a_crash(tmp_path: Path) -> None:
    image = tmp_path / "noise.raw"
    image.write_bytes(os.urandom(1 << 20))
    finding = find(image, weight("m", CONTENT))
    assert finding.weights == ()
    assert "magic mismatch" in finding.problem


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_filesystem_never_escapes_the_answer(overlay: Path, tmp_path: Path, seed: int) -> None:
    """Random damage to the metadata, keeping the superblock: always an answer, in bounded time."""
    import random

    rng = random.Random(seed)
    content = bytearray((overlay.parent / "base.raw").read_bytes())
    for _ in range(4000):
        content[rng.randrange(2048, len(content) // 4)] = rng.randrange(256)
    image = tmp_path / "damaged.raw"
    image.write_bytes(content)
    given = disk_worker.answer(
        DiskQuestion(
            overlay=str(image), sizes={hashlib.sha256(CONTENT).hexdigest(): len(CONTENT)}, max_inodes=5000
        )
    )
    assert given.examined <= 5001


def test_limits_are_told(overlay: Path) -> None:
    sha = hashlib.sha256(b"z" * len(CONTENT)).hexdigest()
    base = DiskQuestion(overlay=str(overlay), sizes={sha: len(CONTENT)})
    assert "more than 3 inodes" in disk_worker.answer(base.model_copy(update={"max_inodes": 3})).problem
    assert "more than 1 files" in disk_worker.answer(base.model_copy(update={"max_hashed": 1})).problem


def test_among_too_many_of_one_size_the_likely_name_comes_first(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for n in range(30):
        (tree / f"{n:02}").write_bytes(bytes([n]) * len(CONTENT))
    (tree / "model.safetensors").write_bytes(CONTENT)
    sha = hashlib.sha256(CONTENT).hexdigest()
    asked = DiskQuestion(
        overlay=str(make_image(tmp_path, tree)), sizes={sha: len(CONTENT)}, names={sha: "model.safetensors"},
        max_hashed=2,
    )  # fmt: skip
    assert [f.path for f in disk_worker.answer(asked).found] == ["/model.safetensors"]
    unlikely = asked.model_copy(update={"names": {sha: "other"}, "max_hashed": 1})
    assert "more than 1 files" in disk_worker.answer(unlikely).problem


def test_what_lies_too_deep_is_hashed_without_a_name(overlay: Path) -> None:
    sha = hashlib.sha256(CONTENT).hexdigest()
    asked = DiskQuestion(overlay=str(overlay), sizes={sha: len(CONTENT)}, max_depth=1)
    found = disk_worker.answer(asked)
    assert [f.sha256 for f in found.found] == [sha]
    assert found.found[0].path.startswith("(inode ")


def test_time_is_limited(overlay: Path) -> None:
    finding = disk.find_weights(
        overlay, [weight("m", CONTENT)], machine="target-1", flushed="none", timeout=0.05
    )
    assert "ran longer" in finding.problem


def test_memory_is_limited(overlay: Path) -> None:
    answer = disk._ask(DiskQuestion(overlay=str(overlay), memory=1 << 20), 60)
    assert answer.problem


def test_a_chain_that_never_ends_is_a_problem(tmp_path: Path) -> None:
    first, second = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    for own, backing in ((first, second), (second, first)):
        subprocess.run(
            ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", own, "1M"],
            check=True,
        )
    assert "longer than 16 files" in find(first, weight("m", CONTENT)).problem
