"""Helm renders the chart in many configurations, and a strict look finds nothing wrong with any of it.

The types are Kubernetes' own, of the oldest and newest version at hand (`kubernetes-validate`); a
ServiceMonitor's are written down in `service_monitor.py`. No cluster takes part.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.chart import manifests as look
from tests.deploy.chart.helm_process import NOTES, Helm, Refused
from tests.deploy.chart.settings_schema import CHART
from tests.deploy.chart.values import FEATURES, FILES, PAIRS, at, load, merged

ALWAYS = {
    "ConfigMap",
    "Deployment",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "ServiceAccount",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_of_values_renders_what_kubernetes_takes(helm: Helm, path: Path) -> None:
    made = helm.manifests(load(path))
    for version in (look.OLDEST, look.NEWEST):
        assert [wrong for each in made if (wrong := look.problem(each, version))] == []
    assert all(each["metadata"]["namespace"] in ("models", "monitoring") for each in made)
    assert helm.lint(load(path)) == []


def test_any_two_features_are_taken_together(helm: Helm) -> None:
    assert len(PAIRS) > 100
    for pair in PAIRS:
        made = helm.manifests(merged(*(FEATURES[name] for name in pair)))
        wrong = [wrong for each in made if (wrong := look.problem(each))]
        assert (pair, wrong) == (pair, [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.template.spec.terminationGracePeriod", 30),
        ("spec.template.spec.terminationGracePeriodSeconds", "30"),
        ("spec.template.spec.securityContext.runAsUsers", 1),
        ("spec.strategy.rollingUpdate.maxSurge", [1]),
        ("spec.template.metadata.labels.x", 1),
    ],
)
def test_a_wrong_manifest_is_found(helm: Helm, path: str, value: object) -> None:
    made = look.the("Deployment", helm.manifests())
    assert look.problem(made) is None
    assert look.problem(merged(copy.deepcopy(made), at(path, value))) is not None


@pytest.mark.parametrize(
    ("path", "value"),
    [("interval", "15 s"), ("metricRelabeling", []), ("port", 8000), ("scheme", "ftp")],
)
def test_a_wrong_service_monitor_is_found(helm: Helm, path: str, value: object) -> None:
    made = look.the("ServiceMonitor", helm.manifests(at("serviceMonitor.enabled", True)))
    assert look.problem(made) is None
    made["spec"]["endpoints"][0][path] = value
    assert look.problem(made) is not None


def test_an_object_is_there_when_it_is_asked_for(helm: Helm) -> None:
    assert look.kinds(helm.manifests()) == {*ALWAYS, "Secret"}
    features = {
        "autoscaling": {"HorizontalPodAutoscaler"},
        "ingress": {"Ingress"},
        "monitor": {"ServiceMonitor"},
        "adapters": {"PersistentVolumeClaim"},
        "existing claim": set(),
    }
    for name, kinds in features.items():
        assert look.kinds(helm.manifests(FEATURES[name])) == {*ALWAYS, "Secret", *kinds}
    assert look.kinds(helm.manifests(FEATURES["open"])) == ALWAYS
    for name, kind in (
        ("no policy", "NetworkPolicy"),
        ("no budget", "PodDisruptionBudget"),
        ("no account", "ServiceAccount"),
    ):
        assert look.kinds(helm.manifests(FEATURES[name])) == {*ALWAYS, "Secret"} - {kind}


@pytest.mark.parametrize("name", ["a", "fathom", "my-fathom-2", "x" * 53])
def test_names_fit_and_everything_points_at_the_pods(helm: Helm, name: str) -> None:
    values = merged(*(FEATURES[each] for each in ("autoscaling", "monitor", "ingress", "adapters")))
    made = helm.manifests(values, name)
    limits = {"PersistentVolumeClaim": 253}  # the others' become names in DNS, or labels
    assert all(len(each["metadata"]["name"]) <= limits.get(each["kind"], 63) for each in made)
    labels = look.pod_of(made)["metadata"]["labels"]
    service = look.the("Service", made)
    selectors: list[dict[str, Any]] = [
        service["spec"]["selector"],
        look.the("Deployment", made)["spec"]["selector"]["matchLabels"],
        look.the("PodDisruptionBudget", made)["spec"]["selector"]["matchLabels"],
        look.the("NetworkPolicy", made)["spec"]["podSelector"]["matchLabels"],
        look.pod_of(made)["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    monitored = look.the("ServiceMonitor", made)["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= service["metadata"]["labels"].items()
    (tested,) = [each for each in made if look.is_test(each)]
    assert not all(
        selector.items() <= tested["metadata"]["labels"].items() for selector in selectors
    )
    assert tested["spec"]["containers"][0]["args"][1] == service["metadata"]["name"]
    target = look.the("HorizontalPodAutoscaler", made)["spec"]["scaleTargetRef"]
    deployment = look.the("Deployment", made)
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }


def test_lint_is_heard(helm: Helm, tmp_path: Path) -> None:
    assert helm.lint() == []
    shutil.copytree(CHART, tmp_path / "fathom")
    service = tmp_path / "fathom" / "templates" / "service.yaml"
    service.write_text(
        service.read_text(encoding="utf-8").replace("{{- end }}", ""), encoding="utf-8"
    )
    assert helm.lint(chart=tmp_path / "fathom") != []


def test_notes_say_how_to_ask_and_what_will_be_lost(helm: Helm) -> None:
    def notes(values: dict[str, Any]) -> str:
        return " ".join(helm.files(values)[NOTES].split())

    lost, anybody = "GO WITH THE POD", "ANYBODY WHO REACHES IT"
    plain = notes({})
    assert "get secret demo-fathom" in plain
    assert "{.data.api-key}" in plain
    assert lost not in plain
    assert anybody not in plain
    assert lost in notes(at("secrets.adminKey.value", "k"))
    assert lost not in notes(load(CHART / "ci" / "sqlite-values.yaml"))
    assert anybody in notes(FEATURES["open"])
    assert "Only pods of this namespace" in plain
    assert "Only pods of this namespace" not in notes(at("networkPolicy.from", []))


def test_a_chart_that_cannot_be_rendered_is_refused(helm: Helm) -> None:
    with pytest.raises(Refused, match="nosuch"):
        helm.manifests({"nosuch": 1})
