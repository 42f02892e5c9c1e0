"""The machine in memory behaves as a machine does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from appliance.cell.incarnation import Incarnation
from tests.conformance.suite import CHECKS, Check
from tests.fakes.cells import host


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Incarnation]:
    """One proved, plugged machine."""
    with host(monkeypatch) as made:
        cell = made.cell("origin")
        cell.plug_all()
        yield cell.machine("origin")
        cell.close()
        assert made.left == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_machine_in_memory(check: Check, machine: Incarnation) -> None:
    check(machine)


def test_every_check_says_what_it_promises() -> None:
    assert len(CHECKS) >= 15
    assert all(c.__doc__ for c in CHECKS)
