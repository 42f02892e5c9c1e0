"""Headers of disk layers are read as what they are: bytes that may have come from anywhere."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from appliance.cell.qcow2 import Header, read_header
from appliance.errors import LabError


def header(backing: bytes = b"/below", *, version: int = 3, crypt: int = 0, features: int = 0) -> bytes:
    at = 104 if backing else 0
    start = struct.pack(">4sIQIIQI", b"QFI\xfb", version, at, len(backing), 16, 1 << 30, crypt)
    return start.ljust(72, b"\0") + features.to_bytes(8) + bytes(24) + backing


@pytest.mark.parametrize("version", [2, 3])
def test_what_a_header_says(tmp_path: Path, version: int) -> None:
    path = tmp_path / "layer"
    path.write_bytes(header(version=version))
    assert read_header(path) == Header("/below", 1 << 30, encrypted=False, external_data=False)
    path.write_bytes(header(b"", version=version))
    assert read_header(path).backing is None


def test_data_elsewhere_and_encryption_are_told(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(header(features=4))
    assert read_header(path).external_data
    path.write_bytes(header(features=4, version=2))
    assert not read_header(path).external_data, "version 2 has no such field"
    path.write_bytes(header(crypt=2))
    assert read_header(path).encrypted


@given(st.binary(max_size=200) | st.binary(max_size=120).map(lambda b: b"QFI\xfb\0\0\0\3" + b))
@example(b"QFI\xfb\0\0\0\3" + b"\xff" * 100)
@example(b"")
def test_no_bytes_make_it_do_anything_but_refuse(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("q") / "layer"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except LabError:
        return
    assert content.startswith(b"QFI\xfb")
    assert found.backing is None or len(os.fsencode(found.backing)) <= 1023


def test_what_is_no_layer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\0" * 1000)
    for path in (tmp_path / "raw", tmp_path / "none", tmp_path):
        with pytest.raises(LabError):
            read_header(path)
