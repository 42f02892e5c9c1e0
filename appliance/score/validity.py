"""Whether a trial says anything. A lab failure is never a result: it is raised, and the trial is void."""

from __future__ import annotations

from appliance.errors import CaptureError, EvidenceError, GuestChannelError, ResetError, SealError
from appliance.model import printable
from appliance.score.facts import Facts
from appliance.score.tolerance import calibrate


def require_valid(facts: Facts) -> None:
    """Return if the trial can be scored.

    Raises:
        EvidenceError: the records contradict each other.
        ResetError: a machine has no reset proof, or one that failed.
        SealError: the preflight is missing for a machine, or a path was not held.
        CaptureError: the capture cannot be believed.
        GuestChannelError: a model answered on a target and there is no usable reference to compare with.
    """
    _require_machines(facts)
    _require_proofs(facts)
    _require_preflight(facts)
    if not facts.capture.healthy:
        c = facts.capture
        raise CaptureError(
            f"the capture cannot be believed: first known frame {'seen' if c.first_seen else 'not seen'}, "
            f"last {'seen' if c.last_seen else 'not seen'}, {c.dropped} dropped"
            + (f"; {printable(c.problem, 300)}" if c.problem else "")
        )
    _require_reference(facts)


def _require_machines(facts: Facts) -> None:
    names = [m.name for m in facts.header.machines]
    if len(set(names)) != len(names):
        raise EvidenceError("two machines of the trial have the same name")
    if len(facts.origins) != 1 or not facts.targets:
        raise EvidenceError(
            f"a trial has one origin and some targets; found {len(facts.origins)} and {len(facts.targets)}"
        )
    named = {
        *(p.machine for p in facts.probes),
        *(s.machine for s in facts.settled),
        *(d.machine for d in facts.disks),
        *(p.machine for p in facts.proofs),
        *(p.machine for p in facts.preflight),
        *facts.frozen,
    }
    if unknown := sorted(named - set(names)):
        raise EvidenceError(f"records name machines the trial does not have: {printable(', '.join(unknown))}")


def _require_proofs(facts: Facts) -> None:
    for machine in facts.header.machines:
        proofs = [p for p in facts.proofs if p.machine == machine.name]
        if not proofs:
            raise ResetError(f"{machine.name}: there is no reset proof", machine=machine.name)
        for proof in proofs:
            failed = [c.name for c in proof.checks if not c.passed]
            if not proof.proved:
                what = printable(", ".join(failed)) or "it holds no check"
                raise ResetError(f"{machine.name}: the reset proof failed: {what}", machine=machine.name)


def _require_preflight(facts: Facts) -> None:
    for machine in facts.header.machines:
        checks = [c for c in facts.preflight if c.machine == machine.name]
        if not checks and machine.role != "world":
            raise SealError(f"{machine.name}: there is no preflight", machine=machine.name)
        for check in checks:
            if check.outcome != "held":
                raise SealError(
                    f"{machine.name}: preflight of {printable(check.name)} is {check.outcome}, must be held",
                    machine=machine.name,
                )


def _require_reference(facts: Facts) -> None:
    """A reference is needed for every prompt that a model on a target answered with log-probabilities."""
    asked = {
        p.prompt
        for target in facts.targets
        for _, p in facts.probes_of(target.name, "origin-live", "origin-frozen")
        if p.model is not None and p.model.logprobs
    }
    if facts.reference is not None:
        calibrate(facts.reference)
    known = {a.prompt for a in facts.reference.answers} if facts.reference else set()
    if missing := asked - known:
        raise GuestChannelError(
            f"a model answered on a target; no reference for {len(missing)} of {len(asked)} prompts"
        )
