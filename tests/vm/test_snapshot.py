"""A running machine saved as a baseline of its own, chained on the one it came from."""

from __future__ import annotations

import shutil

import pytest

from appliance.cell.baseline import Baseline, Workshop, check_files
from appliance.cell.snapshot import snapshot
from appliance.errors import LabError
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def test_a_snapshot_keeps_memory_and_disk_and_can_be_chained(
    open_cell: OpenCell, baselines: dict[str, Baseline], shop: Workshop
) -> None:
    cell = open_cell("target-1")
    machine = cell.machine("target-1")
    machine.qga.write_file("/dev/shm/kept", b"in memory")
    machine.qga.write_file("/root/kept", b"on disk")
    made = [baselines["target-1"]]
    try:
        for label in ("first", "second"):
            made.append(snapshot(shop, cell, "target-1", made[-1], label))
            assert cell.machines == {}
            proof = cell.replace(made[-1], lambda _p: None)
            assert proof.proved, proof.failures
        check_files(made[-1], read=True)
        assert made[2].parent == "first"
        assert len(made[2].expected.chain) == len(baselines["target-1"].expected.chain) + 2
        clone = cell.machine("target-1")
        assert clone.qga.exec(["/bin/cat", "/dev/shm/kept", "/root/kept"]).text == "in memoryon disk"
        # Dirt after the snapshot goes; the machine of the first baseline never had any of it.
        clone.qga.write_file("/root/dirt", b"x")
        assert cell.replace(made[2], lambda _p: None).proved
        assert cell.machine("target-1").qga.exec(["/usr/bin/test", "-e", "/root/dirt"]).rc == 1
        assert cell.replace(made[0], lambda _p: None).proved
        assert cell.machine("target-1").qga.exec(["/usr/bin/test", "-e", "/root/kept"]).rc == 1
    finally:
        for baseline in made[1:]:
            shutil.rmtree(baseline.folder)


def test_a_taken_label_is_refused_and_nothing_is_lost(
    open_cell: OpenCell, baselines: dict[str, Baseline], shop: Workshop
) -> None:
    cell = open_cell("target-1")
    taken = baselines["target-1"].folder.name
    with pytest.raises(LabError, match="already"):
        snapshot(shop, cell, "target-1", baselines["target-1"], taken)
    assert cell.machine("target-1").qga.ping()
    assert shop.paths.baselines.joinpath(taken).exists()
