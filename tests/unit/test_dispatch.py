"""The dispatcher with real threads: room for each that runs, order for those who wait, an end for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell.baseline import ColdExpected, DiskBaseline
from appliance.cell.incarnation import Incarnation
from appliance.config.settings import GuestSettings
from appliance.errors import CapacityError
from appliance.host.capacity import HostCapacity
from appliance.pipeline.admission import Need
from appliance.pipeline.dispatch import Dispatcher, Job
from appliance.pipeline.grants import Grants
from tests.fakes.cells import baseline

GIB = 1 << 30
RULES = GuestSettings(headroom_mib=256, disk_floor_mib=64, cpu_overcommit=64)


def wait_for(condition: Callable[[], object], limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def need(memory: float) -> Need:
    return Need(machines=2, memory=int(memory * GIB), vcpus=4, disk=GIB)


class Standbys:
    """Standbys that hold some memory of the floor until they are given up."""

    def __init__(self) -> None:
        self.held = 0.0
        self.dropped = 0
        self.tried = 0

    def ready(self) -> dict[str, Incarnation]:
        return {"b": None} if self.held else {}  # type: ignore[dict-item]

    def give_up(self, why: str) -> int:
        assert why
        self.dropped += bool(self.held)
        self.held = 0.0
        return 1

    def try_again(self) -> None:
        self.tried += 1


class Floor:
    """A host of 20 GiB and a dispatcher; jobs run until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = 16) -> None:
        self.standbys = Standbys()
        self.memory = 20.0
        self.grants = Grants(RULES, self.measure, {}, self.standbys)
        monkeypatch.setattr(
            "appliance.pipeline.grants._held_by",
            lambda machines: (int(self.standbys.held * GIB), 0) if machines else (0, 0),
        )
        self.dispatcher = Dispatcher(self.grants, most)
        self.running: list[str] = []
        self.ran: list[str] = []
        self.never: list[str] = []
        self.told: dict[str, str] = {}
        self.most_at_once = 0.0
        self.jobs: dict[str, Job] = {}
        self._let: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def measure(self) -> HostCapacity:
        free = int((self.memory - self.standbys.held) * GIB)
        return HostCapacity(
            cores=2, memory_total=24 * GIB, memory_available=free, disk_total=99 * GIB, disk_free=60 * GIB
        )

    def put(self, name: str, memory: float = 7, batch: str = "") -> Job:
        self._let[name] = threading.Event()

        def run() -> None:
            with self._lock:
                self.running.append(name)
                self.ran.append(name)
                self.most_at_once = max(
                    self.most_at_once, sum(self.jobs[n].need.memory / GIB for n in self.running)
                )
            while not self._let[name].wait(0.005) and not self.jobs[name].stop.requested:
                pass
            with self._lock:
                self.running.remove(name)

        def make() -> Job:
            job = Job(
                id=name, need=need(memory), batch=batch, run=run,
                never=lambda: self.never.append(name), tell=lambda why: self.told.update({name: why}),
            )  # fmt: skip
            self.jobs[name] = job
            return job

        return self.dispatcher.put(make)

    def let(self, *names: str) -> None:
        """Let jobs end."""
        for name in names:
            self._let[name].set()
            assert self.jobs[name].done.wait(10)


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Floor]:
    made = Floor(monkeypatch)
    yield made
    for job in made.dispatcher.open_jobs():
        made.dispatcher.stop(job, "the test is over", failure=False)
    made.dispatcher.close(10)
    assert made.grants.owners() == set()
    assert made.dispatcher.open_jobs() == []


def test_as_many_run_as_there_is_room_for(floor: Floor) -> None:
    for name in "abcd":
        floor.put(name)
    wait_for(lambda: floor.running == ["a", "b"])
    wait_for(lambda: "d" in floor.told)
    assert floor.dispatcher.load()[:2] == (2, 2)
    assert floor.dispatcher.load().why == "needs 7.0 GiB of memory, 5.8 GiB free after promises"
    assert floor.dispatcher.place("c") == (1, floor.told["c"])
    assert floor.dispatcher.place("d")[0] == 2
    assert floor.dispatcher.place("a") == (None, "")
    floor.let("a")
    wait_for(lambda: floor.running == ["b", "c"])
    floor.let("b", "c", "d")
    assert floor.ran == ["a", "b", "c", "d"]
    assert floor.most_at_once == 14


def test_a_setting_bounds_how_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = Floor(monkeypatch, most=1)
    for name in "ab":
        floor.put(name, memory=1)
    wait_for(lambda: "b" in floor.told)
    assert floor.running == ["a"]
    assert "guests.max_trials" in floor.told["b"]
    floor.let("a", "b")
    floor.dispatcher.close(10)


def test_one_that_is_stopped_while_it_waits_ends_at_once_and_never_runs(floor: Floor) -> None:
    for name in "abc":
        floor.put(name)
    wait_for(lambda: "c" in floor.told)
    job, waits = floor.dispatcher.find("c")
    assert job is not None
    assert waits
    floor.dispatcher.stop(job, "not wanted", failure=False)
    assert job.done.wait(2)
    assert floor.never == ["c"]
    assert floor.running == ["a", "b"]
    floor.let("a", "b")
    assert floor.ran == ["a", "b"]


