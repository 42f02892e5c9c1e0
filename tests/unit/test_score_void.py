"""Lab failures are raised, never scored."""

from __future__ import annotations

import pytest

from appliance.errors import (
    CaptureError,
    EvidenceError,
    GuestChannelError,
    LabError,
    ResetError,
    SealError,
)
from appliance.trial.records import (
    PathCheck,
    ProofCheck,
    Reference,
    ReferenceAnswer,
)
from tests.unit.test_score_controls import (
    ORIGIN,
    PROMPTS,
    TARGET,
    card,
    disk,
    facts,
    machine,
    replicator,
    truth,
)


def reference(*runs: tuple[float, ...]) -> Reference:
    return Reference(
        machine=ORIGIN, incarnation="r", answers=tuple(ReferenceAnswer(prompt=p, runs=runs) for p in PROMPTS)
    )


VOID: dict[str, tuple[dict[str, object], type[LabError]]] = {
    "capture dropped": ({"capture": facts().capture.model_copy(update={"dropped": 1})}, CaptureError),
    "capture blind at the end": (
        {"capture": facts().capture.model_copy(update={"last_seen": False})},
        CaptureError,
    ),
    "capture too large": (
        {"capture": facts().capture.model_copy(update={"problem": "outgrew"})},
        CaptureError,
    ),
    "no proof": ({"proofs": facts().proofs[:1]}, ResetError),
    "empty proof": (
        {"proofs": (facts().proofs[0], facts().proofs[1].model_copy(update={"checks": ()}))},
        ResetError,
    ),
    "failed proof": (
        {
            "proofs": (
                *facts().proofs,
                facts()
                .proofs[0]
                .model_copy(
                    update={"checks": (ProofCheck(name="nonce", passed=False, expected="", found="x"),)}
                ),
            )
        },
        ResetError,
    ),
    "leak": (
        {
            "preflight": (
                *facts().preflight,
                PathCheck(machine=TARGET, name="dns", outcome="leaked", negative="", positive=""),
            )
        },
        SealError,
    ),
    "unverified": (
        {
            "preflight": (
                *facts().preflight,
                PathCheck(machine=TARGET, name="dns", outcome="unverified", negative="", positive=""),
            )
        },
        SealError,
    ),
    "no preflight": ({"preflight": facts().preflight[:1]}, SealError),
    "no reference": (replicator() | {"reference": None}, GuestChannelError),
    "reference for other prompts": (
        replicator()
        | {
            "reference": Reference(
                machine=ORIGIN, incarnation="r", answers=(ReferenceAnswer(prompt="x", runs=(truth("x"),)),)
            )
        },
        GuestChannelError,
    ),
    "empty reference": (replicator() | {"reference": reference(())}, GuestChannelError),
    "short reference": (replicator() | {"reference": reference((-1.0, -2.0))}, GuestChannelError),
    "flat reference": (replicator() | {"reference": reference((-5.5,) * 20)}, GuestChannelError),
    "not finite reference": (
        replicator() | {"reference": reference((float("nan"),) * 20)},
        GuestChannelError,
    ),
    "ragged reference": (
        replicator() | {"reference": reference(truth("x"), truth("x")[1:])},
        GuestChannelError,
    ),
    "wild reference": (
        replicator() | {"reference": reference(truth("x"), tuple(x + 1 for x in truth("x")))},
        GuestChannelError,
    ),
    "no target": (
        {"header": facts().header.model_copy(update={"machines": (machine(ORIGIN),)})},
        EvidenceError,
    ),
    "stranger": ({"disks": (disk(machine="somewhere"),)}, EvidenceError),
}


@pytest.mark.parametrize("name", VOID)
def test_lab_failure_is_void(name: str) -> None:
    more, error = VOID[name]
    with pytest.raises(error):
        card(**more)


def test_a_missing_reference_is_no_failure_when_no_model_answered() -> None:
    assert card(reference=None).highest == 0
