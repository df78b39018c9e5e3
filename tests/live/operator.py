"""Whoever holds the keys of a live server and calibrates its adapters over HTTP."""

import json
from collections.abc import Iterator
from typing import Any, Self

import httpx

from tests.live.process import ADMIN_KEY, API_KEY, LiveServer, Site

NAME = "plain"
"""The adapter that is calibrated."""
DEPTH = 2
"""Where the samples come from, and so the depth to be found."""
NUM_SAMPLES = 36
LENGTH = 6
NUM_REPEATS = 60
"""How many times longer the job is that has to be seen running."""
LIMIT_S = 60


class Operator:
    """Whoever holds both keys of one server."""

    def __init__(self, server: LiveServer) -> None:
        self.server = server
        self.http = self._client(server, API_KEY)
        self.admin = self._client(server, ADMIN_KEY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.admin.close()

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
        """All that the store holds of what was done; what was refused is on record, too."""
        done = self.admin.get("/admin/audit", params={"outcome": "ok"}).json()
        return [self.history(), self.admin.get("/admin/jobs").json(), done]

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


def write_data(operator: Operator, site: Site) -> None:
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
    (site.data / "valid.jsonl").write_text("\n".join(lines) + "\n")
    (site.data / "long.jsonl").write_text("\n".join(lines * NUM_REPEATS) + "\n")
