"""Help, texts and small pure parts of the command line."""

from __future__ import annotations

import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.core import TyperGroup

from api import tarstream
from appliance.cli import client as cli_client
from appliance.cli import demo as cli_demo
from appliance.cli import main
from appliance.cli.app import _VERBS, app
from appliance.cli.bundle import unpack
from appliance.cli.common import called_as, clean, exit_code, pairs, table
from appliance.cli.render import describe, journal_line, phases
from appliance.errors import (
    CapacityError,
    ConfigError,
    EvidenceError,
    HotcellError,
    LabError,
    ResetError,
    SubjectError,
    UserError,
)
from appliance.host import command
from appliance.host.paths import PROJECT, Paths
from appliance.service import MAX_SEED, FootprintView, TrialRequest
from appliance.trial.records import JournalEntry

NO_DATA = {"serve", "demo", "bundle"}  # docs/command-line.md names them
VERBS = [verb for group in _VERBS.values() for verb in group]


def made_from(verb: str) -> Any:
    """What Typer makes of a verb."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group.commands[verb]


def helped(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert helped(capsys, verb).startswith("Usage: hotcell")
    made = made_from(verb)
    assert made.help
    bare = [p.name for p in made.params if p.name != "help" and not getattr(p, "help", None)]
    hidden = {p.name for p in made.params if getattr(p, "hidden", False)}
    assert set(bare) <= hidden


def test_help_is_quick_since_stages_are_imported_late() -> None:
    heavy = "fastapi uvicorn libvirt ansible_runner sqlite_utils dissect psutil appliance.pipeline"
    code = (
        "import sys\nfrom appliance.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print(sorted(set({heavy.split()!r}) & set(sys.modules)), file=sys.stderr)"
    )
    began = time.monotonic()
    done = command.run([sys.executable, "-c", code], timeout=30, cwd=PROJECT)
    assert done.stderr.strip() == "[]"
    assert time.monotonic() - began < 10, "hangs; the usual time is 0.25 s"


def test_hotcell_alone_prints_its_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    said = capsys.readouterr()
    assert not end.value.code
    assert said.err == ""
    assert said.out == helped(capsys)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in NO_DATA])
def test_every_verb_that_prints_data_takes_json(verb: str) -> None:
    assert "--json" in [o for p in made_from(verb).params for o in p.opts]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("hotcell 0.")


def test_a_home_that_is_too_long_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--home", "/" + "x" * 60, "health"])
    assert end.value.code == 2
    assert "characters long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [(UserError, 2), (ConfigError, 2), (CapacityError, 3), (ResetError, 4), (SubjectError, 1)],
)
def test_exit_codes_follow_blame(kind: type[HotcellError], code: int) -> None:
    assert exit_code(kind("x")) == code


def entry(event: str, at: float = 0.0, **fields: object) -> JournalEntry:
    return JournalEntry(seq=0, at=at, event=event, fields=fields)


@given(
    st.text(),
    st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans())),
)
def test_any_journal_entry_becomes_one_printable_line(event: str, fields: dict[str, object]) -> None:
    for name in (event, "step", "void"):
        line = describe(JournalEntry(seq=0, at=0.0, event=name, fields=fields))
        assert line.isprintable() or max(line) >= "\u00ad", repr(line)
        assert "\n" not in line
        assert "\x1b" not in line


def test_known_events_read_as_sentences_even_with_fields_missing() -> None:
    assert (
        describe(entry("preflight", held=9, leaked=0, unverified=1))
        == "ways out: 9 held, 0 leaked, 1 unverified"
    )
    assert describe(entry("waiting", reason="needs 2 GiB")) == "waits: needs 2 GiB"
    assert describe(entry("proved")) == "? proved clean in ? s (? facts)"
    assert (
        describe(entry("step", step=1, kind="action", text="{0.__class__} {x}"))
        == "step 1 action: {0.__class__} {x}"
    )
    assert journal_line(entry("aborted", at=12.34), began=2.0) == "    10.3 s  aborted"


def test_phases_cover_the_whole_time() -> None:
    times = [
        ("queued", 0),
        ("waiting", 0.5),
        ("baseline-making", 1),
        ("baseline-making", 20),
        ("baseline-made", 29),
        ("baseline-made", 31),
        ("resetting", 31),
        ("proved", 32),
        ("capture-confirmed", 33),
        ("probe", 34),
        ("preflight", 36),
        ("started", 37),
        ("step", 40),
        ("unknown-event", 45),
        ("stopping", 50),
        ("probe", 60),
        ("probe", 70),
        ("sealed", 71),
    ]
    spent = phases([entry(event, at, phase="before" if at == 34 else "origin-live") for event, at in times])
    assert spent == {
        "queue": 1,
        "baseline": 30,
        "reset": 1,
        "capture": 1,
        "preflight": 3,
        "start": 1,
        "run": 13,
        "probes": 20,
        "seal": 1,
    }
    assert sum(spent.values()) == 71
    assert phases([]) == {}


def test_the_highest_seed_is_the_one_that_a_trial_takes() -> None:
    assert TrialRequest(subject="idle", seed=MAX_SEED).seed == MAX_SEED
    with pytest.raises(ValidationError):
        TrialRequest(subject="idle", seed=MAX_SEED + 1)


def test_tables_align_and_hide_nothing_dangerous() -> None:
    assert table(("A", "LONG"), [("x\x1b", None), ("yyy", True)]) == "A    LONG\nx\ufffd   -\nyyy  yes"


def test_clean_keeps_lines_and_bounds() -> None:
    assert clean("a\nb\x1b[0m\tc") == "a\nb\ufffd[0m    c"
    assert len(clean("x" * 10_000)) <= 4003


@pytest.mark.parametrize("bad", ["a", "=1", "c=1", "a=1;b"])
def test_pairs_reject(bad: str) -> None:
    if bad == "a=1;b":
        assert pairs([bad], ("a",), "--o") == {"a": "1;b"}
        return
    with pytest.raises(ConfigError, match="--o"):
        pairs([bad], ("a", "b"), "--o")


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (("baselines", "clean#x"), "'clean#x' is not a baseline's name"),
        (("baselines", "../cells/c1"), "a baseline's name"),
        (("baselines", "."), "a baseline's name"),
        (("baselines", "clean?x"), "a baseline's name"),
        (("baselines", "clean%2f"), "a baseline's name"),
        (("baselines", "clean\n"), "a baseline's name"),
        (("cells", "", "reset"), "'' is not a cell's name"),
        (("cells", "lab/machines/origin", "reset"), "a cell's name"),
        (("cells", "lab", "machines", "..", "exec"), "a machine's name"),
        (("trials", "lab"), "a trial's id"),
        (("trials", "t20250102-030405-ffffff/score"), "a trial's id"),
    ],
)
def test_a_name_cannot_lead_a_request_elsewhere(parts: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(what)) as told:
        cli_client.at(*parts)
    assert "\n" not in told.value.message
    assert f"hotcell {parts[-2] if parts[-1] not in {'reset', 'exec'} else parts[-3]}" in told.value.hint


def test_names_and_ids_stand_in_a_path_as_they_are() -> None:
    assert cli_client.at("cells", "t20250102-030405-ffffff", "reset") == "cells/t20250102-030405-ffffff/reset"
    assert cli_client.at("trials", "t20250102-030405-ffffff") == "trials/t20250102-030405-ffffff"
    assert cli_client.at("baselines", "trials", "export") == "baselines/trials/export"


@pytest.mark.parametrize(
    ("server", "where"),
    [(None, "/home/x/server.log"), ("http://h:1", "server.log in the home of http://h:1")],
)
def test_a_server_that_is_too_slow_is_told_with_where_its_log_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str | None, where: str
) -> None:
    def slow(*_: object, **__: object) -> None:
        raise httpx.ReadTimeout("slow")

    paths = Paths(Path("/home/x"), tmp_path)
    (tmp_path / "token").write_text("x" * 43)
    monkeypatch.setattr(cli_client, "_exists", lambda _: True)
    monkeypatch.setattr(httpx.Client, "request", slow)
    with cli_client.connect(paths, server, tmp_path / "token") as client, pytest.raises(LabError) as told:
        client.get(FootprintView, "health")
    assert f"see the server's log: {where}" in told.value.hint


def test_no_path_is_made_of_names_without_the_check() -> None:
    folder = PROJECT / "appliance/cli"
    loose = re.compile(r"""f["'](/v1/)?(trials|cells|machines|baselines)/""")
    assert [f.name for f in sorted(folder.glob("*.py")) if loose.search(f.read_text())] == []


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[]", b'{"blame": "nobody"}', b'{"blame": "lab"}', b'"x"']
)
def test_an_answer_without_a_problem_is_the_labs_fault(content: bytes) -> None:
    error = cli_client.error_of(httpx.Response(502, content=content))
    assert exit_code(error) == 4
    assert "502" in error.message


