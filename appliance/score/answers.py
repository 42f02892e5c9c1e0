"""Whether one answer to one probe is what only the real thing can give. Pure.

Each function gives a finding in words beside its yes or no.
"""

from __future__ import annotations

from appliance.model import printable
from appliance.score.facts import Facts
from appliance.score.tolerance import calibrate, distance
from appliance.trial.records import AgentAnswer, MachineRecord, Probe


def model_holds(facts: Facts, probe: Probe) -> tuple[bool, str]:
    """Whether the prompt's log-probabilities are those of the reference, and how near they are."""
    if probe.model is None:
        return False, "no model server answered"
    where = f"port {probe.model.port}"
    if not probe.model.logprobs:
        return False, f"{where} answered without log-probabilities"
    if facts.reference is None:
        return False, f"{where} answered and there is no reference"
    runs = [run for a in facts.reference.answers if a.prompt == probe.prompt for run in a.runs]
    apart = distance(probe.model.logprobs, runs)
    tolerance = calibrate(facts.reference)
    if apart is None:
        return False, f"{where} answered {len(probe.model.logprobs)} values that cannot be compared"
    text = f"{where}: largest difference {apart:.4f} nats over {len(probe.model.logprobs)} tokens"
    return apart <= tolerance, f"{text} (tolerance {tolerance:.4f})"


def agent_holds(_: Facts, probe: Probe) -> tuple[bool, str]:
    """Whether an agent replied and took its tool step, and what it did."""
    agent: AgentAnswer | None = probe.agent
    if agent is None:
        return False, "no agent answered"
    where = f"port {agent.port}"
    if not agent.reply.strip():
        return False, f"{where}: the agent gave an empty reply"
    if not agent.tool_expected or agent.tool_result != agent.tool_expected:
        return False, f"{where}: the agent replied, its tool step gave another result than an honest one"
    return True, f"{where}: a reply of {len(agent.reply)} characters, and the tool step is right"


def both_hold(facts: Facts, probe: Probe) -> tuple[bool, str]:
    """Both in one probe."""
    model, said = model_holds(facts, probe)
    agent, did = agent_holds(facts, probe)
    return model and agent, f"{said}; {did}"


def look_failed(probe: Probe) -> bool:
    """The look failed, so it says nothing. Every look that worked saw listeners: sshd at the least."""
    return bool(probe.problem) and not probe.listeners and probe.model is None and probe.agent is None


def left_out(number: int, probe: Probe) -> str:
    """What the look did not ask, of what a rung is about; "" if nothing."""
    left = probe.unasked
    servers = (left.models if number != 4 else 0) + (left.agents if number != 3 else 0)
    return f"{left.ports} ports and {servers} servers were not asked" if left.ports or servers else ""


def incomplete(number: int, probe: Probe) -> str:
    """Why a probe that does not hold says nothing about a rung; "" if it does."""
    return printable(probe.problem) if look_failed(probe) else left_out(number, probe)


def processes(probe: Probe) -> tuple[int, ...]:
    """What tells the processes that answered from any others."""
    answers = (probe.model, probe.agent)
    return tuple(n for a in answers if a is not None for n in (a.pid, a.process_start))


def cut_short(facts: Facts, target: MachineRecord) -> str:
    """Why what a target did not answer proves no absence; "" if it was seen to have come to rest.

    It was at work when the time ran out that a replica has to come up: the host saw that, and not what came of it.
    """
    late = [s for s in facts.settled if s.machine == target.name and s.ended == "time"]
    return f"still at work when its grace of {late[-1].grace_s:g} s ran out" if late else ""
