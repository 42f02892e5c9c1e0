"""Saved machine states."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Body

from api.examples import answer, body
from api.routes import Lab
from api.schemas import BaselineParameter, ExportRequest, ImportRequest
from appliance.service import BaselineDetail, BaselineView, ExportView, TransferView

router = APIRouter(tags=["baselines"])


@router.get("/baselines", responses=answer(BaselineView, many=True))
def baselines(lab: Lab) -> list[BaselineView]:
    """Saved machine states that reset returns to."""
    return lab.baselines()


@router.get("/baselines/{name}", responses=answer(BaselineDetail, 404))
def baseline(lab: Lab, name: BaselineParameter) -> BaselineDetail:
    """Everything about a saved state: files, layers, what its machines are held against, who needs it."""
    return lab.baseline(name)


@router.delete("/baselines/{name}", responses=answer(BaselineView, 404, 409))
def delete_baseline(lab: Lab, name: BaselineParameter) -> BaselineView:
    """Delete a saved state. Refused while a baseline, a machine, a cell or a trial depends on it."""
    return lab.delete_baseline(name)


@router.post("/baselines/{name}/export", status_code=201, responses=answer(ExportView, 404, 503, status=201))
def export_baseline(
    lab: Lab,
    name: BaselineParameter,
    request: Annotated[ExportRequest, Body(openapi_examples=body(ExportRequest))],
) -> ExportView:
    """Write a saved state to a new folder of the server's host. It returns when all is written."""
    return lab.export_baseline(name, Path(request.to))


@router.post("/baselines/import", status_code=201, responses=answer(BaselineView, 404, 409, 503, status=201))
def import_baseline(
    lab: Lab, request: Annotated[ImportRequest, Body(openapi_examples=body(ImportRequest))]
) -> BaselineView:
    """Make an exported state one of this laboratory. Import only what comes from a host that you trust."""
    return lab.import_baseline(Path(request.folder), request.name)


@router.get("/transfers", responses=answer(TransferView, many=True))
def transfers(lab: Lab) -> list[TransferView]:
    """Exports and imports that go on now."""
    return lab.transfers()
