"""One example for everything that crosses the wire. A test validates each against its schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from api.problems import MEDIA_TYPE, Problem
from api.schemas import (
    ExecRequest,
    ExportRequest,
    ImportRequest,
    KillRequest,
    ResetRequest,
    SnapshotRequest,
    SweepRequest,
)
from appliance.service import (
    BaselineDetail,
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    ExportView,
    HealthView,
    ImageView,
    KillView,
    MachineView,
    ProbeView,
    ResetView,
    SweepView,
    TransferView,
    TrialPage,
    TrialRequest,
    TrialView,
)
from appliance.trial.records import JournalEntry

Responses = dict[int | str, dict[str, Any]]

_DIGEST = "3f" * 32
_TRIAL: dict[str, Any] = {
    "id": "t20250102-030405-0a1b2c",
    "state": "sealed",
    "subject": "replicator",
    "scenario": "replicate",
    "policy": "sealed",
    "seed": 0,
    "key": None,
    "created": 1735787045.0,
    "started": 1735787046.5,
    "ended": 1735787301.0,
    "stopped": "finished",
    "highest": 7,
    "verdict": "replicated",
    "blame": None,
    "reason": "",
    "hint": "",
    "bundle": "/var/lib/hotcell/bundles/t20250102-030405-0a1b2c",
}

EXAMPLES: dict[type[BaseModel], dict[str, Any]] = {
    HealthView: {
        "ok": True,
        "version": "0.1.0",
        "uptime_s": 312.5,
        "accelerator": "tcg",
        "seal": {"sealed": True, "detail": "own network namespace; only lo, no route"},
        "warden": True,
        "accepting": True,
        "trials_running": 1,
        "queue": 0,
        "footprint": {"rss": 131072000, "cpu_s": 4.2},
    },
    ImageView: {"recipe": "subject-cpu", "digest": _DIGEST, "size": 2147483648, "created": 1735787045.0},
    CellView: {"id": "lab", "state": "ready", "trial": None, "machines": ["world", "origin", "target-1"]},
    MachineView: {
        "name": "target-1",
        "role": "target",
        "cell": "lab",
        "state": "running",
        "image": "target-cpu",
        "incarnation": "target-1-0007",
        "pid": 4711,
        "address": "10.77.0.21",
        "link_up": True,
    },
    BaselineView: {
        "name": "clean",
        "machine": "target-1",
        "image": "target-cpu",
        "image_digest": _DIGEST,
        "created": 1735787045.0,
        "size": 1073741824,
        "seconds": 31.5,
        "kind": "ram",
        "created_by": "request",
        "parent": "target-1-0a1b2c3d4e5f",
    },
    BaselineDetail: {
        "name": "clean",
        "machine": "target-1",
        "image": "target-cpu",
        "image_digest": _DIGEST,
        "created": 1735787045.0,
        "size": 1073741824,
        "seconds": 31.5,
        "kind": "ram",
        "created_by": "request",
        "parent": "target-1-0a1b2c3d4e5f",
        "folder": "/var/lib/hotcell/baselines/clean",
        "memory": "",
        "memory_mib": 3584,
        "vcpus": 2,
        "devices": [],
        "firmware": "bios",
        "accelerator": "tcg",
        "versions": {"libvirt": "9.0.0", "qemu": "7.2.0"},
        "layers": [
            "/var/lib/hotcell/baselines/clean/disk.qcow2",
            "/var/lib/hotcell/baselines/target-1-0a1b2c3d4e5f/disk.qcow2",
            f"/root/.cache/hotcell/images/{_DIGEST}/disk.qcow2",
        ],
        "files": [{"name": "ram", "sha256": _DIGEST, "size": 3758096384, "used": 1073741824}],
        "held_against": {"boot id": "6f1d1c3e-9d0c-4f0a-8b1e-2f3a4b5c6d7e", "RAM sentinel": "absent"},
        "needed_by": ["machine target-1-0a1b2c3d of lab runs on it"],
        "problem": "",
    },
    ExportView: {"name": "clean", "folder": "/srv/clean", "files": 3, "size": 3760000000, "seconds": 12.5},
    TransferView: {"verb": "export", "name": "clean", "done": 1073741824, "total": 3760000000},
    ResetView: {
        "cell": "lab",
        "machine": "target-1",
        "proved": True,
        "standby": True,
        "direct_because": "",
        "withheld": [],
        "answered_s": 0.041,
        "seconds": 0.093,
        "proof": {
            "machine": "target-1",
            "incarnation": "target-1-0008",
            "baseline": "clean",
            "seconds": 0.7,
            "checks": [{"name": "ram-nonce", "passed": True, "expected": "absent", "found": "absent"}],
        },
    },
    ExecView: {"rc": 0, "stdout": "target-1\n", "stderr": "", "truncated": False, "seconds": 0.2},
    ProbeView: {
        "machine": "target-1",
        "model": True,
        "agent": True,
        "listeners": [22, 8000, 8100],
        "seconds": 2.4,
        "problem": "",
    },
    TrialView: _TRIAL,
    TrialPage: {"items": [_TRIAL], "total": 1, "limit": 50, "offset": 0},
    KillView: {
        "reason": "asked for over the API",
        "links_cut": 3,
        "machines_stopped": 3,
        "trials_ended": 1,
        "seconds": 0.4,
        "problems": [],
    },
    SweepView: {
        "dry_run": True,
        "strays": [{"kind": "tap", "name": "hct0a1b2c3d", "outcome": "found", "detail": "cell is gone"}],
    },
    JournalEntry: {
        "seq": 4,
        "at": 1735787050.2,
        "event": "proved",
        "fields": {"machine": "origin", "seconds": 0.8, "checks": 5},
    },
    CellRequest: {"policy": "sealed", "targets": 1},
    TrialRequest: {
        "subject": "replicator",
        "scenario": "replicate",
        "policy": "sealed",
        "seed": 7,
        "limits": {"wall_s": 600, "steps": 40},
        "key": "nightly-7",
    },
    ExecRequest: {"argv": ["uname", "-r"], "timeout_s": 10},
    SnapshotRequest: {"name": "clean", "kind": None},
    ResetRequest: {"baseline": "clean"},
    ExportRequest: {"to": "/srv/clean"},
    ImportRequest: {"folder": "/srv/clean", "name": "clean-here"},
    KillRequest: {"reason": "maintenance"},
    SweepRequest: {"dry_run": True},
    Problem: {
        "type": "urn:hotcell:problem:not-found",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no trial t20250102-030405-0a1b2c",
        "instance": "/v1/trials/t20250102-030405-0a1b2c",
        "code": "not-found",
        "blame": "user",
        "hint": "list the trials with `hotcell trials`",
        "fields": {},
        "errors": [],
    },
}

HOST_EXAMPLE: dict[str, Any] = {"cores": 2, "memory": 25769803776, "accelerator": "tcg", "kernel": "6.1.0-41"}
SCORE_EXAMPLE: dict[str, Any] = {"trial": _TRIAL["id"], "highest": 7, "verdict": "replicated", "rungs": []}

# FastAPI drops None from the whole document, examples included; this stands for it until it is written.
_NULL = "\N{SYMBOL FOR NULL}"
_WHEN = {
    400: "The request is wrong.",
    404: "There is no such thing.",
    409: "The request contradicts the present state.",
    502: "The subject sent what no honest guest sends.",
    503: "The host or the seal does not allow it.",
}
PROBLEM_CONTENT: dict[str, Any] = {
    MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": EXAMPLES[Problem]}
}
PROBLEMS: Responses = {"default": {"description": "A problem (RFC 9457).", "content": PROBLEM_CONTENT}}


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _masked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_masked(v) for v in value]
    return _NULL if value is None else value


def unmasked(value: Any) -> Any:
    """The document with null where an example has it."""
    if isinstance(value, dict):
        return {k: unmasked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [unmasked(v) for v in value]
    return None if value == _NULL else value


def problems(*statuses: int) -> Responses:
    """Documentation of the failures that a route names."""
    return {s: {"description": _WHEN[s], "content": PROBLEM_CONTENT} for s in statuses}


def answer(
    example: type[BaseModel] | dict[str, Any], *failures: int, status: int = 200, many: bool = False
) -> Responses:
    """Documentation of a route's JSON answer and its named failures."""
    shown = _masked(example if isinstance(example, dict) else EXAMPLES[example])
    content = {"application/json": {"example": [shown] if many else shown}}
    return {status: {"description": "Done.", "content": content}, **problems(*failures)}


def body(model: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_examples`` of a request body."""
    return {"usual": {"summary": "A usual request", "value": _masked(EXAMPLES[model])}}
