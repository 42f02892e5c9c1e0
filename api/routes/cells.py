"""Cells and their machines."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from api.examples import answer, body
from api.routes import Lab
from api.schemas import CellParameter, ExecRequest, MachineParameter, ResetRequest, SnapshotRequest
from appliance.service import (
    BaselineView,
    CellRequest,
    CellView,
    ExecView,
    MachineView,
    ProbeView,
    ResetView,
)

router = APIRouter(tags=["cells"])
_MACHINE = "/cells/{cell}/machines/{machine}"


@router.get("/cells", responses=answer(CellView, many=True))
def cells(lab: Lab) -> list[CellView]:
    """Open cells."""
    return lab.cells()


@router.post("/cells", status_code=201, responses=answer(CellView, 404, 409, 503, status=201))
def open_cell(
    lab: Lab, request: Annotated[CellRequest, Body(openapi_examples=body(CellRequest))]
) -> CellView:
    """Open a cell outside of trials. It returns once the machines are proved clean and run."""
    return lab.open_cell(request)


@router.delete("/cells/{cell}", responses=answer(CellView, 404, 409))
def close_cell(lab: Lab, cell: CellParameter) -> CellView:
    """Stop a cell's machines and remove all that is theirs. A trial's cell cannot be closed by hand."""
    return lab.close_cell(cell)


@router.get("/machines", responses=answer(MachineView, many=True))
def machines(lab: Lab) -> list[MachineView]:
    """Machines of all open cells."""
    return lab.machines()


@router.post(
    _MACHINE + "/snapshot", status_code=201, responses=answer(BaselineView, 404, 409, 503, status=201)
)
def snapshot(
    lab: Lab,
    cell: CellParameter,
    machine: MachineParameter,
    request: Annotated[SnapshotRequest, Body(openapi_examples=body(SnapshotRequest))],
) -> BaselineView:
    """Save a machine's present state as a baseline. One with passed-through devices has `disk` ones only."""
    return lab.snapshot(cell, machine, request.name, request.kind)


@router.post(_MACHINE + "/reset", responses=answer(ResetView, 404, 409, 503))
def reset(
    lab: Lab,
    cell: CellParameter,
    machine: MachineParameter,
    request: Annotated[ResetRequest | None, Body(openapi_examples=body(ResetRequest))] = None,
) -> ResetView:
    """Put a machine back to its baseline, or to a named one of its own, and prove it, fact by fact."""
    return lab.reset(cell, machine, (request or ResetRequest()).baseline)


@router.post("/cells/{cell}/reset", responses=answer(ResetView, 404, 409, 503, many=True))
def reset_cell(lab: Lab, cell: CellParameter) -> list[ResetView]:
    """Put all machines of a cell back as a group: none is plugged in before every proof holds."""
    return lab.reset_cell(cell)


@router.post(_MACHINE + "/exec", responses=answer(ExecView, 404, 409, 502))
def run_in_guest(
    lab: Lab,
    cell: CellParameter,
    machine: MachineParameter,
    request: Annotated[ExecRequest, Body(openapi_examples=body(ExecRequest))],
) -> ExecView:
    """Run a command in a guest through its agent. What comes back is the guest's word, bounded."""
    return lab.exec(cell, machine, list(request.argv), request.timeout_s)


@router.post(_MACHINE + "/probe", responses=answer(ProbeView, 404, 409, 502))
def probe(lab: Lab, cell: CellParameter, machine: MachineParameter) -> ProbeView:
    """Ask with a fresh nonce whether a model and an agent answer on a machine."""
    return lab.probe(cell, machine)
