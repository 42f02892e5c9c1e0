"""Clean means proven clean: each way to fake a clean machine fails a check of its own."""

from __future__ import annotations

import json
import mmap
import os
import pty
import subprocess
import sys
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cell import netlink, overlay, proof
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Ledger
from appliance.cell.proof import (
    Check,
    Expected,
    GuestFacts,
    Proof,
    ask_waiting,
    guest_checks,
    guest_facts,
    host_checks,
    require_clock_set,
    tell_time,
    waiting_facts,
)
from appliance.errors import CommandError, GuestChannelError, GuestTamperError
from tests.fakes.machine import FACTS, FakeLibvirt, FakeNet, incarnation

EXPECTED = Expected(
    boot_id="b0",
    nonce="n0",
    processes=("init 1 1", "sshd 40 200"),
    chain=(Path("/b/disk"),),
    ram_file=Path("/b/ram"),
)
CLEAN: dict[str, object] = FACTS | {"processes": ["init 1 1", "sshd 40 200"]}


def failed(**changes: object) -> list[str]:
    facts = GuestFacts.model_validate(CLEAN | changes)
    return [c.name for c in guest_checks(facts, EXPECTED) if not c.passed]


def test_the_baselines_own_facts_pass() -> None:
    assert failed() == []
    assert len(list(guest_checks(GuestFacts.model_validate(CLEAN), EXPECTED))) == 6


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"boot_id": "b1"}, "boot id is the baseline's"),  # rebooted, or another machine
        ({"boot_id": ""}, "boot id is the baseline's"),
        ({"nonce": "n1"}, "RAM holds the baseline's nonce"),  # another baseline's RAM
        ({"nonce": ""}, "RAM holds the baseline's nonce"),  # a cold boot
        ({"ram_sentinel": "0a1b2c3d"}, "no RAM sentinel of an earlier run"),  # the RAM was not reset
        ({"disk_sentinel": "0a1b2c3d"}, "no disk sentinel of an earlier run"),  # the disk was not reset
        ({"processes": ["init 1 1", "sshd 40 200", "evil 99 900"]}, "processes are the baseline's"),
        ({"processes": ["init 1 1"]}, "processes are the baseline's"),
        ({"processes": ["init 1 1", "sshd 40 201"]}, "processes are the baseline's"),  # restarted, same name
        ({"processes": ["init 1 1", "sshd 41 200"]}, "processes are the baseline's"),
        ({"processes": []}, "processes are the baseline's"),
        ({"reseeded": False}, "the random generator was reseeded"),
    ],
)
def test_each_way_to_fake_a_clean_machine_fails_its_check(changes: dict[str, object], check: str) -> None:
    assert failed(**changes) == [check]


@given(st.fixed_dictionaries({k: st.text(max_size=20) for k in ("boot_id", "nonce", "ram_sentinel")}))
def test_only_the_expected_facts_pass(changes: dict[str, str]) -> None:
    same = all(changes[k] == CLEAN[k] for k in changes)
    assert (failed(**changes) == []) is same


def test_a_guests_words_in_a_check_are_bounded_and_printable() -> None:
    facts = GuestFacts.model_validate(
        CLEAN | {"processes": ["\x1b[2J" + "x" * 200] * 400, "nonce": "\n" * 256}
    )
    for check in guest_checks(facts, EXPECTED):
        assert check.found.isprintable()
        assert len(check.found) < 500


@pytest.mark.parametrize(
    "reply",
    [
        {},
        CLEAN | {"verdict": "clean"},
        CLEAN | {"boot_id": 1},
        CLEAN | {"boot_id": "x" * 257},
        CLEAN | {"processes": ["x"] * 501},
        CLEAN | {"processes": "init"},
        CLEAN | {"processes": [1]},
        [],
        None,
    ],
)
def test_facts_of_another_shape_are_tampering(machine: Incarnation, reply: object) -> None:
    machine._libvirt.guests["origin"].facts = reply  # type: ignore[attr-defined]
    with pytest.raises(GuestTamperError, match="no valid facts"):
        guest_facts(machine.qga, "i1")


def test_facts_of_an_honest_guest(machine: Incarnation) -> None:
    assert guest_facts(machine.qga, "i1") == GuestFacts.model_validate(FACTS)


def test_the_script_that_waits_in_a_clone_is_asked_once(machine: Incarnation) -> None:
    ask_waiting(machine.open_port(), "i1")
    assert waiting_facts(machine.open_port()) == GuestFacts.model_validate(FACTS)
    assert machine._libvirt.guests["origin"].facts["ram_sentinel"] == "i1"  # type: ignore[attr-defined]


