"""The OpenAPI document: everything described, every example fits its schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from api.app import create_app
from api.examples import EXAMPLES
from tests.fakes.client import client
from tests.fakes.service import FakeLab

DOCUMENT = create_app(FakeLab(Path()), "t" * 43).openapi()
OPERATIONS = [
    (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
]
IDS = [f"{method} {path}" for method, path, _ in OPERATIONS]


def resolve(schema: object) -> Any:
    """The schema with references replaced, since the document is not a schema itself."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            at: Any = DOCUMENT
            for part in schema["$ref"].removeprefix("#/").split("/"):
                at = at[part]
            return resolve(at)
        return {k: resolve(v) for k, v in schema.items()}
    return [resolve(v) for v in schema] if isinstance(schema, list) else schema


def examples(content: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for media in content.values():
        schema = resolve(media.get("schema", {}))
        if "example" in media:
            yield media["example"], schema
        for example in media.get("examples", {}).values():
            yield example["value"], schema


def test_every_example_is_a_valid_value() -> None:
    for model, value in EXAMPLES.items():
        assert isinstance(model.model_validate(value), BaseModel)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=IDS)
def test_every_route_is_described_and_has_examples_that_fit(
    method: str, path: str, operation: dict[str, Any]
) -> None:
    assert operation["description"], "a docstring is missing"
    assert operation["summary"]
    assert operation["tags"]
    assert operation["security"]
    for parameter in operation.get("parameters", []):
        assert parameter.get("description"), f"{parameter['name']} has no description"
    good = [r for status, r in operation["responses"].items() if status.startswith("2")]
    assert good
    for response in good:
        assert list(examples(response["content"])), "no example of the answer"
    assert "application/problem+json" in operation["responses"]["default"]["content"]
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies:
        assert list(examples(bodies)), "no example of the body"
    for content in [bodies, *(r["content"] for r in operation["responses"].values())]:
        for value, schema in examples(content):
            Draft202012Validator(schema).validate(value)


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(ids) == len(set(ids))


def test_the_document_is_served(tmp_path: Path) -> None:
    answer = client(FakeLab(tmp_path)).get("/v1/openapi.json")
    assert answer.status_code == 200
    assert answer.json()["components"]["schemas"]["Problem"]["properties"]["blame"]


def test_every_method_of_the_service_has_a_route(tmp_path: Path) -> None:
    from appliance.service import LabService

    methods = {name for name in vars(LabService) if not name.startswith("_")} - {"close"}
    ids = {operation["operationId"] for _, _, operation in OPERATIONS}
    assert ids == (methods - {"exec"}) | {"run_in_guest"}


def test_routes_are_documented_for_people(project: Path) -> None:
    text = (project / "docs" / "api.md").read_text()
    missing = [f"{m.upper()} {p}" for m, p, _ in OPERATIONS if f"`{m.upper()} {p}`" not in text]
    assert not missing
