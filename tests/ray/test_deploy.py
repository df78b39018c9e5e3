"""`serve deploy` of the configuration that users are given, on a cluster that `ray start` began."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ray.fleet import ADAPTERS, ADMIN, DEPLOY, KEY, free_port, of_a_node

LIMIT_S = 240
KEYS = ("FATHOM_API_KEY", "FATHOM_ADMIN_KEY")
"""What serve.yaml says belongs to the nodes' environment."""


def run(*arguments: str, env: dict[str, str]) -> str:
    """One of Ray's own commands, to its end."""
    module, *rest = arguments
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *rest],
        env=env, text=True, capture_output=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def one_node(env: dict[str, str], dashboard: int) -> Iterator[None]:
    """A cluster of one node with the dashboard that `serve deploy` talks to; ended by its pid."""
    options = {
        "port": free_port(),
        "ray-client-server-port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "num-cpus": 8,
        "object-store-memory": 80 << 20,
    }
    command = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts", "start", "--head"]
    command += ["--block", *(f"--{name}={value}" for name, value in options.items())]
    node = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        node.terminate()
        node.wait(LIMIT_S)


def adapted(site: dict[str, str], port: int) -> dict[str, Any]:
    """serve.yaml with this machine's port, model and processors, and nothing else changed."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    application["runtime_env"]["env_vars"] |= {
        name: value for name, value in site.items() if name not in KEYS
    }
    deployment["ray_actor_options"] |= {"num_cpus": 1, "num_gpus": 0}
    return config


def until_running(url: str, env: dict[str, str], cluster: str) -> None:
    """Wait for an application that `serve status` calls running."""
    until = time.monotonic() + LIMIT_S
    while True:
        status = yaml.safe_load(run("ray.serve.scripts", "status", "--address", cluster, env=env))
        application = status["applications"].get("fathom", {})
        if application.get("status") == "RUNNING":
            return
        assert application.get("status") != "DEPLOY_FAILED", application
        assert time.monotonic() < until, status
        time.sleep(1)


def complete(url: str, model: str, **more: object) -> httpx.Response:
    body = {"model": model, "prompt": "depth", "max_tokens": 4, "temperature": 0} | more
    return httpx.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=60)


@pytest.mark.timeout(600)
def test_the_configuration_is_deployed_changed_and_taken_away(
    site: dict[str, str], tmp_path: Path
) -> None:
    dashboard, port = free_port(), free_port()
    cluster, url = f"http://127.0.0.1:{dashboard}", f"http://127.0.0.1:{port}"
    env = dict(os.environ) | of_a_node() | {name: site[name] for name in KEYS}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # Ray's own default
    config, file = adapted(site, port), tmp_path / "serve.yaml"
    with one_node(env, dashboard):
        while True:  # the dashboard is the last to listen
            try:
                httpx.get(cluster, timeout=5)
                break
            except httpx.TransportError:
                time.sleep(0.5)
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        run("ray.serve.scripts", "deploy", str(file), "--address", cluster, env=env)
        until_running(url, env, cluster)
        cut = complete(url, f"{ADAPTERS[0]}@1", n=3)
        assert cut.status_code == 200, cut.text
        assert cut.json()["lora"]["depth"] == 1
        assert httpx.get(f"{url}/admin/adapters", headers=ADMIN, timeout=60).status_code == 200
        assert httpx.get(f"{url}/admin/adapters", timeout=60).status_code == 401

        (application,) = config["applications"]
        application["runtime_env"]["env_vars"]["FATHOM_MAX_N"] = "2"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        run("ray.serve.scripts", "deploy", str(file), "--address", cluster, env=env)
        until = time.monotonic() + LIMIT_S
        while (refused := complete(url, ADAPTERS[0], n=3)).status_code == 200:
            assert time.monotonic() < until, "the change never came"
            time.sleep(0.5)
        assert refused.status_code == 400, refused.text
        assert "limit of 2" in refused.text

        run("ray.serve.scripts", "shutdown", "-y", "--address", cluster, env=env)
        with suppress(httpx.ConnectError):  # or there is a proxy yet
            assert complete(url, ADAPTERS[0]).status_code != 200
