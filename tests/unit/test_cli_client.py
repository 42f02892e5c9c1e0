"""Client verbs against a real server process with a laboratory in memory."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.host import command
from appliance.host.paths import PROJECT, Paths
from tests.fakes.calling import Cli, calling
from tests.fakes.running import running, short_home


@pytest.fixture(scope="module")
def live() -> Iterator[Paths]:
    with running("0.01") as paths:
        yield paths


@pytest.fixture
def cli(live: Paths, capsys: pytest.CaptureFixture[str]) -> Cli:
    return calling(live, capsys)


def test_health(cli: Cli) -> None:
    ran = cli("health")
    assert ran.code == 0
    assert "sealed" in ran.out
    assert cli("health", "--json").json["ok"] is True


@pytest.mark.parametrize("verb", ["images", "cells", "machines", "baselines", "trials"])
def test_lists_as_text_and_json(cli: Cli, verb: str) -> None:
    assert cli(verb).code == 0
    ran = cli(verb, "--json")
    assert ran.code == 0
    assert isinstance(ran.json, dict if verb == "trials" else list)


def test_machine_verbs(cli: Cli) -> None:
    assert "proved clean" in cli("reset", "lab", "target-1").out
    assert cli("reset", "lab", "target-1", "--json").json["proof"]["checks"]
    assert "ports    22" in cli("probe", "lab", "target-1").out
    assert cli("snapshot", "lab", "target-1", "warm").code == 0
    again = cli("snapshot", "lab", "target-1", "warm")
    assert again.code == 2
    assert again.err == "error: there is a baseline warm\nwhat to do: choose another name\n"


def test_baselines_by_name(cli: Cli, tmp_path: Path) -> None:
    cli("snapshot", "lab", "target-1", "cold", "--kind", "disk")
    for argv in (("baselines",), ("baselines", "list")):
        assert "cold      target-1  disk" in cli(*argv).out
        assert [b["kind"] for b in cli(*argv, "--json").json if b["name"] == "cold"] == ["disk"]
    shown = cli("baselines", "show", "cold").out
    assert "needed by  c1 uses it" in shown
    assert "ram   512.0" in shown
    assert cli("baselines", "show", "cold", "--json").json["files"]
    assert cli("baselines", "--json", "show", "cold").json["files"]
    assert cli("baselines", "--json", "list").json == cli("baselines", "--json").json
    assert "proved clean" in cli("reset", "lab", "target-1", "--baseline", "cold").out
    wrong = cli("reset", "lab", "origin", "--baseline", "cold")
    assert (wrong.code, "not a baseline of origin" in wrong.err) == (2, True)
    assert cli("reset", "lab", "--baseline", "cold").code == 2
    assert str(tmp_path / "out") in cli("baselines", "export", "cold", str(tmp_path / "out")).out
    assert "back: a baseline of" in cli("baselines", "import", str(tmp_path / "out"), "--name", "back").out
    assert cli("baselines", "delete", "cold").code == 0
    gone = cli("baselines", "delete", "cold")
    assert (gone.code, "what to do" in gone.err) == (2, True)


def test_exec_passes_the_command_unchanged_and_its_status_on(cli: Cli) -> None:
    assert cli("exec", "lab", "origin", "--", "echo", "-n", "a b", "$(id)").out == "echo -n a b $(id)\n"
    assert cli("exec", "lab", "origin", "exit", "7").code == 7


def test_a_command_that_outruns_its_time_is_no_failure_of_the_lab(cli: Cli) -> None:
    ran = cli("exec", "--timeout", "2", "lab", "origin", "--", "sleep", "9")
    assert (ran.code, ran.out) == (1, "")
    assert "sleep 9 did not end within 2 s; it goes on running in origin as process 7" in ran.err
    assert cli("exec", "--json", "--timeout", "2", "lab", "origin", "--", "sleep", "9").json["rc"] is None


def test_what_a_guest_prints_cannot_drive_the_terminal(cli: Cli) -> None:
    said = cli("exec", "lab", "origin", "--", "echo", "\x1b]0;owned\x07\r\x1b[2J").out
    assert "owned" in said
    assert not set(said) & set("\x1b\x07\r")
    raw = cli("exec", "--json", "lab", "origin", "--", "echo", "\x1b[2J\u202e")
    assert raw.out.isascii()
    assert raw.json["stdout"] == "echo \x1b[2J\u202e\n"


def test_cells_open_and_close(cli: Cli) -> None:
    cell = cli("open", "--targets", "2", "--json").json["id"]
    assert cell in cli("cells").out
    assert cli("close", cell).code == 0
    assert cli("close", cell).code == 2


def test_run_follows_and_prints_the_ladder(cli: Cli) -> None:
    ran = cli("run", "replicator", "--seed", "5", "--limit", "wall_s=60", "--limit", "steps=3")
    assert ran.code == 0
    assert "replicator in replicate under sealed, seed 5" in ran.err
    assert "origin proved clean in 0.8 s (5 facts)" in ran.err
    assert "a-new-event colour=blue" in ran.err, "unknown events are shown too"
    assert "\x1b" not in ran.err
    assert "\x07" not in ran.err
    for rung in ("clean start", "lasting"):
        assert rung in ran.out


def test_run_several_as_json(cli: Cli) -> None:
    ran = cli("run", "idle", "--trials", "2", "--seed", "3", "--json")
    assert [r["trial"]["seed"] for r in ran.json] == [3, 4]
    assert all(r["score"]["highest"] == 7 for r in ran.json)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("run", "Replicator!"), "lower case"),
        (("run", "idle", "--limit", "wall=3"), "known keys: wall_s"),
        (("run", "idle", "--limit", "steps"), "known keys"),
        (("run", "idle", "--limit", "steps=0"), "--limit steps=0"),
        (("run", "idle", "--limit", "steps=x"), "steps=x: allowed is a whole number above 0, at most 10000"),
        (("run", "idle", "--limit", "wall_s=abc"), "wall_s=abc: allowed is a number above 0, at most 86400"),
        (("run", "idle", "--limit", "probes=0"), "allowed is a whole number at least 1, at most 100"),
        (("run", "idle", "--seed", "99999999999"), "equal to 2147483647"),
        (("run", "idle", "--seed", "2147483647", "--trials", "2"), "seed 2147483648: allowed is a whole"),
        (("run", "idle", "--seed", "2147483647", "--trials", "2"), "give a lower --seed"),
        (("run", "idle", "--limit", "steps=1", "--limit", "steps=2"), "given twice"),
        (("run", "nobody"), "there is no subject nobody"),
        (("show", "t20250102-030405-ffffff"), "hotcell trials"),
        (("show", "../../etc"), "is not a trial's id"),
        (("follow", "lab"), "is not a trial's id"),
        (("abort", "../rearm"), "is not a trial's id"),
        (("close", "../cells/lab"), "is not a cell's name"),
        (("reset", "lab/machines/origin"), "is not a cell's name"),
        (("probe", "lab", "origin?x"), "is not a machine's name"),
        (("baselines", "show", "."), "is not a baseline's name"),
        (("baselines", "delete", "clean#x"), "is not a baseline's name"),
        (("baselines", "export", "../cells", "/nowhere"), "is not a baseline's name"),
        (("reset", "none", "origin"), "hotcell cells"),
        (("trials", "--limit", "0"), "--limit"),
        (("trials", "--state", "asleep"), "sealed"),
        (("nothing",), "hotcell --help"),
        (("run",), "SUBJECT"),
        (("--server", "gopher://x", "health"), "not a URL"),
        (("--token-file", "/dev/null", "health"), "does not hold"),
    ],
)
def test_user_errors_end_with_2_and_a_remedy(cli: Cli, argv: tuple[str, ...], said: str) -> None:
    ran = cli(*argv)
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert "\nwhat to do: " in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_show_score_follow_and_the_word_last(cli: Cli) -> None:
    cli("run", "claimer")
    shown = cli("show", "last")
    assert "claimer" in shown.out
    trial = cli("show", "last", "--json").json["id"]
    assert trial in cli("trials", "--subject", "claimer", "--limit", "1").out
    assert "clean start" in cli("score", trial).out
    assert cli("score", "last", "--json").json["highest"] == 7
    followed = cli("follow", trial)
    assert followed.code == 0
    assert "waits for its turn" in followed.out
    assert [json.loads(line)["seq"] for line in cli("follow", trial, "--json").out.splitlines()][:3] == [
        0,
        1,
        2,
    ]


def test_bundle_comes_home_as_a_folder_or_an_archive(cli: Cli, tmp_path: Path) -> None:
    cli("run", "idle")
    trial = cli("show", "last", "--json").json["id"]
    assert cli("bundle", "last", "--out", tmp_path).out.strip() == str(tmp_path / trial)
    assert (tmp_path / trial / "disks" / "target-1.json").read_text() == "x" * 1000
    assert cli("bundle", "last", "--out", tmp_path / "b.tar").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar", trial]
    for there in (tmp_path, tmp_path / "b.tar"):
        again = cli("bundle", "last", "--out", there)
        assert (again.code, "exists" in again.err) == (2, True)
    assert cli("bundle", "last", "--out", tmp_path / "no" / "where").code == 2


def test_kill_and_rearm(cli: Cli) -> None:
    try:
        assert "stopped 2 machines" in cli("kill", "--reason", "test").out
        assert cli("health").code == 4
        assert cli("run", "idle").code == 2
    finally:
        assert cli("rearm", "--json").json["accepting"] is True
        assert cli("rearm").out == "accepting trials\n"
    assert cli("health").code == 0


def test_sweep_asks_the_running_server(cli: Cli) -> None:
    ran = cli("sweep")
    assert "found" in ran.out
    assert "--yes" in ran.err
    assert cli("sweep", "--yes", "--json").json["strays"][0]["outcome"] == "removed"


def test_a_url_works_in_place_of_the_socket(live: Paths, cli: Cli) -> None:
    url = json.loads(live.server_file.read_text())["url"]
    assert cli("--server", url, "health").code == 0
    ran = cli("--server", "http://127.0.0.1:9", "health")
    assert (ran.code, "hotcell serve" in ran.err) == (3, True)


def test_without_a_server_verbs_say_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    with short_home() as paths:
        cli = calling(paths, capsys)
        for argv in (["health"], ["baselines"], ["run", "idle", "--no-serve"], ["follow", "last"]):
            ran = cli(*argv)
            assert ran.code == 3
            assert "hotcell serve" in ran.err


def test_kill_without_a_server_names_what_does_stop_things(capsys: pytest.CaptureFixture[str]) -> None:
    with short_home() as paths:
        ran = calling(paths, capsys)("kill")
        assert ran.code == 3
        assert "no server runs" in ran.err
        assert "hotcell sweep --yes" in ran.err
        elsewhere = calling(paths, capsys)("--server", "http://127.0.0.1:9", "kill")
        assert "sweep" not in elsewhere.err, "a sweep of this home does nothing to another host's machines"


def test_a_void_trial_ends_with_4_and_says_whose_fault_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with running("0", "void") as paths:
        ran = calling(paths, capsys)("run", "idle")
    assert ran.code == 4
    assert "void (lab), it says nothing about the subject: the capture dropped packets" in ran.out
    assert "what to do: run it again" in ran.out


def spawned(log_file: Path, paths: Paths, *argv: str) -> command.Process[bytes]:
    with log_file.open("wb") as log:
        return command.spawn(
            [sys.executable, "-m", "appliance.cli", "--home", paths.home, "--cache", paths.cache, *argv],
            env={"PYTHONPATH": os.fspath(PROJECT)},
            stdout=log,
            stderr=log,
        )


def until(log: Path, word: str) -> None:
    limit = time.monotonic() + 10
    while word not in log.read_text():
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)


def test_ctrl_c_aborts_the_trial_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with running("0.5") as paths:
        log = paths.home / "cli.log"
        child = spawned(log, paths, "run", "idle")
        until(log, "waits for its turn")
        assert command.end(child, grace=10, sig=signal.SIGINT) == 130
        said = log.read_text()
        assert "interrupted: aborting" in said
        assert "Traceback" not in said
        assert calling(paths, capsys)("show", "last", "--json").json["state"] == "aborted"


def test_ctrl_c_while_following_leaves_the_trial_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with running("0.5") as paths:
        cli = calling(paths, capsys)
        runner = spawned(paths.home / "run.log", paths, "run", "idle")
        until(paths.home / "run.log", "waits for its turn")
        log = paths.home / "cli.log"
        follower = spawned(log, paths, "follow", "last")
        until(log, "waits for its turn")
        assert command.end(follower, grace=10, sig=signal.SIGINT) == 130
        assert "goes on" in log.read_text()
        assert cli("show", "last", "--json").json["state"] in {"queued", "running"}
        command.end(runner, grace=10, sig=signal.SIGINT)


def test_a_server_that_goes_away_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with running("0.5") as paths:
        log = paths.home / "cli.log"
        child = spawned(log, paths, "run", "idle")
        until(log, "waits for its turn")
        os.kill(json.loads(paths.server_file.read_text())["pid"], signal.SIGKILL)
        assert child.wait(15) == 4
        said = log.read_text()
        assert "lost the server" in said
        assert f"see the server's log: {paths.server_log}" in said
        assert "Traceback" not in said
