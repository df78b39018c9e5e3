"""What is rendered means what the server, its image and its metrics say."""

import base64
import math
import re
import tomllib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from promql_parser import parse

from server.config import CONFIG_VARIABLE, ENV_PREFIX, Settings, load_settings, variable
from server.exit_guard import EXIT_S
from server.serve import FLUSH_S
from tests.deploy.chart import manifests as look
from tests.deploy.chart.container import DOCKERFILE, image_environment, settings_of
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.settings_schema import CHART
from tests.deploy.chart.test_refusals import DEFAULTS
from tests.deploy.chart.values import FEATURES, FILES, at, load, merged

ROOT = CHART.parents[2]
README = (CHART / "README.md").read_text(encoding="utf-8")
EVERYTHING = load(CHART / "ci" / "everything-values.yaml")
GRAFANA = (ROOT / "deploy" / "grafana" / "README.md").read_text(encoding="utf-8")


def fenced(language: str, text: str) -> list[str]:
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == pyproject["project"]["version"]
    assert look.OLDEST in chart["kubeVersion"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_server_takes_the_settings(helm: Helm, path: Path, tmp_path: Path) -> None:
    """Every variable, and a file that `load_settings` reads to what the values say."""
    values = load(path)
    made = helm.manifests(values)
    given = {
        name for name in look.environment(look.container_of(made)) if name.startswith(ENV_PREFIX)
    }
    assert given <= {CONFIG_VARIABLE, *map(variable, Settings.model_fields)}
    settings = settings_of(made, tmp_path).model_dump()
    for name, value in values.get("settings", {}).items():
        found = settings[name]
        if name in ("adapter_root", "data_root"):
            assert found == tmp_path / value.lstrip("/")
        elif name == "adapter":
            assert found == {key: tmp_path / each.lstrip("/") for key, each in value.items()}
        elif name == "model" and value.startswith("/"):
            assert found == str(tmp_path / value.lstrip("/"))
        elif name.endswith("_bytes") and isinstance(value, str):
            assert found == int(value.removesuffix("iB")[:-1]) << {"M": 20, "G": 30}[value[-3]]
        else:
            assert found == (tuple(value) if isinstance(value, list) else value), name
    secrets = values.get("secrets", {})
    assert (settings["admin_key"] is not None) == ("adminKey" in secrets)
    assert (settings["keys_file"] is not None) == ("keysFile" in secrets)
    assert (settings["database"] is not None) == ("database" in secrets)


def test_a_file_says_what_toml_says_also_of_words_that_need_quotes(helm: Helm) -> None:
    words = 'a "quoted" \\ <b> & \u00e9 \u65e5 line\nnext'
    values = at("settings.served_model_name", words)
    read = tomllib.loads(
        look.toml_of(helm.manifests(merged(values, at("settings.adapter", {words: words}))))
    )
    assert read["served_model_name"] == words
    assert read["adapter"] == {words: words}
    assert read["log_format"] == "json"


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
    plain = helm.manifests()
    assert tomllib.loads(look.toml_of(plain))["device"] == "cpu"
    assert look.container_of(plain)["image"] == "fathom:cpu"
    assert not any("nvidia" in key for key in look.container_of(plain)["resources"]["limits"])
    assert "tolerations" not in look.pod_of(plain)["spec"]
    for target in ("cpu", "cuda"):
        assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE.read_text(encoding="utf-8"), re.M)


def test_one_pod_at_a_time_has_what_one_node_can_mount(helm: Helm) -> None:
    def strategy(values: dict[str, Any]) -> str:
        kind: str = look.the("Deployment", helm.manifests(values))["spec"]["strategy"]["type"]
        return kind

    assert strategy({}) == "RollingUpdate"
    assert strategy(at("persistence.state.enabled", True)) == "Recreate"
    assert strategy(FEATURES["state"]) == "RollingUpdate"
    assert strategy(
        merged(FEATURES["adapters"], at("persistence.adapters.accessModes", ["ReadWriteOncePod"]))
    ) == ("Recreate")


def test_secrets_reach_the_server_from_where_they_are(helm: Helm) -> None:
    made = helm.manifests(EVERYTHING)
    data = look.the("Secret", made)["data"]
    assert {base64.b64decode(each).decode() for each in data.values()} == {
        secret["value"] for secret in EVERYTHING["secrets"].values()
    }
    given = look.environment(look.container_of(made))
    for name, entry in (("FATHOM_API_KEY", "api-key"), ("HF_TOKEN", "hugging-face-token")):
        assert given[name] == {"secretKeyRef": {"name": "serving", "key": entry}}
        assert entry in data
    words = yaml.safe_dump([each for each in made if each["kind"] != "Secret"])
    assert not any(secret["value"] in words for secret in EVERYTHING["secrets"].values())

    elsewhere = helm.manifests(load(CHART / "ci" / "gpu-values.yaml"))
    assert "Secret" not in look.kinds(elsewhere)
    assert look.environment(look.container_of(elsewhere))["FATHOM_ADMIN_KEY"] == {
        "secretKeyRef": {"name": "fathom-keys", "key": "admin"}
    }
    keys = look.pod_of(helm.manifests(load(CHART / "ci" / "fleet-values.yaml")))["spec"]["volumes"]
    (file,) = [each["secret"] for each in keys if each["name"] == "keys"]
    assert (file["secretName"], file["items"]) == (
        "fathom-keys",
        [{"key": "fathom.json", "path": "keys.json"}],
    )


