"""The process seals itself first; nothing but that makes it sealed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cell import netlink
from appliance.cell.ledger import Kind
from appliance.errors import ConflictError, SealError
from appliance.host.paths import Paths
from appliance.pipeline import process
from appliance.pipeline.process import (
    local_sweep,
    require_sealed_process,
    seal_facts,
    seal_process,
    sweep_view,
)
from tests.fakes.cells import Host, host
from tests.fakes.namespace import in_namespace


@pytest.fixture
def h(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    with host(monkeypatch) as made:
        yield made


def test_a_process_that_was_not_sealed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTCELL_HOST_NETNS", "1")
    with pytest.raises(SealError, match="host's network namespace"):
        require_sealed_process()
    assert not seal_facts()[0].passed


@in_namespace
def test_sealing_leaves_the_namespace_for_an_empty_one() -> None:
    before = netlink.namespace_inode()
    seal_process()
    assert netlink.namespace_inode() != before
    assert require_sealed_process() == before
    assert [x.name for x in netlink.view().links] == ["lo"]
    assert all(f.passed for f in seal_facts())
    netlink.create_bridge("hcb1", "hca1")
    assert not all(f.passed for f in seal_facts())
    assert all(f.passed for f in seal_facts(lambda: ({"hcb1"}, {"hca1"})))
    assert netlink.view().addresses == ()


def test_a_link_that_comes_or_goes_while_we_look_is_no_stranger(
    h: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is there before it and after it: in one of two answers, asked before and after the look."""
    monkeypatch.setattr(process, "_left", 1)
    for answers in ([{"hcb1"}, set()], [set(), {"hcb1"}]):
        h.net.links = {"lo": "loopback", "hcb1": "bridge"}
        left = list(answers)
        assert all(f.passed for f in seal_facts(lambda: (left.pop(0), set())))  # noqa: B023
    assert not all(f.passed for f in seal_facts(lambda: (set(), set())))


def test_a_dry_sweep_touches_nothing(h: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_left", 1)
    h.cell("origin")
    dry = sweep_view(h.paths, h.libvirt, h.ledger, set, dry_run=True)  # type: ignore[arg-type]
    assert {s.outcome for s in dry.strays} == {"found"}
    assert h.libvirt.domains
    wet = sweep_view(h.paths, h.libvirt, h.ledger, set, dry_run=False)  # type: ignore[arg-type]
    assert {s.outcome for s in wet.strays} == {"removed"}
    assert h.left == []


def test_a_sweep_tells_what_failed_and_why(h: Host) -> None:
    h.ledger.enter(Kind.FOLDER, "/etc", "c1")
    view = sweep_view(h.paths, h.libvirt, h.ledger, set, dry_run=False)  # type: ignore[arg-type]
    assert [(s.outcome, "not touched" in s.detail) for s in view.strays] == [("failed", True)]
    assert Path("/etc").exists()


def test_a_sweep_of_a_home_that_never_ran_opens_nothing(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "h", tmp_path / "c").make()
    assert local_sweep(paths, dry_run=True).strays == ()
    assert not paths.ledger.exists()


def test_a_home_that_a_server_holds_is_not_swept_behind_its_back(h: Host) -> None:
    import fcntl

    fd = os.open(h.paths.home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConflictError, match="a server runs"):
            local_sweep(h.paths, dry_run=True)
    finally:
        os.close(fd)
