"""What every machine does, in memory or real: one check a function, the docstring says what is promised.

``tests/conformance`` runs them against the machines in memory that the unit tests rely on, ``tests/vm`` against
real ones: a fake that behaves unlike a machine would make the tests that use it worthless.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from appliance.cell import proof
from appliance.cell.incarnation import Incarnation
from appliance.cell.libvirt_door import DomainState
from appliance.cell.qga import MAX_OUTPUT
from appliance.errors import GuestChannelError

Check = Callable[[Incarnation], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Enter a check into the suite."""
    CHECKS.append(function)
    return function


@check
def it_answers(machine: Incarnation) -> None:
    """A running machine answers a ping."""
    assert machine.state is DomainState.RUNNING
    assert machine.qga.ping()


@check
def status_and_streams_come_back(machine: Incarnation) -> None:
    """Exit status, standard output and standard error of a program, apart."""
    done = machine.qga.exec(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.rc, done.stdout, done.stderr, done.truncated) == (3, b"out\n", b"err\n", False)


@check
def bytes_are_bytes(machine: Incarnation) -> None:
    """What is no text comes back as it is, and standard input goes in as it is."""
    data = bytes(range(256)) * 10
    assert machine.qga.exec(["/bin/cat"], stdin=data).stdout == data


@check
def a_signal_is_told(machine: Incarnation) -> None:
    """A program that a signal ends has 128 and the signal's number."""
    assert machine.qga.exec(["/bin/sh", "-c", "kill -9 $$"]).rc == 137
    assert machine.qga.exec(["/bin/sh", "-c", "kill -15 $$"]).rc == 143


@check
def a_program_that_does_not_end_is_given_up(machine: Incarnation) -> None:
    """The limit is an error of the channel, and the machine answers afterwards."""
    with pytest.raises(GuestChannelError, match="longer than"):
        machine.qga.exec(["/bin/sleep", "5"], timeout_s=0.3)
    assert machine.qga.ping()


@check
def a_program_that_is_not_there_is_refused(machine: Incarnation) -> None:
    """The agent's own refusal, in printable words."""
    with pytest.raises(GuestChannelError, match="refused guest-exec") as e:
        machine.qga.exec(["/no/such/program"])
    assert str(e.value).isprintable()


@check
def large_output_is_cut_and_told(machine: Incarnation) -> None:
    """3 MB of output are no error: the first MiB is kept, and the rest is told to be missing."""
    done = machine.qga.exec(["/usr/bin/head", "-c", "3000000", "/dev/zero"], timeout_s=60)
    assert (done.rc, len(done.stdout), done.truncated) == (0, MAX_OUTPUT, True)


@check
def an_argument_is_never_code(machine: Incarnation) -> None:
    """No shell sees what is passed as an argument."""
    nasty = "$(id); `id` \"'\\ \n|&"
    assert machine.qga.exec(["/bin/echo", "-n", nasty]).stdout == nasty.encode()


@check
def a_python_script_gets_its_arguments(machine: Incarnation) -> None:
    """Our scripts go in over standard input and never lie on the guest's disk."""
    done = machine.qga.python("import sys; print(sys.argv[1:], sys.flags.isolated)", "a b", "'")
    assert done.text == "['a b', \"'\"] 1\n"


@check
def a_file_arrives_whole_with_mode_and_owner(machine: Incarnation) -> None:
    """100 KiB in several pieces, byte for byte."""
    data = bytes(i * 31 % 251 for i in range(100 * 1024))
    machine.qga.write_file("/home/subject/conformance", data, mode=0o640, owner="subject:subject")
    told = machine.qga.exec(["/usr/bin/sha256sum", "/home/subject/conformance"]).text
    assert told.split(" ")[0] == hashlib.sha256(data).hexdigest()
    stat = machine.qga.exec(["/usr/bin/stat", "-c", "%a %U:%G", "/home/subject/conformance"])
    assert stat.text == "640 subject:subject\n"


@check
def a_shorter_file_replaces_a_longer_one(machine: Incarnation) -> None:
    """Nothing of the old content is left."""
    machine.qga.write_file("/run/conformance", b"x" * 70_000)
    machine.qga.write_file("/run/conformance", b"y")
    told = machine.qga.exec(["/usr/bin/sha256sum", "/run/conformance"]).text
    assert told.split(" ")[0] == hashlib.sha256(b"y").hexdigest()


@check
def filesystems_freeze_and_thaw(machine: Incarnation) -> None:
    """At least the root filesystem, and programs run again afterwards."""
    assert machine.qga.freeze_filesystems() >= 1
    assert machine.qga.thaw_filesystems() >= 1
    assert machine.qga.exec(["/bin/true"]).rc == 0


@check
def facts_tell_a_machine_and_sentinels_stay(machine: Incarnation) -> None:
    """The facts script's answer is of the schema; what it plants is there the next time."""
    before = proof.guest_facts(machine.qga, "")
    assert before.boot_id
    assert before.processes
    proof.guest_facts(machine.qga, "conformance")
    after = proof.guest_facts(machine.qga, "")
    assert (after.ram_sentinel, after.disk_sentinel) == ("conformance", "conformance")
    assert after.boot_id == before.boot_id


@check
def a_paused_machine_is_silent_and_comes_back(machine: Incarnation) -> None:
    """Pausing stops every answer, resuming brings them back; the boot stays the same."""
    machine.pause()
    assert machine.state is DomainState.PAUSED
    assert not machine.qga.ping(timeout_s=1)
    machine.resume()
    state: DomainState = machine.state
    assert state is DomainState.RUNNING
    machine.wait_for_agent(30)


@check
def plugging_and_unplugging_may_be_repeated(machine: Incarnation) -> None:
    """Each is safe at any time, and ``plugged`` tells what is."""
    for _ in range(2):
        machine.unplug()
        assert not machine.plugged
    for _ in range(2):
        machine.plug()
        assert machine.plugged
    assert machine.qga.ping()


@check
def qemu_tells_its_one_tap(machine: Incarnation) -> None:
    """The monitor shows the network back end that the seal's examination looks for."""
    assert machine.hmp("info network").count("type=tap") == 1


@check
def the_console_is_printable_and_bounded(machine: Incarnation) -> None:
    """Whatever the guest wrote there."""
    tail = machine.console_tail(500)
    assert len(tail) <= 500
    assert all(c.isprintable() or c == "\n" for c in tail)


@check
def destroying_may_be_repeated_and_leaves_nothing(machine: Incarnation) -> None:
    """Domain, folder and answers are gone."""
    for _ in range(2):
        machine.destroy()
    assert machine.state is DomainState.GONE
    assert not machine.folder.exists()
    assert not machine.qga.ping(timeout_s=1)
