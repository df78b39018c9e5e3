"""The container of the chart, run: its probes answer, its metrics are there, and it drains in time.

A process on this machine stands for the container; `container.py` says what differs.
"""

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy.chart.container import Container, container
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.serving import START_S, free_port, running, status, wait_for
from tests.deploy.chart.values import DEFAULTS, at, merged

KEY, ADMIN_KEY = "a-client's", "an-operator's"
DRAIN_S = 120
"""More than a busy machine needs for what is drained here; who has nothing to drain ends at once."""
BODY = {
    "model": "restaurant",
    "prompt": "name: Nando",
    "max_tokens": 400,
    "stream": True,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def made(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Container:
    values = merged(
        at("settings", {"port": free_port(), "drain_timeout_s": DRAIN_S}),
        {"secrets": {"apiKey": {"value": KEY}, "adminKey": {"value": ADMIN_KEY}}},
        at("persistence.adapters.enabled", True),
        at("resources.limits.cpu", "800m"),
    )
    rendered = container(helm.manifests(values), tmp_path_factory.mktemp("root"))
    assert rendered.environ["FATHOM_HOST"] == "0.0.0.0"
    assert rendered.environ["OMP_NUM_THREADS"] == "1"
    rendered.environ["FATHOM_HOST"] = "127.0.0.1"  # stands for the pod's address
    return rendered


def test_the_container_starts_answers_and_drains(made: Container, tmp_path: Path) -> None:
    log = tmp_path / "log"
    url = f"http://127.0.0.1:{made.environ['FATHOM_PORT']}"
    with (
        running(made, log) as process,
        httpx.Client(base_url=url, timeout=DRAIN_S, trust_env=False) as http,
    ):
        wait_for(http, made.probes["startup"], process, log)
        assert (
            status(http, made.probes["readiness"]) == status(http, made.probes["liveness"]) == 200
        )
        assert http.get("/v1/models").status_code == 401
        http.headers["authorization"] = f"Bearer {KEY}"
        assert http.get("/v1/models").status_code == 200
        jobs = http.get("/admin/adapters", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        assert jobs.status_code == 200, jobs.text

        families = {each.name for each in text_string_to_metric_families(http.get("/metrics").text)}
        for metric in ("waiting", "running"):
            asked = DEFAULTS["autoscaling"][metric]["metric"]
            assert asked.replace("vllm_", "vllm:", 1) in families
            assert asked not in families  # which is why the rule renames it

        state = Path(made.environ["HOME"])
        assert list(state.rglob("fathom.db"))  # what is kept is in the volume

        chunks: list[str] = []
        is_open = threading.Event()

        def read() -> None:
            with http.stream("POST", "/v1/completions", json=BODY) as answer:
                for line in answer.iter_lines():
                    chunks.append(line)
                    is_open.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert is_open.wait(START_S)
        process.send_signal(signal.SIGTERM)
        while (answered := status(http, made.probes["readiness"])) == 200:
            time.sleep(0.01)
        assert answered == 503  # while the stream is open
        assert reader.is_alive()
        assert status(http, made.probes["liveness"]) == 200
        reader.join(DRAIN_S)
        assert process.wait(made.grace_s) == 0, log.read_text()
        data = [line.removeprefix("data: ") for line in chunks if line]
        assert data[-1] == "[DONE]"
        reasons = [json.loads(each)["choices"][0]["finish_reason"] for each in data[:-1]]
        assert reasons[-1] == "length"


def test_a_container_whose_settings_are_wrong_does_not_start(
    made: Container, tmp_path: Path
) -> None:
    """The control: what answers above is what was rendered."""
    log = tmp_path / "log"
    wrong = Container(made.command, made.environ | {"FATHOM_SERVICE_HOST": "10.0.0.1"}, 0, {})
    with running(wrong, log) as process:
        assert process.wait(60) == 2, log.read_text()
    assert "enableServiceLinks" in log.read_text()
