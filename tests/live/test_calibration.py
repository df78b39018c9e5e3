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
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from boundary.store.store import Job, Store
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

NAME = "plain"
DEPTH = 2
NUM_SAMPLES = 36
LENGTH = 6
NUM_REPEATS = 60
"""How many times longer the job is that has to be seen running."""
LIMIT_S = 60
PROMISED_S = 2.0
"""The product's promise: so soon is a decision in force in every process."""


class Killed(Exception):
    """The server was killed on purpose."""


class Operator:
    """Whoever holds both keys of one server."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.http = self._client(server, API_KEY)
        self.admin = self._client(server, ADMIN_KEY)

    @staticmethod
    def _client(server: LiveServer, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=server.url, headers=headers, timeout=LIMIT_S)

    def ask(self, model: str = NAME, prompt: str = "Once", **fields: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": LENGTH, "temperature": 0} | fields
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, model: str, prompt: str) -> str:
        text: str = self.ask(model, prompt)["choices"][0]["text"]
        return text

    def lora(self, model: str = NAME) -> tuple[int, str, int | None]:
        """Depth, who chose it, and the version of its record."""
        lora = self.ask(model)["lora"]
        return lora["depth"], lora["source"], lora["boundary_version"]

    def recalibrate(self, name: str = NAME, **fields: Any) -> httpx.Response:
        body = {"dataset": {"file": "valid.jsonl"}} | fields
        return self.admin.post(f"/admin/adapters/{name}/recalibrate", json=body)

    def started(self, name: str = NAME, **fields: Any) -> str:
        response = self.recalibrate(name, **fields)
        assert response.status_code == 202, response.text
        job: str = response.json()["job"]["id"]
        return job

    def events(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.admin.stream("GET", f"/admin/jobs/{job}/events") as response:
            assert response.status_code == 200
            event = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield event, json.loads(line.removeprefix("data: "))

    def finished(self, job: str) -> dict[str, Any]:
        *_, (event, last) = self.events(job)
        assert event == "done", last
        return last

    def until_running(self, job: str) -> None:
        for _, seen in self.events(job):
            if seen["state"] == "running" and seen["done"] > 0:
                return
        raise AssertionError("the job ended before it was seen to run")

    def job(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.admin.get(f"/admin/jobs/{job}").json()
        return found

    def history(self, name: str = NAME) -> dict[str, Any]:
        found: dict[str, Any] = self.admin.get(f"/admin/adapters/{name}/boundaries").json()
        return found

    def state(self) -> list[Any]:
        """All that the store holds."""
        lists = self.admin.get("/admin/jobs").json(), self.admin.get("/admin/audit").json()
        return [self.history(), *lists]

    def activate(self, version: int) -> dict[str, Any]:
        path = f"/admin/adapters/{NAME}/boundaries/{version}/activate"
        response = self.admin.post(path)
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told

    def pin(self, depth: int) -> dict[str, Any]:
        path = f"/admin/adapters/{NAME}/boundary"
        response = self.admin.put(path, json={"depth": depth, "reason": "to see what it does"})
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        return told


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@contextmanager
def operated(site: Site, log: Path, database: str, data_root: Path) -> Iterator[Operator]:
    arguments = {
        "--api-key": API_KEY,
        "--admin-key": ADMIN_KEY,
        "--database": database,
        "--data-root": str(data_root),
        "--adapter-root": str(site.root),
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--max-num-batched-tokens": str(MAX_NUM_BATCHED_TOKENS),
    }
    words = [word for item in arguments.items() for word in item]
    with serve(site, log, *words) as server:
        operator = Operator(server)
        with operator.http, operator.admin:
            yield operator
        assert "Traceback" not in server.stderr, server.stderr


def write_data(operator: Operator, data_root: Path) -> None:
    """`valid.jsonl`: what depth 2 writes; `long.jsonl`: the same, for as long as anybody waits."""
    prompts = [f"{n} tells" for n in range(NUM_SAMPLES)]
    answer = operator.http.post(
        "/v1/completions",
        json={
            "model": f"{NAME}@{DEPTH}",
            "prompt": prompts,
            "max_tokens": LENGTH,
            "temperature": 0,
        },
    ).json()
    texts = [choice["text"] for choice in answer["choices"]]
    lines = [
        json.dumps({"prompt": prompt, "completion": text})
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    (data_root / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (data_root / "long.jsonl").write_text("\n".join(lines * NUM_REPEATS) + "\n")


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
    kind: str,
    site: Site,
    data_root: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "sqlite":
        database = f"sqlite:///{tmp_path / 'fathom.db'}"
    else:
        database = request.getfixturevalue("postgres").fresh_url()
    with (
        suppress(Killed),
        operated(site, tmp_path / "first", database, data_root) as operator,
    ):
        write_data(operator, data_root)
        calibrate(operator)
        decide(operator)
        before = operator.history()
        job = operator.started(dataset={"file": "long.jsonl"})
        operator.until_running(job)
        operator.server.process.kill()
        operator.server.process.wait(LIMIT_S)
        raise Killed
    with operated(site, tmp_path / "second", database, data_root) as operator:
        assert operator.lora() == (DEPTH, "calibrated", 1), "an old depth outlives the process"
        assert operator.history() == before
        limit = time.monotonic() + LIMIT_S
        while (found := operator.job(job))["state"] != "interrupted":
            assert found["state"] == "running"
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert found["boundary_id"] is found["result"] is None
        assert operator.history() == before, "nothing half-written"
        last = operator.started(dataset={"file": "long.jsonl"})
        states = stop_when_running(operator, last)
        assert "done" not in states, "a server that stops does not wait for a job"
    assert asyncio.run(stored(database, last)).error == "its server was stopped"


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
    prompt = "The fox jumps"
    full, planted = (operator.text(f"{NAME}@{depth}", prompt) for depth in ("full", DEPTH))
    assert full != planted, "depths that write the same show nothing"
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

    answer = operator.ask(NAME, prompt)
    assert answer["choices"][0]["text"] == planted, "no KV of the old depth is reused"
    fresh = operator.ask(NAME, "Never seen before, so that nothing of it is kept")
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


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


def test_two_processes_on_one_database_act_as_one(
    site: Site, data_root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    database = request.getfixturevalue("postgres").fresh_url()
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(operated(site, tmp_path / name, database, data_root))
            for name in ("one", "two")
        )
        write_data(one, data_root)
        for depth, operator, elsewhere in ((3, one, two), (1, two, one), (2, one, two)):
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
        assert len(one.history()["boundaries"]) == 3


def test_what_cannot_be_calibrated_is_refused_and_changes_nothing(
    site: Site, data_root: Path, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'fathom.db'}"
    wild = wild_adapter(site.root / "wild")
    foreign = save_adapter(BY_NAME["phi3"], "plain", tmp_path / "foreign", seed=5)
    with operated(site, tmp_path / "log", database, data_root) as operator:
        write_data(operator, data_root)
        good = (data_root / "valid.jsonl").read_text().splitlines()
        too_long = json.dumps({"prompt": "p", "completion": "x" * 2000})
        for name, lines in {
            "empty": [],
            "one": good[:1],
            "mixed": [*good[:3], '{"prompt": "alone"}'],
            "torn": [*good[:3], '{"prompt": '],
            "long_completion": [*good[:3], too_long],
        }.items():
            (data_root / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        with (data_root / "huge.jsonl").open("wb") as huge:
            os.truncate(huge.fileno(), 65 << 20)
        with suppress(FileExistsError):
            (data_root / "out.jsonl").symlink_to(tmp_path / "log")
        before = operator.state()
        for name, status, words in (
            ("empty.jsonl", 400, ["no samples"]),
            ("one.jsonl", 400, ["1 samples are too few", "32"]),
            ("mixed.jsonl", 400, ["line 4"]),
            ("torn.jsonl", 400, ["line 4"]),
            ("long_completion.jsonl", 400, ["line 4", "completion", "1024"]),
            ("huge.jsonl", 400, ["limit"]),
            ("out.jsonl", 400, ["leads out of the data root"]),
            ("../log", 400, ["relative path"]),
        ):
            response = operator.recalibrate(dataset={"file": name})
            assert response.status_code == status, response.text
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

        # Weights so large that the model's numbers overflow: only the passes themselves can tell.
        end = operator.finished(operator.started(wild.name))
        assert end["state"] == "failed"
        assert "nan" in end["error"]
        assert operator.history(wild.name)["boundaries"] == []


def wild_adapter(path: Path) -> Path:
    save_adapter(LLAMA, "plain", path, seed=6)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(tensor, 1e20) for name, tensor in tensors.items()}, file)
    return path
