"""A workshop and cells over the machines in memory: only restoring and proving are replaced."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell import cell as cell_module
from appliance.cell import incarnation, overlay, standby
from appliance.cell.baseline import DISK, RAM, Baseline, RamBaseline, Workshop, workshop
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Ledger
from appliance.cell.proof import SCRIPT_SHA256, Check, Expected, Proof
from appliance.host import firmware
from appliance.host.firmware import Uefi
from appliance.host.paths import Paths
from appliance.model import Accelerator
from tests.fakes.machine import NVRAM_TEMPLATE, FakeGuest, FakeLibvirt, FakeNet, leftovers, machine_spec


def baseline(name: str, folder: Path) -> Baseline:
    """A record of a saved machine; there are no files behind it."""
    expected = Expected(
        script=SCRIPT_SHA256, boot_id="b0", nonce="n0", processes=(), chain=(), ram_file=folder / "ram"
    )
    return RamBaseline(
        key="k" * 64, machine=machine_spec(name), accelerator=Accelerator.TCG, expected=expected, files={}, below={},
        created=1.0, seconds=1.0, versions={}, folder=folder,
    )  # fmt: skip


def fake_overlay(top: Path, backing: Path) -> None:
    """The header of a qcow2 layer (version 2) and nothing below it."""
    name = os.fsencode(backing)
    header = struct.pack(">4sIQIIQI", b"QFI\xfb", 2, 72, len(name), 16, 1 << 20, 0)
    top.write_bytes(header.ljust(72, b"\0") + name.ljust(16, b"\0"))


class Host:
    """A host in memory. ``unproved`` names machines whose proof fails, ``broken`` those that do not restore."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(home / "h", home / "c").make()
        self.net = FakeNet().install(monkeypatch)
        self.libvirt = FakeLibvirt(self.paths.libvirt)
        self.ledger = Ledger(self.paths.ledger)
        self.unproved: set[str] = set()
        self.broken: set[str] = set()
        self.on_restore: Callable[[Incarnation], None] = lambda _clone: None
        self.restored: list[Incarnation] = []
        self.shop = Workshop(
            self.paths, self.libvirt, self.ledger, Accelerator.TCG, "hotcell"  # type: ignore[arg-type]
        )  # fmt: skip
        monkeypatch.setattr(overlay, "create_overlay", fake_overlay)
        for module in (cell_module, standby):
            monkeypatch.setattr(module, "restore", self._restore)
            monkeypatch.setattr(module, "prove", self._prove)
        self.uefi = Uefi(home / "code.fd", home / "variables.fd")
        self.uefi.code.write_bytes(b"firmware")
        self.uefi.variables.write_bytes(NVRAM_TEMPLATE)
        for uses in (incarnation, workshop, firmware):
            monkeypatch.setattr(uses, "require_uefi", lambda: self.uefi)
        monkeypatch.setattr(standby, "is_domain_process", lambda pid, _name: pid == os.getpid())

    def _restore(self, shop: Workshop, saved: Baseline, cell: str) -> Incarnation:
        if saved.machine.name in self.broken:
            raise OSError(f"{saved.machine.name} cannot be restored")
        clone = shop.prepare(
            saved.machine, cell, backing=saved.path(DISK), ram=saved.path(RAM), incoming=True
        )
        try:
            clone.start()
            self.on_restore(clone)
            clone.resume()
        except BaseException:
            clone.destroy()
            raise
        self.restored.append(clone)
        return clone

    def _prove(
        self, clone: Incarnation, saved: Baseline, began: float, *, will_stand_by: bool = False
    ) -> Proof:
        good = clone.name not in self.unproved
        check = Check(
            name="RAM holds the baseline's nonce", passed=good, expected="n0", found="n0" if good else ""
        )
        return Proof(
            machine=clone.name, incarnation=clone.id, baseline=saved.id, seconds=0.1, checks=(check,)
        )

    def baseline(self, name: str) -> Baseline:
        """A baseline of that machine."""
        return baseline(name, self.paths.baselines / name)

    def guest(self, name: str) -> FakeGuest:
        """The guest of that machine."""
        return self.libvirt.guest(name)

    def cell(self, *names: str, cell_id: str = "c1") -> Cell:
        """An open cell with these machines, proved and unplugged."""
        made = Cell(cell_id, self.shop)
        made.open()
        made.restore_all([self.baseline(n) for n in names], lambda _p: None)
        return made

    @property
    def left(self) -> list[str]:
        """Everything of any cell that is still there."""
        return leftovers(self.net, self.libvirt, self.ledger, [self.paths.cells])


@contextlib.contextmanager
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose home has a short path: unix sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="hc", dir="/tmp") as folder:
        made = Host(Path(os.path.realpath(folder)), monkeypatch)
        yield made
        made.ledger.close()
