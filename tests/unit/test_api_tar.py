"""Directories as tar streams."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from api import tarstream
from appliance.errors import EvidenceError


def test_long_names_and_empty_files_and_folders_survive(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / ("f" * 120)).write_bytes(b"x" * 513)
    (tmp_path / "empty").touch()
    (tmp_path / "nothing").mkdir()
    members = tarstream.plan(tmp_path, "b")
    content = b"".join(tarstream.stream(members))
    assert len(content) == tarstream.length(members)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == [m.name for m in members]
        assert {(m.uid, m.mtime, m.uname) for m in tar.getmembers()} == {(0, 0, "")}
        assert tar.getmember("b/empty").size == 0
        assert tar.getmember("b/nothing").isdir()


def test_a_file_that_grows_or_shrinks_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    members = tarstream.plan(tmp_path, "b")
    for content in (b"1234", b"123456"):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(EvidenceError, match="changed"):
            list(tarstream.stream(members))


def test_a_file_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    members = tarstream.plan(tmp_path, "b")
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("/etc/hostname")
    with pytest.raises(EvidenceError):
        list(tarstream.stream(members))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"1")
    monkeypatch.setattr(tarstream, "MAX_FILES", 3)
    with pytest.raises(EvidenceError, match="more than"):
        tarstream.plan(tmp_path, "b")
    monkeypatch.setattr(tarstream, "MAX_FILES", 100)
    monkeypatch.setattr(tarstream, "MAX_BYTES", 2)
    with pytest.raises(EvidenceError, match="more than"):
        tarstream.plan(tmp_path, "b")


def test_names_that_are_not_text_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError):
        tarstream.plan(tmp_path / "missing", "b")
    (tmp_path / "x\udcff").touch()
    with pytest.raises(EvidenceError, match="name"):
        tarstream.plan(tmp_path, "b")