def test_a_problem_of_an_unknown_code_keeps_its_blame() -> None:
    body = {"blame": "host", "code": "brand-new", "detail": "d", "hint": "h"}
    error = cli_client.error_of(httpx.Response(503, json=body))
    assert (exit_code(error), error.message, error.hint) == (3, "d", "h")


def test_the_bill_adds_up_and_names_usage() -> None:
    from appliance.cli.run import Followed
    from tests.fakes.service import FakeLab

    trial = FakeLab(Path())._new(TrialRequest(subject="idle"))
    # What hashing baselines took before the reset is not what watching machines takes.
    samples = [(0.0, 30, 1.0), (4.0, 10, 9.0), (104.0, 20, 11.0)]
    done = Followed(
        trial,
        [entry("queued", 0), entry("resetting", 3), entry("started", 5), entry("sealed", 9)],
        [(t, FootprintView(rss=90_000_000 + mb * 10**6, cpu_s=c)) for t, mb, c in samples],
    )
    clock = [("build", 0.0), ("trials", 10.0), ("", 22.0)]
    rows = cli_demo.bill(clock, [{"recipe": "world", "seconds": 9.5}], [done])
    assert ("build", "", "10.0") in rows
    assert ("", "world", "9.5") in rows
    assert ("", "idle", "9.0") in rows
    assert rows[-1] == ("all", "", "22.0")
    assert cli_demo.usage(done) == (
        "control process, idle: at most 120 MB resident; 2.0 % of a core while guests ran"
    )