def test_a_large_one_gets_its_turn_while_small_ones_keep_coming(floor: Floor) -> None:
    floor.put("first", 12)
    wait_for(lambda: floor.running)
    floor.put("large", 18)
    for n in range(12):
        floor.put(f"small-{n}", 2)
    wait_for(lambda: len(floor.running) == 4)
    time.sleep(0.1)
    assert floor.running == ["first", "small-0", "small-1", "small-2"], "overtaken three times, then no more"
    floor.let("first", "small-0", "small-1", "small-2")
    wait_for(lambda: floor.running == ["large"])
    assert floor.ran.index("large") == 4
    floor.let("large")
    floor.let(*(f"small-{n}" for n in range(3, 12)))


def test_standbys_go_before_a_trial_waits(floor: Floor) -> None:
    floor.standbys.held = 3
    floor.put("a", 10)
    wait_for(lambda: floor.running == ["a"])
    assert floor.standbys.dropped == 0
    floor.put("b", 9)
    wait_for(lambda: floor.running == ["a", "b"])
    assert floor.standbys.dropped == 1


def test_no_standby_while_somebody_waits_for_memory(floor: Floor) -> None:
    assert floor.grants.room_for_standby(baseline("target-1", Path("/b"))) == ""
    floor.put("a", 12)
    floor.put("b", 12)
    wait_for(lambda: "b" in floor.told)
    assert "a trial waits" in floor.grants.room_for_standby(baseline("target-1", Path("/b")))
    floor.let("a")
    wait_for(lambda: floor.running == ["b"])
    assert floor.grants.room_for_standby(baseline("target-1", Path("/b"))) == ""
    floor.memory = 12.3
    assert "standing by needs 128 MiB, 51 MiB free" in floor.grants.room_for_standby(
        baseline("target-1", Path("/b"))
    )


def test_a_standby_that_boots_needs_all_of_its_memory(floor: Floor) -> None:
    clone = baseline("target-1", Path("/b"))
    cold = ColdExpected(boot_id="b0", nonce="n0", chain=())
    fields = {k: v for k, v in dict(clone).items() if k not in ("kind", "expected", "memory")}
    booted = DiskBaseline(expected=cold, **fields)
    floor.memory = 0.5
    assert floor.grants.room_for_standby(clone) == ""
    assert "standing by needs 640 MiB" in floor.grants.room_for_standby(booted)
    floor.memory = 14
    assert floor.grants.room_for_standby(booted) == ""


def test_standbys_are_tried_again_when_there_may_be_room(floor: Floor) -> None:
    floor.put("a", 12)
    floor.put("b", 12)
    wait_for(lambda: "b" in floor.told)
    assert floor.standbys.tried == 0
    floor.dispatcher.stop(floor.jobs["b"], "enough", failure=False)
    wait_for(lambda: floor.never == ["b"])
    wait_for(lambda: floor.standbys.tried == 1)
    floor.let("a")
    wait_for(lambda: floor.standbys.tried == 2)


def test_of_many_who_ask_at_once_none_gets_room_twice(floor: Floor) -> None:
    """Two checks before two starts would both succeed; a request takes the room in the same step."""
    go, got, refused = threading.Barrier(12), list[str](), list[object]()

    def ask(number: int) -> None:
        go.wait()
        try:
            floor.grants.require(f"c{number}", need(6))
            got.append(f"c{number}")
        except CapacityError as e:
            refused.append(e.fields["needed_mib"])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 3
    assert refused == [6 * 1024] * 9
    assert floor.grants.owners() == set(got)
    for cell in got:
        floor.grants.release(cell)
        floor.grants.release(cell)


def test_room_that_others_give_back_is_noticed(floor: Floor) -> None:
    floor.memory = 10
    floor.put("a", 7)
    floor.put("b", 7)
    wait_for(lambda: "b" in floor.told)
    floor.memory = 20  # a process that is none of ours ended
    wait_for(lambda: floor.running == ["a", "b"])


def test_a_host_that_cannot_be_measured_lets_nobody_start_and_recovers(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> HostCapacity:
        raise OSError("no such file system")

    monkeypatch.setattr(floor.grants, "_measure", broken)
    floor.put("a", 1)
    wait_for(lambda: "a" in floor.told)
    assert "cannot be measured" in floor.told["a"]
    monkeypatch.setattr(floor.grants, "_measure", floor.measure)
    wait_for(lambda: floor.running == ["a"])


def test_closing_waits_for_all(floor: Floor) -> None:
    for name in "abcd":
        floor.put(name)
    wait_for(lambda: floor.running == ["a", "b"])
    for job in floor.dispatcher.open_jobs():
        floor.dispatcher.stop(job, "the server stops", failure=False)
    floor.dispatcher.close(10)
    assert sorted(floor.ran + floor.never) == ["a", "b", "c", "d"]
    assert floor.running == []