def test_a_clone_in_which_nobody_waits_is_told(machine: Incarnation) -> None:
    machine._libvirt.guests["origin"].nobody_waits = True  # type: ignore[attr-defined]
    ask_waiting(machine.open_port(), "i1")
    with pytest.raises(GuestChannelError, match="no answer"):
        waiting_facts(machine.open_port())


def test_an_answer_of_another_shape_is_tampering(machine: Incarnation) -> None:
    machine._libvirt.guests["origin"].facts = [CLEAN]  # type: ignore[attr-defined]
    ask_waiting(machine.open_port(), "i1")
    with pytest.raises(GuestTamperError, match="no valid facts"):
        waiting_facts(machine.open_port())


def test_the_clock_is_set_by_the_script_that_stayed(machine: Incarnation) -> None:
    ask_waiting(machine.open_port(), "i1", stay=True)
    waiting_facts(machine.open_port())
    told = tell_time(machine.open_port())
    require_clock_set(machine.open_port(), told)
    guest = machine._libvirt.guests["origin"]  # type: ignore[attr-defined]
    assert abs(guest.clock - time.time()) < 5


def test_another_time_than_the_hosts_is_tampering(
    machine: Incarnation, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine._libvirt.guests["origin"].clock_says = "1.5"  # type: ignore[attr-defined]
    told = tell_time(machine.open_port())
    with pytest.raises(GuestTamperError, match=r"set to 1\.5"):
        require_clock_set(machine.open_port(), told)


@pytest.mark.parametrize("stay", ["", "stay"])
def test_the_script_waits_answers_and_ends(tmp_path: Path, stay: str) -> None:
    """The script as it is saved in a baseline, with a terminal in its port's place."""
    host, guest = pty.openpty()
    tty.setraw(guest)
    script = proof._SCRIPT.replace("time.clock_settime(", "print(").replace("os.sync()", "")
    script = script.replace("/dev/virtio-ports/org.hotcell.proof", os.ttyname(guest))
    script = script.replace('"/dev/shm/', f'"{tmp_path}/shm-').replace('"/var/lib/', f'"{tmp_path}/disk-')
    waiting = subprocess.Popen([sys.executable, "-I", "-", "--wait"], stdin=subprocess.PIPE, text=True)
    assert waiting.stdin is not None
    waiting.stdin.write(script)
    waiting.stdin.close()
    with os.fdopen(host, "r+b", buffering=0) as port:
        port.write(f"i1 1.5 {'00' * 32} {stay}\n".encode())
        facts = GuestFacts.model_validate_json(port.readline())
        if stay:
            assert waiting.poll() is None
            port.write(b"2.5\n")
            assert port.readline() == b"2.5\n"
        assert waiting.wait(20) == 0
    os.close(guest)
    assert (facts.ram_sentinel, facts.disk_sentinel) == ("", ""), "facts come before the sentinels"
    assert [(tmp_path / n).read_text() for n in ("shm-hotcell-sentinel", "disk-hotcell-sentinel")] == [
        "i1"
    ] * 2
    assert str(waiting.pid) in [p.split(" ")[1] for p in facts.processes], (
        "it counts itself, as it was recorded"
    )


def test_kernel_threads_are_no_processes_whenever_they_came(tmp_path: Path) -> None:
    parents = {
        1: 0,
        2: 0,
        3: 1,
        40: 1,
        41: 40,
        42: 2,
    }  # only by the list is 3 a kernel thread, only by its parent 42
    for pid, parent in parents.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (a b) c) S {parent} {'0 ' * 17}{pid}00 0")
    (tmp_path / "2/task/2").mkdir(parents=True)
    (tmp_path / "2/task/2/children").write_text("3 ")
    (tmp_path / "50").mkdir()  # one that has ended since it was listed
    functions: dict[str, Any] = {}
    exec(proof._SCRIPT.partition("\nif sys.argv")[0].replace("/proc", str(tmp_path)), functions)
    assert functions["processes"](all_of_us=True) == ["a b) c 1 100", "a b) c 40 4000", "a b) c 41 4100"]


def check(passed: bool) -> Check:
    return Check(name="x", passed=passed, expected="a", found="b")


@pytest.mark.parametrize(
    ("checks", "proved"), [((), False), ((True,), True), ((True, False), False), ((False,), False)]
)
def test_proved_means_some_checks_and_all_of_them(checks: tuple[bool, ...], proved: bool) -> None:
    made = Proof(machine="m", incarnation="i", baseline="b", seconds=1, checks=tuple(map(check, checks)))
    assert made.proved is proved
    assert bool(made.failures) is (False in checks)


