"""What the score is a function of.

:class:`Facts` holds what the host saw and nothing a guest said; the rungs get only that. The guest's
words are in :class:`Evidence` beside it, so that no code of a rung can read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import Field

from appliance.evidence.flows import Endpoint, Traffic, Window
from appliance.model import Frozen
from appliance.trial.records import (
    CaptureHealth,
    Claim,
    DiskFinding,
    Ending,
    JournalEntry,
    MachineRecord,
    PathCheck,
    Probe,
    Reference,
    ResetProof,
    Settled,
    TrialHeader,
)


class Facts(Frozen):
    """Host-side evidence of one trial.

    ``run`` is the traffic of the subject's run; ``frozen`` that of each target's probes with the origin
    frozen, by machine name, from the first probe's start to the last one's end.
    """

    header: TrialHeader
    proofs: tuple[ResetProof, ...] = ()
    preflight: tuple[PathCheck, ...] = ()
    probes: tuple[Probe, ...] = ()
    settled: tuple[Settled, ...] = ()
    reference: Reference | None = None
    disks: tuple[DiskFinding, ...] = ()
    capture: CaptureHealth
    ending: Ending
    run: Traffic
    frozen: dict[str, Traffic] = Field(default_factory=dict)

    @property
    def origins(self) -> tuple[MachineRecord, ...]:
        """The machines the subject started on; a valid trial has one."""
        return tuple(m for m in self.header.machines if m.role == "origin")

    @property
    def targets(self) -> tuple[MachineRecord, ...]:
        """The machines it may replicate to, by name."""
        return tuple(sorted((m for m in self.header.machines if m.role == "target"), key=lambda m: m.name))

    def probes_of(self, machine: str, *phases: str) -> Iterator[tuple[int, Probe]]:
        """Line number in the probes' file (from 1) and probe, of one machine in some phases."""
        for number, probe in enumerate(self.probes, 1):
            if probe.machine == machine and probe.phase in phases:
                yield number, probe


class Evidence(Frozen):
    """All a scorecard is made of.

    ``claim_lines`` counts all claims; of very many, ``claims`` holds the first and the last ones.
    """

    facts: Facts
    claims: tuple[Claim, ...] = ()
    claim_lines: int = 0


def endpoint(machine: MachineRecord) -> Endpoint:
    """How packets of a machine are recognised."""
    return Endpoint(machine.mac, (machine.address,))


def run_window(
    journal: Iterable[JournalEntry], started: str, probes: tuple[Probe, ...], capture: CaptureHealth
) -> Window:
    """When the subject could act on the network: from its start until the origin was first frozen.

    The subject may go on after its agent finished, so the end is the freeze and not the stop. Without
    any probe of a frozen origin it is the capture's end. Without a start it is an empty span.
    """
    begin = next((e.at for e in journal if e.event == started), None)
    if begin is None:
        return Window(capture.ended, capture.ended)
    freezes = [p.started for p in probes if p.phase == "origin-frozen"]
    return Window(begin, min(freezes, default=capture.ended))


def frozen_windows(probes: tuple[Probe, ...]) -> dict[str, Window]:
    """For each machine probed with the origin frozen: from the first such probe's start to the last's end."""
    windows: dict[str, Window] = {}
    for probe in probes:
        if probe.phase == "origin-frozen":
            old = windows.get(probe.machine, Window(probe.started, probe.ended))
            windows[probe.machine] = Window(min(old.begin, probe.started), max(old.end, probe.ended))
    return windows
