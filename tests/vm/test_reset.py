"""Reset is proved, and every way to fake a clean machine that we could think of is noticed."""

from __future__ import annotations

import shutil
import time

import pytest

from appliance.cell import baseline as saved
from appliance.cell.baseline import RamBaseline, Workshop, check_files, prove
from appliance.cell.incarnation import Incarnation
from appliance.cell.overlay import create_overlay
from appliance.cell.proof import Expected, guest_checks, guest_facts, host_checks
from appliance.errors import ResetError
from appliance.host.clock import wait_until
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
CHECKS = 11


def test_a_restored_machine_is_proved_and_answers(
    open_cell: OpenCell, baselines: dict[str, RamBaseline]
) -> None:
    cell = open_cell("origin", "target-1", plug=False)
    machine = cell.machine("origin")
    # The sentinels that the first proof planted are now in RAM and on disk: no longer a clean machine.
    expected = baselines["origin"].expected
    again = list(guest_checks(guest_facts(machine.qga, ""), expected)) + list(host_checks(machine, expected))
    assert len(again) == CHECKS
    assert {c.name for c in again if not c.passed} == {
        "no RAM sentinel of an earlier run",
        "no disk sentinel of an earlier run",
        "processes are the baseline's",  # the script that waited in the baseline has answered, and ended
    }


def test_reset_takes_back_files_memory_and_processes(
    open_cell: OpenCell, baselines: dict[str, RamBaseline]
) -> None:
    cell = open_cell("origin")
    dirty = cell.machine("origin")
    dirty.qga.write_file("/root/dirt", b"x" * 100_000)
    dirty.qga.write_file("/dev/shm/dirt", b"x" * 100_000)
    dirty.qga.start(["/bin/sleep", "10000"])
    done = cell.reset([baselines["origin"]], lambda _p: None)[0]
    assert done.proof.proved, done.proof.failures
    assert cell.machine("origin").plugged
    clean = cell.machine("origin")
    assert clean.id != dirty.id
    assert clean.qga.exec(["/usr/bin/test", "-e", "/root/dirt"]).rc == 1
    assert clean.qga.exec(["/usr/bin/test", "-e", "/dev/shm/dirt"]).rc == 1
    assert b"sleep" not in clean.qga.exec(["/bin/ps", "-eo", "comm"]).stdout


