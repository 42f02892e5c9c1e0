"""A baseline that was exported, perhaps elsewhere, made one of this home.

Digests show that the files are those that were exported. They do not show who exported them: device state is
fed to QEMU and RAM is run, so only what comes from a trusted host may be imported.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from appliance.build import Image, list_images
from appliance.cell import overlay
from appliance.cell.baseline.exporting import Progress, onward
from appliance.cell.baseline.kinds import NVRAM, RAM, STATE, Baseline, ColdExpected, DiskBaseline, RamBaseline
from appliance.cell.baseline.manifest import Manifest, read_manifest
from appliance.cell.baseline.record import cpu_fingerprint, publish
from appliance.cell.baseline.sparse import copy
from appliance.cell.baseline.template import Site, making
from appliance.cell.baseline.workshop import Workshop
from appliance.cell.proof import Expected
from appliance.cell.qcow2 import read_header
from appliance.cell.spec import GuestImage, MachineSpec
from appliance.errors import ConfigError, ConflictError, LabError, NotFoundError, PrerequisiteError
from appliance.host.capacity import require_room
from appliance.host.firmware import require_same_kind
from appliance.model import NAME_PATTERN, Accelerator

# Names that the laboratory gives to what it makes itself: machine and the first digits of a key.
_OWN_NAME = re.compile(r"(origin|world|target-[0-9]+)-[0-9a-f]{12}")


def require_free_name(name: str) -> None:
    """Refuse a name that the laboratory may give to a baseline of its own.

    Raises:
        ConflictError: it has that form.
    """
    if _OWN_NAME.fullmatch(name):
        raise ConflictError(
            f"{name} is of the form that the laboratory's own baselines have", hint="choose another name"
        )


def check_source(folder: Path) -> None:
    """Refuse what cannot be an export.

    Raises:
        ConfigError: it is no directory, or no plain absolute path of one.
    """
    if not folder.is_absolute() or not folder.is_dir() or folder.resolve() != folder:
        raise ConfigError(
            f"{folder} is not the absolute path of a directory, or is reached through a link",
            hint="name the folder that `export` made, by its real path",
        )


def import_(shop: Workshop, folder: Path, name: str | None, owner: str, progress: Progress) -> Baseline:
    """Make an exported baseline one of this home, under ``name`` or its own name.

    One of the laboratory's own making comes in as ``imported-NAME``, so that no trial takes it for its own.
    ``owner`` stands in the ledger for what is half imported.

    Raises:
        ConfigError: the folder or its manifest is not what an export writes, or a digest is wrong.
        ConflictError: the name is taken.
        NotFoundError: the image that it stands on is not built here.
        PrerequisiteError: it cannot run on this host.
        CapacityError: there is no room.
    """
    began = time.monotonic()
    check_source(folder)
    manifest = read_manifest(folder)
    label = _label(shop, manifest, name)
    _require_fit(shop, manifest)
    machine = _machine(_image(shop, manifest), manifest)
    _require_same_bits(machine.image, manifest)
    require_room(
        shop.paths.baselines,
        memory=0,
        disk=sum(overlay.used_bytes(folder / n) for n in manifest.files),
        purpose=f"the baseline {label}",
    )
    of_ram = machine if manifest.kind == "ram" else None
    with making(shop, label, owner, of_ram) as site:
        _copy_all(folder, manifest, site, progress)
        chain = _relink(site, manifest, machine.image.disk)
        fields: dict[str, Any] = {
            "key": hashlib.sha256(f"import {label} {secrets.token_hex(16)}".encode()).hexdigest(),
            "machine": machine, "accelerator": shop.accelerator, "files": {}, "below": {}, "created": time.time(),
            "versions": shop.versions(machine), "folder": site.final, "label": label, "created_by": "import",
            "seconds": time.monotonic() - began,
        }  # fmt: skip
        return publish(_record(manifest, site, chain, fields), site.folder, manifest.layers[1:])


def _label(shop: Workshop, manifest: Manifest, name: str | None) -> str:
    label = name or (f"imported-{manifest.name}" if _OWN_NAME.fullmatch(manifest.name) else manifest.name)
    if not re.fullmatch(NAME_PATTERN, label):
        raise ConfigError(f"{label!r} is not a name", hint="lower-case letters, digits, hyphens; at most 40")
    require_free_name(label)
    if (shop.paths.baselines / label).exists():
        raise ConflictError(f"there is a baseline {label} already", hint="give it another name")
    return label


def _require_fit(shop: Workshop, manifest: Manifest) -> None:
    """Device state and RAM go on only where they were saved from; a disk boots anywhere, but for devices.

    Under TCG the guest's processor is QEMU's own, whatever the host's is.
    """
    if manifest.devices:
        raise PrerequisiteError(
            f"{manifest.name} is of a machine with passed-through devices ({', '.join(manifest.devices)}): those are "
            "addresses of the host that it was saved on, and name something else here",
            hint="make it anew here",
        )
    if NVRAM in manifest.files:
        require_same_kind(manifest.files[NVRAM].size, manifest.name)
    if manifest.kind == "disk":
        return
    here = shop.libvirt.versions()
    facts = [
        ("QEMU", manifest.versions.get("qemu", "none"), here["qemu"]),
        ("accelerator", manifest.accelerator.value, shop.accelerator.value),
    ]
    if shop.accelerator is Accelerator.KVM:
        facts.append(("processor (fingerprint)", manifest.host_cpu[:12], cpu_fingerprint()[:12]))
    wrong = [f"{what}: saved with {there}, here is {found}" for what, there, found in facts if there != found]
    if wrong:
        raise PrerequisiteError(
            f"the baseline {manifest.name} cannot run on this host: {'; '.join(wrong)}",
            hint="make it anew here, or export a disk baseline, which boots anywhere",
        )


def _image(shop: Workshop, manifest: Manifest) -> Image:
    for image in list_images(shop.paths):
        if (image.recipe, image.digest) == (manifest.recipe, manifest.image_digest):
            return image
    raise NotFoundError(
        f"the image that {manifest.name} stands on is not here: {manifest.recipe} {manifest.image_digest}",
        hint=f"`hotcell build {manifest.recipe}` from the same sources, or copy it into {shop.paths.images}",
    )


def _require_same_bits(image: GuestImage, manifest: Manifest) -> None:
    if image.disk_sha256 != manifest.image_disk_sha256:
        raise PrerequisiteError(
            f"the image {image.recipe} {image.digest[:12]} was built here of the same inputs, and came out with "
            f"other packages than the one that {manifest.name} stands on: its disk has sha256 "
            f"{image.disk_sha256}, expected {manifest.image_disk_sha256}",
            hint=f"copy that image's folder into {image.disk.parent.parent}",
        )


def _machine(image: Image, manifest: Manifest) -> MachineSpec:
    guest = GuestImage.of(image)
    return MachineSpec(
        name=manifest.machine, role=manifest.role, image=guest, memory_mib=manifest.memory_mib,
        vcpus=manifest.vcpus, devices=manifest.devices, firmware=manifest.firmware,
    )  # fmt: skip


def _copy_all(folder: Path, manifest: Manifest, site: Site, progress: Progress) -> None:
    done, total = 0, sum(f.size for f in manifest.files.values())
    for name, wanted in manifest.files.items():
        if name == RAM and wanted.size != manifest.memory_mib << 20:
            raise ConfigError(f"{folder / name}: RAM of {manifest.memory_mib} MiB has another size")
        target = (site.memory if name in (RAM, STATE) else site.folder) / name
        found = copy(folder / name, target, onward(progress, done, total))
        if found != (wanted.sha256, wanted.size):
            raise ConfigError(
                f"{folder / name}: expected {wanted.size} bytes with sha256 {wanted.sha256}, "
                f"found {found[1]} with {found[0]}",
                hint="copy the folder again, or export the baseline again",
            )
        done += wanted.size


def _relink(site: Site, manifest: Manifest, image: Path) -> tuple[Path, ...]:
    """Have each layer name the one below it in this home; their content stays. Returns the chain."""
    chain = (*(site.final / name for name in manifest.layers), image)
    for name, below in zip(manifest.layers, chain[1:], strict=True):
        layer = site.folder / name
        header = read_header(layer)
        if header.encrypted or header.external_data:
            raise ConfigError(
                f"{name} keeps its data elsewhere or encrypted", hint="do not trust this export"
            )
        overlay.relink(layer, below)
        if read_header(layer).backing != str(below):
            raise LabError(f"{layer} does not stand on {below} after it was put there")
    return chain


def _record(manifest: Manifest, site: Site, chain: tuple[Path, ...], fields: dict[str, Any]) -> Baseline:
    told = {k: v for k, v in manifest.expected.items() if k not in ("chain", "ram_file")}
    try:
        if manifest.kind == "ram":
            expected = Expected.model_validate({**told, "chain": chain, "ram_file": site.ram_file})
            return RamBaseline(expected=expected, memory=site.memory if site.tmpfs else None, **fields)
        return DiskBaseline(expected=ColdExpected.model_validate({**told, "chain": chain}), **fields)
    except ValidationError as e:
        raise ConfigError(
            f"the manifest's `expected` is not what this version of hotcell writes: {e.error_count()} faults",
            hint="export it with this version",
        ) from e
