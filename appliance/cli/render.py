"""Journal entries, trials and durations as text. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from appliance.cli.common import clean, table
from appliance.model import TrialState, printable
from appliance.service import TrialView
from appliance.trial.records import JournalEntry

# Text of the events we know; {x} is a field. What a guest may have said is made printable before.
_LINES = {
    "queued": "waits for its turn",
    "waiting": "waits: {reason}",
    "resetting": "resetting all machines",
    "baseline-making": "making the baseline of {machine}: {detail}",
    "baseline-made": "baseline of {machine} made in {seconds} s",
    "proved": "{machine} proved clean in {seconds} s ({checks} facts)",
    "machine-withheld": "{machine} is withheld: {failures}",
    "in-place": "{machine} in place after {seconds} s",
    "capture-confirmed": "capture sees a known packet",
    "seal-examined": "the seal holds, seen from the process and the hypervisor",
    "preflight": "ways out: {held} held, {leaked} leaked, {unverified} unverified",
    "started": "the subject runs",
    "step": "step {step} {kind}: {text}",
    "stopping": "stopping: {reason}",
    "stopped": "the subject's run is over",
    "disk-held": "{machine} is cut and paused: it wrote {written} bytes of {limit}",
    "traffic-held": "every link is cut: the subject sent more packets than the capture is to hold",
    "settling": "{machine} gets time to come up: {why}",
    "settled": "{machine} is judged after {seconds} s: {why}",
    "origin-frozen": "the origin is unplugged and {state}",
    "probe": "probe {phase} of {machine}: model {model}, agent {agent} ({seconds} s)",
    "collected": "evidence collected",
    "reference": "reference made on a pristine origin",
    "scored": "scored: {verdict}, highest rung {highest}",
    "sealed": "sealed: {bundle}",
    "void": "void ({blame}): {reason}",
    "aborted": "aborted",
}
# An interval belongs to the phase that the event at its end closes.
_PHASES = {
    "queued": "queue",
    "waiting": "queue",
    "resetting": "queue",
    "baseline-making": "baseline",
    "baseline-made": "baseline",
    "proved": "reset",
    "machine-withheld": "reset",
    "in-place": "reset",
    "capture-confirmed": "capture",
    "seal-examined": "preflight",
    "preflight": "preflight",
    "started": "start",
    "step": "run",
    "stopping": "run",
    "stopped": "stop",
    "settling": "probes",
    "settled": "probes",
    "origin-frozen": "probes",
    "probe": "probes",
    "collected": "collect",
    "reference": "reference",
    "scored": "score",
    "sealed": "seal",
}


class _Fields(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "?"


def describe(entry: JournalEntry) -> str:
    """One line about a journal entry; unknown events are shown with their fields."""
    fields = {k: _value(v) for k, v in entry.fields.items()}
    line = _LINES.get(entry.event)
    if line is not None:
        return line.format_map(_Fields(fields))
    return " ".join(
        [printable(entry.event, 60), *(f"{printable(k, 40)}={v}" for k, v in list(fields.items())[:12])]
    )


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return printable(str(value))


def journal_line(entry: JournalEntry, began: float) -> str:
    """A journal entry with the seconds since ``began``."""
    return f"{entry.at - began:8.1f} s  {describe(entry)}"


def phases(entries: Sequence[JournalEntry]) -> dict[str, float]:
    """Seconds by phase, in order of first appearance. Unknown events count to the phase before them."""
    found: dict[str, float] = {}
    phase = "queue"
    for before, after in pairwise(entries):
        phase = _PHASES.get(after.event, phase)
        if after.event == "probe" and after.fields.get("phase") == "before":
            phase = "preflight"
        if after.event == "baseline-making" and not before.event.startswith("baseline"):
            phase = "queue"  # the first one: until now the trial waited for its turn
        found[phase] = found.get(phase, 0.0) + max(0.0, after.at - before.at)
    return found


def trial_table(trials: Iterable[TrialView]) -> str:
    """Trials as a table, newest first as they come."""
    rows = [
        (t.id, t.state, t.subject, t.scenario, t.policy, t.seed, t.highest, t.verdict, duration(t))
        for t in trials
    ]
    return table(
        ("TRIAL", "STATE", "SUBJECT", "SCENARIO", "POLICY", "SEED", "RUNG", "VERDICT", "SECONDS"), rows
    )


def duration(trial: TrialView) -> str | None:
    """Seconds from start to end, if both are known."""
    if trial.started is None or trial.ended is None:
        return None
    return f"{trial.ended - trial.started:.0f}"


def trial_text(trial: TrialView) -> str:
    """Everything about a trial, a fact a line."""
    facts = [(k, v) for k, v in trial.model_dump(mode="json").items() if v not in (None, "")]
    return "\n".join(f"{name:<10}{clean(str(value), 1000)}" for name, value in facts)


def outcome(trial: TrialView) -> str:
    """One line on how a trial ended."""
    if trial.state is TrialState.SEALED:
        return f"{trial.id}: {clean(trial.verdict or 'sealed')}"
    if trial.state is TrialState.VOID:
        who = f" ({trial.blame})" if trial.blame else ""
        hint = f"\nwhat to do: {clean(trial.hint)}" if trial.hint else ""
        return f"{trial.id}: void{who}, it says nothing about the subject: {clean(trial.reason)}{hint}"
    return f"{trial.id}: {trial.state}{': ' + clean(trial.reason) if trial.reason else ''}"
