"""What the tests of the whole laboratory stand on: a host in memory, with two machines and a warden."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from appliance.host.capacity import HostCapacity
from appliance.pipeline import cells as cells_module
from appliance.pipeline import lab as lab_module
from appliance.pipeline import trials as trials_module
from tests.fakes.bench import FakeWarden, Workbench, workbench
from tests.fakes.machine import machine_spec
from tests.fakes.plans import WEIGHTS

ROOMY = HostCapacity(
    cores=64, memory_total=64 << 30, memory_available=60 << 30, disk_total=1 << 40, disk_free=900 << 30
)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with room for everything: what the tests run on, a /tmp in RAM for instance, decides nothing."""
    monkeypatch.setattr(lab_module, "host_capacity", lambda _home: ROOMY)


@pytest.fixture
def two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell and trial has an origin and one target."""

    def fleet(*_: object) -> object:
        return (machine_spec("origin"), machine_spec("target-1")), WEIGHTS

    for module in (cells_module, trials_module):
        monkeypatch.setattr(module, "machines_for", fleet)


@pytest.fixture
def w(monkeypatch: pytest.MonkeyPatch, roomy: None, two_machines: None) -> Iterator[Workbench]:
    """A workbench on such a host."""
    with workbench(monkeypatch) as made:
        yield made


@pytest.fixture
def warden() -> FakeWarden:
    """A warden that only remembers what it was told."""
    return FakeWarden()
