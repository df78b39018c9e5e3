"""PostgreSQL goes away under traffic and comes back: requests do not notice, and usage comes after."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import postgres
from tests.faults.clients import Clients, Model
from tests.faults.decisions import samples
from tests.live.operator import NAME, Operator
from tests.live.process import ADMIN_KEY, LiveServer, Site, make_site, metric, serve
from tests.postgres import Postgres
from tests.soak.served import read_metrics

NUM_CLIENTS = 2
PAUSE_S = 0.05
"""Time passes while a store goes and comes; nobody need be busy meanwhile."""
MAX_LOOKS = 1200
LOOK_S = 0.1
UNWRITTEN = "fathom_usage_unwritten_requests"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    """Not the one that other tests share: it is stopped."""
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="module")
def server(
    site: Site, own_postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    words = ["--admin-key", ADMIN_KEY, "--database", own_postgres.fresh_url()]
    with serve(site, tmp_path_factory.mktemp("log") / "stderr", *words) as server:
        yield server
        assert "Traceback" not in server.stderr, server.stderr


def store_up(http: httpx.Client) -> dict[str, float]:
    """By work."""
    found = read_metrics(http.get("/metrics").text)["fathom_store_up"]
    return {labels["work"]: value for labels, value in found}


def until_store(http: httpx.Client, value: float) -> None:
    for _ in range(MAX_LOOKS):
        if set(store_up(http).values()) == {value}:
            return
        time.sleep(LOOK_S)
    pytest.fail(f"the metrics say {store_up(http)}")


def refusals(operator: Operator) -> Iterator[httpx.Response]:
    """What nobody can be told or have done without the store."""
    admin = operator.admin
    yield admin.get("/admin/jobs")
    yield admin.get("/admin/usage")
    yield admin.get("/admin/audit")
    yield admin.get(f"/admin/adapters/{NAME}/boundaries")
    yield admin.put(f"/admin/adapters/{NAME}/boundary", json={"depth": 1, "reason": "x"})
    yield admin.post("/admin/keys", json={"name": "new"})
    sample = [{"prompt": "a", "completion": "b"}] * 40
    yield operator.recalibrate(dataset={"samples": sample})


@pytest.mark.parametrize("num_outages", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_an_outage_stops_no_request_and_loses_no_usage(
    server: LiveServer, own_postgres: Postgres, num_outages: int
) -> None:
    with Operator(server) as operator:
        made = {name: make_key(operator, name) for name in ("other", "ada")}
        operator.http.headers["authorization"] = f"Bearer {made['other']['key']}"
        data = samples(operator.http)
        pinned = operator.pin(2)
        job = operator.started("dora", dataset={"samples": data}, activate=False)
        clients = Clients(server.url, made["ada"]["key"], NUM_CLIENTS, "outage", PAUSE_S)
        with clients:
            for _ in range(num_outages):
                clients.until_answered(15)
                own_postgres.halt()
                clients.until_answered(5)
                until_store(operator.admin, 0)
                the_outage_is_told(operator)
                assert metric(operator.admin, UNWRITTEN) > 0
                clients.until_answered(10)
                own_postgres.start()
                until_store(operator.admin, 1)
            clients.until_answered(10)
        seen = clients.seen
        assert (seen.problems, seen.num_in_flight) == ([], 0)
        counted = usage(operator, made["ada"]["id"])
        assert counted == {model: len(times) for model, times in seen.answered.items()}
        assert metric(operator.admin, UNWRITTEN) == 0
        assert operator.lora() == (2, "calibrated", pinned["version"])
        assert operator.pin(3)["version"] == pinned["version"] + 1, "nothing was pinned meanwhile"
        assert operator.lora()[0] == 3
        assert operator.finished(job)["state"] == "succeeded"


def make_key(operator: Operator, name: str) -> dict[str, Any]:
    made: dict[str, Any] = operator.admin.post("/admin/keys", json={"name": name}).json()
    return made


def the_outage_is_told(operator: Operator) -> None:
    """To administrators, and to nobody else: the server takes requests, and knows keys from strangers'."""
    for answer in refusals(operator):
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["type"] == "server_error"
        assert "database: " in error["message"], "in words"
        assert "Traceback" not in answer.text
    assert operator.admin.get("/ready").status_code == 200
    assert operator.admin.get("/health").status_code == 200
    wrong = {"authorization": "Bearer fathom-0123456789abcdef-wrong"}
    body = {"model": NAME, "prompt": "x", "max_tokens": 1}
    assert operator.http.post("/v1/completions", json=body, headers=wrong).status_code == 401
    told = operator.http.post("/v1/completions", json=body)
    assert told.status_code == 200, told.text


def usage(operator: Operator, key: str) -> dict[Model, int]:
    """Requests by model."""
    rows = operator.admin.get("/admin/usage", params={"key": key, "bucket": "all"}).json()["usage"]
    return {(row["adapter"], row["depth"]): row["requests"] for row in rows}
