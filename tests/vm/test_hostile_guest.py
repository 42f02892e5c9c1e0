"""A real guest that lies, floods or falls silent on its channels to the host."""

from __future__ import annotations

import threading
import time

import pytest

from appliance.cell.events import MAX_TAMPERING, Event, EventStream
from appliance.cell.incarnation import Incarnation
from appliance.errors import GuestChannelError, GuestTamperError
from appliance.trial.probing import probe

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]
QGA_PORT = "/dev/virtio-ports/org.qemu.guest_agent.0"
EVENTS = "/dev/virtio-ports/org.hotcell.events"

# Takes the place of the guest agent: answers every line with what TALK says, or not at all.
SHIM = f"""
import os, sys, time
talk = sys.argv[1]
os.system("systemctl stop qemu-guest-agent")
fd = os.open({QGA_PORT!r}, os.O_RDWR)
while True:
    line = os.read(fd, 65536)
    if not line: time.sleep(0.05); continue
    if talk == "garbage": os.write(fd, os.urandom(4096) + b"\\n")
    elif talk == "string-pid": os.write(fd, b'{{"return": {{"pid": "1; rm -rf /"}}}}\\n')
    elif talk == "flood":
        for _ in range(100): os.write(fd, b"x" * (1 << 20))
"""


def replace_agent(machine: Incarnation, talk: str) -> None:
    machine.qga.write_file("/run/shim.py", SHIM.encode())
    machine.qga.start(
        ["/usr/bin/systemd-run", "--quiet", "--collect", "/usr/bin/python3", "/run/shim.py", talk]
    )
    time.sleep(6)


@pytest.mark.parametrize("talk", ["garbage", "string-pid", "nothing", "flood"])
def test_a_lying_agent_is_an_error_of_ours_or_a_finding_never_a_result(
    vm_machine: Incarnation, talk: str
) -> None:
    replace_agent(vm_machine, talk)
    began = time.monotonic()
    with pytest.raises((GuestChannelError, GuestTamperError)):
        vm_machine.qga.exec(["/bin/true"])
    assert time.monotonic() - began < 60
    found = probe(vm_machine, "origin-live")
    assert found.model is None
    assert found.problem


class Collector:
    """What arrives from an event port."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.tampering: list[str] = []


# The port takes a large write in pieces.
WRITER = f"""
port = open({EVENTS!r}, 'wb', buffering=0)
def write(data):
    while data:
        data = data[port.write(data):]
"""


def say(machine: Incarnation, script: str) -> Collector:
    got = Collector()
    stream = EventStream(machine.spec.events_socket, got.events.append, got.tampering.append)
    try:
        done = machine.qga.python(f"{WRITER}\n{script}", timeout_s=60)
        assert done.rc == 0, done.stderr
        time.sleep(1)
    finally:
        stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("events-")]
    return got


GOOD = '{"v":1,"kind":"note","step":1,"text":"hello","data":{}}'


def test_honest_lines_arrive_between_hostile_ones(vm_machine: Incarnation) -> None:
    got = say(
        vm_machine,
        f"good = {GOOD!r}.encode() + b'\\n'\n"
        "write(good + b'{broken\\n' + b'\\xff\\xfe\\n' + good)\n"
        "write(b'x' * (10 << 20) + b'\\n' + good)\n"
        'write(b\'{"v":1,"kind":"../../etc","step":-1,"text":"\\\\u001b[2J","data":{}}\\n\')\n',
    )
    assert [e.text for e in got.events] == ["hello"] * 3
    assert len(got.tampering) == 4
    assert all(t.isprintable() for t in got.tampering)


def test_a_flood_of_bad_lines_is_bounded(vm_machine: Incarnation) -> None:
    got = say(vm_machine, "for _ in range(200): write(b'{\\n' * 100)\n")
    assert got.events == []
    assert len(got.tampering) == MAX_TAMPERING
