"""The sealed evidence of one trial: a directory, a manifest of every file, and a signature of that.

``manifest.json`` lists path, size and SHA-256 of every other file; ``manifest.sig`` is the Ed25519
signature, base64, of the manifest's bytes. A bundle is complete once it has its final name.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError, field_validator

from appliance.errors import EvidenceError
from appliance.evidence.journal import write_bytes
from appliance.evidence.keys import fingerprint
from appliance.evidence.text import plain
from appliance.model import Frozen, Sha256, TrialId

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
SCHEMA = 1
MAX_FILES = 10_000
MAX_MANIFEST = 8 << 20
_OWN = frozenset({MANIFEST, SIGNATURE})


class ManifestFile(Frozen):
    """One file of a bundle; ``path`` is relative, with forward slashes."""

    path: str
    size: int = Field(ge=0)
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _plain(cls, path: str) -> str:
        parts = path.split("/")
        if (
            len(path) > 1000
            or any(p in ("", ".", "..") for p in parts)
            or not path.isprintable()
            or "\\" in path
        ):
            raise ValueError(
                "a path must be relative and plain: no empty, '.' or '..' part, no control character"
            )
        return path


class Manifest(Frozen):
    """The content of ``manifest.json``. ``key`` is the fingerprint of the key that signed it."""

    schema_version: Literal[1]
    trial: TrialId
    sealed: float
    key: Sha256
    files: tuple[ManifestFile, ...] = Field(max_length=MAX_FILES)

    @field_validator("files")
    @classmethod
    def _unique(cls, files: tuple[ManifestFile, ...]) -> tuple[ManifestFile, ...]:
        paths = [f.path for f in files]
        if len(set(paths)) != len(paths):
            raise ValueError("a path is listed twice")
        if _OWN & set(paths):
            raise ValueError("the manifest may not list itself or its signature")
        return files


Fault = Literal["changed", "missing", "added", "not-a-file", "bad-manifest", "bad-signature", "unknown-key"]


class BundleFault(Frozen):
    """One thing that is wrong with a bundle, and where."""

    fault: Fault
    path: str
    detail: str


class VerifyReport(Frozen):
    """What verification found. ``ok``: every file is as sealed, and the signature is a trusted key's."""

    bundle: str
    trial: str
    key: str
    files: int
    manifest_sha256: str
    faults: tuple[BundleFault, ...]

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.faults


def seal(trial_dir: Path, bundle_dir: Path, key: Ed25519PrivateKey) -> Manifest:
    """Turn a trial's directory into a bundle: hash, sign, make read-only, then give it its final name.

    ``trial_dir`` is named after the trial and lies on the same filesystem as ``bundle_dir``, which must
    not exist. After a failure either ``trial_dir`` is still there and can be sealed again, or the bundle has its
    final name: then it is whole, but its own mode, or its name after a power failure, is not as it should be.

    Raises:
        EvidenceError: there is something that is not a plain file, there are too many files, or the
            directory cannot be read, written or renamed, or the new name not be made to last.
    """
    if bundle_dir.exists() or bundle_dir.is_symlink():
        raise EvidenceError(f"{bundle_dir}: a bundle of that name exists; evidence is never replaced")
    try:
        for own in _OWN:
            (trial_dir / own).unlink(missing_ok=True)
        files = tuple(_describe(trial_dir, path) for path in _plain_files(trial_dir))
        manifest = Manifest(
            schema_version=SCHEMA,
            trial=trial_dir.name,
            sealed=time.time(),
            key=fingerprint(key.public_key()),
            files=files,
        )
        content = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"
        write_bytes(trial_dir / MANIFEST, content)
        write_bytes(trial_dir / SIGNATURE, base64.b64encode(key.sign(content)) + b"\n")
        _freeze(trial_dir)
        trial_dir.rename(bundle_dir)
        # Only now: the owner needs write permission on a directory to give it another parent.
        bundle_dir.chmod(0o500)
        for changed in (bundle_dir.parent, trial_dir.parent):
            _sync(changed)
    except OSError as e:
        raise EvidenceError(
            f"{trial_dir}: could not be sealed: {e.strerror or e}",
            hint="check free space, and that open trials and bundles lie on one filesystem",
            path=str(trial_dir),
        ) from e
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        raise EvidenceError(f"{trial_dir}: could not be sealed: {first['msg']}", path=str(trial_dir)) from e
    return manifest


def load(bundle_dir: Path) -> Manifest:
    """The manifest of a bundle, schema-checked. Says nothing about the files; :func:`verify` does.

    Raises:
        EvidenceError: there is no manifest, or it is not one.
    """
    return _parse(bundle_dir, _read_small(bundle_dir / MANIFEST))


