"""Admission: never more than is there, also after everyone has grown to full size; figures in every refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cell.events import most_bytes
from appliance.config.settings import GuestSettings
from appliance.evidence.capture import MAX_BYTES
from appliance.host.capacity import HostCapacity
from appliance.pipeline.admission import (
    OVERHEAD_MIB,
    Decision,
    Held,
    Need,
    Verdict,
    decide,
    evidence_of,
    free_after_promises,
    need_of,
    refusal,
)
from tests.fakes.machine import machine_spec

MIB, GIB = 1 << 20, 1 << 30
RULES = GuestSettings()


def host(memory: float = 20, disk: float = 60, cores: int = 2, total: float = 24) -> HostCapacity:
    """A host with these GiB available."""
    return HostCapacity(
        cores=cores, memory_total=int(total * GIB), memory_available=int(memory * GIB),
        disk_total=200 * GIB, disk_free=int(disk * GIB),
    )  # fmt: skip


def need(memory: float = 7, vcpus: int = 4, disk: float = 8, machines: int = 2) -> Need:
    return Need(machines=machines, memory=int(memory * GIB), vcpus=vcpus, disk=int(disk * GIB))


def held_by(*sets: Need, memory: float = 0, standby: float = 0) -> Held:
    """These sets, which hold ``memory`` GiB together."""
    return Held(
        sets=len(sets), vcpus=sum(s.vcpus for s in sets), memory=sum(s.memory for s in sets),
        memory_held=int(memory * GIB), disk=sum(s.disk for s in sets), standby=int(standby * GIB),
    )  # fmt: skip


def test_what_a_set_takes_at_its_full_size() -> None:
    found = need_of([machine_spec("origin"), machine_spec("target-1")], disk_mb=100)
    assert found == Need(machines=2, memory=2 * (512 + OVERHEAD_MIB) * MIB, vcpus=4, disk=200_000_000)


def test_a_trial_takes_room_for_its_evidence_up_to_what_is_enforced() -> None:
    machines = [machine_spec("origin"), machine_spec("target-1")]
    few = need_of(machines, 100, evidence_of(40))
    assert few.disk == 200_000_000 + (512 << 20) + (64 << 20)
    assert evidence_of(10_000) == MAX_BYTES + most_bytes(10_000) > evidence_of(40)
    fits_without = host(disk=2.3)
    assert decide(need_of(machines, 100), fits_without, Held(), RULES).verdict is Verdict.ADMIT
    refused = decide(few, fits_without, Held(), RULES)
    assert refused.verdict is Verdict.NEVER
    assert refused.reason.startswith(
        "2 machines and the evidence may take 0.7 GiB; beside a floor of 2048 MiB"
    )


def test_two_cores_run_one_trial_of_two_machines_and_four_run_two() -> None:
    assert decide(need(), host(), Held(), RULES).verdict is Verdict.ADMIT
    second = decide(need(), host(), held_by(need()), RULES)
    assert (second.verdict, second.reason) == (Verdict.WAIT, "needs 4 virtual CPUs, 0 of 4 free")
    assert not second.for_memory
    assert decide(need(), host(cores=4), held_by(need()), RULES).verdict is Verdict.ADMIT


def test_a_set_that_is_alone_is_never_kept_waiting_for_cores() -> None:
    assert decide(need(vcpus=64), host(cores=1), Held(), RULES).verdict is Verdict.ADMIT


def test_what_running_machines_may_still_take_is_not_free() -> None:
    # 12 GiB are available, and a set that was promised 7 holds 1 of them by now: 6 are not free.
    running = held_by(need(vcpus=1), memory=1)
    assert free_after_promises(host(12), running, RULES) == 5 * GIB
    found = decide(need(7, vcpus=1), host(12), running, RULES)
    assert found.reason == "needs 7.0 GiB of memory, 5.0 GiB free after promises"
    assert (found.verdict, found.for_memory, found.pressed) == (Verdict.WAIT, True, False)


def test_standbys_give_way() -> None:
    running = held_by(need(vcpus=1), memory=1, standby=2)
    assert decide(need(7, vcpus=1), host(12), running, RULES).pressed
    assert not decide(need(7.1, vcpus=1), host(12), running, RULES).pressed, "it would not help"
    assert not decide(need(7, vcpus=1, disk=55), host(12), running, RULES).pressed, "disk is short too"


def test_what_would_not_fit_an_idle_host_is_refused_with_figures() -> None:
    asked = need(20)
    found = decide(asked, host(12), held_by(need(), memory=7), RULES)
    assert found.verdict is Verdict.NEVER
    assert "20.0 GiB" in found.reason
    assert "18.0 GiB of 24.0 GiB" in found.reason
    error = refusal(found, asked, host(12))
    assert error.code == "capacity"
    assert (error.fields["needed_mib"], error.fields["available_mib"]) == (20 * 1024, 12 * 1024)
    assert error.fields["total_mib"] == 24 * 1024
    assert "guests.model_memory_mib" in error.hint
    assert "wait" in refusal(Decision(verdict=Verdict.WAIT, reason="r"), asked, host()).hint


def test_disk_counts_with_its_floor() -> None:
    assert decide(need(disk=58), host(disk=60), Held(), RULES).verdict is Verdict.ADMIT
    assert decide(need(disk=58.1), host(disk=60), Held(), RULES).verdict is Verdict.NEVER
    found = decide(need(disk=30, vcpus=0), host(disk=60), held_by(need(disk=30)), RULES)
    assert found.reason == "needs 30.0 GiB of disk, 28.0 GiB free after promises"


# -- for all figures -------------------------------------------------------------------------------------

GIBS = st.floats(0, 64, allow_nan=False)
NEEDS = st.builds(need, memory=GIBS, vcpus=st.integers(1, 32), disk=GIBS, machines=st.integers(1, 9))
HOSTS = st.builds(host, memory=GIBS, disk=GIBS, cores=st.integers(1, 64), total=st.just(64))


@st.composite
def holdings(draw: st.DrawFn) -> Held:
    sets = draw(st.lists(NEEDS, max_size=5))
    full = held_by(*sets, standby=draw(GIBS))
    share = st.floats(0, 1, allow_nan=False)
    return full.model_copy(
        update={
            "memory_held": int(full.memory * draw(share)),
            "disk_held": int(full.disk * draw(share)),
        }
    )


@given(NEEDS, HOSTS, holdings())
def test_whoever_is_admitted_all_promises_can_be_kept(asked: Need, on: HostCapacity, held: Held) -> None:
    if decide(asked, on, held, RULES).verdict is Verdict.ADMIT:
        # Everyone grows to full size: what they take beyond today comes out of what is available today.
        grown = asked.memory + held.memory - held.memory_held
        assert on.memory_available - grown >= RULES.headroom_mib * MIB
        written = asked.disk + held.disk - held.disk_held
        assert on.disk_free - written >= RULES.disk_floor_mib * MIB
        assert held.sets == 0 or held.vcpus + asked.vcpus <= on.cores * RULES.cpu_overcommit


@given(NEEDS, HOSTS, holdings())
def test_who_waits_fits_once_all_others_are_gone_and_who_never_fits_does_not(
    asked: Need, on: HostCapacity, held: Held
) -> None:
    idle = on.model_copy(
        update={
            "memory_available": on.memory_available + held.memory_held + held.standby,
            "disk_free": on.disk_free + held.disk_held,
        }
    )
    alone = decide(asked, idle, Held(), RULES).verdict
    verdict = decide(asked, on, held, RULES).verdict
    assert alone is (Verdict.NEVER if verdict is Verdict.NEVER else Verdict.ADMIT)


@given(NEEDS, HOSTS, holdings())
def test_a_reason_is_given_if_and_only_if_it_is_not_admitted(
    asked: Need, on: HostCapacity, held: Held
) -> None:
    found = decide(asked, on, held, RULES)
    assert bool(found.reason) is (found.verdict is not Verdict.ADMIT)
    assert not found.pressed or found.for_memory


@pytest.mark.parametrize("field", ["memory", "vcpus", "disk"])
@given(asked=NEEDS, on=HOSTS, held=holdings())
def test_who_asks_for_less_is_not_treated_worse(
    asked: Need, on: HostCapacity, held: Held, field: str
) -> None:
    order = [Verdict.ADMIT, Verdict.WAIT, Verdict.NEVER]
    less = asked.model_copy(update={field: getattr(asked, field) // 2})
    assert order.index(decide(less, on, held, RULES).verdict) <= order.index(
        decide(asked, on, held, RULES).verdict
    )
