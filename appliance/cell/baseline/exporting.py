"""A baseline as a folder that can be taken elsewhere: its files, all layers above the image, a manifest.

The image itself stays behind: it is named by the digest of its inputs and can be built anywhere.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from appliance.cell.baseline.kinds import DISK, NVRAM, RAM, STATE, Baseline, FileFact
from appliance.cell.baseline.manifest import MANIFEST, ExportedFile, Manifest, layer_name
from appliance.cell.baseline.places import MARK, mark
from appliance.cell.baseline.record import cpu_fingerprint, read
from appliance.cell.baseline.sparse import copy
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.ledger import Kind
from appliance.cell.overlay import used_bytes
from appliance.errors import ConfigError, ResetError
from appliance.host.capacity import require_room
from appliance.host.paths import Paths

_NO_LAYERS = (RAM, STATE, NVRAM)
# bytes that are done, bytes in all
Progress = Callable[[int, int], None]


def check_target(paths: Paths, target: Path) -> None:
    """Refuse a folder that an export may not become.

    Raises:
        ConfigError: it exists, is no plain absolute path, or lies in the laboratory's own directories.
    """
    if not target.is_absolute() or ".." in target.parts or target.name in ("", "."):
        raise ConfigError(f"{target} is not an absolute path without `..`", hint="name a new folder")
    if not target.parent.is_dir() or target.parent.resolve() != target.parent:
        raise ConfigError(
            f"{target.parent} is not a directory, or is reached through a link", hint="name its real path"
        )
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists", hint="name a new folder; nothing is overwritten")
    inside = [d for d in (paths.home, paths.cache) if d == target or d.resolve() in target.parents]
    if inside:
        raise ConfigError(f"{target} lies in {inside[0]}, which is the laboratory's own", hint="name another")
    if target.parent.stat().st_mode & stat.S_IWOTH and not target.parent.stat().st_mode & stat.S_ISVTX:
        raise ConfigError(f"{target.parent} can be written by everybody", hint="name another folder")


def export(shop: Workshop, baseline: Baseline, target: Path, owner: str, progress: Progress) -> Manifest:
    """Write a baseline to the new folder ``target``, which appears only when it is complete.

    ``owner`` stands in the ledger for what is half written.

    Raises:
        ConfigError: the target is not allowed.
        ResetError: a file is not what was saved.
        CapacityError: there is no room.
    """
    check_target(shop.paths, target)
    sources = _sources(baseline)
    total = sum(fact.size for _, fact in sources.values())
    require_room(
        target.parent,
        memory=0,
        disk=sum(used_bytes(path) for path, _ in sources.values()),
        purpose=f"the export of {baseline.id}",
    )
    part = target.with_name(f".{target.name}-{owner}")
    shop.ledger.enter(Kind.FOLDER, str(part), owner)
    try:
        part.mkdir(mode=0o700)
        mark(shop.paths, part)
        done = 0
        for name, (path, fact) in sources.items():
            sha256, size = copy(path, part / name, onward(progress, done, total))
            if (sha256, size) != (fact.sha256, fact.size):
                raise ResetError(f"baseline {baseline.id}: {name} is not what was saved", hint="delete it")
            done += size
        manifest = _manifest(baseline, sources)
        (part / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        part.rename(target)
        (target / MARK).unlink()
    finally:
        if part.exists():
            shutil.rmtree(part)
        shop.ledger.strike(Kind.FOLDER, str(part))
    return manifest


def onward(progress: Progress, done: int, total: int) -> Callable[[int], None]:
    """Progress of one file, after ``done`` bytes of others."""
    return lambda at: progress(done + at, total)


def _sources(baseline: Baseline) -> dict[str, tuple[Path, FileFact]]:
    """The files to take along by their name in the export, each with what it was when it was saved."""
    memory = [(part, baseline.path(part)) for part in _NO_LAYERS if part in baseline.files]
    layers = [(layer_name(n) if n else DISK, p) for n, p in enumerate(baseline.expected.chain[:-1])]
    return {name: (path, _fact(baseline, path)) for name, path in [*memory, *layers]}


def _fact(baseline: Baseline, path: Path) -> FileFact:
    owner = (
        baseline if path.name in baseline.files and path == baseline.path(path.name) else read(path.parent)
    )
    if owner is None or path.name not in owner.files:
        raise ResetError(f"baseline {baseline.id} stands on {path}, of which no baseline is left")
    return owner.files[path.name]


def _manifest(baseline: Baseline, sources: dict[str, tuple[Path, FileFact]]) -> Manifest:
    machine = baseline.machine
    return Manifest(
        format=1, name=baseline.id, kind=baseline.kind, machine=machine.name, role=machine.role,
        memory_mib=machine.memory_mib, vcpus=machine.vcpus, devices=machine.devices, firmware=machine.firmware,
        recipe=machine.image.recipe, image_digest=machine.image.digest,
        image_disk_sha256=machine.image.disk_sha256, accelerator=baseline.accelerator,
        versions=baseline.versions, host_cpu=cpu_fingerprint(),
        expected=baseline.expected.model_dump(mode="json", exclude={"chain", "ram_file"}),
        layers=tuple(n for n in sources if n not in _NO_LAYERS),
        files={n: ExportedFile(sha256=f.sha256, size=f.size) for n, (_, f) in sources.items()},
        created=baseline.created,
    )  # fmt: skip
