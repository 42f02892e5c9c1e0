"""The shelf of baselines, the warm-up that makes them, and the agent's start: all through the qga."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.cell import baseline as saved
from appliance.cell.baseline import Baseline
from appliance.cell.cell import Cell
from appliance.cell.credentials import SshKeys, ssh_keys
from appliance.cell.incarnation import Incarnation
from appliance.cell.spec import MachineSpec
from appliance.errors import LabError, PrerequisiteError, ResetError
from appliance.model import Firmware, Role
from appliance.trial import subject, warmup
from appliance.trial.baselines import BaselineShelf
from appliance.trial.warmup import recipe, warm_up
from tests.fakes.cells import Host, host
from tests.fakes.machine import machine_spec
from tests.fakes.saved import publish_one

KEYS = SshKeys(b"PRIVATE-KEY-TEXT", b"ssh-ed25519 AAAA hotcell\n")
MACHINES = (machine_spec("origin"), machine_spec("target-1"))


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


# -- the shelf -------------------------------------------------------------------------------------------


class Making:
    """Stands in for making, finding and checking."""

    def __init__(self, h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.asked: list[tuple[str, str, str]] = []
        self.checked: list[tuple[str, bool]] = []
        self.known: dict[str, Baseline] = {}
        self.bad: set[str] = set()
        self.fail: set[str] = set()
        self._h = h
        monkeypatch.setattr(saved, "make", self._make)
        monkeypatch.setattr(saved, "find", lambda _paths, name, _key: self.known.get(name))
        monkeypatch.setattr(saved, "check_files", self._check)

    def _make(
        self, shop: object, machine: MachineSpec, cell: str, key: str, warm: object, on_template: object,
        *, kind: str, created_by: str,
    ) -> Baseline:  # fmt: skip
        name = machine.name
        self.asked.append((name, kind, created_by))
        if name in self.fail:
            raise LabError(f"{name} does not boot")
        self.made.append(name)
        self.known[name] = self._h.baseline(name)
        self.known[name].folder.mkdir(parents=True, exist_ok=True)
        return self.known[name]

    def _check(self, found: Baseline, *, read: bool = False) -> None:
        self.checked.append((found.machine.name, read))
        if found.machine.name in self.bad:
            raise ResetError(f"{found.machine.name}: ram is not what was saved")


@pytest.fixture
def making(h: Host, monkeypatch: pytest.MonkeyPatch) -> Making:
    return Making(h, monkeypatch)


def test_what_is_missing_is_made_once_and_then_found(h: Host, making: Making) -> None:
    shelf, told = BaselineShelf(h.shop, KEYS), list[tuple[str, str]]()
    got = shelf.ensure(MACHINES, lambda m, d, _s: told.append((m, d)))
    assert set(got) == {"origin", "target-1"}
    assert sorted(making.made) == ["origin", "target-1"]
    assert ("origin", "booting") in told
    assert ("origin", "") in told
    assert shelf.ensure(MACHINES, lambda *_: None).keys() == got.keys()
    assert len(making.made) == 2
    assert h.left == []
    assert shelf.cells_in_use() == set()


def test_the_kind_follows_from_the_machine_and_who_asked_is_noted(h: Host, making: Making) -> None:
    shelf = BaselineShelf(h.shop, KEYS)
    with_device = MACHINES[0].model_copy(update={"devices": ("0000:01:00.0",), "firmware": Firmware.UEFI})
    shelf.ensure((with_device, MACHINES[1]), lambda *_: None, created_by="cell")
    assert sorted(making.asked) == [("origin", "disk", "cell"), ("target-1", "ram", "cell")]


def test_no_trial_starts_with_an_origin_that_boots(h: Host, making: Making) -> None:
    """Its model server would not run, and the subject be blamed for it."""
    origin = MACHINES[0].model_copy(update={"firmware": Firmware.UEFI})
    with pytest.raises(PrerequisiteError, match="nothing starts its model server"):
        BaselineShelf(h.shop, KEYS).ensure((origin, MACHINES[1]), lambda *_: None)
    assert making.asked == []
    target = MACHINES[1].model_copy(update={"firmware": Firmware.UEFI})
    BaselineShelf(h.shop, KEYS).ensure((MACHINES[0], target), lambda *_: None)
    assert sorted(making.asked) == [("origin", "ram", "trial"), ("target-1", "disk", "trial")]


def test_a_damaged_one_that_others_build_on_is_not_made_anew(h: Host) -> None:
    """It would change what lies below them."""
    first = publish_one(h, "first")
    publish_one(h, "second", parent=first)
    shelf = BaselineShelf(h.shop, KEYS)
    with pytest.raises(ResetError, match=r"damaged.*second builds on it"):
        shelf._remove(first)
    assert first.folder.exists()


def test_one_of_an_earlier_process_is_read_whole_once(h: Host, making: Making) -> None:
    BaselineShelf(h.shop, KEYS).ensure(MACHINES[:1], lambda *_: None)
    shelf = BaselineShelf(h.shop, KEYS)
    for _ in range(3):
        shelf.ensure(MACHINES[:1], lambda *_: None)
    assert making.checked == [("origin", True), ("origin", False), ("origin", False)]


def test_one_whose_files_changed_is_made_anew_and_that_is_told(h: Host, making: Making) -> None:
    shelf = BaselineShelf(h.shop, KEYS)
    shelf.ensure(MACHINES[:1], lambda *_: None)
    making.bad = {"origin"}
    told: list[str] = []
    shelf.ensure(MACHINES[:1], lambda _m, detail, _s: told.append(detail))
    assert making.made == ["origin", "origin"]
    assert "making it anew" in told[0]


def test_a_making_that_fails_leaves_no_cell(h: Host, making: Making) -> None:
    making.fail = {"target-1"}
    shelf = BaselineShelf(h.shop, KEYS)
    with pytest.raises(LabError, match="does not boot"):
        shelf.ensure(MACHINES, lambda *_: None)
    assert h.left == []
    assert shelf.cells_in_use() == set()


def test_a_cell_that_withstands_its_end_is_left_to_the_sweep(
    h: Host, making: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    def withstands(_cell: Cell) -> None:
        raise LabError("a link is busy")

    monkeypatch.setattr(Cell, "close", withstands)
    shelf = BaselineShelf(h.shop, KEYS)
    with pytest.raises(LabError, match="a link is busy"):
        shelf.ensure(MACHINES[:1], lambda *_: None)
    assert shelf.cells_in_use() == set()


def test_two_who_ask_at_once_make_one(h: Host, making: Making) -> None:
    shelf = BaselineShelf(h.shop, KEYS)
    threads = [threading.Thread(target=shelf.ensure, args=(MACHINES[:1], lambda *_: None)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert making.made == ["origin"]


class Template:
    """A template that boots until it is told that it is up, or is killed."""

    def __init__(self) -> None:
        self.begun, self.up, self.killed = threading.Event(), threading.Event(), threading.Event()

    def kill(self) -> None:
        self.killed.set()

    def boot(self) -> None:
        self.begun.set()
        while not self.up.wait(0.01):
            if self.killed.is_set():
                raise LabError("the template went down")


class Left(Exception):  # noqa: N818 - a request is not an error
    pass


@pytest.mark.parametrize("all_leave", [False, True])
def test_a_request_that_leaves_ends_the_making_only_if_it_is_the_last(
    h: Host, making: Making, monkeypatch: pytest.MonkeyPatch, all_leave: bool
) -> None:
    shelf, template, made, left = BaselineShelf(h.shop, KEYS), Template(), list[str](), list[str]()
    real, gone = saved.make, {"first": threading.Event(), "second": threading.Event()}

    def make(
        shop: object, machine: object, cell: str, key: str, warm: object, on_template: Any, **how: Any
    ) -> Baseline:
        on_template(template)
        template.boot()
        return real(shop, machine, cell, key, warm, on_template, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(saved, "make", make)

    def ask(name: str) -> None:
        def check() -> None:
            if gone[name].is_set():
                raise Left

        try:
            made.extend(shelf.ensure(MACHINES[:1], lambda *_: None, check))
        except Left:
            left.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in gone]
    for t in threads:
        t.start()
    assert template.begun.wait(10)
    assert len(shelf.cells_in_use()) == 1
    gone["first"].set()
    threads[0].join(10)
    assert left == ["first"]
    assert not template.killed.is_set()
    (gone["second"] if all_leave else template.up).set()
    threads[1].join(10)
    shelf.stop_making(10)
    assert (left, made) == ((["first", "second"], []) if all_leave else (["first"], ["origin"]))
    assert template.killed.is_set() is all_leave
    assert shelf.cells_in_use() == set()
    assert h.left == []


# -- warming up ------------------------------------------------------------------------------------------


@pytest.fixture
def asked(h: Host) -> list[list[str]]:
    """Every program that the guests are asked to run; each succeeds and does nothing."""
    seen: list[list[str]] = []

    def program(argv: list[str], _stdin: bytes) -> tuple[int, bytes, bytes]:
        seen.append(argv)
        return 0, b"running\n" if "is-system-running" in argv else b"", b""

    for name in ("origin", "target-1", "world"):
        guest = h.guest(name)
        for path in (
            "/usr/bin/systemctl", "/usr/bin/systemd-run", "/usr/sbin/runuser",
            "/usr/bin/install", "/usr/bin/curl", "/bin/sync",
            "/opt/runtime/bin/python",
        ):  # fmt: skip
            guest.programs[path] = program
    return seen


def machine(h: Host, name: str) -> Incarnation:
    return h.cell(name, cell_id=f"c-{name}").machine(name)


def test_an_origin_gets_its_key_and_a_warm_model(h: Host, asked: list[list[str]]) -> None:
    warm_up(machine(h, "origin"), KEYS, warm_model=True, say=lambda _w: None)
    guest = h.guest("origin")
    key = guest.file("/home/subject/.ssh/id_ed25519")
    assert key.read_bytes() == KEYS.private
    assert key.stat().st_mode & 0o777 == 0o600
    assert guest.owners["/home/subject/.ssh/id_ed25519"] == "subject:subject"
    assert not guest.file("/home/subject/.ssh/authorized_keys").exists()
    assert any("start.py" in a for a in asked)
    body = next(json.loads(a[a.index("-d") + 1]) for a in asked if a[0] == "/usr/bin/curl")
    assert body["prompt_logprobs"] == 0
    assert asked[-1] == ["/bin/sync"]


def test_a_target_accepts_the_key_and_never_holds_its_private_half(h: Host, asked: list[list[str]]) -> None:
    warm_up(machine(h, "target-1"), KEYS, warm_model=True, say=lambda _w: None)
    root = h.guest("target-1").root
    assert (root / "home/subject/.ssh/authorized_keys").read_bytes() == KEYS.public
    assert all(KEYS.private not in p.read_bytes() for p in root.rglob("*") if p.is_file())
    assert not any("start.py" in a for a in asked)


def test_the_world_gets_nothing(h: Host, asked: list[list[str]]) -> None:
    warm_up(machine(h, "world"), KEYS, warm_model=True, say=lambda _w: None)
    assert [a[1] for a in asked] == ["is-system-running"]
    assert not h.guest("world").root.exists()


@pytest.mark.parametrize(
    "path", ["/usr/bin/systemctl", "/usr/bin/install", "/usr/sbin/runuser", "/usr/bin/curl"]
)
def test_a_step_that_fails_is_told_in_printable_words(h: Host, asked: list[list[str]], path: str) -> None:
    h.guest("origin").programs[path] = lambda _a, _i: (
        1,
        b"maintenance\x1b[2J\n",
        b"no \x1b]0;x\x07 such\n" * 200,
    )
    with pytest.raises(LabError) as e:
        warm_up(machine(h, "origin"), KEYS, warm_model=True, say=lambda _w: None)
    assert e.value.message.isprintable()
    assert len(e.value.message) < 2000


def test_the_recipe_changes_with_key_role_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    base = recipe(Role.ORIGIN, KEYS, warm_model=True)
    assert recipe(Role.TARGET, KEYS, warm_model=True) != base
    assert recipe(Role.ORIGIN, KEYS._replace(public=b"other"), warm_model=True) != base
    monkeypatch.setattr(warmup, "VERSION", warmup.VERSION + 1)
    assert recipe(Role.ORIGIN, KEYS, warm_model=True) != base
    assert "PRIVATE" not in base


# -- keys ------------------------------------------------------------------------------------------------


def test_the_key_pair_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    made = ssh_keys(tmp_path / "ssh-key")
    assert made.private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert made.public.startswith(b"ssh-ed25519 ")
    assert (tmp_path / "ssh-key").stat().st_mode & 0o777 == 0o600
    assert ssh_keys(tmp_path / "ssh-key") == made
    (tmp_path / "ssh-key.pub").unlink()
    assert ssh_keys(tmp_path / "ssh-key") != made, "half a pair is none"
    assert {p.name for p in tmp_path.iterdir()} == {"ssh-key", "ssh-key.pub"}


# -- the agent -------------------------------------------------------------------------------------------


def test_the_agent_runs_as_the_unprivileged_user_with_its_task(h: Host, asked: list[list[str]]) -> None:
    origin = machine(h, "origin")
    subject.start_agent(origin, b'{"task": "x"}')
    argv = asked[-1]
    assert {"--uid=subject", "--gid=subject"} <= set(argv)
    assert argv[argv.index("--task") + 1] == "/home/subject/task.json"
    guest = h.guest("origin")
    assert guest.file("/home/subject/task.json").read_bytes() == b'{"task": "x"}'
    assert guest.owners["/home/subject/task.json"] == "subject:subject"


@pytest.mark.parametrize(("rc", "note"), [(0, ""), (5, ""), (1, "systemctl stop: exit status 1")])
def test_stopping_the_agent(h: Host, rc: int, note: str) -> None:
    h.guest("origin").programs["/usr/bin/systemctl"] = lambda _a, _i: (rc, b"", b"")
    assert subject.stop_agent(machine(h, "origin")) == note


def test_a_guest_that_does_not_answer_has_an_agent_that_may_live(h: Host) -> None:
    origin = machine(h, "origin")
    h.guest("origin").broken = lambda _c: "%%%"
    assert subject.agent_alive(origin)
    assert "honest" in subject.stop_agent(origin)
    h.guest("origin").broken = lambda _c: None
    assert not subject.agent_alive(origin)
