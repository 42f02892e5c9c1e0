"""What a killed libvirt left of its machines names their QEMU, or nobody, before libvirt reads it again."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cell.libvirt_status import NOBODY, put_right
from tests.fakes.qemu import look_alike

NAME = "hc-c1-origin-0a1b2c3d"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "run" / "qemu").mkdir(parents=True)
    (tmp_path / "run" / "qemu" / "driver.pid").touch()
    return tmp_path


def status(root: Path, pid: object) -> Path:
    path = root / "run" / "qemu" / f"{NAME}.xml"
    path.write_text(
        f"<!--\nWARNING\n-->\n\n<domstatus state='paused' reason='starting up' pid='{pid}'>\n"
        f"  <domain type='qemu'><x pid='0'/></domain>\n</domstatus>\n"
    )
    return path


@pytest.fixture
def qemu(root: Path) -> Iterator[Callable[[str], int]]:
    started = []

    def start(name: str) -> int:
        started.append(look_alike("-name", f"guest={name},debug-threads=on", f"path={root}/lib/monitor.sock"))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("told", [0, -1, 1, os.getpid()])
def test_a_machine_whose_qemu_is_gone_has_no_process_and_not_somebody_elses(root: Path, told: int) -> None:
    path = status(root, told)
    assert put_right(root) == [NAME]
    assert f"reason='starting up' pid='{NOBODY}'>" in path.read_text()
    assert "<x pid='0'/>" in path.read_text(), "nothing else is touched"
    assert path.stat().st_mode & 0o777 == 0o600
    assert put_right(root) == []
    assert {p.name for p in path.parent.iterdir()} == {path.name, "driver.pid"}


def test_a_qemu_that_runs_is_named(root: Path, qemu: Callable[[str], int]) -> None:
    path, other, mine = status(root, 0), qemu(f"{NAME}0"), qemu(NAME)
    assert put_right(root) == [NAME]
    assert f"pid='{mine}'" in path.read_text()
    assert str(other) not in path.read_text()
    assert put_right(root) == []


def test_nobody_is_larger_than_any_pid() -> None:
    assert int(Path("/proc/sys/kernel/pid_max").read_text()) < NOBODY
    with pytest.raises(ProcessLookupError):
        os.kill(NOBODY, 0)


@pytest.mark.parametrize("text", ["", "<domstatus>", "not XML", "<domain pid='0'/>"])
def test_what_is_no_status_is_left_alone(root: Path, text: str) -> None:
    path = root / "run" / "qemu" / "x.xml"
    path.write_text(text)
    assert put_right(root) == []
    assert path.read_text() == text


def test_a_root_that_was_never_used_has_nothing_to_put_right(tmp_path: Path) -> None:
    assert put_right(tmp_path) == []


def _hold(
    lock: Path, held: multiprocessing.synchronize.Event, let_go: multiprocessing.synchronize.Event
) -> None:
    with lock.open("ab") as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        held.set()
        let_go.wait(20)


def test_where_libvirt_runs_nothing_is_touched(root: Path) -> None:
    path = status(root, 0)
    held, let_go = multiprocessing.Event(), multiprocessing.Event()
    holder = multiprocessing.Process(target=_hold, args=(root / "run" / "qemu" / "driver.pid", held, let_go))
    holder.start()
    assert held.wait(20)
    assert put_right(root) == []
    assert "pid='0'" in path.read_text().splitlines()[4]
    let_go.set()
    holder.join(20)
    assert put_right(root) == [NAME]
