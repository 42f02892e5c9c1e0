"""Verbs that read a home's own files while no server runs: trials, show, score, bundle, verify, reindex."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cli import main
from appliance.evidence import bundle
from appliance.evidence.journal import Journal, write_record
from appliance.evidence.keys import public_path, signing_key
from appliance.host.paths import Paths
from appliance.model import TrialState
from appliance.score.facts import Evidence
from appliance.score.scoring import score
from appliance.store import queries
from appliance.store.database import Store
from appliance.store.reindex import row_of_bundle
from appliance.trial import records
from appliance.trial.records import Closing
from tests.fakes.calling import Cli, calling
from tests.fakes.running import running, short_home
from tests.unit.test_score_controls import facts, replicator

OLD, NEW, OPEN = (f"t20250101-12000{n}-00000{n}" for n in range(3))


@pytest.fixture
def home() -> Iterator[Paths]:
    with short_home() as paths:
        yield paths


@pytest.fixture
def cli(home: Paths, capsys: pytest.CaptureFixture[str]) -> Cli:
    return calling(home, capsys)


@pytest.fixture
def filled(home: Paths) -> Paths:
    """Two sealed trials and one that a killed server left open."""
    store, key = Store(home.database), signing_key(home.signing_key)
    for number, name in enumerate((OLD, NEW)):
        header = facts().header.model_copy(update={"id": name, "created": 1000.0 + number})
        card = score(Evidence(facts=facts(**replicator()))).model_copy(update={"trial": name})
        folder = home.open_trials / name
        folder.mkdir()
        with Journal(folder / records.JOURNAL) as journal:
            journal.write("queued")
        write_record(folder / records.TRIAL, header)
        write_record(folder / records.SCORE, card)
        write_record(folder / records.CLOSING, Closing(state=TrialState.SEALED, reason="", at=1500.0))
        bundle.seal(folder, home.bundles / name, key)
        queries.put(store, row_of_bundle(home.bundles / name, key.public_key()))
    header = facts().header.model_copy(update={"id": OPEN, "created": 900.0})
    queries.upsert_state(store, OPEN, TrialState.RUNNING, header=header)
    return home


@pytest.mark.usefixtures("filled")
def test_trials_are_listed_without_a_server_and_it_is_said(home: Paths, cli: Cli) -> None:
    ran = cli("trials")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == ["TRIAL", NEW, OLD, OPEN]
    assert ran.err == f"no server runs; read from {home.home}\n"
    assert [t["id"] for t in cli("trials", "--state", "running", "--json").json["items"]] == [OPEN]
    assert "1 of 3" in cli("trials", "--limit", "1", "--offset", "1").err


@pytest.mark.usefixtures("filled")
def test_show_and_score_without_a_server(cli: Cli) -> None:
    assert cli("show", "last", "--json").json["id"] == NEW
    assert cli("show", OLD, "--json").json["highest"] == 7
    assert "clean start" in cli("score", "last").out
    assert cli("score", OLD, "--json").json["trial"] == OLD
    unscored = cli("score", OPEN)
    assert (unscored.code, "has no score: it is running" in unscored.err) == (2, True)
    for wrong in ("t20250101-120000-ffffff", "../../etc"):
        ran = cli("show", wrong)
        assert (ran.code, "what to do" in ran.err) == (2, True)


def test_a_bundle_comes_home_without_a_server_and_verifies(filled: Paths, cli: Cli, tmp_path: Path) -> None:
    assert cli("bundle", "last", "--out", tmp_path).out.strip() == str(tmp_path / NEW)
    files = {p.name: p.read_bytes() for p in (filled.bundles / NEW).iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / NEW).iterdir()} == files
    assert f"{NEW}: intact" in cli("verify", tmp_path / NEW).out
    assert cli("bundle", OLD, "--out", tmp_path / "b.tar").code == 0
    with tarfile.open(tmp_path / "b.tar") as tar:
        assert f"{OLD}/manifest.json" in tar.getnames()
    assert cli("bundle", OPEN, "--out", tmp_path).code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar", NEW], "nothing half-made stays"


def test_an_empty_home_has_no_trials_and_is_left_alone(home: Paths, cli: Cli) -> None:
    before = sorted(home.home.iterdir())
    assert cli("trials").out == "no trials\n"
    for argv in (["score", "last"], ["show", OLD], ["bundle", OLD]):
        ran = cli(*argv)
        assert (ran.code, "hotcell run replicator" in ran.err) == (2, True)
    assert sorted(home.home.iterdir()) == before


def test_a_server_that_was_named_is_never_replaced_by_the_home(filled: Paths, cli: Cli) -> None:
    filled.token.write_text("x" * 43)
    ran = cli("--server", "http://127.0.0.1:9", "trials")
    assert (ran.code, ran.out) == (3, "")


def test_a_server_is_named_by_a_url_and_with_its_token(home: Paths, cli: Cli) -> None:
    for wrong in ("foo", "http://", "http://x:99999999"):
        told = cli("--server", wrong, "health").err
        assert told.startswith(f"error: --server {wrong!r} is not a URL\n"), "first, whatever the token"
    untold = cli("--server", "http://127.0.0.1:9", "health")
    assert untold.code == 2
    assert untold.err.splitlines() == [
        f"error: cannot read the API token {home.token}: No such file or directory",
        "what to do: name a file that holds the token of http://127.0.0.1:9 with --token-file",
    ]
    home.token.write_bytes(b"\xff\xfe")
    assert "does not hold an API token" in cli("--server", "http://127.0.0.1:9", "health").err


def test_a_sweep_that_a_named_server_does_not_answer_touches_nothing_here(
    home: Paths, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.pipeline.local_sweep", lambda *_: pytest.fail("the home was swept"))
    assert cli("--server", "http://127.0.0.1:9", "sweep", "--yes").code == 2, "there is no token"
    home.token.write_text("x" * 43)
    ran = cli("--server", "http://127.0.0.1:9", "sweep", "--yes")
    assert (ran.code, ran.out) == (3, "")
    assert "no server answers at http://127.0.0.1:9" in ran.err


def test_a_refusal_of_the_running_server_is_not_replaced_either(capsys: pytest.CaptureFixture[str]) -> None:
    with running() as paths, pytest.raises(SystemExit) as end:
        main(["--home", os.fspath(paths.home), "--token-file", "/dev/null", "trials"])
    assert end.value.code == 2
    assert capsys.readouterr().out == ""


# httpx leaves the socket of a refused connection to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_socket_of_a_killed_server_is_no_server(filled: Paths, cli: Cli) -> None:
    filled.api_socket.touch()
    filled.token.write_text("x" * 43)
    assert cli("show", "last", "--json").json["id"] == NEW


def test_a_trial_can_be_verified_by_its_id(filled: Paths, cli: Cli) -> None:
    assert f"{NEW}: intact" in cli("verify", "last").out
    assert f"{OLD}: intact" in cli("verify", OLD).out
    score_file = filled.bundles / OLD / records.SCORE
    score_file.chmod(0o600)
    score_file.write_text("{}")
    assert cli("verify", OLD).code == 4, "a broken seal is the laboratory's matter, not the caller's"


@pytest.mark.parametrize("named", ["nowhere", "/no/such/folder", OPEN])
@pytest.mark.parametrize("fixture", ["home", "filled"])
def test_a_wrong_bundle_is_named_before_any_key(
    request: pytest.FixtureRequest, cli: Cli, fixture: str, named: str
) -> None:
    request.getfixturevalue(fixture)
    ran = cli("verify", named)
    assert ran.code == 2
    assert ran.err.startswith(f"error: {named}: no such directory or sealed trial\n")


def test_a_file_is_no_bundle(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "b.tar").touch()
    ran = cli("verify", tmp_path / "b.tar")
    assert (ran.code, "is a file" in ran.err, "unpack" in ran.err) == (2, True, True)


def test_a_wrong_key_is_the_callers_to_mend(filled: Paths, cli: Cli, tmp_path: Path) -> None:
    private = cli("verify", NEW, "--key", filled.signing_key)
    assert private.code == 2
    assert f"name the .pub file: {public_path(filled.signing_key)}" in private.err
    missing = cli("verify", NEW, "--key", tmp_path / "x.pub")
    assert (missing.code, ".pub" in missing.err) == (2, True)


def test_a_home_without_a_key_says_so(home: Paths, cli: Cli, tmp_path: Path) -> None:
    for argv in (["verify", tmp_path], ["reindex"]):
        ran = cli(*argv)
        assert (ran.code, "has sealed nothing yet" in ran.err, "--home" in ran.err) == (2, True, True)
    assert not home.database.exists()
