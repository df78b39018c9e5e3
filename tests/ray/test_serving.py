"""Two replicas on two nodes answer as one server: streams, depths, and what an operator changes."""

import json
import time

import httpx

from tests.ray.fleet import ADMIN, KEY, REPLICA, Fleet, ask, ask_each, deploy, say

LENGTH = 32


def test_a_stream_comes_in_pieces_and_says_the_same_as_one_answer(fleet: Fleet) -> None:
    deploy()
    whole = ask(fleet, "a1@2", max_tokens=LENGTH).json()
    body = {"model": "a1@2", "prompt": "depth", "max_tokens": LENGTH, "temperature": 0}
    with httpx.stream(
        "POST", f"{fleet.url}/v1/completions", json=body | {"stream": True}, headers=KEY
    ) as stream:
        assert stream.status_code == 200
        *events, last = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    assert last == "[DONE]"
    assert len(events) > LENGTH // 2  # not all at once
    texts = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert "".join(texts) == whole["choices"][0]["text"]
    assert whole["lora"]["depth"] == 2
    assert ask(fleet, "a1@4", max_tokens=LENGTH).json()["choices"] != whole["choices"]


def test_who_has_no_key_is_refused_by_every_replica(fleet: Fleet) -> None:
    deploy()
    for response in ask_each(fleet, "a1", headers={}):
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_depth_that_one_replica_is_told_is_in_force_on_all(fleet: Fleet) -> None:
    deploy()
    name = "a5"
    for depth in (3, 1):
        pin = {"depth": depth, "reason": "a test"}
        path = f"{fleet.url}/admin/adapters/{name}/boundary"
        told = httpx.put(path, json=pin, headers=ADMIN, timeout=60)
        assert told.status_code == 200, told.text
        since = time.monotonic()
        while any(r.json()["lora"]["depth"] != depth for r in ask_each(fleet, name)):
            pass
        say(f"depth {depth} on every replica {time.monotonic() - since:.2f} s after its answer")


def test_an_adapter_is_calibrated_by_one_replica_at_a_time(fleet: Fleet) -> None:
    deploy()
    samples = [{"prompt": f"sum {n}", "completion": " of many"} for n in range(36)]
    body = {"dataset": {"samples": samples * 20}, "activate": False}
    path = f"{fleet.url}/admin/adapters/a6/recalibrate"
    answers = {}
    while len(answers) < 2:  # until both replicas were asked while it runs
        response = httpx.post(path, json=body, headers=ADMIN, timeout=60)
        answers.setdefault(response.headers[REPLICA], response)
    first, second = answers.values()
    assert first.status_code == 202, first.text
    job = first.json()["job"]["id"]
    assert (second.status_code, second.json()["error"]["code"]) == (409, "job_running")
    assert job in second.text
    seen = {}
    while len(seen) < 2:
        response = httpx.get(f"{fleet.url}/admin/jobs/{job}", headers=ADMIN, timeout=60)
        seen[response.headers[REPLICA]] = response.json()["id"]
    assert set(seen.values()) == {job}
    httpx.delete(f"{fleet.url}/admin/jobs/{job}", headers=ADMIN, timeout=60)
    while httpx.get(f"{fleet.url}/admin/jobs/{job}", headers=ADMIN).json()["state"] != "cancelled":
        time.sleep(0.1)


def test_what_only_one_replica_would_know_is_refused(fleet: Fleet) -> None:
    deploy()
    load = {"lora_name": "x", "lora_path": "a1"}
    for method, path, body in (
        ("POST", "/v1/load_lora_adapter", load),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "a1"}),
        ("PUT", "/admin/adapters/x", {"path": "a1"}),
        ("DELETE", "/admin/adapters/a1", None),
    ):
        response = httpx.request(method, fleet.url + path, json=body, headers=ADMIN)
        assert response.json()["error"]["code"] == "many_replicas"
        assert response.status_code == 409
