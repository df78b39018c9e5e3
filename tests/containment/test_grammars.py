"""A grammar that gives way while text is made: its own request ends, as the client's error."""

import json
from pathlib import Path
from typing import Any

import httpx

from tests.containment.served import API_KEY, served
from tests.tiny import Tiny

GIVES_WAY = {"regex": "((((a{0,30}){0,30}){0,30}){0,30}){1,30}"}
"""Fits, begins, and after some tokens needs more expressions than llguidance constructs."""
FORCED: dict[str, Any] = {
    "model": "tuned",
    "prompt": "a",
    "max_tokens": 60,
    "temperature": 0,
    "logit_bias": {str(ord("a")): 100},
    "structured_outputs": GIVES_WAY,
}


def test_the_request_ends_with_what_happened_and_others_go_on(model: Tiny, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {API_KEY}"}
    with (
        served(model, tmp_path) as (url, engine),
        httpx.Client(base_url=url, headers=headers, timeout=120) as http,
    ):
        whole = http.post("/v1/completions", json=FORCED)
        assert whole.status_code == 400, whole.text
        error = whole.json()["error"]
        assert (error["code"], error["type"]) == ("grammar_failed", "invalid_request_error")
        assert "too many expressions" in error["message"]

        stream = http.post("/v1/completions", json=FORCED | {"stream": True}).text.split("\n\n")
        chunks = [json.loads(line[6:]) for line in stream if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]).startswith("aaa")
        assert chunks[-1] == {"error": error}
        assert "data: [DONE]" not in stream

        small = http.post(
            "/v1/completions", json=FORCED | {"structured_outputs": {"regex": "a{3}"}}
        )
        assert small.json()["choices"][0]["text"] == "aaa"
        engine.assert_invariants()
    assert engine.added.total() == 3
