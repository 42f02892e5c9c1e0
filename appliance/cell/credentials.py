"""The appliance's one ssh key pair: the origin holds its private half, every target accepts it.

It opens nothing but machines of sealed cells. Made on first use, kept in the home directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


class SshKeys(NamedTuple):
    """OpenSSH texts of a key pair."""

    private: bytes
    public: bytes


def ssh_keys(path: Path) -> SshKeys:
    """The key pair at ``path`` and ``path``.pub, made if it is not there."""
    public = path.with_name(path.name + ".pub")
    if not (path.exists() and public.exists()):
        key = Ed25519PrivateKey.generate()
        _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
        text = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(public, text + b" hotcell\n", 0o644)
    return SshKeys(path.read_bytes(), public.read_bytes())


def _write(path: Path, data: bytes, mode: int) -> None:
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    part.rename(path)
