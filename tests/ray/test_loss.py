"""A replica and a node are lost: who was there is told, others go on, and who asks again is answered."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from threading import Thread
from typing import Any

import httpx
import ray

from tests.ray.fleet import KEY, NODE, REPLICA, Fleet, ask, ask_each, deploy

LONG: dict[str, Any] = {"max_tokens": 900, "n": 8, "ignore_eos": True}
"""An answer that takes seconds: to end a node takes Ray one, and it must not be over before that."""


def open_stream(fleet: Fleet, stack: ExitStack) -> tuple[str, Iterator[str]]:
    """A stream that has begun: its replica, and the data of its events."""
    body = {"model": "tiny", "prompt": "on", "stream": True, "seed": 1}
    response = stack.enter_context(
        httpx.stream(
            "POST",
            f"{fleet.url}/v1/completions",
            json=body | LONG,
            headers=KEY,
            timeout=60,
        )
    )
    assert response.status_code == 200
    events = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
    next(events)
    return response.headers[REPLICA], events


def killer(replica: str) -> Callable[[], None]:
    """What ends it at once, as the kernel does when memory is short: asking Ray who it is takes a while."""
    actor = ray.get_actor(f"SERVE_REPLICA::fathom#Fathom#{replica}", namespace="serve")
    return partial(ray.kill, actor)


def test_a_stream_whose_replica_dies_ends_with_an_error_and_others_go_on(fleet: Fleet) -> None:
    deploy()
    with ExitStack() as stack:
        streams: dict[str, Iterator[str]] = {}
        while len(streams) < 2:
            replica, events = open_stream(fleet, stack)
            streams.setdefault(replica, events)
        lost, kept = streams
        killer(lost)()
        *_, last = streams[lost]
        assert json.loads(last)["error"]["code"] == "replica_lost"
        response = ask(fleet, "a1")  # long before there are two again
        assert (response.status_code, response.headers[REPLICA]) == (200, kept)
        *_, last = streams[kept]
        assert last == "[DONE]"
    assert lost not in {response.headers[REPLICA] for response in ask_each(fleet, "a1")}


def test_an_answer_whose_replica_dies_is_an_error_and_a_retry_succeeds(fleet: Fleet) -> None:
    deploy()
    answer, lost = answer_of_a_lost_replica(fleet)
    while answer.headers.get(REPLICA, lost) != lost:  # it was asked of the other one
        ask_each(fleet, "a1")
        answer, lost = answer_of_a_lost_replica(fleet)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_lost"
    assert ask(fleet, "a1").status_code == 200
    ask_each(fleet, "a1")  # until there are two again


def answer_of_a_lost_replica(fleet: Fleet) -> tuple[httpx.Response, str]:
    """What was answered while the replica was killed that most likely was asked, and that replica."""
    answers: list[httpx.Response] = []
    asking = Thread(target=lambda: answers.append(ask(fleet, "a1", temperature=1, **LONG)))
    holder = ask(fleet, "a1").headers[REPLICA]
    kill = killer(holder)
    asking.start()
    asking.join(0.3)
    kill()
    asking.join()
    return answers[0], holder


def test_a_node_is_lost_and_another_takes_its_place(fleet: Fleet) -> None:
    deploy()
    with ExitStack() as stack:
        streams: dict[str, Iterator[str]] = {}
        while len(streams) < 2:
            replica, events = open_stream(fleet, stack)
            streams.setdefault(replica, events)
        (other,) = fleet.cluster.worker_nodes
        fleet.cluster.remove_node(other, allow_graceful=False)
        last = [list(events)[-1] for events in streams.values()]
    (error,) = [json.loads(data) for data in last if data != "[DONE]"]
    assert error["error"]["code"] == "replica_lost"
    kept = {ask(fleet, "a1").headers.get(REPLICA) for _ in range(20)}
    assert len(kept) == 1
    assert kept < streams.keys()
    fleet.cluster.add_node(**NODE)
    assert kept < {response.headers[REPLICA] for response in ask_each(fleet, "a1")}
