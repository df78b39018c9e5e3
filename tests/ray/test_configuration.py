"""Ray itself reads the configuration, which lets a misspelt field pass: so its fields are looked up."""

from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from tests.ray.fleet import DEPLOY


def unknown(given: dict[str, Any], model: type[BaseModel]) -> set[str]:
    """Fields that Ray does not have, and would not miss."""
    return given.keys() - model.model_fields.keys()


def test_serve_accepts_the_configuration_and_knows_its_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY))  # it imports the router
    config = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    assert not unknown(config, ServeDeploySchema)
    assert not unknown(config["http_options"], HTTPOptionsSchema)
    assert not unknown(application, ServeApplicationSchema)
    assert not unknown(deployment, DeploymentSchema)
    assert not unknown(deployment["ray_actor_options"], RayActorOptionsSchema)
    assert not unknown(deployment["autoscaling_config"], AutoscalingConfig)
    assert not unknown(deployment["request_router_config"], RequestRouterConfig)
    assert unknown({"max_ongoing_request": 1}, DeploymentSchema)
