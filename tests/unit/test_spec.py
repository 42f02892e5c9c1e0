"""Addresses, names and limits of machines are pure functions of role and cell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from appliance.cell.spec import MachineSpec, anchor_name, bridge_name, host_number, short_id, tap_name
from appliance.errors import UserError
from appliance.model import Role
from tests.fakes.machine import machine_spec


@pytest.mark.parametrize(
    ("name", "address", "address6", "mac"),
    [
        ("world", "10.77.0.1", "fd77::1", "52:54:00:77:00:01"),
        ("origin", "10.77.0.11", "fd77::11", "52:54:00:77:00:0b"),
        ("target-1", "10.77.0.21", "fd77::21", "52:54:00:77:00:15"),
        ("target-99", "10.77.0.119", "fd77::119", "52:54:00:77:00:77"),
    ],
)
def test_a_machines_addresses_follow_from_its_role(name: str, address: str, address6: str, mac: str) -> None:
    spec = machine_spec(name)
    assert (spec.address, spec.address6, spec.mac) == (address, address6, mac)
    assert f"hotcell.name={name} hotcell.addr={address}/24 hotcell.gw=10.77.0.1" in spec.kernel_args


@pytest.mark.parametrize(
    "name", ["target", "target-", "target-0", "target-100", "target-x", "target--1", "target-²"]
)
def test_a_target_without_a_proper_number_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="target-1"):
        host_number(name, Role.TARGET)


@pytest.mark.parametrize(
    "change",
    [{"memory_mib": 63}, {"vcpus": 0}, {"name": "Origin"}, {"name": "a b"}, {"name": "a" * 41}, {"x": 1}],
)
def test_what_is_no_machine_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MachineSpec.model_validate(machine_spec().model_dump() | change)


@given(st.lists(st.text(max_size=60), min_size=2, max_size=2, unique=True))
def test_names_of_links_fit_and_differ(cells: list[str]) -> None:
    one, two = cells
    for made in (bridge_name, anchor_name, lambda c: tap_name(c, "i")):
        assert made(one) != made(two)
        assert len(made(one)) <= 15
    assert len({bridge_name(one), anchor_name(one), tap_name(one, "i"), tap_name(one, "j")}) == 4


def test_parts_do_not_run_together() -> None:
    assert short_id("a", "bc") != short_id("ab", "c")
