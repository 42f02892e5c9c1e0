"""The digest of a file with holes is that of its content, whatever lies where."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cell.baseline.sparse import digest

MIB = 1 << 20


def write(path: Path, size: int, data: dict[int, bytes]) -> None:
    with path.open("wb") as f:
        for at, piece in data.items():
            f.seek(at)
            f.write(piece)
        f.truncate(size)


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (0, {}),
        (1, {}),
        (3 * MIB + 5, {}),
        (3 * MIB, {0: b"start"}),
        (3 * MIB, {3 * MIB - 3: b"end"}),
        (9 * MIB, {4 * MIB + 17: b"middle"}),
        (9 * MIB, {0: b"a" * MIB, 5 * MIB: b"b" * 2 * MIB}),
        (4096, {0: bytes(4096)}),
        (10, {0: b"0123456789"}),
    ],
)
def test_it_is_the_contents(tmp_path: Path, size: int, data: dict[int, bytes]) -> None:
    write(tmp_path / "f", size, data)
    assert digest(tmp_path / "f") == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


@given(
    size=st.integers(0, 1 << 18),
    data=st.dictionaries(st.integers(0, 1 << 18), st.binary(max_size=9000), max_size=4),
)
def test_wherever_the_holes_lie(
    tmp_path_factory: pytest.TempPathFactory, size: int, data: dict[int, bytes]
) -> None:
    path = tmp_path_factory.mktemp("sparse") / "f"
    write(path, size, data)
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
