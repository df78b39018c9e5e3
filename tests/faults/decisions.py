"""Whoever operates a server that may be gone the next moment, and what they were told was done.

Pins depths, rolls forward and back, and calibrates one adapter after the other, without a pause.
"""

import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.faults.clients import LIMIT_S
from tests.faults.stored import FINAL, Stored
from tests.live.operator import NAME
from tests.live.process import ADMIN_KEY
from tests.parity.zoo import NUM_LAYERS

AS_ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
POLL_S = 0.05


@dataclass(slots=True)
class Told:
    """What the server answered for sure, in its order."""

    decisions: list[tuple[str, int]] = field(default_factory=list)
    """Action and version, of the one adapter that is pinned and rolled."""
    num_unanswered: int = 0
    """Decisions that were sent and not answered: done or not."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Id and the last state that was seen."""
    problems: list[str] = field(default_factory=list)


class Operator:
    """Two threads on one server, from `with` to its end or the server's."""

    def __init__(self, url: str, names: Iterator[str], samples: list[Any], seed: object) -> None:
        """names: adapters that were never calibrated; one after the other is taken from it."""
        self.told = Told()
        self._url = url
        self._names = names
        self._samples = samples
        self._rng = random.Random(f"{seed}/operator")
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._until_gone, args=(work,))
            for work in (self._decide, self._calibrate)
        ]

    def __enter__(self) -> "Operator":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "an operator never got an answer"

    def _until_gone(self, work: Any) -> None:
        with httpx.Client(base_url=self._url, headers=AS_ADMIN, timeout=LIMIT_S) as http:
            try:
                while not self._over.is_set():
                    work(http)
            except httpx.TransportError:
                return
            except Exception as error:  # noqa: BLE001 -- a thread that dies silently finds nothing
                self.told.problems.append(repr(error))

    def _decide(self, http: httpx.Client) -> None:
        versions = [version for _, version in self.told.decisions]
        self.told.num_unanswered += 1
        if versions and self._rng.random() < 0.5:
            version = self._rng.choice(versions)
            path = f"/admin/adapters/{NAME}/boundaries/{version}/activate"
            response = http.post(path)
        else:
            body = {"depth": self._rng.randint(0, NUM_LAYERS), "reason": "to see what it does"}
            response = http.put(f"/admin/adapters/{NAME}/boundary", json=body)
        if response.status_code == 200:
            answer = response.json()
            self.told.decisions.append((answer["action"], answer["version"]))
        else:
            self.told.problems.append(f"{response.status_code} {response.text[:300]}")
        self.told.num_unanswered -= 1
        self._over.wait(self._rng.uniform(0, 2 * POLL_S))

    def _calibrate(self, http: httpx.Client) -> None:
        body = {"dataset": {"samples": self._samples}, "activate": True}
        response = http.post(f"/admin/adapters/{next(self._names)}/recalibrate", json=body)
        if response.status_code != 202:
            self.told.problems.append(f"{response.status_code} {response.text[:300]}")
            return
        id = response.json()["job"]["id"]
        self.told.jobs[id] = "queued"
        while self.told.jobs[id] not in FINAL and not self._over.is_set():
            self.told.jobs[id] = http.get(f"/admin/jobs/{id}").json()["state"]
            self._over.wait(POLL_S)


def samples(http: httpx.Client, num: int = 36, length: int = 6) -> list[dict[str, str]]:
    """What the adapter writes at depth 2, so that a calibration concludes."""
    prompts = [f"{number} tells" for number in range(num)]
    body = {"model": f"{NAME}@2", "prompt": prompts, "max_tokens": length, "temperature": 0}
    answer = json.loads(http.post("/v1/completions", json=body).text)
    return [
        {"prompt": prompt, "completion": choice["text"]}
        for prompt, choice in zip(prompts, answer["choices"], strict=True)
    ]


def what_was_told_is_kept(told: Told, before: Stored, after: Stored, adapter: str) -> Iterator[str]:
    """What was answered is in the history, in its order; beside it at most what was not answered.

    before: as the store was when the server started. adapter: the content that was decided about.
    """
    made = [
        (each.action, each.version)
        for each in after.decisions[len(before.decisions) :]
        if each.adapter == adapter
    ]
    rest = iter(made)
    if not all(each in rest for each in told.decisions):
        yield f"of {told.decisions} the history has {made}"
    if len(made) > len(told.decisions) + told.num_unanswered:
        yield f"{len(made)} decisions, and {len(told.decisions)} were answered"
    now = {job.id: job.state for job in after.jobs}
    for id, state in told.jobs.items():
        if id not in now:
            yield f"job {id} is not there"
        elif state in FINAL and now[id] != state:
            yield f"job {id} was {state} and is {now[id]}"
