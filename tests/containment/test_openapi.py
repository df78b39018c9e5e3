"""schemathesis over every operation of the OpenAPI document, against the real engine.

It sends what the document allows and what it forbids, and holds every answer against what the
document says of it: status, content type, schema. What is forbidden must be refused. That what is
allowed is always accepted is not asked: a document cannot say which fields go together.
"""

import contextlib
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

from tests.containment.served import ADMIN_KEY, API_KEY, served
from tests.tiny import Tiny

CHECKED = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
}
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
TIMEOUT_S = 120
NUM_OPERATIONS = 23
"""More are welcome; fewer would mean that something is no longer looked at."""


def key_of(path: str) -> str:
    return ADMIN_KEY if path.startswith("/admin") or "lora_adapter" in path else API_KEY


def examine(operation: Any, url: str, num_cases: int, statuses: Counter[tuple[str, int]]) -> None:
    """Send cases of both modes; raises FailureGroup for an answer that the document forbids."""
    headers = {"authorization": f"Bearer {key_of(operation.path)}"}
    others = [check for check in CHECKS.get_all() if check.__name__ not in CHECKED]
    assert len(CHECKS.get_all()) - len(others) == len(CHECKED)

    for mode in MODES:

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


@pytest.mark.parametrize(
    "num_cases", [4, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_every_operation_keeps_what_the_document_says(
    model: Tiny, tmp_path: Path, num_cases: int
) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    with served(model, tmp_path) as (url, engine):
        document = httpx.get(f"{url}/openapi.json").json()
        operations = [
            each.ok() for each in schemathesis.openapi.from_dict(document).get_all_operations()
        ]
        for operation in operations:
            examine(operation, url, num_cases, statuses)
        engine.assert_invariants()
    assert len({label for label, _ in statuses}) == len(operations) >= NUM_OPERATIONS
    assert sum(number for (_, status), number in statuses.items() if status == 200) > num_cases
    assert sum(number for (_, status), number in statuses.items() if status == 400) > num_cases


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
        schema = schemathesis.openapi.from_dict(document)
        with pytest.raises(FailureGroup):
            examine(schema["/v1/models"]["GET"], url, 1, Counter())
