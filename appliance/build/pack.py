"""From a configured root tree to the files of an image: ext4, qcow2, kernel, initial ramdisk, package list."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from email.parser import HeaderParser
from pathlib import Path

from appliance.build.manifest import DISK, INITRD, KERNEL, PackageRecord
from appliance.build.workspace import Workspace, run_logged
from appliance.errors import BuildError, CapacityError
from appliance.host import command

_GIB = 1 << 30
_SPACE_HINT = "free some disk space, or point HOTCELL_CACHE at a larger file system"


def need_space(folder: Path, needed: int, what: str) -> None:
    """Refuse early rather than fill the disk.

    Raises:
        CapacityError: fewer than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CapacityError(
            f"{what} needs {needed / _GIB:.1f} GiB free below {folder}, found {free / _GIB:.1f} GiB",
            hint=_SPACE_HINT, needed=needed, free=free,
        )  # fmt: skip


def tree_bytes(root: Path) -> int:
    """What the tree occupies on disk, in bytes."""
    out = command.run(["du", "--summarize", "--one-file-system", "--block-size=1", root], timeout=300).stdout
    return int(out.split()[0])


def kernel_version(root: Path) -> str:
    """The newest kernel of the tree.

    Raises:
        BuildError: there is none.
    """
    found = [p.name.removeprefix("vmlinuz-") for p in (root / "boot").glob("vmlinuz-*")]
    if not found:
        raise BuildError("the root tree has no kernel in /boot", hint="a recipe must install linux-image-*")
    return max(found, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])


def pack(workspace: Workspace, disk_gib: int, digest: str, source_date: int) -> str:
    """Write disk, kernel and initrd into the workspace's seal folder; returns the kernel's version.

    Raises:
        BuildError: a tool failed, or the tree does not fit the disk.
    """
    root, seal = workspace.root, workspace.seal
    size = disk_gib * _GIB
    used = tree_bytes(root)
    if used > size * 0.9:
        raise BuildError(
            f"the root tree holds {used / _GIB:.1f} GiB, too much for a disk of {disk_gib} GiB",
            hint="raise disk_gib in the recipe",
        )
    # The raw file and the qcow2 exist side by side for a moment, then only the qcow2.
    need_space(workspace.folder, int(2.2 * used), "packing the image")
    version = kernel_version(root)
    seal.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(root / "boot" / f"vmlinuz-{version}", seal / KERNEL)
    shutil.copyfile(root / "boot" / f"initrd.img-{version}", seal / INITRD)
    raw = workspace.folder / "disk.raw"
    raw.unlink(missing_ok=True)
    identity = uuid.UUID(digest[:32])
    with raw.open("wb") as f:
        f.truncate(size)
    mkfs: list[str | os.PathLike[str]] = [
        "mkfs.ext4", "-q", "-F", "-L", "hotcell", "-U", str(identity), "-m", "0", "-i", "32768",
        "-E", f"root_owner=0:0,hash_seed={identity},lazy_itable_init=1,lazy_journal_init=1", "-J", "size=32",
        "-d", root, raw,
    ]  # fmt: skip
    run_logged(
        workspace,
        mkfs,
        timeout=900,
        what="making the file system",
        env={"SOURCE_DATE_EPOCH": str(source_date)},
    )
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "lazy_refcounts=on", "-W", "-m", "8"]
    run_logged(workspace, [*convert, raw, seal / DISK], timeout=900, what="converting the disk to qcow2")
    raw.unlink()
    return version


def debian_packages(root: Path) -> tuple[PackageRecord, ...]:
    """Installed Debian packages, read from dpkg's status file."""
    text = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    found = []
    for block in text.split("\n\n"):
        fields = HeaderParser().parsestr(block.lstrip())
        if fields.get("Status", "").endswith(" installed"):
            found.append(PackageRecord(kind="deb", name=fields["Package"], version=fields["Version"]))
    return tuple(sorted(found, key=lambda p: p.name))


def python_packages(root: Path) -> tuple[PackageRecord, ...]:
    """Python packages of the runtime's own environment, read from their metadata."""
    found = []
    for file in root.glob("opt/*/lib/python3*/site-packages/*.dist-info/METADATA"):
        fields = HeaderParser().parsestr(file.read_text(encoding="utf-8", errors="replace"))
        found.append(PackageRecord(kind="pypi", name=fields["Name"], version=fields["Version"]))
    return tuple(sorted(found, key=lambda p: p.name.lower()))
