"""A base model that the engine does not reproduce is refused at load, and the message says why."""

import re

import pytest

from server.errors import ModelError
from tests.parity.conftest import ModelPath
from tests.parity.generation import open_core
from tests.parity.zoo import REFUSED

REASONS = {
    "deepseek_v2": r"latent attention|MLA",
    "deepseek_v3": r"latent attention|MLA",
    "mamba": r"state.space|attention",
    "jamba": r"state.space|mamba|hybrid",
    "qwen3_next": r"linear.attention|linear_attention",
    "llama4": r"chunked",
    "t5": r"encoder-decoder",
}


@pytest.mark.parametrize("architecture", [architecture.name for architecture in REFUSED])
def test_what_is_not_supported_is_named(model_path: ModelPath, architecture: str) -> None:
    path = model_path(architecture)
    with pytest.raises(ModelError) as refusal, open_core(path):
        pass
    assert re.search(REASONS[architecture], refusal.value.message, re.IGNORECASE)
    assert refusal.value.code == "model_refused"
