"""Machines without machines: a libvirt, a network and guests in memory, below the real ``Incarnation``.

What is faked is only what lies outside of the package: libvirt's door, netlink, and the agent in the guest.
``FakeGuest`` is an honest agent unless it is told otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cell import isolation, netlink, proof
from appliance.cell.domain import OWNER_NS, PROOF_PORT, DomainSpec
from appliance.cell.incarnation import Incarnation
from appliance.cell.ledger import Ledger
from appliance.cell.libvirt_door import DomainFact, DomainState
from appliance.cell.netlink import Link, NamespaceView
from appliance.cell.spec import GuestImage, MachineSpec, bridge_name, tap_name
from appliance.errors import GuestChannelError, GuestTamperError, LabError
from appliance.model import Accelerator, Role
from appliance.trial import probing

DIGEST = "d" * 64
NVRAM_TEMPLATE = b"_FVH no variables"
# Real programs that a guest in memory may run on this host; there is no other.
HARMLESS = {
    "/bin/sh", "/bin/cat", "/bin/sleep", "/bin/echo", "/bin/true", "/usr/bin/head", "/usr/bin/python3",
}  # fmt: skip
ROLES = {"origin": Role.ORIGIN, "world": Role.WORLD}
HELD = {
    key: ("timeout" if key == negative else "open")
    for negative, positive in isolation._TWINS.values()
    for key in (negative, positive)
}
FACTS: dict[str, object] = {
    "boot_id": "b0", "nonce": "n0", "ram_sentinel": "", "disk_sentinel": "", "processes": ["init 1 1"],
    "reseeded": True,
}  # fmt: skip


def machine_spec(name: str = "origin", folder: Path = Path("/images")) -> MachineSpec:
    """A small machine of the role that its name tells."""
    role = ROLES.get(name, Role.TARGET)
    recipe = {Role.ORIGIN: "subject-cpu", Role.TARGET: "target-cpu", Role.WORLD: "world"}[role]
    image = GuestImage(
        recipe=recipe, digest=DIGEST, disk_sha256=DIGEST, disk=folder / "disk.qcow2", kernel=folder / "vmlinuz",
        initrd=folder / "initrd.img",
    )  # fmt: skip
    return MachineSpec(name=name, role=role, image=image, memory_mib=512, vcpus=2)


Program = Callable[[list[str], bytes], tuple[int, bytes, bytes]]


class FakeGuest:
    """The agent of a guest, as a channel. Programs are ``programs``, or a few harmless ones of this host.

    ``broken`` may answer a command with any text, or raise; None leaves it to the honest agent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.broken: Callable[[str], str | None] = lambda _command: None
        self.calls: list[str] = []
        self.frozen = 0
        self.facts = dict(FACTS)
        self.paths = dict(HELD)
        self.serving: dict[str, object] = {
            "model": None, "agent": None, "listeners": [22], "problem": "",
            "unasked": {"ports": 0, "models": 0, "agents": 0},
        }  # fmt: skip
        self.agent_runs = False
        self.clock, self.clock_says = 0.0, ""
        self.nobody_waits, self.hung_up = False, 0
        self.on_agent: Callable[[list[str]], None] = lambda _argv: None
        self.owners: dict[str, str] = {}
        self._running: dict[int, subprocess.Popen[bytes] | tuple[int, bytes, bytes]] = {}
        self._handles: dict[int, str] = {}
        self._number = 100
        self.programs: dict[str, Program] = {
            "/bin/chmod": self._chmod, "/bin/chown": self._chown, "/usr/bin/stat": self._stat,
            "/usr/bin/sha256sum": self._sum, "/bin/rm": self._rm,
            "/bin/date": lambda _argv, _stdin: (0, b"", b""),
            "/usr/bin/systemd-run": self._unit, "/usr/bin/systemctl": self._ctl,
        }  # fmt: skip

    def __call__(self, request: str, timeout_s: int, /) -> str:
        asked = json.loads(request)
        command, arguments = asked["execute"], asked.get("arguments", {})
        self.calls.append(command)
        answer = self.broken(command)
        if answer is not None:
            return answer
        handler = getattr(self, command.replace("-", "_"), None)
        if handler is None:
            return json.dumps({"error": {"class": "CommandNotFound", "desc": f"no {command}"}})
        try:
            return json.dumps({"return": handler(**{k.replace("-", "_"): v for k, v in arguments.items()})})
        except (OSError, KeyError) as e:
            return json.dumps({"error": {"class": "GenericError", "desc": str(e)}})

    # -- the agent's commands -------------------------------------------------------------------------

    def guest_ping(self) -> dict[str, object]:
        return {}

    def guest_exec(
        self,
        path: str,
        arg: list[str],
        capture_output: bool = False,
        input_data: str = "",
        env: object = None,
    ) -> dict[str, int]:
        stdin = base64.b64decode(input_data)
        self._number += 1
        if path in self.programs:
            self._running[self._number] = self.programs[path]([path, *arg], stdin)
        elif arg[-1:] == ["--wait"]:
            self._running[self._number] = (0, b"", b"")
        elif stdin and stdin.decode(errors="replace") in _SCRIPTS:
            answer = _SCRIPTS[stdin.decode()](self, arg)
            self._running[self._number] = (0, json.dumps(answer).encode(), b"")
        elif path not in HARMLESS:
            raise OSError(f"Failed to execute child process \u201c{path}\u201d (No such file or directory)")
        else:
            process = subprocess.Popen(
                [path, *arg], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            self._running[self._number] = process
            threading.Thread(target=self._collect, args=(self._number, process, stdin)).start()
        return {"pid": self._number}

    def _collect(self, number: int, process: subprocess.Popen[bytes], stdin: bytes) -> None:
        out, err = process.communicate(stdin)
        self._running[number] = (process.returncode, out, err)

    def guest_exec_status(self, pid: int) -> dict[str, object]:
        done = self._running[pid]
        if not isinstance(done, tuple):
            return {"exited": False}
        del self._running[pid]  # as the real one: a result is told once
        rc, out, err = done
        limit = 16 << 20
        status: dict[str, object] = {"exited": True, **({"exitcode": rc} if rc >= 0 else {"signal": -rc})}
        for key, data in (("out", out), ("err", err)):
            if data:
                status[f"{key}-data"] = base64.b64encode(data[:limit]).decode()
            if len(data) > limit:
                status[f"{key}-truncated"] = True
        return status

    def guest_file_open(self, path: str, mode: str) -> int:
        self._number += 1
        self._handles[self._number] = path
        self.file(path).parent.mkdir(parents=True, exist_ok=True)
        if mode == "w":
            self.file(path).write_bytes(b"")
        elif not self.file(path).exists():
            raise FileNotFoundError(path)
        return self._number

    def guest_file_write(self, handle: int, buf_b64: str) -> dict[str, object]:
        data = base64.b64decode(buf_b64)
        path = self._handles[handle]
        with self.file(path).open("ab") as f:
            f.write(data)
        return {"count": len(data), "eof": False}

    def guest_file_read(self, handle: int, count: int) -> dict[str, object]:
        data = self.file(self._handles[handle]).read_bytes()[:count]
        return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": True}

    def guest_file_close(self, handle: int) -> dict[str, object]:
        del self._handles[handle]
        return {}

    def guest_fsfreeze_freeze(self) -> int:
        self.frozen += 1
        return 1

    def guest_fsfreeze_thaw(self) -> int:
        self.frozen, was = 0, self.frozen
        return min(was, 1)

    # -- programs that must not run on the host --------------------------------------------------------

    def file(self, path: str) -> Path:
        """Where a guest's file lies here."""
        return self.root / path.lstrip("/")

    def _chmod(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        self.file(argv[2]).chmod(int(argv[1], 8))
        return 0, b"", b""

    def _chown(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        if argv[1].split(":")[0] not in ("root", "subject"):
            return 1, b"", f"chown: invalid user: '{argv[1]}'\n".encode()
        self.owners[argv[2]] = argv[1]
        return 0, b"", b""

    def _stat(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        mode = self.file(argv[3]).stat().st_mode & 0o7777
        return 0, f"{mode:o} {self.owners[argv[3]]}\n".encode(), b""

    def _sum(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        return 0, f"{hashlib.sha256(self.file(argv[1]).read_bytes()).hexdigest()}  {argv[1]}\n".encode(), b""

    def _rm(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        self.file(argv[-1]).unlink(missing_ok=True)
        return 0, b"", b""

    def _unit(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        self.agent_runs = True
        self.on_agent(argv)
        return 0, b"", b""

    def _ctl(self, argv: list[str], stdin: bytes) -> tuple[int, bytes, bytes]:
        if argv[1] == "stop":
            self.agent_runs = False
            return 0, b"", b""
        return (0 if self.agent_runs else 3), b"", b""

    def _facts(self, arg: list[str]) -> object:
        told = json.loads(json.dumps(self.facts))
        if arg[2] and isinstance(self.facts, dict):
            self.facts |= {"ram_sentinel": arg[2], "disk_sentinel": arg[2]}
        return told

    def _probe(self, arg: list[str]) -> dict[str, object]:
        question = json.loads(arg[2])
        answer: dict[str, Any] = json.loads(json.dumps(self.serving))
        answer |= {kind: None for kind in ("model", "agent") if kind not in question["kinds"]}
        if answer["agent"] and answer["agent"].get("tool_result") == "honest":
            answer["agent"]["tool_result"] = hashlib.sha256(question["secret"].encode()).hexdigest()
        return answer


_SCRIPTS: dict[str, Callable[[FakeGuest, list[str]], object]] = {
    proof._SCRIPT: lambda guest, arg: guest._facts(arg),
    isolation._SCRIPT: lambda guest, arg: {"results": guest.paths},
    probing._SCRIPT: lambda guest, arg: guest._probe(arg),
}


class FakePort:
    """The proof port of a guest in memory, in which the script waits."""

    def __init__(self, guest: FakeGuest) -> None:
        self._guest = guest
        self._answer = ""

    def send(self, line: str) -> None:
        words = line.split()
        if self._guest.nobody_waits:
            return
        if len(words) == 1:
            self._guest.clock = float(words[0])
            self._answer = self._guest.clock_says or words[0]
        else:
            self._answer = json.dumps(self._guest._facts(["-I", "-", *words]))

    def read(self, limit: int, timeout_s: float) -> str:
        answer, self._answer = self._answer, ""
        if not answer:
            raise GuestChannelError(f"no answer on the port within {timeout_s:.0f} s")
        if len(answer) > limit:
            raise GuestTamperError(f"an answer on the port is longer than {limit} bytes")
        return answer

    def close(self) -> None:
        self._guest.hung_up += 1


class FakeLibvirt:
    """Domains in memory; ``refuse`` names operations that fail."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.domains: dict[str, DomainState] = {}
        self.owners: dict[str, str] = {}
        self.guests: dict[str, FakeGuest] = {}
        self.refuse: set[str] = set()
        self.done: list[tuple[str, str]] = []
        self.closed = False
        self._machine: dict[str, str] = {}
        self._ports: dict[Path, str] = {}
        self._powered_off: dict[str, bool] = {}

    def guest(self, machine: str) -> FakeGuest:
        """The guest of the machine of that name, in whatever incarnation."""
        return self.guests.setdefault(machine, FakeGuest(self.root / "guests" / machine))

    def guard(self, on_hang: Callable[[str, str], None]) -> None:
        self.on_hang = on_hang

    def _do(self, what: str, name: str) -> None:
        self.done.append((what, name))
        if what in self.refuse or f"{what} {self._machine.get(name, name)}" in self.refuse:
            raise LabError(f"libvirt could not {what} {name}: refused by the test")

    def start(self, xml: str, *, paused: bool) -> None:
        tree = ET.fromstring(xml)
        name = str(tree.findtext("name"))
        owner = tree.find(f"metadata/{{{OWNER_NS}}}owner")
        assert owner is not None
        self._machine[name] = owner.get("machine", "")
        for channel in tree.iterfind("devices/channel"):
            source, target = channel.find("source"), channel.find("target")
            if source is not None and target is not None and target.get("name") == PROOF_PORT:
                self._ports[Path(source.get("path", ""))] = name
        self._do("start", name)
        self.owners[name] = owner.text or ""
        self.domains[name] = DomainState.PAUSED if paused else DomainState.RUNNING
        self.guest(self._machine[name])

    def state(self, name: str) -> DomainState:
        return self.domains.get(name, DomainState.GONE)

    def suspend(self, name: str) -> None:
        self._do("suspend", name)
        self._require(name)
        self.domains[name] = DomainState.PAUSED

    def resume(self, name: str) -> None:
        self._do("resume", name)
        self._require(name)
        self.domains[name] = DomainState.RUNNING

    def _require(self, name: str) -> None:
        if name not in self.domains:
            raise LabError(f"libvirt knows no {name}")

    def destroy(self, name: str) -> None:
        self._do("destroy", name)
        self.domains.pop(name, None)

    def power_off(self, machine: str) -> None:
        """The guest ends its machine by itself."""
        self._end(machine, powered_off=True)

    def lose(self, machine: str) -> None:
        """The machine's QEMU is killed from outside."""
        self._end(machine, powered_off=False)

    def _end(self, machine: str, *, powered_off: bool) -> None:
        for name in [n for n, m in self._machine.items() if m == machine]:
            if self.domains.pop(name, None) is not None:
                self._powered_off[name] = powered_off

    @contextlib.contextmanager
    def watch_end(self, name: str) -> Iterator[Callable[[float], bool]]:
        self._require(name)
        yield lambda _limit_s: self._powered_off.get(name, False)

    def list_domains(self, owner_ns: str) -> list[DomainFact]:
        return [DomainFact(n, self.owners.get(n, ""), self.pid(n)) for n in self.domains]

    def pid(self, name: str) -> int | None:
        return os.getpid() if name in self.domains else None

    def hmp(self, name: str, command: str) -> str:
        self._require(name)
        return "net0: index=0,type=nic,model=virtio-net-pci\r\n \\ hostnet0: index=0,type=tap,fd=30\r\n"

    def qmp(self, name: str, command: str, arguments: dict[str, object] | None = None) -> Any:
        self._require(name)
        return {"status": "running"}

    def guest_agent(self, name: str, request: str, timeout_s: int) -> str:
        if self.state(name) is not DomainState.RUNNING:
            raise GuestChannelError(f"the qga of {name} does not answer: it is {self.state(name)}")
        reply = self.guests[self._machine[name]](request, timeout_s)
        if len(reply) > 10 << 20:  # libvirt's own bound
            raise GuestChannelError(f"the qga of {name} does not answer: reply too large")
        return reply

    def open_port(self, path: Path) -> Any:
        name = self._ports.get(path, "")
        if name not in self.domains:
            raise GuestChannelError(f"the port {path} cannot be opened: nobody listens")
        return FakePort(self.guests[self._machine[name]])

    def versions(self) -> dict[str, str]:
        return {"libvirt": "9.0.0", "qemu": "7.2.0"}

    def close(self) -> None:
        self.closed = True


class FakeNet:
    """A namespace in memory. ``refuse`` names functions that fail."""

    def __init__(self) -> None:
        self.links: dict[str, str] = {"lo": "loopback"}
        self.plugged: dict[str, str] = {}
        self.refuse: set[str] = set()
        self.done: list[tuple[str, str]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeNet:
        """Take netlink's place everywhere."""
        for name in ("unplug", "plug", "create_bridge", "delete_link", "view"):
            monkeypatch.setattr(netlink, name, getattr(self, name))
        return self

    def _do(self, what: str, name: str) -> None:
        self.done.append((what, name))
        if what in self.refuse:
            raise LabError(f"netlink could not {what} {name}: refused by the test")

    def create_bridge(self, name: str, anchor: str = "") -> None:
        self._do("create_bridge", name)
        self.links[name] = "bridge"
        if anchor:
            self.links[anchor] = "tun"

    def delete_link(self, name: str) -> bool:
        self._do("delete_link", name)
        self.plugged.pop(name, None)
        return self.links.pop(name, None) is not None

    def plug(self, tap: str, bridge: str, mac: str) -> None:
        self._do("plug", tap)
        self.links[tap] = "tun"
        self.plugged[tap] = bridge

    def unplug(self, tap: str) -> None:
        self._do("unplug", tap)
        self.plugged.pop(tap, None)

    def view(self) -> NamespaceView:
        links = tuple(Link(i, n, k, True, None) for i, (n, k) in enumerate(self.links.items(), 1))
        return NamespaceView(links, (), ())


def incarnation(
    folder: Path, libvirt: FakeLibvirt, ledger: Ledger, name: str = "origin", cell: str = "c1"
) -> Incarnation:
    """A machine that is prepared and not started, as ``prepare`` leaves it."""
    number = uuid.uuid4().hex[:8]
    own = folder / f"{name}-{number}"
    own.mkdir(parents=True)
    (own / "disk.qcow2").write_bytes(b"QFI\xfb")
    spec = DomainSpec(
        domain=f"hc-{cell}-{name}-{number}", uuid=str(uuid.uuid4()), owner="hotcell",
        machine=machine_spec(name), accelerator=Accelerator.TCG, overlay=own / "disk.qcow2",
        ram_file=folder / "ram", incoming=True,
        bridge=bridge_name(cell), tap=tap_name(cell, number), events_socket=own / "events",
        proof_socket=own / "proof",
        serial_log=own / "console.log",
    )  # fmt: skip
    return Incarnation(spec, cell, number, libvirt, ledger)  # type: ignore[arg-type]


def signal_name(rc: int) -> str:
    """Name of the signal that an exit status of 128 + n stands for."""
    return signal.Signals(rc - 128).name


def leftovers(net: FakeNet, libvirt: FakeLibvirt, ledger: Ledger, folders: Iterable[Path]) -> list[str]:
    """Everything that is still there of any machine: empty after a clean end."""
    found = [f"link {n}" for n, k in net.links.items() if k != "loopback"]
    found += [f"domain {n}" for n in libvirt.domains]
    found += [f"row {t.kind} {t.name}" for t in ledger.things()]
    return found + [f"folder {p}" for f in folders if f.exists() for p in f.iterdir()]


def is_domain_name(name: str) -> bool:
    """Whether a name has the shape that we give to domains."""
    return re.fullmatch(r"hc-[a-z0-9-]+-[0-9a-f]{8}", name) is not None
