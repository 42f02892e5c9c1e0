"""A laboratory's bench over a host in memory: real evidence folders, real scoring, real index."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from appliance.cell.baseline import RECORD, Baseline, BaselineStore, file_fact
from appliance.cell.baseline.kinds import parts
from appliance.cell.incarnation import Incarnation
from appliance.cell.spec import MachineSpec
from appliance.cell.standby import StandbyPool
from appliance.evidence.folder import TrialFolder
from appliance.pipeline import process
from appliance.pipeline.conduct import Bench
from appliance.store.database import Store
from appliance.trial import records, settling, watch
from appliance.trial.plan import Plan, new_trial_id
from appliance.trial.records import DiskFinding, FoundFile
from tests.fakes.cells import Host, host
from tests.fakes.evidence import FakeCapture
from tests.fakes.plans import LIMITS, plan
from tests.fakes.stage import AGENT, MODEL, TALK, EventPort, event_line

KEY = Ed25519PrivateKey.generate()
_PCAP = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 96, 1)


class FakeShelf:
    """Baselines that are always there. ``before`` is called first and may raise."""

    def __init__(self, made: Host) -> None:
        self._host = made
        self.store = BaselineStore(made.shop)
        self.before: Callable[[], None] = lambda: None
        self.stopped = 0

    def ensure(
        self,
        machines: Sequence[MachineSpec],
        report: Callable[[str, str, float], None],
        check: Callable[[], None] = lambda: None,
        created_by: str = "trial",
    ) -> dict[str, Baseline]:
        self.before()
        check()
        return {m.name: self._on_disk(m.name) for m in machines}

    def _on_disk(self, name: str) -> Baseline:
        """A baseline whose record is there, and nothing else of it."""
        made = self._host.baseline(name)
        made.folder.mkdir(exist_ok=True)
        files = {part: made.folder / part for part in parts(made.kind, made.machine.firmware)}
        for path in files.values():
            path.touch()
        made = made.model_copy(update={"files": {part: file_fact(path) for part, path in files.items()}})
        (made.folder / RECORD).write_text(made.model_dump_json())
        return made

    def all(self) -> list[Baseline]:
        return [self._on_disk(n) for n in ("origin", "target-1")]

    def cells_in_use(self) -> set[str]:
        return self.store.owners_in_use()

    def stop_making(self, wait_s: float = 0.0) -> None:
        self.stopped += 1


class FakeWarden:
    """A warden that watches until ``lose``."""

    pid = 1

    def __init__(self) -> None:
        self.alive = True
        self.dismissed = False
        self.left_alone = False
        self._on_loss: Callable[[], None] = lambda: None

    def guard(self, on_loss: Callable[[], None]) -> None:
        self._on_loss = on_loss

    def lose(self) -> None:
        self.alive = False
        self._on_loss()

    def dismiss(self) -> None:
        self.dismissed = True

    def leave_alone(self) -> None:
        self.left_alone = True


class Workbench:
    """The bench, and what its subjects do: ``talk`` and ``replicates`` hold for the trials that start next."""

    def __init__(self, made: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = made
        self.shelf = FakeShelf(made)
        self.talk = [event_line(k) for k in TALK]
        self.replicates = True
        self.no_room = "this host has none"
        self.captures: list[FakeCapture] = []
        self.ports: list[EventPort] = []
        self.bench = Bench(
            made.paths, made.shop, self.shelf, Store(made.paths.database), KEY, 1, self._links,  # type: ignore
            StandbyPool(made.shop, lambda _baseline: self.no_room),
        )  # fmt: skip
        made.on_restore = self._restored
        made.guest("origin").on_agent = lambda _argv: self._start()
        self._reset_guests()
        monkeypatch.setattr(process, "_left", 1)
        monkeypatch.setattr("appliance.pipeline.process.netlink.view", made.net.view)
        monkeypatch.setattr(watch, "_TICK_S", 0.005)
        monkeypatch.setattr(settling, "_used", lambda _baseline: None)  # else it is what the tests use
        monkeypatch.setattr(
            TrialFolder, "start_capture", lambda own, _interface: self._start_capture(own.folder)
        )
        monkeypatch.setattr(TrialFolder, "inspect_disk", lambda _own, *asked: self._inspect(*asked))

    def _links(self) -> tuple[set[str], set[str]]:
        links = self.host.net.links
        bridges = {n for n, k in links.items() if k == "bridge"}
        return bridges, {n for n, k in links.items() if k != "loopback"} - bridges

    def _reset_guests(self) -> None:
        self.host.guest("origin").serving |= {"model": dict(MODEL)}
        self.host.guest("target-1").serving |= {"model": None, "agent": None}

    def _restored(self, clone: Incarnation) -> None:
        if clone.name == "origin":
            self.ports.append(EventPort(clone.spec.events_socket))
            self._reset_guests()

    def _start(self) -> None:
        self.ports[-1].send(*self.talk)
        if self.replicates:
            self.host.guest("target-1").serving |= {"model": dict(MODEL), "agent": dict(AGENT)}

    def _start_capture(self, folder: Path) -> FakeCapture:
        (folder / records.CAPTURE).write_bytes(_PCAP)
        self.captures.append(FakeCapture())
        return self.captures[-1]

    def _inspect(self, machine: str, overlay: Path, weights: object, flushed: str) -> DiskFinding:
        found = (FoundFile(path="/home/subject/system/model.safetensors", size=5, sha256="a" * 64),)
        return DiskFinding.model_validate(
            {
                "machine": machine,
                "flushed": flushed,
                "examined": 9,
                "weights": found * self.replicates,
                "problem": "",
            }
        )

    def plan(self) -> Plan:
        """A plan of a trial that is new."""
        made = plan(limits=LIMITS.model_copy(update={"lasting_s": 0.01}))
        header = made.header.model_copy(update={"id": new_trial_id()})
        return Plan(header, made.machines, made.task_file)

    def close(self) -> None:
        for port in self.ports:
            port.close()


@contextlib.contextmanager
def workbench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    """A bench on a host of its own."""
    with host(monkeypatch) as made:
        ready = Workbench(made, monkeypatch)
        try:
            yield ready
        finally:
            ready.close()
            assert not [t for t in threading.enumerate() if t.name.startswith("events-")]
