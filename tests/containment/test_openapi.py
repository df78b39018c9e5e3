"""schemathesis over every operation of the OpenAPI document, against the real engine.

It sends what the document allows and what it forbids, and holds every answer against what the
document says of it: status, content type, schema. What is forbidden must be refused. That what is
allowed is always accepted is not asked: a document cannot say which fields go together. So that more of it
is, some cases are also made from the document narrowed to what this server has.

4 cases an operation and mode by default, 300 among the slow tests, always the same ones.
"""

import contextlib
import copy
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup

from tests.containment.served import ADAPTERS, ADMIN_KEY, API_KEY, served
from tests.tiny import Tiny

log = logging.getLogger(__name__)

CHECKED = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
}
CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {"negative_data_rejection": {"expected-statuses": [400, 404, 413]}},
        "generation": {"with-security-parameters": False},  # keys are the tests' own
    }
)
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
TIMEOUT_S = 120
MODELS = ["tiny", *ADAPTERS, "tuned@2"]
GENERATING = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
NUM_OPERATIONS = 29
"""More are welcome; fewer would mean that something is no longer looked at."""


def key_of(path: str) -> str:
    return ADMIN_KEY if path.startswith("/admin") or "lora_adapter" in path else API_KEY


def examine(
    operation: Any,
    url: str,
    num_cases: int,
    statuses: Counter[tuple[str, int]],
    modes: tuple[Any, ...] = (POSITIVE, NEGATIVE),
) -> None:
    """Send cases of each mode; raises FailureGroup for an answer that the document forbids."""
    headers = {"authorization": f"Bearer {key_of(operation.path)}"}
    others = [check for check in CHECKS.get_all() if check.__name__ not in CHECKED]
    assert len(CHECKS.get_all()) - len(others) == len(CHECKED)

    for mode in modes:

        @settings(
            max_examples=num_cases,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            response = case.call_and_validate(
                base_url=url, headers=headers, excluded_checks=others, timeout=TIMEOUT_S
            )
            statuses[operation.label, response.status_code] += 1

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a route of no input
            send()


def operations_of(document: dict[str, Any]) -> list[Any]:
    schema = schemathesis.openapi.from_dict(document, config=CONFIG)
    return [each.ok() for each in schema.get_all_operations()]


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """Models that there are, texts in their vocabulary, and messages with words in them."""
    narrow = copy.deepcopy(document)
    schemas = narrow["components"]["schemas"]
    for schema in schemas.values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": MODELS}
    text = {"type": "string", "minLength": 1, "maxLength": 20}
    tokens = {"type": "array", "minItems": 1, "items": {"enum": [*range(97, 123)]}}
    schemas["CompletionRequest"]["properties"]["prompt"] = {"oneOf": [text, tokens]}
    schemas["DetokenizeRequest"]["properties"]["tokens"] = tokens
    schemas["TokenizeRequest"]["properties"] = {"model": {"enum": MODELS}, "prompt": text}
    schemas["TokenizeRequest"]["required"] = ["prompt"]
    message = schemas["Message"]
    message["properties"] = {"role": {"enum": ["system", "user", "assistant"]}, "content": text}
    message["required"] = ["role", "content"]
    return narrow


@pytest.mark.parametrize(
    "num_cases", [4, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_every_operation_keeps_what_the_document_says(
    model: Tiny, tmp_path: Path, num_cases: int
) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    with served(model, tmp_path) as (url, engine):
        document = httpx.get(f"{url}/openapi.json").json()
        operations = operations_of(document)
        for operation in operations:
            examine(operation, url, num_cases, statuses)
        for operation in operations_of(narrowed(document)):
            if operation.path in GENERATING:
                examine(operation, url, num_cases, statuses, (POSITIVE,))
        engine.assert_invariants()
    by_status: Counter[int] = Counter()
    for (_, status), number in statuses.items():
        by_status[status] += number
    log.info("%d answers of %d operations: %s", statuses.total(), len(operations), dict(by_status))
    assert len({label for label, _ in statuses}) == len(operations) >= NUM_OPERATIONS
    assert by_status[400] > num_cases
    for path in GENERATING:
        assert statuses[f"POST {path}", 200] >= num_cases // 10, path
    assert engine.added.total() > num_cases // 10  # requests came as far as the engine


def _is_a_number(document: dict[str, Any]) -> None:
    answer = document["paths"]["/v1/models"]["get"]["responses"]["200"]
    answer["content"]["application/json"]["schema"] = {"type": "integer"}


def _has_no_errors(document: dict[str, Any]) -> None:
    del document["paths"]["/v1/models"]["get"]["responses"]["200"]


@pytest.mark.parametrize("spoil", [_is_a_number, _has_no_errors])
def test_a_document_that_says_otherwise_is_found(model: Tiny, tmp_path: Path, spoil: Any) -> None:
    with served(model, tmp_path) as (url, _):
        document = httpx.get(f"{url}/openapi.json").json()
        spoil(document)
        schema = schemathesis.openapi.from_dict(document, config=CONFIG)
        with pytest.raises(FailureGroup):
            examine(schema["/v1/models"]["GET"], url, 1, Counter())


def test_the_document_says_which_key_a_route_needs(model: Tiny, tmp_path: Path) -> None:
    """And each route asks for just that: without it 401, with an API key in an admin key's place 403."""
    with served(model, tmp_path) as (url, _), httpx.Client(base_url=url) as http:
        document = http.get("/openapi.json").json()
        schemes = document["components"]["securitySchemes"]
        assert schemes.keys() == {"api_key", "admin_key"}
        assert {(each["type"], each["scheme"]) for each in schemes.values()} == {("http", "bearer")}
        found: Counter[str] = Counter()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                (needed,) = operation.get("security", [{"none": []}])
                (name,) = needed
                found[name] += 1
                answers = [
                    http.request(method, path, headers=headers).status_code
                    for headers in ({}, {"authorization": f"Bearer {API_KEY}"})
                ]
                if name == "none":
                    assert answers == [200, 200], path
                elif name == "admin_key":
                    assert answers == [401, 403], path
                else:
                    assert answers[0] == 401, path
                    assert answers[1] not in (401, 403), path
        assert found == {"none": 4, "api_key": 7, "admin_key": 19}
