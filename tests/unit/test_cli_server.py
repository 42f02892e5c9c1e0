"""Verbs that start a server for the length of their job."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cli import demo as cli_demo
from appliance.cli import main
from appliance.cli import server as cli_server
from appliance.cli.common import Options, exit_code
from appliance.errors import HostError, HotcellError, LabError, UserError
from appliance.host import command
from appliance.host.paths import PROJECT, Paths
from tests.fakes import server as fake_server
from tests.fakes.running import short_home


@pytest.fixture
def home() -> Iterator[Paths]:
    with short_home() as paths:
        yield paths


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """All images are built."""
    monkeypatch.setattr("appliance.pipeline.fleet.machines_for", lambda *_: ((), ()))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, built: None) -> None:
    """Verbs start the laboratory in memory instead of a real one."""

    def argv(options: Options, *, with_parent: bool) -> list[str | os.PathLike[str]]:
        return [sys.executable, fake_server.__file__, options.paths.home, options.paths.cache]

    monkeypatch.setattr(cli_server, "argv_of", argv)


def call(paths: Paths, *argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["--home", os.fspath(paths.home), "--cache", os.fspath(paths.cache), *argv])
    return int(end.value.code or 0)


@pytest.mark.usefixtures("fake")
def test_run_starts_a_server_and_ends_it(home: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(home, "run", "replicator") == 0
    assert "lasting" in capsys.readouterr().out
    assert (home.home / "order").read_text().splitlines()[-1] == "closed announced=False"
    assert not home.server_file.exists()
    assert not home.api_socket.exists()


@pytest.mark.usefixtures("fake")
def test_the_log_of_the_server_before_is_kept(home: Paths) -> None:
    home.server_log.write_text("an earlier one\n")
    before = home.server_log.with_name("server.log.1")
    before.write_text("one before that\n")
    assert call(home, "run", "replicator") == 0
    assert before.read_text() == "an earlier one\n"
    assert "serving" in home.server_log.read_text()


@pytest.mark.usefixtures("fake")
def test_a_run_that_the_server_refuses_ends_the_server_too(
    home: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_server, "require_known", lambda *_: None)
    assert call(home, "run", "nobody") == 2
    assert (home.home / "order").exists(), "it ran"
    assert not home.api_socket.exists()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("replictor",), "no subject named 'replictor' (did you mean `replicator`?)"),
        (("idle", "--scenario", "nowhere"), "no scenario named 'nowhere'"),
        (("idle", "--policy", "loose"), "no policy named 'loose'"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_started(
    home: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cli_server, "argv_of", lambda *_, **__: pytest.fail("a server was started"))
    assert call(home, "run", *argv) == 2
    assert said in capsys.readouterr().err


def test_an_image_that_is_not_built_is_told_before_anything_is_started(
    home: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_server, "argv_of", lambda *_, **__: pytest.fail("a server was started"))
    assert call(home, "run", "replicator") == 2
    assert "hotcell build subject-cpu" in capsys.readouterr().err


@pytest.mark.usefixtures("built")
def test_a_server_that_does_not_come_up_is_the_hosts_fault(
    home: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; sys.exit('no libvirt here')"
    monkeypatch.setattr(cli_server, "argv_of", lambda *_, **__: [sys.executable, "-c", code])
    assert call(home, "run", "idle") == 3
    said = capsys.readouterr().err
    assert "no libvirt here" in said
    assert "hotcell doctor" in said


@pytest.mark.parametrize(
    ("status", "kind", "blame"), [(2, UserError, 2), (3, HostError, 3), (4, LabError, 4)]
)
def test_what_the_child_told_is_passed_on(status: int, kind: type[HotcellError], blame: int) -> None:
    said = "2025 starting\nerror: not this one\nmore\nerror: a.toml: key `x`: found 1\nb.toml: y\nwhat to do: mend it"
    error = cli_server.why_it_ended(status, said, Path("/log"))
    assert type(error) is kind
    assert (error.message, error.hint) == ("a.toml: key `x`: found 1\nb.toml: y", "mend it")
    assert exit_code(error) == blame
    assert "/log" in cli_server.why_it_ended(status, "error: bare", Path("/log")).hint


@pytest.mark.parametrize(("status", "said"), [(-9, "error: x"), (1, "Traceback"), (2, "")])
def test_a_child_that_told_nothing_is_the_hosts_fault(status: int, said: str) -> None:
    error = cli_server.why_it_ended(status, said, Path("/log"))
    assert exit_code(error) == 3
    assert "hotcell doctor" in error.hint
    assert said in error.message


@pytest.mark.parametrize(
    ("settings", "subject", "said"),
    [
        (
            'library_dirs = ["rel"]',
            "",
            "settings.toml: key `library_dirs.0`: found 'rel', allowed: the absolute",
        ),
        ("acelerator = 1", "", "settings.toml: unknown key `acelerator` (did you mean `accelerator`?)"),
        ('library_dirs = ["DIR"]', 'name = "mine"\nsummary = "x"', "mine.toml: key `brain` is missing"),
    ],
)
def test_a_slip_in_a_file_is_told_once_and_starts_nothing(
    home: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    settings: str, subject: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(cli_server, "argv_of", lambda *_, **__: pytest.fail("a server was started"))
    (home.cache / "mine/subjects").mkdir(parents=True)
    if subject:
        (home.cache / "mine/subjects/mine.toml").write_text(subject)
    file = home.cache / "settings.toml"
    file.write_text(settings.replace("DIR", str(home.cache / "mine")))
    assert call(home, "--config", str(file), "run", "idle") == 2
    told = capsys.readouterr().err
    assert said in told
    assert (told.count("error: "), told.count("what to do: ")) == (1, 1)
    assert "doctor" not in told


def test_the_child_gets_the_same_home_and_settings(home: Paths) -> None:
    options = Options(home, Path("/etc/x.toml"), None, None)
    argv = [os.fspath(a) for a in cli_server.argv_of(options, with_parent=True)]
    assert argv[argv.index("--home") + 1] == os.fspath(home.home)
    assert argv[argv.index("--config") + 1] == "/etc/x.toml"
    assert argv[-2:] == ["--parent", str(os.getpid())]
    assert "--parent" not in cli_server.argv_of(options, with_parent=False)


def test_the_child_gets_the_settings_that_the_environment_names(
    home: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTCELL_CONFIG", "/etc/y.toml")
    argv = [os.fspath(a) for a in cli_server.argv_of(Options(home, None, None, None), with_parent=True)]
    assert argv[argv.index("--config") + 1] == "/etc/y.toml"


def test_a_missing_settings_file_is_blamed_on_who_named_it(
    home: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_server, "argv_of", lambda *_, **__: pytest.fail("a server was started"))
    monkeypatch.setenv("HOTCELL_CONFIG", "/nowhere/y.toml")
    assert call(home, "run", "idle") == 2
    assert "/nowhere/y.toml: no such file (named by HOTCELL_CONFIG)" in capsys.readouterr().err
    assert call(home, "--config", "/nowhere/x.toml", "run", "idle") == 2
    assert "/nowhere/x.toml: no such file (named on the command line)" in capsys.readouterr().err


def test_a_server_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = (
        "import sys, os, signal; from appliance.cli.server import die_with_parent; "
        "die_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True); signal.pause()"
    )
    parent = (
        "import os, sys; from appliance.host import command; "
        f"command.spawn([sys.executable, '-c', {child!r}, str(os.getpid())], "
        "env={'PYTHONPATH': os.environ['PYTHONPATH']}, stdout=1).wait()"
    )
    with (tmp_path / "pid").open("wb") as f:
        process = command.spawn([sys.executable, "-c", parent], env={"PYTHONPATH": str(PROJECT)}, stdout=f)
    limit = time.monotonic() + 10
    while not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < limit
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait(5)
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < limit, "the child outlived its parent"
        time.sleep(0.02)


# The demo leaves a kept server unwaited on purpose; the test reaps it below.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("keep", [False, True])
def test_the_demo_shows_both_ladders_and_the_bill(
    home: Paths, keep: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_demo, "_build", lambda o: [{"recipe": "world", "seconds": 9.5}])
    monkeypatch.setattr(cli_demo, "_verify", lambda o, done: True)
    monkeypatch.setattr(sys, "argv", ["/opt/lab/hotcell"])
    settings = home.cache / "my settings.toml"
    settings.touch()
    again = f"/opt/lab/hotcell --home {home.home} --cache {home.cache} --config '{settings}'"
    try:
        assert call(home, "--config", str(settings), "demo", *(["--keep-serving"] if keep else [])) == 0
        said = capsys.readouterr().out
        assert said.count("clean start") == 2
        for word in (
            "evidence: ",
            "where the time went",
            "world",
            "replicator",
            "claimer",
            "to look further",
        ):
            assert word in said
        assert f"\n  {again} run claimer\n" in said
        assert f"\n  {again} verify /" in said
        assert home.api_socket.exists() is keep
        assert ("the API is at" in said) is keep
    finally:
        if keep:  # a child of this test, started by the demo above, in a home of this test's own
            pid = json.loads(home.server_file.read_text())["pid"]
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    assert not home.api_socket.exists()
