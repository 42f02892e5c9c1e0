"""Real machines that stand by: swapped in clean, with their clock set, and never two of one address on a segment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from appliance.cell.baseline import Baseline, Workshop
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.overlay import create_overlay
from appliance.cell.standby import STANDBY, StandbyPool
from appliance.host.clock import wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
WAIT_S = 60.0


@pytest.fixture
def pool(shop: Workshop) -> Iterator[StandbyPool]:
    made = StandbyPool(shop)
    yield made
    made.close()
    assert shop.ledger.things(owner=STANDBY) == []


@pytest.fixture
def cell(shop: Workshop, pool: StandbyPool, baselines: dict[str, Baseline]) -> Iterator[Cell]:
    """An origin and a target, plugged, with a standby of each."""
    made = Cell("c-standby", shop, pool)
    made.open()
    both = [baselines["origin"], baselines["target-1"]]
    made.restore_all(both, lambda _p: None)
    made.plug_all()
    pool.keep(made.id, both)
    assert pool.wait_ready(WAIT_S), pool.missing()
    yield made
    made.close()
    assert shop.ledger.things(owner=made.id) == []


def reaches(machine: Incarnation, address: str) -> bool:
    """Whether a host of that address answers a connection, also by refusing it."""
    script = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], 9), 5)\n"
        "except ConnectionRefusedError: pass\n"
    )
    return machine.qga.python(script, address).rc == 0


def test_a_swap_gives_the_clean_machine_with_the_right_clock(
    cell: Cell, pool: StandbyPool, baselines: dict[str, Baseline]
) -> None:
    old = cell.machine("origin")
    old.qga.write_file("/root/dirt", b"x" * 100_000)
    old.qga.start(["/bin/sleep", "10000"])
    time.sleep(3)  # the standby's clock stands still meanwhile
    done = cell.reset([baselines["origin"]], lambda _p: None)[0]
    new = cell.machine("origin")
    assert (done.direct_because, done.machine) == ("", new)
    assert (new.state, new.plugged, old.plugged) == (DomainState.RUNNING, True, False)
    assert new.qga.exec(["/usr/bin/test", "-e", "/root/dirt"]).rc == 1
    assert b"sleep" not in new.qga.exec(["/bin/ps", "-eo", "comm"]).stdout
    told = float(new.qga.exec(["/bin/date", "+%s.%N"]).text)
    assert abs(told - time.time()) < 1
    wait_until(lambda: not old.folder.exists(), WAIT_S, "the old incarnation to be gone")


def test_what_is_swapped_in_speaks_on_the_segment_under_the_same_address(
    cell: Cell, pool: StandbyPool, baselines: dict[str, Baseline]
) -> None:
    target, address = cell.machine("target-1"), cell.machine("origin").spec.machine.address
    assert reaches(target, address)
    for _ in range(3):
        assert pool.wait_ready(WAIT_S), pool.missing()
        cell.reset([baselines["origin"]], lambda _p: None)
        assert reaches(target, address)


def test_a_group_is_swapped_as_one(cell: Cell, baselines: dict[str, Baseline]) -> None:
    done = cell.reset([baselines["origin"], baselines["target-1"]], lambda _p: None)
    assert [r.direct_because for r in done] == ["", ""]
    assert all(m.plugged for m in cell.machines.values())


def test_a_standby_cannot_reach_a_cell(cell: Cell, pool: StandbyPool, baselines: dict[str, Baseline]) -> None:
    """Let one run where it stands: its peer's address answers the plugged machine, not the standby."""
    waiting = pool.ready()[baselines["target-1"].id]
    waiting.resume()
    address = cell.machine("origin").spec.machine.address
    assert reaches(cell.machine("target-1"), address)
    assert not reaches(waiting, address)


def _exchange_overlay(pool: StandbyPool, key: str, frozen: Baseline) -> None:
    top = pool.ready()[key].spec.overlay
    top.rename(top.with_name("aside"))
    create_overlay(top, frozen.expected.chain[0])


def _let_it_run(pool: StandbyPool, key: str, frozen: Baseline) -> None:
    pool.ready()[key].resume()


def _kill(pool: StandbyPool, key: str, frozen: Baseline) -> None:
    machine = pool.ready()[key]
    machine.kill()
    wait_until(lambda: machine.state is DomainState.GONE, WAIT_S, "libvirt to notice")


@pytest.mark.parametrize("change", [_exchange_overlay, _let_it_run, _kill])
def test_a_standby_that_was_meddled_with_is_withheld_and_the_reset_is_direct(
    cell: Cell,
    pool: StandbyPool,
    baselines: dict[str, Baseline],
    change: Callable[[StandbyPool, str, Baseline], None],
) -> None:
    change(pool, baselines["origin"].id, baselines["origin"])
    done = cell.reset([baselines["origin"]], lambda _p: None)[0]
    assert "withheld" in done.direct_because
    assert done.proof.proved
