"""The Ed25519 key that seals bundles.

Whoever holds it can make a bundle that verifies: it shows that this appliance sealed the files and that
nothing changed since, not that the host's owner is honest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from appliance.errors import EvidenceError

_MAX_KEY = 4096


def public_path(path: Path) -> Path:
    """Where the public half of the key at ``path`` lies."""
    return path.with_name(path.name + ".pub")


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The key at ``path`` (PEM, PKCS#8, not encrypted); made, mode 0600, if there is none.

    The public half is written beside it on every call in which it is missing.

    Raises:
        EvidenceError: it cannot be read or made, others may read it, or it is not an Ed25519 key.
    """
    try:
        key = _read_private(path) if path.exists() else _make(path)
        public = public_path(path)
        if not public.exists():
            _write_new(public, public_pem(key.public_key()), 0o644)
    except OSError as e:
        raise EvidenceError(
            f"{path}: the signing key is not usable: {e.strerror or e}", path=str(path)
        ) from e
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file.

    Raises:
        EvidenceError: the file is missing or holds no Ed25519 public key.
    """
    try:
        with path.open("rb") as f:
            key = load_pem_public_key(f.read(_MAX_KEY))
    except OSError as e:
        raise EvidenceError(
            f"{path}: the public key cannot be read: {e.strerror or e}",
            hint="name the .pub file of the appliance that made the bundle",
            path=str(path),
        ) from e
    except (ValueError, UnsupportedAlgorithm) as e:
        raise EvidenceError(f"{path}: holds no public key in PEM form", path=str(path)) from e
    if not isinstance(key, Ed25519PublicKey):
        raise EvidenceError(
            f"{path}: is a {type(key).__name__}, an Ed25519 public key is needed", path=str(path)
        )
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256, in hex, of the 32 raw bytes of a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def public_pem(key: Ed25519PublicKey) -> bytes:
    """A public key as a PEM file's content."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _read_private(path: Path) -> Ed25519PrivateKey:
    with path.open("rb") as f:
        mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
        content = f.read(_MAX_KEY)
    if mode & 0o077:
        raise EvidenceError(
            f"{path}: mode is {mode:04o}, at most 0600 is allowed",
            hint="others may have read it: remove it, keep the .pub for old bundles under another name",
            path=str(path),
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise EvidenceError(f"{path}: holds no private key in PEM form", path=str(path)) from e
    if not isinstance(key, Ed25519PrivateKey):
        raise EvidenceError(f"{path}: is a {type(key).__name__}, an Ed25519 key is needed", path=str(path))
    return key


def _make(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        _write_new(path, pem, 0o600)
    except FileExistsError:
        return _read_private(path)
    return key


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not exist yet. It appears whole or not at all, also beside a second maker."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.link(beside, path)
    finally:
        beside.unlink()
