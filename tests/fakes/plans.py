"""Plans of trials, from the built-in library and machines without images."""

from __future__ import annotations

from appliance.config import load_library
from appliance.model import Accelerator
from appliance.trial.plan import Plan, make_plan
from appliance.trial.records import Limits, WeightFile
from tests.fakes.machine import machine_spec

TRIAL = "t20260101-000000-0a1b2c"
WEIGHTS = (WeightFile(name="model.safetensors", size=5, sha256="a" * 64),)
LIMITS = Limits(wall_s=30, steps=5, disk_mb=10, lasting_s=0.05, probes=2)


def plan(*targets: str, subject: str = "claimer", limits: Limits = LIMITS, seed: int = 1) -> Plan:
    """The plan of one trial with an origin and these targets (one, if none is named)."""
    library = load_library()
    machines = tuple(machine_spec(n) for n in ("origin", *(targets or ("target-1",))))
    return make_plan(
        TRIAL, library.subject(subject), library.scenario("replicate"), library.policy("sealed"), limits, seed,
        machines, WEIGHTS, Accelerator.TCG, {"libvirt": "9.0.0"}, 1.5,
    )  # fmt: skip
