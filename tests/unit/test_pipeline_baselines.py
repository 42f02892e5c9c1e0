"""Baselines behind the API, on a host in memory: who needs them, other ones to reset to, and the way out."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from appliance.cell.baseline import RAM, Baseline, exporting, sparse
from appliance.cell.cell import Cell
from appliance.cell.standby import Standby
from appliance.config import HostSettings, load_library
from appliance.errors import ConflictError, HostError, NotFoundError, ResetError
from appliance.model import Firmware
from appliance.pipeline import cells as cells_module
from appliance.pipeline.lab import Lab
from appliance.service import CellRequest, TransferView
from tests.fakes.bench import FakeWarden, Workbench, workbench
from tests.fakes.machine import machine_spec
from tests.fakes.plans import WEIGHTS
from tests.fakes.saved import publish_one, with_image

SETTINGS = HostSettings.model_validate(
    {"guests": {"cpu_overcommit": 64, "headroom_mib": 256, "disk_floor_mib": 64}}
)


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch, roomy: None) -> Iterator[Workbench]:
    machines = (machine_spec("origin"), machine_spec("target-1"))
    monkeypatch.setattr(cells_module, "machines_for", lambda *_: (machines, WEIGHTS))
    with workbench(monkeypatch) as made:
        with_image(made.host, monkeypatch)
        yield made


@pytest.fixture
def lab(w: Workbench) -> Iterator[Lab]:
    made = Lab(w.bench, SETTINGS, load_library(), FakeWarden(), {})  # type: ignore[arg-type]
    yield made
    made.close()


def test_one_is_described(lab: Lab, w: Workbench) -> None:
    first = publish_one(w.host, "first")
    second = publish_one(w.host, "second", parent=first)
    view = lab.baseline("first")
    assert (view.kind, view.parent, view.memory_mib, view.problem) == ("ram", "", 64, "")
    assert view.needed_by == ("baseline second builds on it",)
    assert {f.name: f.sha256 for f in view.files} == {n: f.sha256 for n, f in first.files.items()}
    assert view.held_against["boot id"] == "b0"
    assert "n0..." in view.held_against["RAM nonce"]
    assert lab.baseline("second").layers == tuple(str(p) for p in second.expected.chain)
    (first.folder / RAM).unlink()
    assert "has lost ram" in lab.baseline("first").problem
    cold = publish_one(w.host, "cold", kind="disk")
    assert cold.expected.boot_id in lab.baseline("cold").held_against["boot id"]
    assert [b.name for b in lab.baselines() if b.name in {"first", "second", "cold"}] == [
        "cold", "first", "second",
    ], "made at one moment, so by name"  # fmt: skip


def test_what_an_open_cell_uses_stays_until_it_is_closed(lab: Lab, w: Workbench) -> None:
    cell = lab.open_cell(CellRequest()).id
    name = next(b.name for b in lab.baselines() if b.machine == "target-1")
    with pytest.raises(ConflictError, match=f"{cell} uses it") as e:
        lab.delete_baseline(name)
    assert "runs on it" in e.value.message
    assert lab.baseline(name).needed_by
    lab.close_cell(cell)
    w.bench.standbys.wait_ready(5)
    assert lab.delete_baseline(name).machine == "target-1"
    with pytest.raises(NotFoundError):
        lab.delete_baseline(name)


def test_a_standby_makes_way_and_others_stay(lab: Lab, w: Workbench) -> None:
    mine, other = publish_one(w.host, "mine"), publish_one(w.host, "other", name="origin")
    w.bench.standbys.ask(lambda _baseline: "")
    w.bench.standbys.keep("c1", [mine, other])
    assert w.bench.standbys.wait_ready(5), w.bench.standbys.missing()
    assert any("of standby runs on it" in n for n in lab.baseline("mine").needed_by)
    lab.delete_baseline("mine")
    assert set(w.bench.standbys.ready()) == {"other"}


@pytest.mark.parametrize("overlay", [True, False])
def test_a_standby_in_the_making_makes_way(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch, overlay: bool
) -> None:
    begun, make = threading.Event(), w.bench.standbys._make

    def slowly(baseline: Baseline, generation: int) -> Standby:
        made = make(baseline, generation) if overlay else None
        begun.set()
        time.sleep(0.3)
        return made or make(baseline, generation)

    mine = publish_one(w.host, "mine")
    w.bench.standbys.ask(lambda _baseline: "")
    monkeypatch.setattr(w.bench.standbys, "_make", slowly)
    w.bench.standbys.keep("c1", [mine])
    assert begun.wait(5)
    w.bench.standbys.forget("c1")
    assert lab.delete_baseline("mine").name == "mine"
    assert w.bench.standbys.missing() == {}


def test_a_standby_that_withstands_is_swept_by_a_living_server(lab: Lab, w: Workbench) -> None:
    mine = publish_one(w.host, "mine")
    w.bench.standbys.ask(lambda _baseline: "")
    w.bench.standbys.keep("c1", [mine])
    assert w.bench.standbys.wait_ready(5), w.bench.standbys.missing()
    (domain,) = (m.domain for m in w.bench.standbys.ready().values())
    w.host.libvirt.refuse = {"destroy"}
    w.bench.standbys.drop_all()
    w.host.libvirt.refuse = set()
    assert [(s.name, s.outcome) for s in lab.sweep(dry_run=False).strays] == [(domain, "removed")]
    assert lab.sweep(dry_run=True).strays == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"memory_mib": 1 << 20}, "MiB of memory, and was given room for"),
        ({"vcpus": 64}, "virtual CPUs, and was given room for"),
        (
            {"devices": ("0000:01:00.0",), "firmware": Firmware.UEFI},
            "other passed-through devices: 0000:01:00.0;",
        ),
    ],
)
def test_no_machine_becomes_larger_than_its_cell_was_given_room_for(
    lab: Lab, w: Workbench, changes: dict[str, Any], told: str
) -> None:
    cell = lab.open_cell(CellRequest()).id
    kind = "disk" if "devices" in changes else "ram"
    publish_one(w.host, "larger", kind=kind, **changes)
    with pytest.raises(ConflictError, match=told):
        lab.reset(cell, "target-1", "larger")
    assert lab.exec(cell, "target-1", ["/bin/true"], 5).rc == 0, "nothing was done to it"
    publish_one(w.host, "smaller")
    assert lab.reset(cell, "target-1", "smaller").proved


def test_two_machines_do_not_become_larger_behind_each_others_back(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id
    before = {b.machine: b for b in lab.baselines()}
    least = lab.baseline(before["target-1"].name).memory_mib
    for name in ("origin", "target-1"):
        publish_one(w.host, f"smaller-{name}", name=name, memory_mib=64)
        publish_one(w.host, f"larger-{name}", name=name, memory_mib=2 * least - 64)
        lab.reset(cell, name, f"smaller-{name}")
    inside, go, real = threading.Event(), threading.Event(), Cell.reset

    def slow(self: Cell, baselines: Any, on_proof: Any) -> Any:
        inside.set()
        assert go.wait(5)
        return real(self, baselines, on_proof)

    monkeypatch.setattr(Cell, "reset", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(lab.reset, cell, "origin", "larger-origin")
        assert inside.wait(5)
        with pytest.raises(ConflictError, match="was given room for"):
            lab.reset(cell, "target-1", "larger-target-1")
        go.set()
        assert first.result().proved
    with pytest.raises(ConflictError, match="was given room for"):
        lab.reset(cell, "target-1", "larger-target-1")
    assert lab.reset(cell, "origin", "smaller-origin").proved
    assert lab.reset(cell, "target-1", "larger-target-1").proved


def test_a_machine_goes_back_to_another_baseline_of_its_own(lab: Lab, w: Workbench) -> None:
    publish_one(w.host, "mine")
    publish_one(w.host, "theirs", name="origin")
    cell = lab.open_cell(CellRequest()).id
    before = lab.reset(cell, "target-1").proof.baseline
    assert lab.reset(cell, "target-1", "mine").proof.baseline == "mine"
    assert lab.reset(cell, "target-1").proof.baseline == "mine", "from then on that is where it came from"
    assert lab.reset(cell, "target-1", before).proof.baseline == before
    with pytest.raises(ConflictError, match="of origin, not of target-1") as e:
        lab.reset(cell, "target-1", "theirs")
    assert "mine" in e.value.hint
    with pytest.raises(NotFoundError):
        lab.reset(cell, "target-1", "nobodys")
    with pytest.raises(ConflictError, match="uses it"):
        lab.delete_baseline("mine")
    assert lab.machines()[-1].state == "running", "a refused request leaves the machine as it was"


def test_one_that_was_damaged_before_this_process_began_is_not_reset_to(lab: Lab, w: Workbench) -> None:
    """Content is read once: here only the content tells, since the record was made to fit the inode."""
    made = publish_one(w.host, "mine")
    path = made.path(RAM)
    path.chmod(0o600)
    with path.open("r+b") as f:
        f.write(b"X")
    path.chmod(0o400)
    stat = path.stat()
    fact = made.files[RAM].model_copy(update={"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns})
    record = made.model_copy(update={"files": {**made.files, RAM: fact}})
    (made.folder / "baseline.json").write_text(record.model_dump_json())
    cell = lab.open_cell(CellRequest()).id
    with pytest.raises(ResetError, match="ram is not what was saved"):
        lab.reset(cell, "target-1", "mine")
    assert lab.machines()[-1].state == "running"
    lab.delete_baseline("mine")  # what was refused is not in use


def test_after_a_snapshot_the_next_machine_stands_by_on_it(
    lab: Lab, w: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = lab.open_cell(CellRequest()).id
    mine = publish_one(w.host, "mine")
    monkeypatch.setattr(cells_module, "snapshot", lambda *_: mine)
    monkeypatch.setattr(cells_module, "require_free_name", lambda _name: None)
    monkeypatch.setattr(w.bench.shelf, "all", list)
    w.bench.standbys.ask(lambda _baseline: "")
    lab.snapshot(cell, "target-1", "mine")
    assert w.bench.standbys.wait_ready(5), w.bench.standbys.missing()
    assert "mine" in w.bench.standbys.ready()


def test_names_of_the_laboratorys_own_form_are_not_given(lab: Lab) -> None:
    cell = lab.open_cell(CellRequest()).id
    with pytest.raises(ConflictError, match="own baselines"):
        lab.snapshot(cell, "target-1", "target-1-0123456789ab")


def test_out_and_in_with_progress(
    lab: Lab, w: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = publish_one(w.host, "mine")
    seen: list[list[TransferView]] = []
    copy = sparse.copy

    def looked_at(*args: object) -> object:
        found = copy(*args)  # type: ignore[arg-type]
        seen.append(lab.transfers())
        return found

    monkeypatch.setattr(exporting, "copy", looked_at)
    view = lab.export_baseline("mine", tmp_path / "out")
    assert (view.folder, view.files) == (str(tmp_path / "out"), 3)
    assert view.size == sum(f.size for f in made.files.values())
    assert [(t.verb, t.name, t.done > 0) for ts in seen for t in ts] == [("export", "mine", True)] * 3
    assert lab.transfers() == []
    assert lab.import_baseline(tmp_path / "out", "back").created_by == "import"
    cell = lab.open_cell(CellRequest()).id
    assert lab.reset(cell, "target-1", "back").proof.baseline == "back"


def test_while_it_goes_out_it_cannot_be_deleted(
    lab: Lab, w: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_one(w.host, "mine")
    begun, go = threading.Event(), threading.Event()
    copy = sparse.copy

    def slow(*args: object) -> object:
        begun.set()
        assert go.wait(10)
        return copy(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(exporting, "copy", slow)
    thread = threading.Thread(target=lab.export_baseline, args=("mine", tmp_path / "out"))
    thread.start()
    assert begun.wait(10)
    try:
        with pytest.raises(ConflictError, match=r"export-[0-9a-f]{8} uses it"):
            lab.delete_baseline("mine")
        assert lab.sweep(dry_run=True).strays == ()
    finally:
        go.set()
        thread.join()
    lab.delete_baseline("mine")


def test_a_full_disk_is_the_hosts_fault_and_leaves_nothing(
    lab: Lab, w: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_one(w.host, "mine")

    def full(*_: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "copy", full)
    with pytest.raises(HostError, match="No space left") as e:
        lab.export_baseline("mine", tmp_path / "out")
    assert "nothing of it is left" in e.value.hint
    assert list(tmp_path.iterdir()) == []
    assert lab.transfers() == []
    assert lab.sweep(dry_run=True).strays == ()
    lab.delete_baseline("mine")