def verify(bundle_dir: Path, public_key: Ed25519PublicKey) -> VerifyReport:
    """Check a bundle against its manifest, and the manifest against a key that the caller trusts.

    Nothing inside the bundle can vouch for its key. Everything wrong is reported, not only the first.

    Raises:
        EvidenceError: the directory does not exist or cannot be read at all.
    """
    if bundle_dir.is_symlink() or not bundle_dir.is_dir():
        raise EvidenceError(
            f"{bundle_dir}: is not a bundle directory",
            hint="name the bundle's directory",
            path=str(bundle_dir),
        )
    faults: list[BundleFault] = []
    content = b""
    manifest: Manifest | None = None
    try:
        content = _read_small(bundle_dir / MANIFEST)
        faults += _signature_faults(bundle_dir, content, public_key)
        manifest = _parse(bundle_dir, content)
        if manifest.key != fingerprint(public_key):
            faults.append(
                _fault("unknown-key", MANIFEST, f"sealed by key {manifest.key}, which is not the given one")
            )
    except EvidenceError as e:
        faults.append(_fault("bad-manifest", MANIFEST, e.message))
    if manifest is not None:
        try:
            faults += _file_faults(bundle_dir, manifest)
        except OSError as e:
            raise EvidenceError(
                f"{bundle_dir}: cannot be read: {e.strerror or e}", path=str(bundle_dir)
            ) from e
    return VerifyReport(
        bundle=str(bundle_dir),
        trial=manifest.trial if manifest else "",
        key=manifest.key if manifest else "",
        files=len(manifest.files) if manifest else 0,
        manifest_sha256=hashlib.sha256(content).hexdigest() if content else "",
        faults=tuple(faults),
    )


def _signature_faults(bundle_dir: Path, content: bytes, public_key: Ed25519PublicKey) -> list[BundleFault]:
    try:
        signature = base64.b64decode(_read_small(bundle_dir / SIGNATURE).strip(), validate=True)
        public_key.verify(signature, content)
    except EvidenceError as e:
        return [_fault("bad-signature", SIGNATURE, e.message)]
    except (binascii.Error, ValueError):
        return [_fault("bad-signature", SIGNATURE, "is not base64")]
    except InvalidSignature:
        return [_fault("bad-signature", SIGNATURE, "is not the given key's signature of the manifest")]
    return []


def _file_faults(bundle_dir: Path, manifest: Manifest) -> list[BundleFault]:
    faults: list[BundleFault] = []
    listed = {f.path: f for f in manifest.files}
    present: set[str] = set()
    for path, mode in _walk(bundle_dir):
        if not stat.S_ISREG(mode):
            faults.append(_fault("not-a-file", path, "is neither a plain file nor a directory"))
            present.add(path)
        elif path in listed:
            present.add(path)
            found = _describe(bundle_dir, path)
            if found != listed[path]:
                detail = f"{found.size} bytes, sha256 {found.sha256}; sealed were {listed[path].size} bytes"
                faults.append(_fault("changed", path, f"{detail}, sha256 {listed[path].sha256}"))
        elif path not in _OWN:
            faults.append(_fault("added", path, "is not in the manifest"))
    faults += [_fault("missing", path, "is in the manifest only") for path in sorted(set(listed) - present)]
    if manifest.trial != bundle_dir.resolve().name:
        faults.append(_fault("changed", ".", f"the directory is not named after its trial {manifest.trial}"))
    return faults


def _fault(fault: Fault, path: str, detail: str) -> BundleFault:
    return BundleFault(fault=fault, path=plain(path, 300), detail=plain(detail, 500))


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    """Relative path and mode of everything below ``root`` that is no directory. Follows no link."""
    count = 0
    folders = [root]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                count += 1
                if count > MAX_FILES:
                    raise EvidenceError(f"{root}: holds more than {MAX_FILES} entries", path=str(root))
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    folders.append(Path(entry.path))
                else:
                    yield PurePosixPath(Path(entry.path).relative_to(root)).as_posix(), mode


def _plain_files(root: Path) -> list[str]:
    files = []
    for path, mode in _walk(root):
        if not stat.S_ISREG(mode):
            raise EvidenceError(f"{root}: {plain(path)} is not a plain file", path=str(root))
        files.append(path)
    return sorted(files)


def _describe(root: Path, path: str) -> ManifestFile:
    fd = os.open(root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return ManifestFile(path=path, size=f.tell(), sha256=digest)


def _freeze(root: Path) -> None:
    """All files to disk and read-only, then the directories below ``root``."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fd = os.open(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.fchmod(fd, 0o400)
            finally:
                os.close(fd)
        _sync(Path(folder))
        if Path(folder) != root:
            Path(folder).chmod(0o500)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_small(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as f:
            content = f.read(MAX_MANIFEST + 1)
    except OSError as e:
        raise EvidenceError(f"{path}: cannot be read: {e.strerror or e}", path=str(path)) from e
    if len(content) > MAX_MANIFEST:
        raise EvidenceError(f"{path}: is larger than {MAX_MANIFEST} bytes", path=str(path))
    return content


def _parse(bundle_dir: Path, content: bytes) -> Manifest:
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        raise EvidenceError(f"{bundle_dir / MANIFEST}: {where}: {first['msg']}", path=str(bundle_dir)) from e
