"""The application: one service, one token, the routes under /v1."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from api.auth import LOCAL_HOSTS, Gate
from api.examples import PROBLEMS, unmasked
from api.problems import Problem, install
from api.routes import baselines, cells, laboratory, trials
from api.sse import Followers
from appliance import __version__
from appliance.service import LabService

_DESCRIPTION = (
    "Control plane of a sealed laboratory for replication trials of AI agents. Every request carries the "
    "bearer token; every error is `application/problem+json`. Times are Unix seconds, sizes bytes."
)
_TAGS: list[dict[str, Any]] = [
    {"name": "laboratory", "description": "Health, host, images."},
    {"name": "baselines", "description": "Saved machine states: show, delete, take elsewhere."},
    {"name": "switches", "description": "Kill, rearm, sweep."},
    {"name": "cells", "description": "Cells and their machines."},
    {"name": "trials", "description": "Create, follow, stop, score, take home."},
]


def _operation_id(route: APIRoute) -> str:
    return route.name


def create_app(service: LabService, token: str, *, hosts: Collection[str] = LOCAL_HOSTS) -> FastAPI:
    """The ASGI application of ``service``. ``hosts`` are the Host headers (without port) that are served."""
    app = FastAPI(
        title="Hotcell",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url="/v1/openapi.json",
        openapi_tags=_TAGS,
        docs_url=None,  # the bundled pages load scripts from the internet
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        dependencies=[Depends(HTTPBearer(auto_error=False, description="The token of the server's home."))],
        responses=PROBLEMS,
    )
    app.state.lab = service
    app.state.followers = Followers()
    install(app)
    app.add_middleware(Gate, token=token, hosts=hosts)
    for module in (laboratory, baselines, cells, trials):
        app.include_router(module.router, prefix="/v1")
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Add the problem schema to the OpenAPI document, since no route returns it as a model."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components.update(problem.pop("$defs", {}))
            components["Problem"] = problem
            app.openapi_schema = unmasked(schema)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way to extend it
