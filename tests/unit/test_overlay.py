"""The layers of a disk, from real qcow2 files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.cell.overlay import backing_chain, create_overlay, relink
from appliance.errors import LabError
from appliance.host import command


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    command.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], timeout=30)
    return path


def test_the_chain_is_every_layer_from_the_top_down(tmp_path: Path, image: Path) -> None:
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    create_overlay(middle, image)
    create_overlay(top, middle)
    assert backing_chain(top) == (top, middle, image)
    assert backing_chain(image) == (image,)


def test_a_layer_named_from_its_own_folder_is_found_from_any(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "top.qcow2"
    create_overlay(top, image)
    relink(top, Path("./image.qcow2"))
    monkeypatch.chdir("/")
    assert backing_chain(top) == (top, image)


def test_a_lost_layer_and_one_that_is_none_are_told(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    create_overlay(top, image)
    image.write_bytes(b"raw, perhaps")
    with pytest.raises(LabError, match="image"):
        backing_chain(top)
    image.unlink()
    with pytest.raises(LabError, match="image"):
        backing_chain(top)


def test_layers_that_lie_on_themselves_end(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    create_overlay(top, image)
    relink(top, top)
    with pytest.raises(LabError, match="more than"):
        backing_chain(top)


def test_qemu_sees_the_same_layers(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    create_overlay(top, image)
    told = command.run(["qemu-img", "info", "--output=json", "--backing-chain", top], timeout=30)
    assert [layer["filename"] for layer in json.loads(told.stdout)] == [str(p) for p in backing_chain(top)]
