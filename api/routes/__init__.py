"""Routes by subject: each calls one method of the laboratory and returns what it gave."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from api.sse import Followers
from appliance.service import LabService


# Coroutines, so that looking these up needs none of the threads that serve requests.
async def _lab(request: Request) -> LabService:
    return cast("LabService", request.app.state.lab)


async def _followers(request: Request) -> Followers:
    return cast("Followers", request.app.state.followers)


Lab = Annotated[LabService, Depends(_lab)]
Following = Annotated[Followers, Depends(_followers)]
