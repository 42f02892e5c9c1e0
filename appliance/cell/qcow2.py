"""What the header of a qcow2 file says, read without running anything on it.

https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/qcow2.txt
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from appliance.errors import LabError

_MAGIC = b"QFI\xfb"
_FIXED = struct.Struct(">4sIQIIQI")
_FEATURES_AT = 72
_EXTERNAL_DATA = 1 << 2
_MAX_BACKING = 1023  # the format's own limit


class Header(NamedTuple):
    """``backing`` is the layer below, as it is written there; None if there is none. ``size`` is the guest's."""

    backing: str | None
    size: int
    encrypted: bool
    external_data: bool


def read_header(path: Path) -> Header:
    """The header of a layer.

    Raises:
        LabError: it is no qcow2 file (yet), or its header is damaged.
    """
    try:
        with path.open("rb") as f:
            start = f.read(_FEATURES_AT + 8)
            magic, version, at, length, _, size, crypt = _FIXED.unpack_from(start)
            if magic != _MAGIC or version not in (2, 3) or length > _MAX_BACKING:
                raise LabError(f"{path} is not a qcow2 layer")
            f.seek(at)
            backing = os.fsdecode(f.read(length)) if at else None
    except (OSError, struct.error, OverflowError) as e:
        raise LabError(f"the header of {path} cannot be read: {e}") from e
    features = int.from_bytes(start[_FEATURES_AT : _FEATURES_AT + 8]) if version == 3 else 0
    return Header(backing, size, crypt != 0, bool(features & _EXTERNAL_DATA))
