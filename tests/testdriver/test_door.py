"""The door to libvirt, before a real libvirt: its ``test`` driver, in a child process of each test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.cell.domain import OWNER_NS
from appliance.cell.libvirt_door import DomainState, Libvirt
from appliance.errors import GuestChannelError, LabError
from tests.fakes.namespace import in_child

XML = (Path(__file__).resolve().parents[1] / "golden" / "data" / "clone-tcg.xml").read_text()
NAME = "hc-t20260101-000000-0a1b2c-origin-0a1b2c3d"


def door(root: Path) -> Libvirt:
    """The door on the test driver, which always has one domain of its own, named ``test``."""
    import libvirt

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    return Libvirt(libvirt.open("test:///default"), root)


def xml(**changes: str) -> str:
    made = XML.replace('type="qemu"', 'type="test"', 1)
    for old, new in changes.items():
        made = made.replace(old, new)
    return made


@in_child
def test_a_domains_life(tmp_path: Path) -> None:
    d = door(tmp_path)
    assert d.state(NAME) is DomainState.GONE
    d.start(xml(), paused=False)  # the test driver cannot start paused
    assert d.state(NAME) is DomainState.RUNNING
    d.suspend(NAME)
    assert d.state(NAME) is DomainState.PAUSED
    d.resume(NAME)
    assert d.state(NAME) is DomainState.RUNNING
    d.suspend(NAME)
    assert d.state(NAME) is DomainState.PAUSED
    d.destroy(NAME)
    assert d.state(NAME) is DomainState.GONE
    d.destroy(NAME)  # one that is gone already is no error


@in_child
def test_the_log_of_a_domain_goes_with_it(tmp_path: Path) -> None:
    d = door(tmp_path)
    logs = tmp_path / "log" / "qemu"
    logs.mkdir(parents=True)
    for name in (NAME, "hc-other"):
        (logs / f"{name}.log").write_text("starting up")
    d.start(xml(), paused=False)
    d.destroy(NAME)
    assert [p.name for p in logs.iterdir()] == ["hc-other.log"]


@in_child
def test_whose_a_domain_is(tmp_path: Path) -> None:
    d = door(tmp_path)
    d.start(xml(), paused=False)
    owners = {fact.name: fact.owner for fact in d.list_domains(OWNER_NS)}
    assert owners == {"test": "", NAME: "hotcell"}, "somebody else's domain has no tag of ours"
    assert {fact.owner for fact in d.list_domains("https://other.invalid/1")} == {""}


@in_child
def test_what_libvirt_refuses_is_a_lab_error(tmp_path: Path) -> None:
    d = door(tmp_path)
    d.start(xml(), paused=False)
    refused: list[Callable[[], Any]] = [
        lambda: d.start("<domain", paused=False),
        lambda: d.start(xml(), paused=False),  # it runs already
        lambda: d.suspend("no-such-domain"),
        lambda: d.resume("no-such-domain"),
        lambda: d.qmp(NAME, "query-status"),  # the test driver has no monitor
        lambda: d.hmp(NAME, "info network"),
    ]
    for call in refused:
        with pytest.raises(LabError, match="libvirt could not"):
            call()


@in_child
def test_an_agent_that_is_not_there_is_a_channel_error(tmp_path: Path) -> None:
    d = door(tmp_path)
    d.start(xml(), paused=False)
    for name in (NAME, "no-such-domain"):
        with pytest.raises(GuestChannelError, match="does not answer"):
            d.guest_agent(name, '{"execute":"guest-ping"}', 1)


@in_child
def test_a_pid_file_that_is_none_is_no_pid(tmp_path: Path) -> None:
    d = door(tmp_path)
    folder = tmp_path / "run" / "qemu"
    folder.mkdir(parents=True)
    assert d.pid(NAME) is None
    for content, pid in (("", None), ("x", None), ("12\n", 12)):
        (folder / f"{NAME}.pid").write_text(content)
        assert d.pid(NAME) == pid


@in_child
def test_versions_are_dotted_and_a_closed_door_is_an_error(tmp_path: Path) -> None:
    d = door(tmp_path)
    assert all(v.count(".") == 2 for v in d.versions().values())
    d.close()
    with pytest.raises(Exception, match=r"closed|invalid"):
        d.list_domains(OWNER_NS)