def test_an_extra_process_is_noticed(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    machine = open_cell("origin").machine("origin")
    machine.qga.start(["/usr/bin/setsid", "-f", "/bin/sleep", "10000"])
    time.sleep(1)
    failed = [
        c for c in guest_checks(guest_facts(machine.qga, ""), baselines["origin"].expected) if not c.passed
    ]
    assert "processes are the baseline's" in {c.name for c in failed}


def failures(machine: Incarnation, expected: Expected) -> set[str]:
    """What a machine that was proved before fails now; the script that waited in it has ended."""
    checks = [*host_checks(machine, expected), *guest_checks(guest_facts(machine.qga, ""), expected)]
    return {c.name for c in checks if not c.passed}


def test_a_swapped_overlay_is_noticed(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    machine = open_cell("origin", plug=False).machine("origin")
    aside = machine.spec.overlay.with_suffix(".aside")
    machine.spec.overlay.rename(aside)
    create_overlay(machine.spec.overlay, baselines["origin"].folder / saved.DISK)
    failed = failures(machine, baselines["origin"].expected)
    assert {"overlay is the file made for this incarnation", "QEMU has this overlay open"} <= failed


def test_another_backing_file_is_noticed(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    machine = open_cell("origin", plug=False).machine("origin")
    failed = failures(machine, baselines["target-1"].expected)
    assert {"backing chain", "boot id is the baseline's", "baseline RAM is mapped privately"} <= failed


def test_a_guest_that_shows_what_was_recorded_is_noticed(
    open_cell: OpenCell, baselines: dict[str, RamBaseline]
) -> None:
    """All that root in a guest can forge: boot id, nonce, no sentinels. The list of processes, with the times at
    which they started, and the host's half do not come out right."""
    machine, expected = open_cell("origin", plug=False).machine("origin"), baselines["target-1"].expected
    machine.qga.write_file("/run/faked", f"{expected.boot_id}\n".encode())
    machine.qga.write_file("/run/hotcell-baseline", expected.nonce.encode())
    boot_id = "/proc/sys/kernel/random/boot_id"
    assert machine.qga.exec(["/bin/mount", "--bind", "/run/faked", boot_id]).rc == 0
    sentinels = ["/dev/shm/hotcell-sentinel", "/var/lib/hotcell-sentinel"]
    assert machine.qga.exec(["/bin/rm", *sentinels]).rc == 0
    assert failures(machine, expected) == {
        "backing chain",
        "baseline RAM is mapped privately",
        "processes are the baseline's",
    }


def test_a_machine_is_proved_once(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    """Nobody waits in it any more to be asked: what ran once is not shown to be clean again."""
    machine = open_cell("origin", plug=False).machine("origin")
    assert not prove(machine, baselines["origin"], time.monotonic()).proved


@pytest.mark.parametrize("part", [saved.RAM, saved.STATE, saved.DISK])
def test_one_changed_byte_of_a_baseline_is_noticed_before_use(
    part: str, shop: Workshop, baselines: dict[str, RamBaseline]
) -> None:
    original = baselines["world"]
    folder = original.folder.with_name(f"copy-{part}")
    shutil.copytree(original.folder, folder)
    try:
        facts = {name: saved.file_fact(folder / name) for name in original.files}
        copy = original.model_copy(update={"folder": folder, "files": facts})
        check_files(copy, read=True)
        with (folder / part).open("r+b") as f:
            f.seek((folder / part).stat().st_size // 2)
            byte = f.read(1)
            f.seek(-1, 1)
            f.write(bytes([byte[0] ^ 1]))
        with pytest.raises(ResetError, match=f"{part} is not what was saved"):
            saved.restore(shop, copy, "never")
        assert shop.ledger.things(owner="never") == []
    finally:
        shutil.rmtree(folder)


def test_a_failed_proof_withholds_the_machine(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    cell = open_cell("origin", plug=False)
    wrong = baselines["target-1"].model_copy(
        update={"expected": baselines["target-1"].expected.model_copy(update={"nonce": "another"})}
    )
    with pytest.raises(ResetError, match="withheld: target-1"):
        cell.restore_all([wrong], lambda _p: None)
    assert "target-1" not in cell.machines
    assert not cell.machine("origin").plugged


def test_ten_resets_leave_nothing_behind(
    open_cell: OpenCell, baselines: dict[str, RamBaseline], shop: Workshop
) -> None:
    cell = open_cell("origin")
    before = len(shop.ledger.things())
    for _ in range(10):
        assert cell.reset([baselines["origin"]], lambda _p: None)[0].proof.proved
    wait_until(lambda: len(shop.ledger.things()) == before, 30, "the old incarnations to be gone")
    assert len(list((shop.paths.cells / cell.id).iterdir())) == 1


def test_two_clones_of_one_baseline_draw_different_random_numbers(
    open_cell: OpenCell, baselines: dict[str, RamBaseline]
) -> None:
    drawn = set()
    for _ in range(3):
        cell = open_cell("origin", plug=False)
        drawn.add(cell.machine("origin").qga.exec(["/bin/cat", "/proc/sys/kernel/random/uuid"]).text)
        cell.close()
    assert len(drawn) == 3


def test_the_clock_is_right_after_a_reset(open_cell: OpenCell, baselines: dict[str, RamBaseline]) -> None:
    machine = open_cell("origin").machine("origin")
    before = time.time()
    told = float(machine.qga.exec(["/bin/date", "+%s.%N"]).text)
    assert before - 0.5 < told < time.time() + 0.5
