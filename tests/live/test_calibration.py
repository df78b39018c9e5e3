"""Calibration of a server that serves, over HTTP, as an operator does it, on both databases.

What the adapter writes at depth 2 is the data set, so that depth 2 is the one to be found.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from boundary.store.store import Job, Store
from tests.live.operator import DEPTH, LIMIT_S, NAME, Operator, write_data
from tests.live.process import (
    ADMIN_KEY,
    API_KEY,
    LLAMA,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    LiveServer,
    Site,
    metric,
    serve,
)
from tests.parity.adapters import save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS

PROMISED_S = 2.0
"""The product's promise: so soon is a decision in force in every process."""


class Killed(Exception):
    """The server was killed on purpose."""


@contextmanager
def operated(site: Site, log: Path, database: str) -> Iterator[Operator]:
    arguments = {
        "--api-key": API_KEY,
        "--admin-key": ADMIN_KEY,
        "--database": database,
        "--data-root": str(site.data),
        "--adapter-root": str(site.root),
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--max-num-batched-tokens": str(MAX_NUM_BATCHED_TOKENS),
    }
    words = [word for item in arguments.items() for word in item]
    with serve(site, log, *words) as server:
        with Operator(server) as operator:
            yield operator
        assert "Traceback" not in server.stderr, server.stderr


@pytest.fixture
def operator(server: LiveServer) -> Iterator[Operator]:
    """Of the server that all tests share."""
    with Operator(server) as operator:
        yield operator


