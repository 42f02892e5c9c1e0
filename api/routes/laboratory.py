"""The laboratory as a whole: health, host, images, and the switches."""

from __future__ import annotations

from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Body

from api.examples import HOST_EXAMPLE, answer, body
from api.routes import Lab
from api.schemas import KillRequest, SweepRequest
from appliance.service import HealthView, ImageView, KillView, SweepView

router = APIRouter()


@router.get("/health", tags=["laboratory"], responses=answer(HealthView))
def health(lab: Lab) -> HealthView:
    """Say whether trials can run: seal, warden, kill switch, queue, and what the server itself uses."""
    return lab.health()


@router.get("/host", tags=["laboratory"], responses=answer(HOST_EXAMPLE))
def host(lab: Lab) -> dict[str, object]:
    """Facts of the host that the laboratory runs on."""
    return lab.host()


@router.get("/images", tags=["laboratory"], responses=answer(ImageView, many=True))
def images(lab: Lab) -> list[ImageView]:
    """All recipes with what is built of them. Building is done with `hotcell build`, outside the seal."""
    return lab.images()


@router.post("/kill", tags=["switches"], responses=answer(KillView))
async def kill(
    lab: Lab, request: Annotated[KillRequest | None, Body(openapi_examples=body(KillRequest))] = None
) -> KillView:
    """Cut all links, stop all machines, end all trials; refuse new ones until `rearm`."""
    # In a thread of its own: those that serve requests may all be at work that takes minutes.
    reason = (request or KillRequest()).reason
    return await to_thread.run_sync(lab.kill, reason, limiter=CapacityLimiter(1))


@router.post("/rearm", tags=["switches"], responses=answer(HealthView, 503))
def rearm(lab: Lab) -> HealthView:
    """Accept trials again after `kill`."""
    return lab.rearm()


@router.post("/sweep", tags=["switches"], responses=answer(SweepView))
def sweep(
    lab: Lab, request: Annotated[SweepRequest | None, Body(openapi_examples=body(SweepRequest))] = None
) -> SweepView:
    """Find what the ledger owns and no live cell uses; remove it with `dry_run: false`."""
    return lab.sweep((request or SweepRequest()).dry_run)
