"""Baselines with small real files: published ones, and a folder that looks like an export."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from appliance.cell import overlay
from appliance.cell.baseline import (
    DISK,
    NVRAM,
    RAM,
    STATE,
    Baseline,
    ColdExpected,
    DiskBaseline,
    RamBaseline,
    importing,
    making,
    publish,
)
from appliance.cell.proof import Expected
from appliance.cell.spec import GuestImage, MachineSpec
from appliance.model import Accelerator, Firmware
from tests.fakes.cells import Host, fake_overlay
from tests.fakes.machine import DIGEST, NVRAM_TEMPLATE, machine_spec

MIB = 64
CONTENT = b"content of a saved file"


def image_folder(h: Host, digest: str) -> Path:
    """The folder of a built image, with a disk of a few bytes; what its manifest says of it is taken for true."""
    folder = h.paths.images / digest
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "disk.qcow2").exists():
        (folder / "disk.qcow2").write_bytes(b"QFI\xfb an image")
    return folder


def machine(h: Host, name: str = "target-1", **changes: object) -> MachineSpec:
    """A machine of 64 MiB, the least there is."""
    spec = machine_spec(name, image_folder(h, DIGEST))
    return spec.model_copy(update={"memory_mib": MIB, **changes})


def write_layer(path: Path, below: Path) -> None:
    """A layer's header, and something that makes its content its own."""
    fake_overlay(path, below)
    with path.open("ab") as f:
        f.write(b"data of " + os.fsencode(path.name) + os.fsencode(path.parent.name))


def publish_one(
    h: Host, label: str, *, parent: Baseline | None = None, kind: str = "ram", name: str = "target-1",
    **changes: object,
) -> Baseline:  # fmt: skip
    """A baseline with real files: 64 MiB of RAM, almost all of it a hole, on its parent or on the image."""
    spec = machine(h, name, **changes)
    chain = parent.expected.chain if parent else (spec.image.disk,)
    common = {
        "key": label.ljust(64, "0"), "machine": spec, "accelerator": Accelerator.TCG, "files": {}, "below": {},
        "created": 1.0, "seconds": 1.0, "versions": h.libvirt.versions(), "label": label,
        "parent": parent.id if parent else "",
    }  # fmt: skip
    with making(h.shop, label, "make-1", spec if kind == "ram" else None) as site:
        write_layer(site.folder / DISK, chain[0])
        below = (site.final / DISK, *chain)
        if kind == "disk":
            if spec.firmware is Firmware.UEFI:
                (site.folder / NVRAM).write_bytes(NVRAM_TEMPLATE[::-1])
            cold = ColdExpected(boot_id="b0", nonce="n0", chain=below)
            return publish(DiskBaseline(expected=cold, folder=site.final, **common), site.folder)
        with (site.memory / RAM).open("wb") as f:
            f.write(CONTENT)
            f.seek(MIB << 19)
            f.write(CONTENT)
            f.truncate(MIB << 20)
        (site.memory / STATE).write_bytes(CONTENT)
        expected = Expected(
            boot_id="b0", nonce="n0", processes=("init 1 1",), chain=below, ram_file=site.ram_file
        )
        memory = site.memory if site.tmpfs else None
        return publish(
            RamBaseline(expected=expected, folder=site.final, memory=memory, **common), site.folder
        )


def with_image(h: Host, monkeypatch: pytest.MonkeyPatch, digest: str = DIGEST) -> GuestImage:
    """The image that baselines stand on, as one that is built here; qemu-img's part is played."""
    folder = image_folder(h, digest)
    image = SimpleNamespace(
        recipe="target-cpu", digest=digest, folder=folder, disk=folder / "disk.qcow2",
        kernel=folder / "vmlinuz", initrd=folder / "initrd.img",
        record=SimpleNamespace(
            kernel_cmdline="root=/dev/vda", files=(SimpleNamespace(name="disk.qcow2", sha256=DIGEST),)
        ),
    )  # fmt: skip
    monkeypatch.setattr(importing, "list_images", lambda _paths: (image,))
    monkeypatch.setattr(overlay, "relink", _relink)
    return machine_spec("target-1", folder).image


def _relink(layer: Path, backing: Path) -> None:
    """As ``qemu-img rebase -u``: another name in the header, behind what was there."""
    data = bytearray(layer.read_bytes())
    name = os.fsencode(backing)
    data[8:16], data[16:20] = len(data).to_bytes(8), len(name).to_bytes(4)
    layer.write_bytes(data + name)
