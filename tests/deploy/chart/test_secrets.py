"""Secrets reach the server from where they are, and a key is made where there is none."""

import base64
import re
from typing import Any

import yaml

from tests.deploy.chart import manifests as look
from tests.deploy.chart.helm_process import Helm
from tests.deploy.chart.settings_schema import CHART
from tests.deploy.chart.values import EVERYTHING, FEATURES, at, load, merged


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
