"""The time of day is set by days, forward and back, under a server: nothing that waits or counts notices."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import faulty_server
from tests.faults.clock import Clock
from tests.live.operator import Operator, write_data
from tests.live.process import ADMIN_KEY, BASE, LiveServer, Site, make_site, metric, serve

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="libfaketime's preloading is Linux's here"
)

STEPS = [50, -50]
"""Hours from where the clock is: forward, and back again."""
MINUTE_S = 60
WAITING = "vllm:num_requests_waiting"
MAX_LOOKS = 3000
ARGUMENTS = ("--admin-key", ADMIN_KEY, "--max-num-seqs", "1", "--max-num-batched-tokens", "64")
LONG: dict[str, Any] = {"model": BASE, "prompt": "and so on", "max_tokens": 200, "stream": True}
LONG |= {"ignore_eos": True}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def server(
    site: Site, clock: Clock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """Serves one sequence at a time, so that others wait."""
    folder = tmp_path_factory.mktemp("state")
    words = [*ARGUMENTS, "--database", f"sqlite:///{folder / 'fathom.db'}"]
    words += ["--data-root", str(site.data), "--queue-timeout-s", "600"]
    program = (faulty_server.__file__, "slow", "0")  # what is under way must last until the step
    with serve(site, folder / "log", *words, program=program, variables=clock.variables) as server:
        yield server
        assert "Traceback" not in server.stderr, server.stderr
        assert "warning" not in server.stderr, server.stderr


@pytest.fixture
def operator(server: LiveServer) -> Iterator[Operator]:
    with Operator(server) as operator:
        yield operator


def make_key(operator: Operator, **limits: int) -> str:
    """Its id; the operator asks with it from now on."""
    made = operator.admin.post("/admin/keys", json={"name": "ada"} | limits).json()
    operator.http.headers["authorization"] = f"Bearer {made['key']}"
    id: str = made["id"]
    return id


def status(operator: Operator) -> int:
    body = {"model": "plain@2", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    return operator.http.post("/v1/completions", json=body).status_code


def limited(clock: Clock, operator: Operator, hours: int) -> httpx.Response:
    """What a key that has used its minute is answered after the step, within that minute."""
    while True:
        make_key(operator, requests_per_minute=1)
        began_s = time.monotonic()
        first, second = status(operator), status(operator)
        clock.step(hours, operator.http)
        body = {"model": "plain@2", "prompt": "x", "max_tokens": 2}
        answer = operator.http.post("/v1/completions", json=body)
        if time.monotonic() - began_s < MINUTE_S / 2:  # else this process stood still: once more
            assert (first, second) == (200, 429)
            return answer


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_the_clock_disturbs_nothing(
    step: int, clock: Clock, operator: Operator, site: Site
) -> None:
    """Many things at once, because each has to be under way when the one step comes."""
    id, first_pin, job = prepared(operator, site)
    with Operator(operator.server) as narrow, ThreadPoolExecutor(1) as pool:
        with operator.http.stream("POST", "/v1/completions", json=LONG) as running:
            lines = (line for line in running.iter_lines() if line)
            next(lines)
            waiting = pool.submit(status, operator)
            for _ in range(MAX_LOOKS):
                if metric(operator.admin, WAITING) == 1:
                    break
            done = operator.job(job)["done"]
            clock.step(step, narrow.http)
            assert metric(operator.admin, WAITING) == 1, "the step came too late"
            *_, last, end = lines
        assert '"finish_reason":"length"' in last.replace(" ", "")
        assert (end, waiting.result()) == ("data: [DONE]", 200)
        the_job_goes_on(operator, job, done)
        usage_is_in_its_hour(operator, clock, step, id)
        the_last_decision_counts(operator, step, first_pin)
    assert operator.admin.delete(f"/admin/keys/{id}").is_success
    assert status(operator) == 401


def prepared(operator: Operator, site: Site) -> tuple[str, dict[str, Any], str]:
    """Of the time before the step: a key that was used, a pinned depth, and a job that runs."""
    id = make_key(operator)
    if not list(site.data.iterdir()):
        write_data(operator, site)
        operator.admin.delete(f"/admin/keys/{id}")
        id = make_key(operator)  # whose usage is only what is counted here
    pinned = operator.pin(1)
    job = operator.started("dora", dataset={"file": "long.jsonl"})
    operator.until_running(job)
    return id, pinned, job


def the_job_goes_on(operator: Operator, job: str, done: int) -> None:
    for _ in range(MAX_LOOKS):
        found = operator.job(job)
        assert found["state"] == "running", found
        if found["done"] > done + 2:
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"it came from {done} to {found['done']}")
    assert operator.recalibrate("dora", dataset={"file": "long.jsonl"}).status_code == 409
    operator.admin.delete(f"/admin/jobs/{job}")
    *_, (_, last) = operator.events(job)
    assert last["state"] == "cancelled"


def usage_is_in_its_hour(operator: Operator, clock: Clock, step: int, key: str) -> None:
    """What ended after the step is counted when the clock showed it, and all of it once."""
    (total,) = usage(operator, key, "all", adapter="plain")
    assert total["requests"] == 1
    (row,) = usage(operator, key, "hour", adapter="plain")
    hour = datetime.fromisoformat(row["since"])
    assert abs(clock.now - hour) < timedelta(hours=2)
    parted = "until" if step > 0 else "since"
    middle = (clock.now - timedelta(hours=step / 2)).strftime("%Y-%m-%dT%H:00:00Z")
    assert usage(operator, key, "all", adapter="plain", **{parted: middle}) == []


def usage(operator: Operator, key: str, bucket: str, **more: str) -> list[dict[str, Any]]:
    answer = operator.admin.get("/admin/usage", params={"key": key, "bucket": bucket} | more)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["usage"]
    return found


def the_last_decision_counts(operator: Operator, step: int, first: dict[str, Any]) -> None:
    """Whatever time it bears: what was decided last is in force, and comes first."""
    second = operator.pin(3)
    assert (first["at"] < second["at"]) == (step > 0), "the clock was set"
    assert operator.lora() == (3, "calibrated", second["version"])
    newest = operator.history()["boundaries"][0]
    assert (newest["version"], newest["is_active"]) == (second["version"], True)
    assert operator.activate(first["version"])["action"] == "roll_back"
    assert operator.lora() == (1, "calibrated", first["version"])
    entries = operator.admin.get("/admin/audit").json()["entries"]
    ids = [each["id"] for each in entries]
    assert ids == sorted(ids, reverse=True)
    assert entries[0]["action"] == "boundary.roll_back"
    assert metric(operator.admin, "fathom_calibration_age_seconds") >= 0


@pytest.mark.parametrize("step", STEPS)
def test_a_keys_minute_is_neither_over_nor_longer(
    step: int, clock: Clock, operator: Operator
) -> None:
    answer = limited(clock, operator, step)
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= MINUTE_S
    assert 0 < float(answer.headers["x-ratelimit-reset-requests"].rstrip("s")) <= MINUTE_S


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_minutes_by_the_time_of_day_would_be_found(step: int, site: Site, tmp_path: Path) -> None:
    """The control: a server that counts so lets the key in, or keeps it out for days."""
    clock = Clock(tmp_path)
    words = [*ARGUMENTS, "--database", f"sqlite:///{tmp_path / 'fathom.db'}"]
    program = (faulty_server.__file__, "wall-clock", "0")
    with (
        serve(site, tmp_path / "log", *words, program=program, variables=clock.variables) as server,
        Operator(server) as operator,
    ):
        answer = limited(clock, operator, step)
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) > MINUTE_S
