"""How a machine came to its new incarnation, and the rule that nothing unproved is ever used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from appliance.cell.incarnation import Incarnation
from appliance.cell.proof import Proof
from appliance.errors import ResetError


class Renewal(NamedTuple):
    """How one machine came to its new incarnation. Seconds from the request.

    ``direct_because`` is "" if a standby was taken. ``withheld`` are proofs of machines that were destroyed
    for it; ``answered_s`` is when the guest answered, ``seconds`` when its clock was set too.
    """

    machine: Incarnation
    proof: Proof
    direct_because: str
    withheld: tuple[Proof, ...]
    answered_s: float
    seconds: float


def require_proved(renewals: Iterable[Renewal]) -> None:
    """Nothing unproved may be used.

    Raises:
        ResetError: a machine and its replacement were withheld.
    """
    bad = [
        f"{r.machine.name}, {len(r.withheld)} times ({r.proof.failures}); not from a standby: {r.direct_because}"
        for r in renewals
        if not r.proof.proved
    ]
    if bad:
        raise ResetError(
            f"withheld: {'; '.join(bad)}",
            hint="the machines were destroyed; the baseline is checked before its next use",
        )
