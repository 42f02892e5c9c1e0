"""Sealing and verifying: whatever is changed, missing or added must be found."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from appliance.errors import EvidenceError
from appliance.evidence import bundle, keys

TRIAL = "t20250101-120000-abcdef"
KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    folder = tmp_path / "open" / TRIAL
    (folder / "logs").mkdir(parents=True)
    (folder / "trial.json").write_text("{}\n")
    (folder / "empty").touch()
    (folder / "logs" / "origin.log").write_bytes(os.urandom(100_000))
    (tmp_path / "bundles").mkdir()
    return folder


@pytest.fixture
def sealed(trial: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bundles" / TRIAL
    bundle.seal(trial, path, KEY)
    return path


def faults(path: Path, key: Ed25519PrivateKey = KEY) -> set[tuple[str, str]]:
    report = bundle.verify(path, key.public_key())
    assert report.ok is (not report.faults)
    return {(f.fault, f.path) for f in report.faults}


def edit(path: Path, content: bytes) -> None:
    path.parent.chmod(0o700)
    if path.exists():
        path.chmod(0o600)
    path.write_bytes(content)


def resign(path: Path, manifest: object) -> None:
    content = json.dumps(manifest).encode()
    edit(path / bundle.MANIFEST, content)
    edit(path / bundle.SIGNATURE, base64.b64encode(KEY.sign(content)))


def test_a_sealed_trial_verifies_and_is_read_only(sealed: Path, trial: Path) -> None:
    report = bundle.verify(sealed, KEY.public_key())
    assert (report.ok, report.trial, report.files) == (True, TRIAL, 3)
    assert not trial.exists()
    modes = {p.stat().st_mode & 0o222 for p in (sealed, *sealed.rglob("*"))}
    assert modes == {0}
    manifest = bundle.load(sealed)
    assert [f.path for f in manifest.files] == ["empty", "logs/origin.log", "trial.json"]
    assert manifest.key == keys.fingerprint(KEY.public_key())


def test_a_changed_file_is_found_even_with_its_size_and_time_kept(sealed: Path) -> None:
    path = sealed / "logs/origin.log"
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    edit(path, bytes(content))
    assert faults(sealed) == {("changed", "logs/origin.log")}


def test_missing_and_added_files_are_found(sealed: Path) -> None:
    sealed.chmod(0o700)
    (sealed / "empty").unlink()
    edit(sealed / "logs" / "more\x1b[2J", b"")
    assert faults(sealed) == {("missing", "empty"), ("added", "logs/more\ufffd[2J")}


def test_a_link_in_place_of_a_file_is_found_although_the_content_is_the_same(
    sealed: Path, tmp_path: Path
) -> None:
    sealed.chmod(0o700)
    copy = tmp_path / "copy"
    shutil.copy(sealed / "trial.json", copy)
    (sealed / "trial.json").unlink()
    (sealed / "trial.json").symlink_to(copy)
    os.mkfifo(sealed / "pipe")
    assert faults(sealed) == {("not-a-file", "trial.json"), ("not-a-file", "pipe")}


def test_a_linked_folder_is_not_followed(sealed: Path, tmp_path: Path) -> None:
    sealed.chmod(0o700)
    (sealed / "logs").chmod(0o700)
    (sealed / "logs").rename(tmp_path / "logs")
    (sealed / "logs").symlink_to(tmp_path / "logs")
    assert faults(sealed) == {("not-a-file", "logs"), ("missing", "logs/origin.log")}


def test_another_key_is_not_trusted(sealed: Path) -> None:
    other = Ed25519PrivateKey.generate()
    assert faults(sealed, other) == {("bad-signature", "manifest.sig"), ("unknown-key", "manifest.json")}


def test_sealing_again_with_an_own_key_is_found(sealed: Path, tmp_path: Path) -> None:
    """Somebody changes a file and makes a whole new bundle of it with a key of their own."""
    forged = tmp_path / "open" / TRIAL
    shutil.copytree(sealed, forged)
    forged.chmod(0o700)
    edit(forged / "trial.json", b"{1}")
    forgery = tmp_path / "elsewhere" / TRIAL
    forgery.parent.mkdir()
    bundle.seal(forged, forgery, Ed25519PrivateKey.generate())
    assert ("unknown-key", "manifest.json") in faults(forgery)
    assert ("bad-signature", "manifest.sig") in faults(forgery)


@pytest.mark.parametrize("signature", [b"", b"!!!", base64.b64encode(b"x" * 64), base64.b64encode(b"short")])
def test_a_broken_signature_is_found(sealed: Path, signature: bytes) -> None:
    edit(sealed / bundle.SIGNATURE, signature)
    assert faults(sealed) == {("bad-signature", "manifest.sig")}


def test_a_changed_manifest_is_found(sealed: Path) -> None:
    content = (sealed / bundle.MANIFEST).read_bytes()
    edit(sealed / bundle.MANIFEST, content.replace(b'"size": 3', b'"size": 4'))
    assert faults(sealed) == {("bad-signature", "manifest.sig"), ("changed", "trial.json")}
    edit(sealed / bundle.MANIFEST, content + b" ")
    assert faults(sealed) == {("bad-signature", "manifest.sig")}


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../b", "a//b", "./a", "", "a\\b", "a\nb", "manifest.json", "logs/"]
)
def test_path_tricks_in_a_signed_manifest_are_refused(sealed: Path, path: str) -> None:
    manifest = json.loads((sealed / bundle.MANIFEST).read_text())
    manifest["files"][0]["path"] = path
    resign(sealed, manifest)
    assert faults(sealed) == {("bad-manifest", "manifest.json")}


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"more": 1}, {"trial": "../x"}, {"files": None}])
def test_a_manifest_of_another_schema_is_refused(sealed: Path, change: dict[str, object]) -> None:
    resign(sealed, json.loads((sealed / bundle.MANIFEST).read_text()) | change)
    assert faults(sealed) == {("bad-manifest", "manifest.json")}


def test_a_path_listed_twice_is_refused(sealed: Path) -> None:
    manifest = json.loads((sealed / bundle.MANIFEST).read_text())
    manifest["files"].append(manifest["files"][0])
    resign(sealed, manifest)
    assert faults(sealed) == {("bad-manifest", "manifest.json")}


def test_a_renamed_bundle_is_found(sealed: Path) -> None:
    renamed = sealed.with_name("t20250101-120000-000000")
    sealed.chmod(0o700)
    sealed.rename(renamed)
    assert faults(renamed) == {("changed", ".")}


def test_no_manifest_and_no_directory(sealed: Path, tmp_path: Path) -> None:
    sealed.chmod(0o700)
    (sealed / bundle.MANIFEST).unlink()
    assert ("bad-manifest", "manifest.json") in faults(sealed)
    with pytest.raises(EvidenceError):
        bundle.load(sealed)
    with pytest.raises(EvidenceError):
        bundle.verify(tmp_path / "nothing", KEY.public_key())


def test_a_link_is_never_sealed(trial: Path, tmp_path: Path) -> None:
    (trial / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(EvidenceError, match="passwd is not a plain file"):
        bundle.seal(trial, tmp_path / "bundles" / TRIAL, KEY)
    assert trial.is_dir()
    (trial / "passwd").unlink()
    bundle.seal(trial, tmp_path / "bundles" / TRIAL, KEY)
    assert faults(tmp_path / "bundles" / TRIAL) == set()


def test_evidence_is_never_replaced(trial: Path, sealed: Path) -> None:
    trial.mkdir()
    with pytest.raises(EvidenceError, match="never replaced"):
        bundle.seal(trial, sealed, KEY)
    assert faults(sealed) == set()


# --- keys ----------------------------------------------------------------------------------------


def test_the_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "signing-key"
    first, second = keys.signing_key(path), keys.signing_key(path)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.fingerprint(keys.public_key(keys.public_path(path))) == keys.fingerprint(first.public_key())
    assert {p.name for p in tmp_path.iterdir()} == {"signing-key", "signing-key.pub"}


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "signing-key"
    keys.signing_key(path)
    path.chmod(0o640)
    with pytest.raises(EvidenceError, match="0640"):
        keys.signing_key(path)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_broken_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "signing-key"
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(EvidenceError, match="no private key"):
        keys.signing_key(path)
    with pytest.raises(EvidenceError, match="no public key"):
        keys.public_key(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    path = tmp_path / "signing-key"
    path.touch(0o600)
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(EvidenceError, match="Ed25519"):
        keys.signing_key(path)
    path.write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(EvidenceError, match="Ed25519"):
        keys.public_key(path)
    with pytest.raises(EvidenceError, match="cannot be read"):
        keys.public_key(tmp_path / "nothing")
