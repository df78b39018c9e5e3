"""Whatever is sent to whichever route: no 5xx, no hang, no neighbour disturbed, nothing kept.

300 bodies by default and 10,000 among the slow tests, to the real engine, four at once, while two
streams of other depths run beside them again and again.
"""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.containment.bodies import Sent, requests
from tests.containment.served import ADMIN_KEY, API_KEY, served
from tests.tiny import Tiny

NUM_AT_ONCE = 4
NEIGHBOURS: list[dict[str, Any]] = [
    {"model": "tuned@2", "prompt": "neighbour", "max_tokens": 40, "temperature": 0},
    {"model": "tiny", "prompt": "another", "max_tokens": 30, "seed": 7},
]
TIMEOUT_S = 120
"""An answer that takes this long on any machine is none."""


class Client:
    """Sends requests and judges what comes back."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.codes: Counter[str] = Counter()
        self.http = httpx.Client(base_url=url, timeout=TIMEOUT_S)

    def send(self, sent: Sent) -> None:
        key = ADMIN_KEY if "admin" in sent.path or "lora_adapter" in sent.path else API_KEY
        headers = {"authorization": f"Bearer {key}"} | sent.headers
        response = self.http.request(sent.method, sent.path, content=sent.content, headers=headers)
        self.statuses[response.status_code] += 1
        self._judge(response)

    def _judge(self, response: httpx.Response) -> None:
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["message"]
            self.codes[error["code"]] += 1
            assert response.status_code < 500 or error["code"] == "queue_full", response.text
        elif response.headers["content-type"].startswith("text/event-stream"):
            *_, last = response.text.strip().split("\n\n")
            if last != "data: [DONE]":
                error = json.loads(last.removeprefix("data: "))["error"]
                self.codes[error["code"]] += 1
                assert error["code"] == "grammar_failed", error


class Neighbours:
    """Two clients whose answers must stay what they are alone."""

    def __init__(self, url: str) -> None:
        headers = {"authorization": f"Bearer {API_KEY}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        self._alone = [self._ask(body) for body in NEIGHBOURS]
        self._is_over = threading.Event()
        self._threads = ThreadPoolExecutor(len(NEIGHBOURS))

    def __enter__(self) -> "Neighbours":
        self._rounds = [
            self._threads.submit(self._go_on, body, text)
            for body, text in zip(NEIGHBOURS, self._alone, strict=True)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._threads.shutdown()
        self._http.close()
        for rounds in self._rounds:
            assert rounds.result() > 0

    def _go_on(self, body: dict[str, Any], text: str) -> int:
        num_rounds = 0
        while not (self._is_over.is_set() and num_rounds):
            assert self._ask(body) == text
            num_rounds += 1
        return num_rounds

    def _ask(self, body: dict[str, Any]) -> str:
        with self._http.stream("POST", "/v1/completions", json=body | {"stream": True}) as lines:
            chunks = [line[6:] for line in lines.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize(
    "num_bodies", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_no_body_breaks_the_server(model: Tiny, tmp_path: Path, num_bodies: int) -> None:
    with served(model, tmp_path) as (url, engine):
        client = Client(url)

        @settings(
            max_examples=num_bodies // NUM_AT_ONCE,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        @given(st.lists(requests(), min_size=NUM_AT_ONCE, max_size=NUM_AT_ONCE))
        def send_all(together: list[Sent]) -> None:
            for sending in [threads.submit(client.send, sent) for sent in together]:
                sending.result()

        with Neighbours(url), client.http, ThreadPoolExecutor(NUM_AT_ONCE) as threads:
            send_all()
        engine.assert_invariants()
    assert client.statuses.total() >= num_bodies
    # The control: bodies come far enough to matter, by every door.
    assert client.statuses[200] > num_bodies // 10
    assert client.statuses[400] > num_bodies // 10
    assert engine.added.total() > num_bodies // 10
