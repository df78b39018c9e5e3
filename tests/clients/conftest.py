"""The embedded demo, served by a process of its own, for the tools that people already use."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import demo
from tests.live.process import LiveServer, Site, serve

API_KEY = "key-of-a-client"

# Nothing here asks the network: not for models or data sets, not for prices, not to report itself.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "OPENAI_API_KEY": API_KEY,
}.items():
    os.environ[_name] = _value


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("clients")
    site = Site(demo.model_path(), demo.adapters(), root, root)
    arguments = ["--api-key", API_KEY, "--served-model-name", "fathom-demo"]
    with serve(site, root / "stderr", *arguments) as running:
        yield running
        assert "Traceback" not in running.stderr, running.stderr


@pytest.fixture(scope="session")
def base_url(server: LiveServer) -> str:
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def prompts() -> dict[str, str]:
    """A prompt of the kind that each adapter was trained on."""
    return {name: _first_prompt(demo.valid_path(name)) for name in demo.adapters()}


def _first_prompt(path: Path) -> str:
    with path.open(encoding="utf-8") as samples:
        prompt: str = json.loads(samples.readline())["prompt"]
    return prompt
