"""Two pods of one release share what PostgreSQL keeps: processes on this machine stand for them."""

import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.deploy.chart.container import container
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.serving import START_S, free_port, running, status, wait_for
from tests.deploy.chart.values import at, merged
from tests.postgres import Postgres

ADMIN = {"authorization": "Bearer an-operator's"}


@pytest.mark.slow
def test_a_key_that_one_pod_makes_opens_the_other(
    helm: Helm, postgres: Postgres, tmp_path: Path
) -> None:
    values = merged(
        at("replicaCount", 2),
        at("secrets.adminKey.value", "an-operator's"),
        at("secrets.database.value", postgres.fresh_url()),
    )
    manifests = helm.manifests(values)
    with ExitStack() as stack:
        pods = []
        for name in ("one", "other"):
            made = container(manifests, tmp_path / name)
            made.environ.update(FATHOM_HOST="127.0.0.1", FATHOM_PORT=str(free_port()))
            log = tmp_path / f"{name}.log"
            process = stack.enter_context(running(made, log))
            url = f"http://127.0.0.1:{made.environ['FATHOM_PORT']}"
            http = httpx.Client(base_url=url, timeout=START_S, trust_env=False)
            wait_for(stack.enter_context(http), made.probes["readiness"], process, log)
            pods.append(http)
        one, other = pods
        answer = one.post("/admin/keys", headers=ADMIN, json={"name": "ada"})
        assert answer.status_code in (200, 201), answer.text
        assert status(other, "/v1/models") == 401
        other.headers["authorization"] = f"Bearer {answer.json()['key']}"
        give_up = time.monotonic() + START_S
        while (seen := status(other, "/v1/models")) != 200:
            assert seen == 401
            assert time.monotonic() < give_up
            time.sleep(0.1)
