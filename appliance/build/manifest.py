"""What a sealed image says about itself: ``manifest.json`` beside the disk, and the shapes of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from appliance.errors import BuildError
from appliance.model import Frozen, Name, Sha256

SCHEMA = 1
MANIFEST = "manifest.json"
DISK = "disk.qcow2"
KERNEL = "vmlinuz"
INITRD = "initrd.img"
LOG = "build.log"
_CHUNK = 1 << 20


class ImageFile(Frozen):
    """One file: its name, size in bytes and hash."""

    name: str
    size: int
    sha256: Sha256


class PackageRecord(Frozen):
    """One installed package; ``kind`` is ``deb`` or ``pypi``."""

    kind: str
    name: str
    version: str


class Manifest(Frozen):
    """Everything that went into an image and everything that came out. Times are seconds."""

    schema_version: int = SCHEMA
    recipe: Name
    digest: Sha256
    suite: str
    base: str | None
    roles: tuple[str, ...]
    inputs: dict[str, Sha256]
    tools: dict[str, str]
    packages: tuple[PackageRecord, ...]
    weights: tuple[ImageFile, ...]
    agent: tuple[ImageFile, ...]
    kernel_version: str
    kernel_cmdline: str
    memory_mib: int
    vcpus: int
    disk_bytes: int
    files: tuple[ImageFile, ...]
    log: str = LOG
    stages: dict[str, float]
    built: float


def sha256_file(path: Path) -> str:
    """Hash of one file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def describe(path: Path, name: str) -> ImageFile:
    """Size and hash of one file, under the name the manifest gives it."""
    return ImageFile(name=name, size=path.stat().st_size, sha256=sha256_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and make it durable."""
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as f:
        f.write(json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n")
        f.flush()
        os.fsync(f.fileno())


@dataclass(frozen=True)
class Image:
    """A sealed image in the cache."""

    recipe: str
    digest: str
    folder: Path

    @property
    def disk(self) -> Path:
        """The qcow2; never written to, machines run on overlays of it."""
        return self.folder / DISK

    @property
    def kernel(self) -> Path:
        """For direct kernel boot."""
        return self.folder / KERNEL

    @property
    def initrd(self) -> Path:
        """The initial ramdisk that belongs to the kernel."""
        return self.folder / INITRD

    @cached_property
    def record(self) -> Manifest:
        """The manifest, checked.

        Raises:
            BuildError: it is missing or not what a build writes.
        """
        return read_manifest(self.folder)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return self.record.model_dump(mode="json")

    @property
    def weights(self) -> tuple[ImageFile, ...]:
        """The subject's weight files, empty for images without a model."""
        return self.record.weights


def read_manifest(folder: Path) -> Manifest:
    """Read and check a sealed image's manifest.

    Raises:
        BuildError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise BuildError(
            f"{path}: not a readable image manifest: {str(e)[:300]}",
            hint=f"remove {folder} and run `hotcell build` again",
            folder=str(folder),
        ) from e