async def stored(database: str, job: str) -> Job:
    store = await Store.open(database)
    try:
        found = await store.job(job)
    finally:
        await store.close()
    assert found is not None
    return found


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_adapter_is_calibrated_rolled_back_and_survives_a_kill(
    kind: str, site: Site, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On PostgreSQL beside another process, which lives on when the first is killed."""
    if kind == "sqlite":
        database = f"sqlite:///{tmp_path / 'fathom.db'}"
    else:
        database = request.getfixturevalue("postgres").fresh_url()
    with ExitStack() as stack:
        other = None
        if kind == "postgresql":
            other = stack.enter_context(operated(site, tmp_path / "other", database))
        with suppress(Killed), operated(site, tmp_path / "first", database) as operator:
            write_data(operator, site)
            calibrate(operator)
            decide(operator)
            if other is not None:
                act_as_one(operator, other)
            before = operator.history()
            job = operator.started(dataset={"file": "long.jsonl"})
            operator.until_running(job)
            operator.server.process.kill()
            operator.server.process.wait(LIMIT_S)
            raise Killed
        if other is not None:
            assert other.lora() == (DEPTH, "calibrated", 1)
        with operated(site, tmp_path / "second", database) as operator:
            assert operator.lora() == (DEPTH, "calibrated", 1), "the depth outlives the process"
            limit = time.monotonic() + LIMIT_S
            while (found := operator.job(job))["state"] != "interrupted":
                assert found["state"] == "running"
                assert time.monotonic() < limit
                time.sleep(0.1)
            assert found["boundary_id"] is found["result"] is None
            assert operator.history() == before, "nothing half-written"
            last = operator.started(dataset={"file": "long.jsonl"})
            names = stop_when_running(operator, last)
            assert "done" not in names, "a server that stops does not wait for a job"
        assert asyncio.run(stored(database, last)).error == "its server was stopped"


def act_as_one(one: Operator, two: Operator) -> None:
    """What either decides is soon in force in both, and a job of one is everybody's."""
    for depth, operator, elsewhere in ((3, one, two), (1, two, one)):
        version = operator.pin(depth)["version"]
        decided = time.monotonic()
        while elsewhere.lora() != (depth, "calibrated", version):
            assert time.monotonic() < decided + LIMIT_S
            time.sleep(0.01)
        assert time.monotonic() - decided < PROMISED_S
    job = one.started(dataset={"file": "long.jsonl"})
    two.until_running(job)
    refused = two.recalibrate()
    assert (refused.status_code, job in refused.text) == (409, True)
    assert two.admin.delete(f"/admin/jobs/{job}").status_code == 202
    assert two.finished(job)["state"] == one.job(job)["state"] == "cancelled"
    assert one.activate(1)["action"] == "roll_back"
    while two.lora() != (DEPTH, "calibrated", 1):
        time.sleep(0.01)


def stop_when_running(operator: Operator, job: str) -> list[str]:
    """Tell the server to stop while somebody watches, who is told all until then."""
    names = []
    is_told = False
    for name, seen in operator.events(job):
        names.append(name)
        if seen["done"] > 0 and not is_told:
            operator.server.process.terminate()
            is_told = True
    assert operator.server.process.wait(LIMIT_S) == 0
    return names


def calibrate(operator: Operator) -> None:
    """Find the depth without activating it, then activate it under a stream."""
    prompt = "The fox jumps over the lazy dog"
    at_full = operator.text(NAME, prompt)
    assert operator.lora() == (NUM_LAYERS, "full", None)

    job = operator.started(activate=False)
    events = list(operator.events(job))
    assert [event for event, _ in events] == ["progress"] * (len(events) - 1) + ["done"]
    end = events[-1][1]
    assert (end["state"], end["result"]["verdict"]) == ("succeeded", "improves"), end
    assert (end["result"]["depth"], end["result"]["is_activated"]) == (DEPTH, False)
    assert operator.lora() == (NUM_LAYERS, "full", None)
    (kept,) = operator.history()["boundaries"]
    assert len(kept["record"]["curve"]) == NUM_LAYERS + 1
    shown = kept["evidence"]["outputs"][0]
    assert set(shown["by_depth"]) == {"0", str(DEPTH), str(NUM_LAYERS)}
    assert shown["by_depth"][str(DEPTH)].startswith(shown["reference"])
    svg = operator.admin.get(f"/admin/boundaries/{kept['id']}/curve.svg")
    assert svg.headers["content-type"] == "image/svg+xml"

    wish = {"model": NAME, "prompt": "So long", "max_tokens": 900, "temperature": 0}
    body = wish | {"stream": True, "ignore_eos": True}
    with operator.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        next(lines)
        assert operator.activate(1)["depth"] == DEPTH
        assert operator.lora() == (DEPTH, "calibrated", 1)
        assert metric(operator.http, "vllm:num_requests_running") == 1, "the stream goes on"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert chunks[-1]["lora"]["depth"] == NUM_LAYERS
    assert chunks[-1]["lora"]["source"] == "full"

    # Its blocks are kept, of another depth.
    answer = operator.ask(NAME, prompt)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    text = answer["choices"][0]["text"]
    assert text == operator.text(f"{NAME}@{DEPTH}", prompt)
    assert at_full == operator.text(f"{NAME}@full", prompt)
    assert text != at_full, "depths that write the same show nothing"


def decide(operator: Operator) -> None:
    """Pin, roll back, and see each in force in the next request."""
    assert operator.pin(3)["version"] == 2
    assert operator.lora() == (3, "calibrated", 2)
    assert operator.lora(f"{NAME}@full") == (NUM_LAYERS, "full", None)
    assert operator.activate(1)["action"] == "roll_back"
    assert operator.lora() == (DEPTH, "calibrated", 1)
    card = operator.http.get(f"/v1/models/{NAME}").json()["lora"]
    assert (card["calibrated_depth"], card["boundary_version"]) == (DEPTH, 1)
    names = [entry["action"] for entry in operator.admin.get("/admin/audit").json()["entries"]]
    assert names[:2] == ["boundary.roll_back", "boundary.pin"]


def test_what_cannot_be_calibrated_is_refused_and_changes_nothing(
    site: Site, operator: Operator
) -> None:
    write_data(operator, site)
    foreign = save_adapter(BY_NAME["phi3"], "plain", site.root / "foreign", seed=5)
    good = (site.data / "valid.jsonl").read_text().splitlines()
    too_long = json.dumps({"prompt": "p", "completion": "x" * 2000})
    for name, lines in {
        "empty": [],
        "one": good[:1],
        "mixed": [*good[:3], '{"prompt": "alone"}'],
        "torn": [*good[:3], '{"prompt": '],
        "long_completion": [*good[:3], too_long],
    }.items():
        (site.data / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with (site.data / "huge.jsonl").open("wb") as huge:
        os.truncate(huge.fileno(), 65 << 20)
    (site.data / "out.jsonl").symlink_to(site.model / "config.json")
    before = operator.state()
    for name, words in (
        ("empty.jsonl", ["no samples"]),
        ("one.jsonl", ["1 samples are too few", "32"]),
        ("mixed.jsonl", ["line 4"]),
        ("torn.jsonl", ["line 4"]),
        ("long_completion.jsonl", ["line 4", "completion", "1024"]),
        ("huge.jsonl", ["limit"]),
        ("out.jsonl", ["leads out of the root"]),
        ("../tiny/config.json", ["relative path"]),
    ):
        response = operator.recalibrate(dataset={"file": name})
        assert response.status_code == 400, response.text
        message = response.json()["error"]["message"]
        assert all(word in message for word in words), message
    for path, body, status, word in (
        ("/admin/adapters/foreign", {"path": str(foreign)}, 400, "another base"),
        (f"/admin/adapters/{NAME}/boundary", {"depth": 5, "reason": "x"}, 400, "0 to 4"),
        ("/admin/adapters/none/boundary", {"depth": 1, "reason": "x"}, 404, "not loaded"),
    ):
        response = operator.admin.put(path, json=body)
        assert response.status_code == status, response.text
        assert word in response.json()["error"]["message"]
    assert operator.state() == before


def test_numbers_that_overflow_fail_the_job_and_keep_nothing(
    site: Site, operator: Operator
) -> None:
    """Only the passes themselves can tell that an adapter's weights are too large."""
    write_data(operator, site)
    path = save_adapter(LLAMA, "plain", site.root / "wild", seed=6)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(tensor, 1e20) for name, tensor in tensors.items()}, file)
    response = operator.admin.put("/admin/adapters/wild", json={"path": str(path)})
    assert response.status_code == 200, response.text
    try:
        end = operator.finished(operator.started("wild"))
        assert (end["state"], "nan" in end["error"]) == ("failed", True)
        assert operator.history("wild")["boundaries"] == []
    finally:
        assert operator.admin.delete("/admin/adapters/wild").status_code == 200
