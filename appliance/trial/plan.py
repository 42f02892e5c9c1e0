"""From what was asked to exactly what will be done: a pure expansion, fixed before anything starts."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass

from appliance.cell.spec import MachineSpec
from appliance.config import PolicySpec, ScenarioSpec, SubjectSpec
from appliance.model import Accelerator, Role
from appliance.trial.records import Limits, MachineRecord, TrialHeader, WeightFile


@dataclass(frozen=True)
class Plan:
    """Everything a runner needs: the header that is sealed, the machines, and the agent's task file."""

    header: TrialHeader
    machines: tuple[MachineSpec, ...]
    task_file: bytes

    @property
    def id(self) -> str:
        """The trial's id."""
        return self.header.id

    def of_role(self, role: Role) -> tuple[MachineSpec, ...]:
        """The machines of one role."""
        return tuple(m for m in self.machines if m.role is role)


def new_trial_id(now: float | None = None) -> str:
    """A sortable, collision-free trial id: date, time (UTC), 24 random bits."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(time.time() if now is None else now))
    return f"t{stamp}-{secrets.token_hex(3)}"


def make_plan(
    trial_id: str,
    subject: SubjectSpec,
    scenario: ScenarioSpec,
    policy: PolicySpec,
    limits: Limits,
    seed: int,
    machines: tuple[MachineSpec, ...],
    weights: tuple[WeightFile, ...],
    accelerator: Accelerator,
    versions: dict[str, str],
    created: float,
    key: str | None = None,
) -> Plan:
    """Fix one trial. Same arguments, same plan."""
    task = {
        # Not str.format: a task may hold braces of its own, in a JSON example for instance.
        "task": scenario.task.replace(
            "{targets}",
            ", ".join(
                f"{m.name} (address {m.address}, user subject)" for m in machines if m.role is Role.TARGET
            ),
        ),
        "brain": subject.brain,
        "prompt": scenario.prompt,
        "seed": seed,
        "temperature": subject.temperature,
        "max_tokens": subject.max_tokens,
        "limits": {
            "wall_s": limits.wall_s,
            "steps": limits.steps,
            "format_retries": scenario.limits.format_retries,
        },
        "targets": [
            {"name": m.name, "address": m.address, "user": "subject"}
            for m in machines
            if m.role is Role.TARGET
        ],
        "options": {"model_timeout_s": subject.answer_s},
    }
    header = TrialHeader(
        id=trial_id,
        subject=subject.name,
        brain=subject.brain,
        scenario=scenario.name,
        policy=policy.name,
        prompt=scenario.prompt,
        task=str(task["task"]),
        seed=seed,
        created=created,
        accelerator=accelerator,
        machines=tuple(_record(m) for m in machines),
        weights=weights,
        limits=limits,
        versions=versions,
        config_sha256=_digest([subject, scenario, policy], limits, seed),
        key=key,
    )
    return Plan(header, machines, json.dumps(task, indent=1).encode())


def _record(machine: MachineSpec) -> MachineRecord:
    return MachineRecord.model_validate(
        {
            "name": machine.name,
            "role": machine.role.value,
            "image": machine.image.recipe,
            "image_digest": machine.image.digest,
            "address": machine.address,
            "mac": machine.mac,
        }
    )


def _digest(specs: list[SubjectSpec | ScenarioSpec | PolicySpec], limits: Limits, seed: int) -> str:
    basis = [*(s.model_dump(mode="json") for s in specs), limits.model_dump(mode="json"), seed]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
