"""Ray Serve's configuration and KubeRay's manifest say what the code says, looked at without Ray.

`test_ray_service.py` holds the manifest against KubeRay's schema; `make test-ray` lets Ray itself read the
configuration.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import affinity
from server.config import CONFIG_VARIABLE, Settings, variable
from server.environment import load_settings

RAY = Path(__file__).parents[2] / "deploy" / "ray"
AFFINITY = Path(affinity.__file__)


def names_in(dotted: str) -> bool:
    """Whether a module of `fathom_ray` defines the last part of a dotted or colon path."""
    module, _, name = dotted.replace(":", ".").rpartition(".")
    path = (RAY / module.replace(".", "/")).with_suffix(".py")
    if not path.is_file():
        return False
    return any(
        name in (getattr(node, "name", None), *_targets(node))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def _targets(node: ast.stmt) -> list[str]:
    return [ast.unparse(target) for target in node.targets] if isinstance(node, ast.Assign) else []


def constants(path: Path) -> dict[str, Any]:
    """Numbers and words that a module gives names to."""
    return {
        name: node.value.value
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for name in _targets(node)
    }


@pytest.fixture(scope="module")
def config() -> Any:
    return yaml.safe_load((RAY / "serve.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifest() -> Any:
    return yaml.safe_load((RAY / "rayservice.yaml").read_text(encoding="utf-8"))


def test_the_configuration_names_what_there_is(config: Any) -> None:
    (application,) = config["applications"]
    assert names_in(application["import_path"])
    assert not names_in(application["import_path"] + "x")
    (deployment,) = application["deployments"]
    application_module = RAY / "fathom_ray" / "application.py"
    assert f'name="{deployment["name"]}"' in application_module.read_text(encoding="utf-8")
    router = deployment["request_router_config"]
    assert names_in(router["request_router_class"])
    code = constants(application_module) | constants(AFFINITY)
    assert router["request_router_class"] == code["ROUTER"]
    assert router["request_router_kwargs"]["max_imbalance"] == code["MAX_IMBALANCE"]
    assert deployment["max_ongoing_requests"] == code["MAX_ONGOING_REQUESTS"]
    scaling = deployment["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == code["TARGET_ONGOING_REQUESTS"]


def test_its_variables_are_settings_and_replicas_have_room_for_their_requests(config: Any) -> None:
    (application,) = config["applications"]
    given = dict(application["runtime_env"]["env_vars"])
    assert given.keys() <= {CONFIG_VARIABLE, *map(variable, Settings.model_fields)}
    for directory in ("FATHOM_MODEL", "FATHOM_ADAPTER_ROOT"):  # which this machine has not
        del given[directory]
    settings = load_settings(environ=given)
    (deployment,) = application["deployments"]
    assert deployment["max_ongoing_requests"] == 2 * settings.max_num_seqs
    assert deployment["autoscaling_config"]["target_ongoing_requests"] < settings.max_num_seqs
    secret = {variable(name) for name in ("api_key", "admin_key")}
    assert not secret & given.keys()  # the dashboard shows them


def test_the_manifest_has_the_same_configuration_and_room_for_its_replicas(
    config: Any, manifest: Any
) -> None:
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == config
    cluster = manifest["spec"]["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    (deployment,) = config["applications"][0]["deployments"]
    assert workers["maxReplicas"] == deployment["autoscaling_config"]["max_replicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        env = {item["name"]: item["value"] for item in container["env"]}
        assert names_in(env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])
        assert container["envFrom"] == [{"secretRef": {"name": "fathom"}}]
    options = deployment["ray_actor_options"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert options["num_gpus"] == int(limits["nvidia.com/gpu"])
    assert options["num_cpus"] <= int(limits["cpu"])