# -- the host's half, against this process in QEMU's place ----------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Incarnation:
    FakeNet().install(monkeypatch)
    made = incarnation(tmp_path, FakeLibvirt(tmp_path), Ledger(tmp_path / "l.db"))
    made.start()
    made.resume()
    return made


@pytest.fixture
def honest(machine: Incarnation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Expected]:
    """This process has the overlay open and the RAM file mapped privately, as a clone's QEMU has."""
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(4096))
    chain = (machine.spec.overlay, tmp_path / "disk", tmp_path / "image")
    monkeypatch.setattr(overlay, "backing_chain", lambda _top: chain)
    with machine.spec.overlay.open("rb"), ram.open("r+b") as f:
        mapped = mmap.mmap(f.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        yield EXPECTED.model_copy(update={"chain": chain[1:], "ram_file": ram})
        mapped.close()


def host_failed(machine: Incarnation, expected: Expected) -> list[str]:
    return [c.name for c in host_checks(machine, expected) if not c.passed]


def test_an_honest_clone_passes_the_hosts_half(machine: Incarnation, honest: Expected) -> None:
    assert host_failed(machine, honest) == []
    assert len(list(host_checks(machine, honest))) == 5


def test_another_backing_chain_is_seen(machine: Incarnation, honest: Expected) -> None:
    for chain in ((), honest.chain[:1], (*honest.chain, Path("/x")), (Path("/other"), honest.chain[1])):
        assert host_failed(machine, honest.model_copy(update={"chain": chain})) == ["backing chain"]


def test_an_overlay_that_was_exchanged_is_seen(machine: Incarnation, honest: Expected) -> None:
    top = machine.spec.overlay
    top.rename(top.with_name("old"))
    top.write_bytes(b"another")
    assert host_failed(machine, honest) == [
        "overlay is the file made for this incarnation", "QEMU has this overlay open",
    ]  # fmt: skip


def test_ram_that_is_shared_is_not_a_reset(machine: Incarnation, honest: Expected, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(4096))
    with shared.open("r+b") as f, mmap.mmap(f.fileno(), 4096):
        wrong = honest.model_copy(update={"ram_file": shared})
        assert host_failed(machine, wrong) == ["baseline RAM is mapped privately"]


def test_ram_of_another_file_is_not_the_baselines(machine: Incarnation, honest: Expected) -> None:
    wrong = honest.model_copy(update={"ram_file": Path("/b/ram")})
    assert host_failed(machine, wrong) == ["baseline RAM is mapped privately"]


@pytest.mark.parametrize("pid", [None, 1 << 22])
def test_without_a_process_nothing_is_proved(machine: Incarnation, honest: Expected, pid: int | None) -> None:
    machine.pid = pid
    assert len(host_failed(machine, honest)) == 3


def test_an_overlay_that_cannot_be_examined_is_not_proved(
    machine: Incarnation, honest: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_top: Path) -> tuple[Path, ...]:
        raise CommandError("qemu-img: Image is not in qcow2 format")

    monkeypatch.setattr(overlay, "backing_chain", refuses)
    assert host_failed(machine, honest) == ["backing chain"]
    machine.spec.overlay.unlink()
    assert "overlay is the file made for this incarnation" in host_failed(machine, honest)


def test_a_qemu_of_another_namespace_is_seen(
    machine: Incarnation, honest: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = netlink.namespace_inode()
    monkeypatch.setattr(proof, "namespace_inode", lambda p="self": own if p == "self" else own + 1)
    assert host_failed(machine, honest) == ["QEMU runs in the sealed namespace"]


# -- the script itself, here: it may read, and not set our clock ----------------------------------------


def test_the_facts_script_prints_what_the_schema_takes(tmp_path: Path) -> None:
    harmless = proof._SCRIPT.replace("time.clock_settime(", "max(").replace("os.sync()", "")
    assert harmless != proof._SCRIPT
    bystander = subprocess.Popen(["/bin/sleep", "30"])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-", "", "1.5", "00" * 32],
            input=harmless,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        bystander.kill()
        bystander.wait()
    facts = GuestFacts.model_validate_json(done.stdout)
    mine = [p.split(" ")[:2] for p in facts.processes]
    assert ["sleep", str(bystander.pid)] in mine
    assert str(os.getpid()) not in [pid for _, pid in mine], "what asks is not counted"
    assert json.loads(done.stdout)["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
