"""Clients of a server that may be gone the next moment, and the account they keep of what they saw.

Each asks one model after the other, streamed and not, for as long as the server answers. Every
prompt and every answer has the same number of tokens, so that usage can be checked to the token.
"""

import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

LIMIT_S = 60
LENGTH = 3
"""Tokens of an answer."""
NUM_PROMPT_TOKENS = 9
"""`<bos>` and one for each character."""

Model = tuple[str | None, int]
"""An adapter, or the base model, and its depth: what usage is counted by."""
MODELS: Mapping[str, Model] = {"tiny": (None, 0), "plain@2": ("plain", 2), "dora@3": ("dora", 3)}


@dataclass(slots=True)
class Seen:
    """What the clients of one server process saw, all together."""

    started: Counter[Model] = field(default_factory=Counter)
    answered: dict[Model, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When each whole answer had come, by `time.monotonic()`."""
    problems: list[str] = field(default_factory=list)

    @property
    def num_answered(self) -> int:
        return sum(len(times) for times in self.answered.values())

    @property
    def num_in_flight(self) -> int:
        """Started and never answered."""
        return self.started.total() - self.num_answered


class Clients:
    """So many threads on one server, from `with` to its end or the server's."""

    def __init__(self, url: str, key: str, num: int, seed: object, pause_s: float = 0.0) -> None:
        """pause_s: between an answer and the next request of each."""
        self.seen = Seen()
        self._pause_s = pause_s
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(f"{seed}/{number}"),))
            for number in range(num)
        ]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What is being asked is asked to its end."""
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a client never got an answer"

    def until_answered(self, more: int) -> None:
        """Wait until so many more answers have come. Raises TimeoutError."""
        wanted = self.seen.num_answered + more
        give_up_at = time.monotonic() + LIMIT_S
        while self.seen.num_answered < wanted:
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"{self.seen.num_answered} of {wanted}: {self.seen.problems}")
            time.sleep(0.01)

    def _work(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=LIMIT_S) as http:
            while not self._over.wait(self._pause_s):
                name = rng.choice(list(MODELS))
                model = MODELS[name]
                with self._lock:
                    self.seen.started[model] += 1
                try:
                    problem = ask(http, name, rng)
                except httpx.TransportError as error:
                    if not self._over.is_set():
                        # The server is gone; where it should not be, the caller misses answers.
                        self._note(f"no answer: {error!r}")
                    return
                with self._lock:
                    self.seen.answered[model].append(time.monotonic())
                if problem is not None:
                    self._note(problem)

    def _note(self, problem: str) -> None:
        with self._lock:
            self.seen.problems.append(problem)


def ask(http: httpx.Client, name: str, rng: random.Random) -> str | None:
    """One completion, read to its end; what is wrong with the answer, if anything."""
    prompt = "".join(rng.choices("abcdefgh", k=NUM_PROMPT_TOKENS - 1))
    body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": LENGTH}
    body |= {"ignore_eos": True, "temperature": 0}
    if rng.random() < 0.5:
        response = http.post("/v1/completions", json=body)
        if response.status_code != 200:
            return f"{response.status_code} {response.text[:300]}"
        return _wrong(response.json()["usage"])
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if response.status_code != 200 or events[-1] != "[DONE]":
        return f"{response.status_code} {events[-1:]}"
    return _wrong(json.loads(events[-2])["usage"])


def _wrong(usage: Mapping[str, int]) -> str | None:
    told = (usage["prompt_tokens"], usage["completion_tokens"])
    return None if told == (NUM_PROMPT_TOKENS, LENGTH) else f"usage is {told}"


def lost_after(answered: Sequence[float], num_lost: int, died_s: float) -> float:
    """How long before the death the oldest of the answers came that the store does not have, in seconds."""
    return died_s - sorted(answered)[-num_lost] if num_lost else 0.0
