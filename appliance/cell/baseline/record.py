"""The record of a baseline and its files: written once, found again, checked before each use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from appliance.cell import overlay
from appliance.cell.baseline.kinds import Baseline, BaselineKind, FileFact, parts
from appliance.cell.baseline.sparse import digest
from appliance.cell.proof import SCRIPT_SHA256
from appliance.cell.spec import MachineSpec
from appliance.errors import ConflictError, ResetError
from appliance.host.durable import sync_folder, write_durably
from appliance.host.paths import Paths
from appliance.model import Accelerator

RECORD = "baseline.json"
_BASELINE: TypeAdapter[Baseline] = TypeAdapter(Annotated[Baseline, Field(discriminator="kind")])


def baseline_key(
    machine: MachineSpec,
    accelerator: Accelerator,
    versions: dict[str, str],
    recipe: str,
    kind: BaselineKind = "ram",
) -> str:
    """sha256 over everything a baseline depends on. ``recipe`` names and versions its warm-up."""
    basis = {
        "machine": machine.model_dump(mode="json"),
        "accelerator": accelerator,
        "versions": versions,
        "recipe": recipe,
        "format": 2,
        "script": SCRIPT_SHA256,
        "host_cpu": _cpu_model(),
        "kind": kind,
    }
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


def cpu_fingerprint() -> str:
    """sha256 of what a saved CPU state depends on."""
    return hashlib.sha256(_cpu_model().encode()).hexdigest()


def _cpu_model() -> str:
    """A saved CPU state is only valid on a CPU with the same features."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(x for x in lines if x.split("\t")[0].strip() in wanted)


def publish(record: Baseline, folder: Path, layers: Sequence[str] = ()) -> Baseline:
    """Freeze the files of ``folder``, note what they are, and give them their final place.

    ``layers`` are disk layers that lie in ``folder`` too, below the baseline's own.

    Raises:
        ConflictError: there is a baseline in that place already.
    """
    places = {
        part: folder / part if record.path(part).parent == record.folder else record.path(part)
        for part in (*parts(record.kind, record.machine.firmware), *layers)
    }
    for path in places.values():
        with path.open("rb") as f:
            os.fsync(f.fileno())
        overlay.freeze(path)
    if record.folder.exists():
        require_none(record.folder)
        shutil.rmtree(record.folder)
    # Facts are taken after the last change of any inode field; a rename changes only the folder's.
    files = {part: file_fact(path) for part, path in places.items()}
    own = {record.path(part) for part in files}
    below = {path: _layer_fact(record, path) for path in record.expected.chain if path not in own}
    record = record.model_copy(update={"files": files, "below": below})
    # A power cut finds a baseline whole or not at all: only what is on the disk gets the final name.
    write_durably(folder / RECORD, record.model_dump_json(indent=1))
    sync_folder(folder)
    folder.rename(record.folder)
    sync_folder(record.folder.parent)
    return record


def require_none(folder: Path) -> None:
    """Refuse the place of a baseline that can be read.

    Raises:
        ConflictError: there is one.
    """
    if read(folder) is not None:
        raise ConflictError(
            f"there is a baseline {folder.name} already", hint="delete it, or choose another name"
        )


def _layer_fact(record: Baseline, path: Path) -> FileFact:
    """Of a layer below; an image's own manifest tells its digest, and has to be right."""
    image = record.machine.image
    return file_fact(path, image.disk_sha256 if path == image.disk else "")


def file_fact(path: Path, sha256: str = "") -> FileFact:
    """A file's digest, read now unless it is known, and its inode's signs."""
    sha256 = sha256 or digest(path)
    stat = path.stat()
    return FileFact(
        sha256=sha256,
        size=stat.st_size,
        inode=stat.st_ino,
        mtime_ns=stat.st_mtime_ns,
        ctime_ns=stat.st_ctime_ns,
    )


def read(folder: Path) -> Baseline | None:
    """The record of a baseline's folder; an unreadable one counts as none, and one that lacks a file, or is of
    another place.

    A home that was copied holds records that name the files of the first: those are not this home's to use,
    and least of all to remove.
    """
    try:
        record = _BASELINE.validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
    whole = set(parts(record.kind, record.machine.firmware)) <= set(record.files)
    return record if whole and record.folder == folder else None


def read_all(paths: Paths) -> list[Baseline]:
    """Every baseline of a home that can be read, oldest first; those of one moment by their names."""
    records = paths.baselines.glob(f"*/{RECORD}")
    found = (read(path.parent) for path in records if not path.parent.name.startswith("."))
    return sorted((b for b in found if b), key=lambda b: (b.created, b.id))


def find_broken(paths: Paths) -> list[Path]:
    """Folders under a final name whose record is empty or no JSON, and which no other record names.

    A record that is merely not understood is of another version or another home, and none of these. Neither is a
    folder without a record: nothing tells that it is a baseline.
    """
    texts = {
        path.parent: _text(path)
        for path in paths.baselines.glob(f"*/{RECORD}")
        if not path.parent.name.startswith(".") and not path.parent.is_symlink()
    }
    broken = [folder for folder, text in texts.items() if text is not None and not _is_json(text)]
    whole = [text for folder, text in texts.items() if text is not None and folder not in broken]
    return [f for f in broken if not any(os.fsencode(f"{f}/") in text for text in whole)]


def _text(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    except RecursionError:
        return True  # for all that can be told
    return True


def find(paths: Paths, machine: str, key: str) -> Baseline | None:
    """An existing baseline of that key."""
    found = read(paths.baselines / f"{machine}-{key[:12]}")
    return found if found is not None and found.key == key else None


def check_files(baseline: Baseline, *, read: bool = False) -> None:
    """Make sure that a baseline's files, and the layers below them, are what was recorded, before they are used.

    Inode signs are compared every time (microseconds); content is read if a sign differs, and with ``read`` that
    of the baseline's own files in any case. An image that was built anew has other signs and other content.

    Raises:
        ResetError: a file is missing or its content changed.
    """
    for part, fact in baseline.files.items():
        _check_file(baseline, part, baseline.path(part), fact, read=read)
    for path, fact in baseline.below.items():
        _check_file(baseline, f"the layer {path}", path, fact, read=False)


def _check_file(baseline: Baseline, part: str, path: Path, fact: FileFact, *, read: bool) -> None:
    try:
        stat = path.stat()
    except OSError as e:
        raise ResetError(f"baseline {baseline.id} has lost {part}: {e}", hint=_remedy(baseline)) from e
    same = (stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) == (
        fact.size, fact.inode, fact.mtime_ns, fact.ctime_ns,
    )  # fmt: skip
    if (read or not same) and digest(path) != fact.sha256:
        raise ResetError(f"baseline {baseline.id}: {part} is not what was saved", hint=_remedy(baseline))


def _remedy(baseline: Baseline) -> str:
    how = {"import": "import it again", "request": "take the snapshot again"}
    then = how.get(baseline.created_by, "the next trial or cell makes it anew")
    return f"`hotcell baselines delete {baseline.id}`, then {then}"
