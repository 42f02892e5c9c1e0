"""An in-process HTTP client of the control plane."""

from __future__ import annotations

import warnings

from api.app import create_app
from appliance.service import LabService

with warnings.catch_warnings():
    # Starlette would like another HTTP library; ours is httpx.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

TOKEN = "t" * 43


def client(lab: LabService, token: str | None = TOKEN, host: str = "localhost") -> TestClient:
    """A client that sends ``token`` (None: none) and ``host``; server errors become responses."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return TestClient(
        create_app(lab, TOKEN), base_url=f"http://{host}", headers=headers, raise_server_exceptions=False
    )
