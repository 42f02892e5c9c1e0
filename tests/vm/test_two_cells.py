"""Two cells at once whose machines have the same names, addresses and MACs: each sees its own and nothing else."""

from __future__ import annotations

import concurrent.futures
import json
import secrets

import pytest

from appliance.cell.baseline import Baseline, Workshop
from appliance.cell.cell import Cell
from appliance.cell.incarnation import Incarnation
from appliance.cell.isolation import SealFact, paths_from_all
from appliance.cell.libvirt_door import DomainState
from appliance.host.clock import wait_until
from appliance.pipeline.opening import links_of
from appliance.pipeline.process import cell_facts
from tests.fakes.namespace import master_of
from tests.vm.conftest import OpenCell

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
PYTHON = "/usr/bin/python3"
RESETS = 5

# Answers every connection with its cell's word, and keeps every datagram that reaches it.
SERVER = """
import socket, sys, threading
word = sys.argv[1].encode()
def datagrams():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("", 9001))
    while True:
        with open("/dev/shm/heard", "ab") as f:
            f.write(s.recv(200) + b"\\n")
def answer(c):
    while c.recv(1):
        c.sendall(word)
threading.Thread(target=datagrams, daemon=True).start()
l = socket.create_server(("", 9000))
open("/dev/shm/ready", "w").close()
while True:
    threading.Thread(target=answer, args=(l.accept()[0],), daemon=True).start()
"""
ASK = """
import socket, sys
c = socket.create_connection(("10.77.0.21", 9000), timeout=10)
c.sendall(b"?")
sys.stdout.write(c.recv(100).decode())
"""
SHOUT = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
for to in ("10.77.0.255", "255.255.255.255", "10.77.0.21"):
    s.sendto(sys.argv[1].encode(), (to, 9001))
"""
# One connection, asked over and over; the file tells how often and the longest silence.
KEEP_ASKING = """
import json, os, socket, time
c = socket.create_connection(("10.77.0.21", 9000), timeout=60)
n, last, longest = 0, time.monotonic(), 0.0
while True:
    c.sendall(b"?")
    word = c.recv(100).decode()
    now = time.monotonic()
    n, longest, last = n + 1, max(longest, now - last), now
    with open("/dev/shm/asked.new", "w") as f:
        json.dump([n, longest, word], f)
    os.rename("/dev/shm/asked.new", "/dev/shm/asked")
    time.sleep(0.05)
"""


@pytest.fixture
def pair(open_cell: OpenCell) -> tuple[Cell, Cell]:
    """Two cells, each with an origin and a target that serves the cell's id."""
    one, two = open_cell("origin", "target-1"), open_cell("origin", "target-1")
    for cell in (one, two):
        serve(cell)
    return one, two


def serve(cell: Cell) -> None:
    target = cell.machine("target-1")
    target.qga.start([PYTHON, "-c", SERVER, cell.id])
    wait_until(
        lambda: target.qga.exec(["/usr/bin/test", "-e", "/dev/shm/ready"]).rc == 0, 60, "the target to serve"
    )


def asked(cell: Cell) -> str:
    """What the origin of a cell gets from "its" target; empty if nothing answers."""
    return cell.machine("origin").qga.exec([PYTHON, "-c", ASK], timeout_s=60).text


def heard(machine: Incarnation) -> str:
    return machine.qga.exec(["/bin/sh", "-c", "cat /dev/shm/heard 2>/dev/null; true"]).text


def test_equal_addresses_lead_to_the_own_cell_only(pair: tuple[Cell, Cell]) -> None:
    one, two = pair
    for name in ("origin", "target-1"):
        first, second = one.machine(name).spec.machine, two.machine(name).spec.machine
        assert (first.address, first.mac) == (second.address, second.mac)
    assert [asked(one), asked(two)] == [one.id, two.id]
    # With its own target gone, the other cell's target, alive at the same address, is not reached in its place.
    one.machine("target-1").unplug()
    assert [asked(one), asked(two)] == ["", two.id]


def test_a_broadcast_stays_in_its_cell(pair: tuple[Cell, Cell]) -> None:
    for here, there in (pair, pair[::-1]):
        word = secrets.token_hex(8)
        sent = here.machine("origin").qga.exec([PYTHON, "-c", SHOUT, word], timeout_s=60)
        assert sent.rc == 0, sent.stderr
        wait_until(lambda h=here, w=word: w in heard(h.machine("target-1")), 20, "the own target to hear it")  # type: ignore[misc]
        assert word not in heard(there.machine("target-1"))


def test_every_tap_is_in_its_own_cells_bridge_and_the_seal_holds_for_both(
    pair: tuple[Cell, Cell], shop: Workshop, sealed: int
) -> None:
    for cell in pair:
        assert {master_of(m.spec.tap) for m in cell.machines.values()} == {cell.bridge}
    assert pair[0].bridge != pair[1].bridge

    def facts_with_rows_of(*known: Cell) -> list[SealFact]:
        owners = {c.id for c in known}
        found = [cell_facts(cell, lambda: links_of(shop.ledger, owners), sealed) for cell in pair]
        return [fact for of_one in found for fact in of_one]

    assert [f for f in facts_with_rows_of(*pair) if not f.passed] == []
    # The control: without the rows of one cell, its links are strangers.
    assert [f.name for f in facts_with_rows_of(pair[0]) if not f.passed]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for results in pool.map(lambda c: paths_from_all(list(c.machines.values())), pair):
            assert {r.outcome for r in results} == {"held"}, [r for r in results if r.outcome != "held"]


def test_resets_in_one_do_not_disturb_the_other(
    pair: tuple[Cell, Cell], baselines: dict[str, Baseline]
) -> None:
    one, two = pair
    two.machine("origin").qga.start([PYTHON, "-c", KEEP_ASKING])

    def so_far() -> tuple[int, float, str] | None:
        text = two.machine("origin").qga.exec(["/bin/sh", "-c", "cat /dev/shm/asked || true"]).text
        return tuple(json.loads(text)) if text else None

    before = wait_until(so_far, 60, "the first answer")
    incarnations = {m.name: (m.id, m.pid) for m in two.machines.values()}
    for _ in range(RESETS):
        renewed = one.reset([baselines["origin"], baselines["target-1"]], lambda _p: None)
        assert all(r.proof.proved for r in renewed), [r.proof.failures for r in renewed]
    after = so_far()
    assert after is not None
    assert {m.name: (m.id, m.pid) for m in two.machines.values()} == incarnations
    assert all(m.plugged and m.state is DomainState.RUNNING for m in two.machines.values())
    assert after[0] > before[0] + RESETS, "the one connection went on all the time"
    assert after[2] == two.id
    assert after[1] < 10, f"the longest silence was {after[1]:.1f} s"
    serve(one)
    assert [asked(one), asked(two)] == [one.id, two.id]


def test_both_are_reset_at_the_same_time(pair: tuple[Cell, Cell], baselines: dict[str, Baseline]) -> None:
    both = [baselines["origin"], baselines["target-1"]]
    before = [{m.id for m in cell.machines.values()} for cell in pair]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for renewed in pool.map(lambda cell: cell.reset(both, lambda _p: None), pair):
            assert all(r.proof.proved for r in renewed), [r.proof.failures for r in renewed]
    for cell, old in zip(pair, before, strict=True):
        assert not old & {m.id for m in cell.machines.values()}
        serve(cell)
        assert asked(cell) == cell.id