def test_a_key_is_made_where_nobody_gave_one(helm: Helm) -> None:
    def key(values: dict[str, Any]) -> str | None:
        made = helm.manifests(values)
        secret = look.the("Secret", made)["data"] if "Secret" in look.kinds(made) else {}
        found = base64.b64decode(secret.get("api-key", "")).decode()
        assert bool(found) == ("FATHOM_API_KEY" in look.environment(look.container_of(made)))
        return found or None

    first, second = key({}), key({})
    assert first is not None
    assert re.fullmatch(r"[A-Za-z0-9]{40}", first)
    assert first != second
    assert key(at("secrets.apiKey.value", "mine")) == "mine"
    assert key(FEATURES["open"]) is None
    assert key(FEATURES["keys file"]) is None
    assert key(FEATURES["admin"]) is not None


def test_pods_start_anew_for_what_they_read_once(helm: Helm) -> None:
    def annotations(values: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = look.pod_of(helm.manifests(values))["metadata"]["annotations"]
        return found

    assert annotations({}) == annotations({})  # although a key is made each time
    assert annotations({}) != annotations(at("settings.max_num_seqs", 8))
    assert annotations({}) != annotations(at("secrets.apiKey.value", "k"))
    keys = {"secrets": {"keysFile": {"value": "a"}}}
    assert annotations(keys) == annotations(merged(keys, at("secrets.keysFile.value", "b")))


def test_the_policy_lets_out_what_the_server_needs(helm: Helm) -> None:
    def ports(values: dict[str, Any]) -> list[int]:
        rules = look.the("NetworkPolicy", helm.manifests(values))["spec"]["egress"]
        return [port["port"] for rule in rules for port in rule["ports"]]

    assert ports({}) == [53, 53, 443]
    assert ports(at("networkPolicy.hub", False)) == [53, 53]
    assert ports(FEATURES["replicas"]) == [53, 53, 443, 5432]
    assert ports(EVERYTHING) == [53, 53, 443, 5432, 4318]
    policy = look.the("NetworkPolicy", helm.manifests())["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"][0]["from"] == [{"podSelector": {}}]
    assert "from" not in look.the("NetworkPolicy", helm.manifests(EVERYTHING))["spec"]["ingress"][0]


def test_replicas_follow_the_line_and_busy_ones_stay(helm: Helm) -> None:
    made = helm.manifests(load(CHART / "ci" / "fleet-values.yaml"))
    assert (
        "replicas" not in look.the("Deployment", made)["spec"]
    )  # else each upgrade would set them
    scaler = look.the("HorizontalPodAutoscaler", made)["spec"]
    targets = {
        each["pods"]["metric"]["name"]: each["pods"]["target"]["averageValue"]
        for each in scaler["metrics"]
    }
    assert targets == {"vllm_num_requests_waiting": "8", "vllm_num_requests_running": "96"}
    plain = look.the("HorizontalPodAutoscaler", helm.manifests(FEATURES["autoscaling"]))["spec"]
    seats = Settings.model_fields["max_num_seqs"].default
    assert plain["metrics"][1]["pods"]["target"]["averageValue"] == str(seats * 3 // 4)


def test_the_readme_has_the_adapters_rule_for_these_metrics(helm: Helm) -> None:
    """`test_container.py` asks a server for the metrics."""
    (rules,) = [
        each for block in fenced("yaml", README) if "rules" in (each := yaml.safe_load(block))
    ]
    (rule,) = rules["rules"]["custom"]
    name = rule["name"]
    scaling = DEFAULTS["autoscaling"]
    for exposed in (scaling["waiting"]["metric"], scaling["running"]["metric"]):
        metric = exposed.replace("vllm_", "vllm:", 1)
        assert re.sub(name["matches"], name["as"].replace("$1", r"\1"), metric) == exposed
        assert re.search(re.search(r'=~"(.*?)"', rule["seriesQuery"])[1], metric)  # type: ignore[index]
        query = rule["metricsQuery"]
        for placeholder, text in (
            ("<<.Series>>", metric), ("<<.LabelMatchers>>", 'namespace="models"'), ("<<.GroupBy>>", "pod"),
        ):  # fmt: skip
            assert placeholder in query
            query = query.replace(placeholder, text)
        assert parse(query)
    assert parse(rule["seriesQuery"])


def test_the_monitor_drops_what_the_dashboards_page_drops(helm: Helm) -> None:
    (scrape,) = fenced("yaml", GRAFANA)
    (job,) = yaml.safe_load(scrape)["scrape_configs"]
    (endpoint,) = look.the("ServiceMonitor", helm.manifests(FEATURES["monitor"]))["spec"][
        "endpoints"
    ]
    (asked,), (made,) = job["metric_relabel_configs"], endpoint["metricRelabelings"]
    assert {"sourceLabels": asked.pop("source_labels"), **asked} == made
    assert endpoint["interval"] == job["scrape_interval"]


def test_the_readmes_values_are_taken_and_every_value_is_in_it(helm: Helm) -> None:
    blocks = [
        each for block in fenced("yaml", README) if "rules" not in (each := yaml.safe_load(block))
    ]
    assert len(blocks) >= 4
    for values in blocks:
        made = helm.manifests(values)
        assert [wrong for each in made if (wrong := look.problem(each))] == []
    told = set(re.findall(r"^\| `(\w+)", README, re.MULTILINE))
    named = {
        name
        for line in re.findall(r"^\|(.*?)\|", README, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", line)
    }
    assert told
    assert set(DEFAULTS) - named == set()
    assert named - set(DEFAULTS) == set()


def test_load_settings_would_refuse_a_setting_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "fathom.toml"
    file.write_text("max_num_seq = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is no setting"):
        load_settings(config_file=file, environ={})
