"""The pod agrees with the image that it runs and with what the server says of starting and stopping."""

import math
import re
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from server.exit_guard import EXIT_S
from server.serve import FLUSH_S
from tests.deploy.chart import manifests as look
from tests.deploy.chart.container import DOCKERFILE, image_environment, variables
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.values import FEATURES, FILES, at, load, merged


@pytest.mark.parametrize("port", [8000, 9123, 65535])
def test_probes_the_service_and_the_policy_ask_where_the_server_listens(
    helm: Helm, port: int
) -> None:
    values = merged(at("settings.port", port), at("service.port", 80), FEATURES["monitor"])
    made = helm.manifests(merged(values, FEATURES["ingress"]))
    container = look.container_of(made)
    (named,) = container["ports"]
    assert named == {"name": "http", "containerPort": port}
    assert look.environment(container)["FATHOM_PORT"] == str(port)
    assert look.environment(container)["FATHOM_HOST"] == "0.0.0.0"
    asked = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {each["port"] for each in asked.values()} == {"http"}
    assert {name: each["path"] for name, each in asked.items()} == {
        "startup": "/health", "readiness": "/ready", "liveness": "/health",
    }  # fmt: skip
    (service,) = look.the("Service", made)["spec"]["ports"]
    assert service == {"name": "http", "port": 80, "targetPort": "http"}
    (rule,) = look.the("NetworkPolicy", made)["spec"]["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    (endpoint,) = look.the("ServiceMonitor", made)["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
    (path,) = look.the("Ingress", made)["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["port"] == {"name": "http"}


@pytest.mark.parametrize(("drain_s", "sleep_s"), [(30, 5), (0, 0), (45.5, 5), (600, 30)])
def test_a_pod_has_time_to_drain(helm: Helm, drain_s: float, sleep_s: int) -> None:
    values = merged(at("settings.drain_timeout_s", drain_s), at("preStopSleepSeconds", sleep_s))
    made = helm.manifests(values)
    grace_s = look.pod_of(made)["spec"]["terminationGracePeriodSeconds"]
    assert grace_s == sleep_s + math.ceil(drain_s) + 15
    assert grace_s - sleep_s - drain_s > EXIT_S > FLUSH_S  # the server's own guard comes first
    lifecycle = look.container_of(made).get("lifecycle")
    assert (lifecycle is None) == (sleep_s == 0)
    if lifecycle is not None:
        assert lifecycle["preStop"]["exec"]["command"] == ["sleep", str(sleep_s)]


def test_a_rollout_waits_as_long_as_a_start_may_take(helm: Helm) -> None:
    deployment = look.the("Deployment", helm.manifests())["spec"]
    startup = look.container_of(helm.manifests())["startupProbe"]
    assert (
        deployment["progressDeadlineSeconds"]
        > startup["periodSeconds"] * startup["failureThreshold"]
    )
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800


def test_the_user_and_the_places_are_the_images(helm: Helm) -> None:
    made = helm.manifests()
    pod, container = look.pod_of(made)["spec"], look.container_of(made)
    steps = DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes())).structure
    users = [step["value"] for step in steps if step["instruction"] == "USER"]
    security = pod["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == users[-1]
    assert security["fsGroup"] == security["runAsGroup"]
    assert security["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert mounts == {"/state", "/tmp"}
    volumes = {step["value"] for step in steps if step["instruction"] == "VOLUME"}
    assert volumes == {"/state"}
    home = {value for key, value in image_environment().items() if key.endswith(("HOME", "DIR"))}
    assert home
    assert all(value == "/state" or value.startswith("/state/") for value in home)
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    entry = [step["value"] for step in steps if step["instruction"] == "ENTRYPOINT"]
    assert entry == ['["fathom-entrypoint"]']
    assert "command" not in container
    assert container["args"][0] == "serve"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_mounted_is_a_volume_and_what_settings_name_is_mounted(
    helm: Helm, path: Path
) -> None:
    made = helm.manifests(load(path))
    pod, container = look.pod_of(made)["spec"], look.container_of(made)
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    places = [each["mountPath"] for each in container["volumeMounts"]]
    assert len(set(places)) == len(places)
    settings = tomllib.loads(look.toml_of(made))
    names = [settings.get(key, "") for key in ("model", "adapter_root", "data_root")]
    names += settings.get("adapter", {}).values()
    names += [each for each in look.environment(container).values() if isinstance(each, str)]
    absolute = [name for name in names if name.startswith("/")]
    assert "/etc/fathom/fathom.toml" in absolute
    assert all(any(f"{name}/".startswith(f"{place}/") for place in places) for name in absolute)
    claims = {
        each["persistentVolumeClaim"]["claimName"]
        for each in pod["volumes"]
        if "persistentVolumeClaim" in each
    }
    own = {each["metadata"]["name"] for each in made if each["kind"] == "PersistentVolumeClaim"}
    existing = {each.get("existingClaim") for each in load(path).get("persistence", {}).values()}
    assert own == claims - existing
    keeps = {
        each["metadata"]["annotations"]["helm.sh/resource-policy"]
        for each in made
        if each["kind"] == "PersistentVolumeClaim"
    }
    assert keeps <= {"keep"}


def test_a_gpu_is_asked_for_used_and_tolerated(helm: Helm) -> None:
    made = helm.manifests({"gpu": {"count": 1, "resource": "nvidia.com/mig-3g.40gb"}})
    container = look.container_of(made)
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/mig-3g.40gb"] == "1"
    assert tomllib.loads(look.toml_of(made))["device"] == "cuda"
    assert container["image"] == "fathom:cuda"
    (toleration,) = look.pod_of(made)["spec"]["tolerations"]
    assert toleration == {
        "key": "nvidia.com/mig-3g.40gb", "operator": "Exists", "effect": "NoSchedule",
    }  # fmt: skip
    stern = helm.manifests({"gpu": {"count": 1, "tolerate": False}})
    assert "tolerations" not in look.pod_of(stern)["spec"]
    (ready,) = [each for each in made if look.is_test(each)]
    assert ready["spec"]["tolerations"] == [toleration]  # it runs where the image is
    plain = helm.manifests()
    assert tomllib.loads(look.toml_of(plain))["device"] == "cpu"
    assert look.container_of(plain)["image"] == "fathom:cpu"
    assert not any("nvidia" in key for key in look.container_of(plain)["resources"]["limits"])
    assert "tolerations" not in look.pod_of(plain)["spec"]
    for target in ("cpu", "cuda"):
        assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE.read_text(encoding="utf-8"), re.M)


def test_one_pod_at_a_time_has_what_one_node_can_mount_and_sqlite(helm: Helm) -> None:
    def strategy(values: dict[str, Any]) -> str:
        kind: str = look.the("Deployment", helm.manifests(values))["spec"]["strategy"]["type"]
        return kind

    assert strategy({}) == "RollingUpdate"
    assert strategy(at("persistence.state.enabled", True)) == "Recreate"
    assert strategy(FEATURES["state"]) == "RollingUpdate"
    sqlite = at("secrets.database.value", "sqlite:////state/fathom.db")
    for kept in (sqlite, at("secrets.adminKey.value", "k"), at("secrets.keysFile.value", "{}")):
        assert strategy(merged(FEATURES["state"], kept)) == "Recreate"
    assert strategy(merged(FEATURES["state"], FEATURES["admin"])) == "RollingUpdate"
    one_pod = at("persistence.adapters.accessModes", ["ReadWriteOncePod"])
    assert strategy(FEATURES["adapters"]) == "RollingUpdate"
    assert strategy(merged(FEATURES["adapters"], one_pod)) == "Recreate"


@pytest.mark.parametrize(
    ("requests", "limits", "threads"),
    [
        ({"cpu": "2500m"}, {}, "3"),
        ({"cpu": "1"}, {"cpu": 4}, "4"),
        ({"cpu": "1"}, {"memory": "1Gi"}, "1"),
    ],
)
def test_threads_are_as_many_as_processors(
    helm: Helm, requests: dict[str, Any], limits: dict[str, Any], threads: str
) -> None:
    made = helm.manifests({"resources": {"requests": requests, "limits": limits}})
    assert variables(made)["OMP_NUM_THREADS"] == threads
