"""Replicas are exchanged, added and taken away, and no request is dropped meanwhile."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from tests.ray.fleet import ADAPTERS, REPLICA, Fleet, ask, deploy, num_running, say

NUM_CLIENTS = 6


@contextmanager
def asked_all_the_time(fleet: Fleet, answers: list[tuple[int, str]]) -> Iterator[None]:
    """Clients that each send a request when they have the answer to the last: status and replica."""
    stop = Event()

    def client(number: int) -> None:
        while not stop.is_set():
            response = ask(fleet, ADAPTERS[number], max_tokens=64)
            answers.append((response.status_code, response.headers.get(REPLICA, response.text)))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(NUM_CLIENTS)]
        try:
            yield
        finally:
            stop.set()
        for done in clients:
            done.result()


def wait_for(answers: list[tuple[int, str]], num: int) -> None:
    while len(answers) < num:
        time.sleep(0.1)


def test_a_rolling_update_drops_no_request(fleet: Fleet) -> None:
    deploy()
    answers: list[tuple[int, str]] = []
    with asked_all_the_time(fleet, answers):
        wait_for(answers, 30)
        old = {replica for _, replica in answers}
        deploy(ray_actor_options={"num_cpus": 0.5})  # which makes it another version
        wait_for(answers, len(answers) + 60)
    assert not old & {replica for _, replica in answers[-30:]}
    assert {status for status, _ in answers} == {200}, answers
    say(f"{len(answers)} requests while both replicas were exchanged, all answered")


def test_it_grows_with_its_requests_and_shrinks_again(fleet: Fleet) -> None:
    deploy(
        num_replicas=None,
        max_replicas_per_node=None,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 3,
            "target_ongoing_requests": 1,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
            "upscale_delay_s": 0,
            "downscale_delay_s": 2,
        },
    )
    seen = []
    answers: list[tuple[int, str]] = []
    while num_running() > 1:
        time.sleep(0.5)
    seen.append(num_running())
    with asked_all_the_time(fleet, answers):
        while num_running() < 3:
            time.sleep(0.5)
    seen.append(num_running())
    while num_running() > 1:
        time.sleep(0.5)
    seen.append(num_running())
    assert seen == [1, 3, 1]
    assert {status for status, _ in answers} == {200}, answers
    assert ask(fleet, "a1").status_code == 200
