"""Commands, paths, capacity, clock, log lines, and the accelerator probe's decisions."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from appliance.cell.processes import started
from appliance.errors import (
    CapacityError,
    CommandError,
    ConfigError,
    LabError,
    PrerequisiteError,
    ResetError,
)
from appliance.host import accelerator, capacity, clock, command, log, microguest
from appliance.host.accelerator import AcceleratorReport, Attempt
from appliance.host.paths import Paths, default_paths
from appliance.model import Accelerator

PY = sys.executable


# --- command ----------------------------------------------------------------------------------------


def test_run_returns_both_streams_and_the_status() -> None:
    done = command.run(
        [PY, "-c", "import sys; print('o'); print('e', file=sys.stderr); sys.exit(3)"],
        timeout=20,
        check=False,
    )
    assert done == (3, "o\n", "e\n")


def test_a_failure_can_be_pasted_into_a_shell() -> None:
    with pytest.raises(CommandError, match="exit status 1") as caught:
        command.run(["false", "a b"], timeout=5)
    assert "false 'a b'" in str(caught.value)
    assert caught.value.fields["rc"] == 1


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandError, match="no-such-program: not found"):
        command.run(["no-such-program"], timeout=5)
    with pytest.raises(CommandError, match="not installed") as caught:
        command.require("no-such-program", "some-package")
    assert "some-package" in caught.value.hint


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    script = f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.fork()))\ntime.sleep(60)"
    with pytest.raises(CommandError, match="ran longer than 1 s"):
        command.run([PY, "-c", script], timeout=1)
    for pid in (int(p) for p in (tmp_path / "pid").read_text().split() if p != "0"):
        clock.wait_until(partial(lambda pid: started(pid) is None, pid), 5, f"{pid} to end")


def test_the_environment_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    done = command.run(["env"], timeout=5, env={"EXTRA": "1"})
    names = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert names == {"PATH", "HOME", "LANG", "EXTRA"}


def test_no_shell_interprets_arguments(tmp_path: Path) -> None:
    command.run(["echo", f"$(touch {tmp_path}/x); touch {tmp_path}/x"], timeout=5)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_does_not_read_its_input_is_no_error() -> None:
    assert command.run(["true"], timeout=5, stdin=b"x" * 1_000_000).rc == 0


def test_end_escalates_to_a_process_that_ignores_the_signal() -> None:
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = command.spawn([PY, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert command.end(process, grace=0.2) == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize("how", ["run", "spawn"])
def test_what_is_tied_ends_with_a_process_that_is_killed(how: str, tmp_path: Path) -> None:
    """SIGKILL leaves no moment to end anything: the kernel does it."""
    pid = tmp_path / "pid"
    sleeper = [PY, "-c", f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
    call = {"run": f"command.run({sleeper!r}, timeout=60, tied=True)",
            "spawn": f"command.spawn({sleeper!r}, tied=True); time.sleep(60)"}[how]  # fmt: skip
    ours = subprocess.Popen([PY, "-c", f"import time; from appliance.host import command; {call}"])
    clock.wait_until(lambda: pid.exists() and pid.read_text(), 20, "the child to start")
    child = Path("/proc", pid.read_text())
    assert child.exists()
    ours.kill()
    ours.wait()
    clock.wait_until(
        lambda: not (child / "cmdline").exists() or not (child / "cmdline").read_bytes(), 10, "its end"
    )


def test_what_is_tied_tells_its_status_and_output() -> None:
    done = command.run(["/bin/sh", "-c", "cat; exit 3"], timeout=5, check=False, stdin=b"said", tied=True)
    assert (done.rc, done.stdout) == (3, "said")


# --- paths ------------------------------------------------------------------------------------------


def test_paths_from_arguments_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOTCELL_HOME", "/srv/h")
    monkeypatch.setenv("HOTCELL_CACHE", "/srv/c")
    assert default_paths() == Paths(Path("/srv/h"), Path("/srv/c"))
    assert default_paths(Path("/a"), Path("/b")) == Paths(Path("/a"), Path("/b"))


@pytest.mark.parametrize(
    ("caches", "cache"),
    [
        (None, "/root/.cache/hotcell"),
        ("", "/root/.cache/hotcell"),
        ("x", "/root/.cache/hotcell"),
        ("/x", "/x/hotcell"),
    ],
)
def test_an_empty_variable_counts_as_unset_and_a_relative_cache_as_none(
    monkeypatch: pytest.MonkeyPatch, caches: str | None, cache: str
) -> None:
    for name in ("HOTCELL_HOME", "HOTCELL_CACHE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if caches is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", caches)
    assert default_paths() == Paths(Path("/var/lib/hotcell"), Path(cache))


def test_a_home_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 46"):
        default_paths(Path("/" + "x" * 60), Path("/c"))


def test_directories_are_private(tmp_path: Path) -> None:
    made = Paths(tmp_path / "h", tmp_path / "c").make()
    assert all(d.stat().st_mode & 0o077 == 0 for d in (made.home, made.cache, made.bundles, made.libvirt))


# --- capacity ---------------------------------------------------------------------------------------


def test_host_capacity_is_plausible_for_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    have = capacity.host_capacity(tmp_path / "not" / "yet")
    assert have.cores >= 1
    assert 0 < have.memory_available <= have.memory_total
    assert 0 < have.disk_free <= have.disk_total


def test_what_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    capacity.require_room(tmp_path, memory=1, disk=1, purpose="nothing")
    with pytest.raises(CapacityError, match=r"not enough memory for a cell: needs .* GiB, free"):
        capacity.require_room(tmp_path, memory=1 << 60, disk=0, purpose="a cell")
    with pytest.raises(CapacityError, match="not enough disk"):
        capacity.require_room(tmp_path, memory=0, disk=1 << 60, purpose="a build")


def test_a_process_is_sampled() -> None:
    me = capacity.sample_process(os.getpid())
    assert me is not None
    assert 0 < me.own <= me.rss


def test_a_process_that_ended_gives_nothing() -> None:
    process = command.spawn(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its pid is taken, it is gone
    assert capacity.sample_process(process.pid) is None
    command.end(process)


def test_own_footprint_sees_an_open_file(tmp_path: Path) -> None:
    before = capacity.own_footprint()
    with (tmp_path / "x").open("w"):
        assert capacity.own_footprint().fds == before.fds + 1
    assert before.rss > 0


# --- clock ------------------------------------------------------------------------------------------


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    @property
    def clock(self) -> clock.Clock:
        return clock.Clock(lambda: self.now, self.sleep)


def test_wait_until_returns_the_value_as_soon_as_there_is_one() -> None:
    time, answers = FakeTime(), iter([None, None, "yes"])
    assert clock.wait_until(lambda: next(answers), 10, "an answer", 1.0, clock=time.clock) == "yes"
    assert time.now == 2.0


def test_wait_until_says_what_it_waited_for_and_what_it_saw() -> None:
    time = FakeTime()
    with pytest.raises(clock.WaitError, match=r"waited 3 s for state busy; last seen: 0"):
        clock.wait_until(lambda: 0, 3, lambda: "state busy", 2.0, clock=time.clock)
    assert time.now == 3.0


def test_wait_until_asks_at_least_once_and_raises_what_the_caller_wants() -> None:
    asked: list[int] = []
    with pytest.raises(ResetError):
        clock.wait_until(lambda: asked.append(1), 0, "x", clock=FakeTime().clock, error=ResetError)
    assert asked == [1]


def test_what_the_condition_raises_is_not_waited_out() -> None:
    def broken() -> None:
        raise ValueError("terminal")

    with pytest.raises(ValueError, match="terminal"):
        clock.wait_until(broken, 100, "x", clock=FakeTime().clock)


# --- log --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("tap0\n", r'"tap0\n"'),
        ("plain-1.2/3", "plain-1.2/3"),
        (1.23456, "1.235"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a\nlevel=error forged", '"a\\nlevel=error forged"'),
        ("\x1b[2J", '"\\x1b[2J"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("\u202eevil", '"\\u202eevil"'),
        ("x" * 301, "x" * 300 + "...+1"),
    ],
)
def test_log_values_cannot_forge_a_line(given: object, written: str) -> None:
    assert log.value(given) == written


def test_log_lines_carry_the_trial(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        log.set_up("debug")
        with log.trial("t1"):
            log.Log("hotcell.test").info("started", machine="origin", text="a\nb")
        logging.getLogger("other").warning("two\nlines")
    finally:
        root.handlers[:], root.level = handlers, level
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith('info hotcell.test trial=t1 started machine=origin text="a\\nb"')
    assert second.endswith("warning other two\\nlines")


# --- accelerator ------------------------------------------------------------------------------------


def test_the_micro_guest_is_what_its_source_says(tmp_path: Path, project: Path) -> None:
    source = project / "appliance/host/microguest.S"
    link = ["ld", "-m", "elf_x86_64", "--oformat", "binary", "-Ttext", "0", "-e", "0", "m.o", "-o", "m.bin"]
    subprocess.run(["as", source, "-o", "m.o"], cwd=tmp_path, check=True)
    subprocess.run(link, cwd=tmp_path, check=True)
    assert (tmp_path / "m.bin").read_bytes() == microguest.image()


def test_progress_names_the_stage_that_was_not_passed() -> None:
    assert microguest.progress("") == "the guest did not run at all"
    assert "did not get through twenty million rounds" in microguest.progress("RPGLI")
    assert microguest.progress(microguest.MARKER) == "reached ten timer interrupts"


def test_the_micro_guest_runs_under_software_emulation() -> None:
    attempt = accelerator.boot_micro(Accelerator.TCG, 30)
    assert attempt.passed, attempt.problem


def test_a_guest_that_does_not_reach_its_marker_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = microguest.image().replace(
        b"\xb0W\xe6\xe9", b"\xb0X\xe6\xe9"
    )  # another letter in the place of W
    monkeypatch.setattr(microguest, "image", lambda: spoiled)
    attempt = accelerator.boot_micro(Accelerator.TCG, 30)
    assert not attempt.passed
    assert "twenty million" in attempt.problem


def made(kind: Accelerator, passed: bool, guest: str = "micro") -> Attempt:
    return Attempt.model_validate(
        {
            "accelerator": kind,
            "guest": guest,
            "passed": passed,
            "seconds": 1,
            "problem": "" if passed else "hung",
        }
    )


KVM, TCG = Accelerator.KVM, Accelerator.TCG


@pytest.mark.parametrize(
    ("attempts", "chosen", "count", "says"),
    [
        ([made(KVM, True), made(TCG, True)], KVM, 1, "KVM: booted"),
        ([made(KVM, True), made(KVM, True, "kernel"), made(TCG, True)], KVM, 2, "KVM: booted"),
        ([made(KVM, True), made(KVM, False, "kernel"), made(TCG, True)], TCG, 3, "not usable here: hung"),
        ([made(KVM, False), made(TCG, True)], TCG, 2, "not usable here: hung"),
        ([made(KVM, False), made(TCG, False)], None, 2, "neither"),
        ([], None, 0, "neither"),
    ],
)
def test_kvm_is_chosen_only_if_every_guest_ran(
    attempts: list[Attempt], chosen: Accelerator | None, count: int, says: str
) -> None:
    report = accelerator._decide("auto", True, "q", "b", iter(attempts))
    assert report.chosen is chosen
    assert len(report.attempts) == count
    assert says in report.line


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch, paths: Paths) -> list[str]:
    """Probes that boot nothing: KVM never works, TCG does. Lists the calls."""
    calls: list[str] = []

    def boot(kind: Accelerator, limit_s: float) -> Attempt:
        calls.append(kind.value)
        return made(kind, kind is TCG)

    monkeypatch.setattr(accelerator, "boot_micro", boot)
    monkeypatch.setattr(accelerator, "qemu_version", lambda: "QEMU 1")
    monkeypatch.setattr(accelerator, "_KVM", paths.home)  # exists
    return calls


def test_a_finding_is_kept_for_this_boot_and_this_qemu(
    probed: list[str], paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = accelerator.probe_accelerator(paths)
    again = accelerator.probe_accelerator(paths)
    assert (first.from_cache, again.from_cache, again.chosen) == (False, True, TCG)
    assert probed == ["kvm", "tcg"]
    accelerator.probe_accelerator(paths, fresh=True)
    assert len(probed) == 4
    monkeypatch.setattr(accelerator, "qemu_version", lambda: "QEMU 2")
    assert not accelerator.probe_accelerator(paths).from_cache


@pytest.mark.parametrize("spoiled", ["", "{", '{"chosen": "kvm"}', "\x00"])
def test_a_spoiled_finding_is_made_anew(probed: list[str], paths: Paths, spoiled: str) -> None:
    accelerator.probe_accelerator(paths)
    next(paths.cache.glob("accelerator-*.json")).write_text(spoiled)
    assert not accelerator.probe_accelerator(paths).from_cache


def test_demanding_kvm_where_it_does_not_work_is_refused(probed: list[str], paths: Paths) -> None:
    assert accelerator.select_accelerator(paths).chosen is TCG
    with pytest.raises(PrerequisiteError, match="kvm: hung") as caught:
        accelerator.select_accelerator(paths, "kvm")
    assert "auto" in caught.value.hint
    assert not list(paths.cache.glob("accelerator-kvm*"))  # a failure is not kept


def test_a_report_survives_json() -> None:
    report = accelerator._decide("tcg", False, "q", "b", iter([made(TCG, True)]))
    assert AcceleratorReport.model_validate_json(report.model_dump_json()) == report
    assert "as configured" in report.line


@pytest.mark.parametrize(
    ("passed", "wall", "jumped"),
    [
        (0, 0, False), (60, 61.9, False), (60, 58.1, False), (7200, 7209, False),
        (60, 63, True), (60, 57, True), (60, 3660, True), (60, -90_000, True), (7200, 7210, True),
    ],
)  # fmt: skip
def test_a_jump_of_the_clock_is_told_from_its_being_kept_in_step(
    passed: float, wall: float, jumped: bool
) -> None:
    now = {"wall": 1e9, "monotonic": 5.0}
    steady = clock.SteadyClock(lambda: now["wall"], clock.Clock(lambda: now["monotonic"], lambda _s: None))
    now["wall"] += wall
    now["monotonic"] += passed
    if jumped:
        with pytest.raises(LabError, match="jumped by") as e:
            steady.require()
        assert "in step" in e.value.hint
    else:
        steady.require()
