"""The OpenAPI document against the service that it describes: whatever it lets one send, there is no 5xx."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from serving import HEADERS, KEY, Running, make_place, run_service
from test_serve_labels import make_findings

from pairdr.findings import write_audit

if TYPE_CHECKING:
    from conftest import Parts

EXAMPLES = 25
UNFIT = {"POST": [positive_data_acceptance], "GET": [positive_data_acceptance, negative_data_rejection]}
"""What no document can say: that a passage is there, that a field is, that a text is short enough; parameters that mean
nothing are left alone."""
KNOWING = ("POST /passages/delete", "POST /feedback", "POST /audit")
"""Answered well only to who knows what is there."""
OPERATIONS = {
    *("GET /search", "POST /search", "POST /v1/embeddings", "POST /v1/rerank", "GET /v1/models"),
    *("POST /passages", "POST /passages/delete", "POST /feedback", "GET /audit", "POST /audit"),
    *("GET /settings", "GET /health", "GET /ready", "GET /metrics"),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, toy: Path, toy_parts: Parts) -> Iterator[Running]:
    """Return a service with everything there is: keys, passages that may be written, feedback, an audit."""
    folder = tmp_path_factory.mktemp("described")
    place = make_place(folder, toy, toy_parts.encoder)
    write_audit(folder / "audit.tsv", make_findings())
    options: dict[str, Any] = {"feedback": folder / "feedback", "audit": folder / "audit.tsv"}
    with run_service(place, toy_parts.start, keys=[KEY], **options) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def document(running: Running) -> dict[str, Any]:
    return dict(running.client.get("/openapi.json").json())


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_service_is_what_its_document_says(
    running: Running, document: dict[str, Any], name: str, mode: GenerationMode
) -> None:
    """What fits the document, and what does not, is answered as the document says; nothing with a 5xx."""
    method, path = name.split()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=running.url)

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(headers=HEADERS, excluded_checks=UNFIT[method])
        seen.add(answer.status_code)

    seen: set[int] = set()
    try:
        ask()
    except Unsatisfiable:  # there is nothing that one could get wrong
        assert mode is GenerationMode.NEGATIVE
        assert "parameters" not in document["paths"][path][method.lower()]
    if mode is GenerationMode.POSITIVE and name not in KNOWING:
        assert 200 in seen


def test_the_document_names_every_operation(document: dict[str, Any]) -> None:
    found = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert found == OPERATIONS
