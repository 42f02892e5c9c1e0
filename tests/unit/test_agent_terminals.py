"""Terminals are real shells: they persist, are bounded in time and output, and leave nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.terminals import HEAD, TAIL, Capture, Terminals
from agent.tools import Execute, Receive, Toolbox


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Terminals]:
    terminals = Terminals(tmp_path)
    yield terminals
    terminals.close()


def gone(pid: int, limit_s: float = 5.0) -> bool:
    """True once no live process has this pid."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_shell_keeps_directory_and_variables(box: Terminals, tmp_path: Path) -> None:
    assert box.execute(1, "pwd", 10).stdout == f"{tmp_path}\n"
    assert box.execute(1, "cd /; X=5; echo $X", 10).stdout == "5\n"
    assert box.execute(1, "pwd; echo $X", 10).stdout == "/\n5\n"
    assert box.execute(2, "pwd; echo [$X]", 10).stdout == f"{tmp_path}\n[]\n"


@pytest.mark.parametrize(
    ("command", "status", "stdout"),
    [
        ("true", "ok", ""),
        ("(exit 7)", "failed (exit 7)", ""),
        ("no-such-program-xyz", "failed (exit 127)", ""),
        ("echo 'it''s' \"$((1+1))\"", "ok", "its 2\n"),
        ("echo a; # a comment", "ok", "a\n"),
        ("cat <<E\nx $HOME_X y\nE", "ok", "x  y\n"),
        ("cat", "ok", ""),  # standard input is empty, not the shell's own script
        ("printf '0\\n' >&3", "failed (exit 1)", ""),  # the status pipe is not the command's to write
        ("echo é\x07", "ok", "é\x07\n"),
        ("printf '\\xff'", "ok", "�"),
    ],
)
def test_status_and_output(box: Terminals, command: str, status: str, stdout: str) -> None:
    result = box.execute(3, command, 10)
    assert (result.status, result.stdout, result.terminal) == (status, stdout, 3)
    assert box.execute(3, "echo on", 10).stdout == "on\n"


def test_a_syntax_error_leaves_the_terminal_usable(box: Terminals) -> None:
    result = box.execute(1, "if then 'unclosed", 10)
    assert result.status.startswith("failed")
    assert result.stderr
    assert box.execute(1, "echo on", 10).stdout == "on\n"


def test_stderr_is_apart(box: Terminals) -> None:
    result = box.execute(1, "echo out; echo err >&2", 10)
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_a_shell_that_ends_is_told_and_replaced(box: Terminals) -> None:
    result = box.execute(1, "echo bye; exit 4", 10)
    assert (result.status, result.stdout) == ("closed (exit 4)", "bye\n")
    assert box.execute(1, "echo back", 10).stdout == "back\n"


def test_a_command_that_takes_too_long_is_ended_with_all_its_processes(box: Terminals) -> None:
    begun = time.monotonic()
    result = box.execute(1, "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done'", 1)
    assert result.status == "timeout"
    assert time.monotonic() - begun < 8
    assert gone(int(result.stdout.split()[0]))
    assert "stopped after 1 s" in result.stderr
    assert box.receive(1, 0.1).status == "idle"
    assert box.execute(1, "echo afresh", 10).status == "ok"


def test_output_is_bounded_head_and_tail(box: Terminals) -> None:
    result = box.execute(1, "echo first; yes | head -c 20000000; echo last", 60)
    assert result.status == "ok"
    assert result.stdout.startswith("first\n")
    assert result.stdout.endswith("last\n")
    assert len(result.stdout) < HEAD + TAIL + 100
    assert "bytes dropped]" in result.stdout


def test_a_background_writer_does_not_hold_up_the_next_command(box: Terminals) -> None:
    assert box.execute(1, "yes & echo started", 10).status == "ok"
    assert box.execute(1, "kill %1; echo killed", 10).status == "ok"


def test_long_running_is_read_with_receive(box: Terminals) -> None:
    started = box.launch(2, "echo one; sleep 3; echo two; (exit 3)")
    assert (started.status, started.stdout) == ("running", "one\n")
    busy = box.execute(2, "echo no", 10)
    assert busy.status == "busy"
    assert not busy.stdout
    rest = box.receive(2, 20)
    text = rest.stdout
    while rest.status == "running":
        rest = box.receive(2, 20)
        text += rest.stdout
    assert (text, rest.status) == ("two\n", "failed (exit 3)")
    assert box.receive(2, 0.1).status == "idle"


def test_receive_waits_no_longer_than_asked(box: Terminals) -> None:
    box.launch(1, "sleep 30")
    begun = time.monotonic()
    result = box.receive(1, 0.3)
    assert (result.status, result.stdout) == ("running", "")
    assert time.monotonic() - begun < 2


def test_receive_on_a_terminal_never_used(box: Terminals) -> None:
    assert box.receive(5, 5).status == "idle"


def test_a_short_long_running_command_is_told_at_once(box: Terminals) -> None:
    assert box.launch(1, "echo quick").status == "ok"


def test_close_ends_and_reaps_everything_and_starts_nothing_again(tmp_path: Path) -> None:
    terminals = Terminals(tmp_path)
    pids = []
    for number in (1, 2):
        terminals.execute(number, "sleep 300 &", 10)
        pids += [int(p) for p in terminals.execute(number, "echo $$ $!", 10).stdout.split()]
    fds = len(list(Path("/proc/self/fd").iterdir()))
    terminals.close()
    assert all(gone(pid) for pid in pids)
    assert len(list(Path("/proc/self/fd").iterdir())) < fds
    assert terminals.execute(1, "echo no", 1).status == "closed"
    assert terminals.launch(1, "echo no").status == "closed"
    terminals.close()


def test_a_program_that_detached_outlives_its_terminal(tmp_path: Path) -> None:
    terminals = Terminals(tmp_path)
    terminals.execute(1, "setsid sleep 300 >/dev/null 2>&1 </dev/null & echo $! > pid; sleep 0.3", 10)
    pid = int((tmp_path / "pid").read_text())
    terminals.close()
    try:
        assert not gone(pid, 0.5)
    finally:
        os.kill(pid, 9)


def test_the_toolbox_keeps_to_the_time_left(tmp_path: Path) -> None:
    tools = Toolbox(Terminals(tmp_path), command_s=100, receive_s=100)
    try:
        begun = time.monotonic()
        assert tools.run(Execute("sleep 60"), within_s=0.5).status == "timeout"
        tools.run(Execute("sleep 60", 2, "long_running"))
        assert tools.run(Receive(2), within_s=0.2).status == "running"
        assert time.monotonic() - begun < 12
    finally:
        tools.close()


def test_capture_counts_what_it_drops() -> None:
    capture = Capture(head=4, tail=4)
    for part in (b"ab", b"cdEFGH", b"ij", b""):
        capture.add(part)
    assert capture.take() == "abcd\n[2 bytes dropped]\nGHij"
    assert not capture
    assert capture.take() == ""
