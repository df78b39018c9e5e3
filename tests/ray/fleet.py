"""Ray on two nodes of this machine with the application on it, and what clients of it do.

Every process of it is started and ended by `Cluster`, by its id. The model is the live tests' tiny one.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from tests.live.process import LLAMA, save_readable_model
from tests.parity.adapters import save_adapter

DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"
REPLICA = "x-fathom-replica"
HINT = "serve-multiplexed-model-id"
NUM_SLOTS = 4
"""Adapters on the device of a replica."""
ADAPTERS = tuple(f"a{index}" for index in range(16))
NODE = {"num_cpus": 4, "object_store_memory": 80 << 20, "include_dashboard": False}
"""What a node says it has: logical processors, whatever the machine has."""
deployed: dict[str, object] = {}
"""The options of what runs now."""
KEY = {"authorization": "Bearer key-of-a-client"}
ADMIN = {"authorization": "Bearer key-of-an-operator"}


@dataclass(frozen=True, slots=True)
class Fleet:
    """Where it is asked, and the nodes, of which `other` is not this process's."""

    url: str
    cluster: Cluster


def make_site(directory: Path, database: str) -> dict[str, str]:
    """Model and adapters below `directory`; the settings that name them and the database's URL."""
    model = save_readable_model(directory / "tiny")
    first = save_adapter(LLAMA, "plain", directory / "root" / ADAPTERS[0], seed=0)
    for seed, name in enumerate(ADAPTERS[1:], start=1):
        save_adapter(LLAMA, "plain", first.parent / name, seed=seed)
    return {
        "FATHOM_MODEL": str(model),
        "FATHOM_DEVICE": "cpu",
        "FATHOM_DTYPE": "float32",
        "FATHOM_KV_CACHE_BYTES": "8MiB",
        "FATHOM_ADAPTER_ROOT": str(first.parent),
        "FATHOM_MAX_LORAS": str(NUM_SLOTS),
        "FATHOM_DATABASE": database,
        "FATHOM_API_KEY": KEY["authorization"].removeprefix("Bearer "),
        "FATHOM_ADMIN_KEY": ADMIN["authorization"].removeprefix("Bearer "),
        "FATHOM_LOG_LEVEL": "warning",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """What Ray's processes inherit when they are started."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def of_a_node() -> dict[str, str]:
    """What a node's environment must hold before Ray is started on it."""
    path = [str(DEPLOY), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "fathom_ray.door.middlewares",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextmanager
def two_nodes(site: dict[str, str]) -> Iterator[Fleet]:
    """A head and a second node; Serve's proxy listens on the head."""
    with ExitStack() as stack:
        stack.enter_context(environment(site | of_a_node()))
        sys.path.insert(0, str(DEPLOY))
        stack.callback(sys.path.remove, str(DEPLOY))
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        stack.callback(cluster.shutdown)
        cluster.add_node(**NODE)
        cluster.connect()
        stack.callback(ray.shutdown)
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        stack.callback(serve.shutdown)
        yield Fleet(f"http://127.0.0.1:{port}", cluster)


def deploy(num_replicas: int | None = 2, **options: object) -> None:
    """The application with these options, at most one replica a node; returns when all of them run.

    What is deployed already stays as it is: Serve would take it for another version.
    """
    from fathom_ray.application import Replica

    usual = {"autoscaling_config": None, "max_replicas_per_node": 1, "num_replicas": num_replicas}
    given = usual | options
    if deployed != given:
        serve.run(Replica.options(**given).bind(), name="fathom", route_prefix="/")
        deployed.clear()
        deployed.update(given)
    while num_replicas is not None and num_running() != num_replicas:
        time.sleep(0.2)


def undeploy() -> None:
    """No replica is left that holds anything."""
    serve.delete("fathom")
    deployed.clear()


def num_running() -> int:
    """Replicas, as Serve counts them."""
    deployment = serve.status().applications["fathom"].deployments["Fathom"]
    return deployment.replica_states.get("RUNNING", 0)


def ask(
    fleet: Fleet, model: str, *, max_tokens: int = 4, headers: dict[str, str] = KEY, **body: object
) -> httpx.Response:
    """One greedy completion."""
    body = {"model": model, "prompt": "depth", "max_tokens": max_tokens, "temperature": 0} | body
    return httpx.post(f"{fleet.url}/v1/completions", json=body, headers=headers, timeout=60)


def ask_each(
    fleet: Fleet, model: str, *, num_replicas: int = 2, headers: dict[str, str] = KEY
) -> list[httpx.Response]:
    """An answer of every replica. Which one is asked is hinted, and tried again until it was."""
    found: dict[str, httpx.Response] = {}
    for attempt in count():
        hint = {HINT: f"elsewhere-{attempt}"}
        response = ask(fleet, model, max_tokens=1, headers=headers | hint)
        if response.status_code != 503:  # which is a replica that was lost meanwhile
            found[response.headers[REPLICA]] = response
        if len(found) == num_replicas:
            return list(found.values())
    raise AssertionError("unreachable")


def say(figure: str) -> None:
    """A figure for whoever reads the run; nothing is asserted of it."""
    sys.stdout.write(f"\n{figure}\n")
