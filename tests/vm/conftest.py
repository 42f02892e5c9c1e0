"""Real machines of the lean ``world`` image under real libvirt and QEMU, in a sealed namespace of this process.

The whole pytest process leaves the host's network on first use: nothing of this tier could reach it if it
tried. Baselines are made once a session (together about 100 s under TCG); every test then gets fresh clones.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appliance.build import find_image
from appliance.cell import baseline as saved
from appliance.cell.baseline import Baseline, Workshop
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Ledger
from appliance.cell.libvirt_door import Libvirt
from appliance.cell.netlink import namespace_inode
from appliance.cell.spec import GuestImage, MachineSpec
from appliance.host.accelerator import select_accelerator
from appliance.host.paths import Paths, default_paths
from appliance.model import Role
from appliance.pipeline.process import require_sealed_process, seal_process, sweep_view


@pytest.fixture(scope="session")
def sealed() -> int:
    """This process in a namespace without uplink; gives the host's namespace."""
    before = namespace_inode()
    seal_process()
    assert require_sealed_process() == before
    return before


@pytest.fixture(scope="session")
def vm_paths() -> Iterator[Paths]:
    """A short home of this session; the images come from the real cache."""
    # Not /tmp, which may be RAM: images of machines are gigabytes. Short, for unix sockets lie below it.
    home = Path(f"/var/tmp/hcvm{secrets.token_hex(3)}")
    yield default_paths(home=home).make()
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def shop(sealed: int, vm_paths: Paths) -> Iterator[Workshop]:
    """libvirt, ledger and paths. At the end nothing of ours may be left."""
    accelerator = select_accelerator(vm_paths).chosen
    assert accelerator is not None
    libvirt, ledger = Libvirt.open_embedded(vm_paths.libvirt), Ledger(vm_paths.ledger)
    yield Workshop(vm_paths, libvirt, ledger, accelerator, "hotcell-test")
    left = sweep_view(vm_paths, libvirt, ledger, set, dry_run=False).strays
    libvirt.close()
    ledger.close()
    assert left == (), f"this session left {left}"


def world_spec(paths: Paths, name: str, role: Role) -> MachineSpec:
    """A small machine of the world image in any role."""
    image = find_image("world", paths)
    assert image is not None, "the image world is not built: hotcell build world"
    guest = GuestImage.of(image)
    return MachineSpec(name=name, role=role, image=guest, memory_mib=256, vcpus=1)


@pytest.fixture(scope="session")
def baselines(shop: Workshop, vm_paths: Paths) -> dict[str, Baseline]:
    """An origin, a target and a world, booted and saved side by side."""

    def make(role: Role) -> Baseline:
        name = "target-1" if role is Role.TARGET else role.value
        spec = world_spec(vm_paths, name, role)
        key = saved.baseline_key(spec, shop.accelerator, shop.libvirt.versions(), "vm tier")
        cell = Cell(f"make-{name}", shop)
        cell.open()
        try:
            return saved.make(shop, spec, cell.id, key, settle)
        finally:
            cell.close()

    with ThreadPoolExecutor() as pool:
        made = pool.map(make, (Role.ORIGIN, Role.TARGET, Role.WORLD))
    return {b.machine.name: b for b in made}


def settle(machine: Incarnation) -> None:
    done = machine.qga.exec(["/usr/bin/systemctl", "is-system-running", "--wait"], timeout_s=120)
    assert done.text.strip() == "running", done


OpenCell = Callable[..., Cell]


@pytest.fixture
def open_cell(shop: Workshop, baselines: dict[str, Baseline]) -> Iterator[OpenCell]:
    """A function that opens a cell with proved machines of the given names, plugged unless told otherwise."""
    cells: list[Cell] = []

    def make(*names: str, plug: bool = True) -> Cell:
        cell = Cell(f"c{secrets.token_hex(3)}", shop)
        cells.append(cell)
        cell.open()
        cell.restore_all([baselines[n] for n in names], lambda _p: None)
        if plug:
            cell.plug_all()
        return cell

    yield make
    for cell in cells:
        cell.close()
        assert shop.ledger.things(owner=cell.id) == []


@pytest.fixture
def vm_machine(open_cell: OpenCell) -> Incarnation:
    """One proved, plugged machine."""
    return open_cell("origin").machine("origin")
