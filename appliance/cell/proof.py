"""Clean means proven clean: the facts that show a machine is its baseline and not what ran before.

Half of them are the host's own (which file is open, which layers lie below it, which RAM file is mapped);
the other half are read in the guest *before* the subject had a chance to run in this incarnation, when the
guest's software is still the baseline's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from appliance.cell import overlay
from appliance.cell.incarnation import Incarnation, OwnFile
from appliance.cell.netlink import namespace_inode
from appliance.cell.port import Port
from appliance.cell.qga import Qga
from appliance.errors import GuestTamperError, HotcellError
from appliance.model import Frozen, printable

_Short = Annotated[str, StringConstraints(max_length=256)]


class GuestFacts(BaseModel):
    """What the facts script prints; bounded, since it comes from a guest."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    boot_id: _Short
    nonce: _Short
    ram_sentinel: _Short
    disk_sentinel: _Short
    processes: Annotated[list[_Short], Field(max_length=500)]
    reseeded: bool


class Check(Frozen):
    """One fact: what it had to be and what it is."""

    name: str
    passed: bool
    expected: str
    found: str


class Proof(Frozen):
    """All checks of one incarnation; ``seconds`` from the request to the last check."""

    machine: str
    incarnation: str
    baseline: str
    seconds: float
    checks: tuple[Check, ...]

    @property
    def proved(self) -> bool:
        """True if there are checks and all passed."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def failures(self) -> str:
        """The failed checks in words."""
        return "; ".join(
            f"{c.name}: expected {c.expected}, found {c.found}" for c in self.checks if not c.passed
        )


class Expected(Frozen):
    """What a baseline recorded of itself, to hold a restored machine against.

    ``script`` is the digest of the script that waits in it; one of another version is not asked.
    """

    script: str = ""
    boot_id: str
    nonce: str
    processes: tuple[str, ...]
    chain: tuple[Path, ...]
    ram_file: Path


_SCRIPT = files("appliance.cell.guest").joinpath("facts.py").read_text()
SCRIPT_SHA256 = hashlib.sha256(_SCRIPT.encode()).hexdigest()
_ANSWER_LIMIT = 160 << 10
_ANSWER_S = 30.0


def guest_facts(qga: Qga, incarnation: str) -> GuestFacts:
    """Read the facts, set the clock, reseed, and (with an incarnation) plant its sentinels in RAM and on disk.

    Raises:
        GuestTamperError: the answer is not what our script prints.
    """
    done = qga.python(_SCRIPT, incarnation, f"{time.time():.6f}", _seed())
    return _facts(done.stdout, f"exit status {done.rc}; {done.stderr.decode(errors='replace')}")


def leave_waiting(machine: Incarnation) -> None:
    """Start the script in a machine that is about to be saved, so that its clones have it running."""
    machine.open_port()  # the script waits only while somebody holds the other end
    machine.qga.start(["/usr/bin/python3", "-I", "-", "--wait"], stdin=_SCRIPT.encode())


def ask_waiting(port: Port, incarnation: str, *, stay: bool = False) -> None:
    """As :func:`guest_facts`, of the script that was saved running; :func:`waiting_facts` gets the answer.

    It answers once, and ends; or with ``stay`` once more, to :func:`tell_time`. Starting an interpreter
    is most of what asking would cost under TCG.

    Raises:
        GuestChannelError: the machine is gone.
    """
    port.send(" ".join([incarnation, f"{time.time():.6f}", _seed(), *(["stay"] if stay else [])]))


def waiting_facts(port: Port) -> GuestFacts:
    """What the script that was asked answers.

    Raises:
        GuestChannelError: no answer came within 30 s.
        GuestTamperError: the answer is not what our script writes.
    """
    return _facts(port.read(_ANSWER_LIMIT, _ANSWER_S), "written by the waiting script")


def tell_time(port: Port) -> str:
    """Have the script that was told to stay set the clock of a machine that stood still; returns the time told.

    Raises:
        GuestChannelError: the machine is gone.
    """
    now = f"{time.time():.6f}"
    port.send(now)
    return now


def require_clock_set(port: Port, told: str) -> None:
    """Wait until the script says that it set the clock to the time it was told.

    Raises:
        GuestChannelError: it did not within 30 s.
        GuestTamperError: it set another time.
    """
    if (done := port.read(_ANSWER_LIMIT, _ANSWER_S)) != told:
        raise GuestTamperError(f"the clock was set to {printable(done, 40)}, not {told}")


def _seed() -> str:
    """As many random bytes as the guest's kernel keeps, fresh for every asking."""
    return secrets.token_hex(32)


