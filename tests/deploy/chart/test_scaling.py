"""What surrounds the pods: the autoscaler, Prometheus, the network, and the page that explains them."""

import re
import tomllib
from typing import Any

import yaml
from promql_parser import parse

from server.config import Settings
from tests.deploy.chart import manifests as look
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.settings_schema import CHART
from tests.deploy.chart.values import DEFAULTS, EVERYTHING, FEATURES, at, load

ROOT = CHART.parents[2]
README = (CHART / "README.md").read_text(encoding="utf-8")
GRAFANA = (ROOT / "deploy" / "grafana" / "README.md").read_text(encoding="utf-8")


def fenced(language: str, text: str) -> list[str]:
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == pyproject["project"]["version"]
    assert look.OLDEST in chart["kubeVersion"]


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
    first_cells = re.findall(r"^\|(.*?)\|", README, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert set(DEFAULTS) - named == set()
    assert named - set(DEFAULTS) == set()