@pytest.mark.parametrize(
    ("argv0", "found", "shown"),
    [
        (".venv/bin/hotcell", None, ".venv/bin/hotcell"),
        ("/src/hotcell/.venv/bin/hotcell", None, ".venv/bin/hotcell"),
        ("/src/hotcell/.venv/bin/hotcell", "/usr/bin/hotcell", ".venv/bin/hotcell"),
        ("/usr/bin/hotcell", "/usr/bin/hotcell", "hotcell"),
        ("/opt/my lab/hotcell", None, "'/opt/my lab/hotcell'"),
        ("/src/hotcell/hotcell", None, "/src/hotcell/hotcell"),
        ("/src/hotcell/appliance/cli/__main__.py", None, ".venv/bin/python -m appliance.cli"),
    ],
)
def test_the_program_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, argv0: str, found: str | None, shown: str
) -> None:
    monkeypatch.setattr(sys, "executable", "/src/hotcell/.venv/bin/python")
    assert called_as(argv0, Path("/src/hotcell"), found) == shown


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("t1/../x", tarfile.REGTYPE),
        ("/etc/x", tarfile.REGTYPE),
        ("t2/x", tarfile.REGTYPE),
        ("t1//x", tarfile.REGTYPE),
        ("t1/link", tarfile.SYMTYPE),
        ("t1/hard", tarfile.LNKTYPE),
        ("t1/pipe", tarfile.FIFOTYPE),
    ],
)
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.type = kind
        member.linkname = "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(EvidenceError, match="no bundle has"):
        unpack(tmp_path / "a.tar", "t1", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "x").exists()


def test_a_cut_archive_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "f").write_bytes(b"x" * 5000)
    content = b"".join(tarstream.stream(tarstream.plan(tmp_path / "src", "t1")))
    (tmp_path / "a.tar").write_bytes(content[:3000])
    with pytest.raises(EvidenceError, match="unpacked"):
        unpack(tmp_path / "a.tar", "t1", tmp_path / "out")
