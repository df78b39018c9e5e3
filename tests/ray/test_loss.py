"""A replica and a node are lost: who was there is told, others go on, and who asks again is answered."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from threading import Thread

import httpx
import ray

from tests.ray.fleet import KEY, NODE, REPLICA, Fleet, ask, ask_each, deploy

LENGTH = 900
"""Tokens of a stream that is not over before its replica is."""


def open_stream(fleet: Fleet, stack: ExitStack) -> tuple[str, Iterator[str]]:
    """A stream that has begun: its replica, and the data of its events."""
    body = {"model": "tiny", "prompt": "on", "max_tokens": LENGTH, "stream": True, "seed": 1}
    response = stack.enter_context(
        httpx.stream(
            "POST",
            f"{fleet.url}/v1/completions",
            json=body | {"ignore_eos": True},
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
        *_, last = streams[kept]
        assert last == "[DONE]"
    response = ask(fleet, "a1")
    assert (response.status_code, response.headers[REPLICA]) == (200, kept)
    assert lost not in {response.headers[REPLICA] for response in ask_each(fleet, "a1")}


def test_an_answer_whose_replica_dies_is_an_error_and_a_retry_succeeds(fleet: Fleet) -> None:
    deploy()
    answers: list[httpx.Response] = []
    # Of many sequences, so that it takes seconds: it must not be over before its replica is.
    long = {"max_tokens": LENGTH, "ignore_eos": True, "n": 32, "temperature": 1}
    asking = Thread(target=lambda: answers.append(ask(fleet, "a1", **long)))
    kill = killer(ask(fleet, "a1").headers[REPLICA])
    asking.start()
    asking.join(0.3)
    kill()
    asking.join()
    (answer,) = answers
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "replica_lost"
    assert ask(fleet, "a1").status_code == 200
    ask_each(fleet, "a1")  # until there are two again


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