def _facts(answer: bytes | str, context: str) -> GuestFacts:
    try:
        return GuestFacts.model_validate_json(answer)
    except ValidationError as e:
        raise GuestTamperError(f"facts script: no valid facts; {printable(context, 300)}") from e


def guest_checks(facts: GuestFacts, expected: Expected) -> Iterator[Check]:
    """The guest's half of a proof. Pure."""
    yield _same("boot id is the baseline's", expected.boot_id, facts.boot_id)
    yield _same("RAM holds the baseline's nonce", expected.nonce, facts.nonce)
    yield _same("no RAM sentinel of an earlier run", "", facts.ram_sentinel)
    yield _same("no disk sentinel of an earlier run", "", facts.disk_sentinel)
    yield reseeded(facts)
    extra = sorted(set(facts.processes) - set(expected.processes))
    missing = sorted(set(expected.processes) - set(facts.processes))
    yield Check(
        name="processes are the baseline's",
        passed=not extra and not missing,
        expected=f"{len(expected.processes)} processes with their start times",
        found=printable(f"{len(facts.processes)}; extra {extra[:5]}; missing {missing[:5]}", 400),
    )


def reseeded(facts: GuestFacts) -> Check:
    """Whether the guest's random generator took the fresh seed it was given."""
    return _same("the random generator was reseeded", "True", str(facts.reseeded))


def host_checks(machine: Incarnation, expected: Expected) -> Iterator[Check]:
    """The host's half: what QEMU really has open, mapped, and below its disk."""
    yield from disk_checks(machine, expected.chain)
    flags = _mapping(machine.pid, expected.ram_file)
    yield _same("baseline RAM is mapped privately", "rw-p", flags)


def disk_checks(machine: Incarnation, expected: tuple[Path, ...]) -> Iterator[Check]:
    """What QEMU has open and below its disk, and where it runs; ``expected`` are the layers below its own."""
    pid, top = machine.pid, machine.spec.overlay
    below = _seen(lambda: [str(p) for p in overlay.backing_chain(top)[1:]])
    yield _same("backing chain", str([str(p) for p in expected]), below)
    for file in machine.own_files:
        yield from _own_file_checks(pid, file)
    where = _seen(lambda: namespace_inode(pid)) if pid else "no process"
    yield _same("QEMU runs in the sealed namespace", str(namespace_inode()), where)


def _own_file_checks(pid: int | None, file: OwnFile) -> Iterator[Check]:
    inode = _seen(lambda: file.path.stat().st_ino)
    yield _same(f"{file.what} is the file made for this incarnation", str(file.inode), inode)
    is_open = str(file.path) in _open_files(pid)
    yield Check(
        name=f"QEMU has this {file.what} open",
        passed=is_open,
        expected=str(file.path),
        found="open" if is_open else "not open",
    )


def _seen(look: Callable[[], object]) -> str:
    """What a look showed, or why it showed nothing: what cannot be examined is not proved, and no fault of ours."""
    try:
        return str(look())
    except (HotcellError, OSError) as e:
        return f"not seen: {e}"


def _same(name: str, expected: str, found: str) -> Check:
    return Check(name=name, passed=expected == found, expected=expected, found=printable(found, 300))


def _open_files(pid: int | None) -> set[str]:
    folder = Path(f"/proc/{pid}/fd")
    found = set()
    try:
        for entry in folder.iterdir():
            try:
                found.add(str(entry.readlink()))
            except OSError:
                continue
    except OSError:
        return set()
    return found


def _mapping(pid: int | None, path: Path) -> str:
    """Permission flags of the first mapping of ``path`` in a process, or a word that says there is none."""
    wanted = os.fspath(path)
    try:
        with Path(f"/proc/{pid}/maps").open() as lines:
            for line in lines:
                if line.rstrip().endswith(wanted):
                    return line.split()[1]
    except OSError:
        return "no process"
    return "not mapped"
