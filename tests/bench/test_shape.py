"""Shapes of random models."""

import pytest
import torch
from transformers import LlamaForCausalLM

from server.bench.random_model import llama_config
from server.bench.shape import NAMED, ModelShape, parse_shape
from server.config import ConfigError


def test_two_numbers_are_enough() -> None:
    assert parse_shape("12x768") == ModelShape(12, 768, 2048, 12, 12, 64, 8000, 2048)


def test_keys_change_dimensions_of_any_shape() -> None:
    small = parse_shape("2x32:heads=4:kv_heads=2:vocab=100:positions=64:intermediate=48")
    assert small == ModelShape(2, 32, 48, 4, 2, 8, 100, 64)
    assert parse_shape("llama-3.1-8b:layers=4").num_layers == 4


def test_the_8b_shape_has_eight_billion_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(NAMED["llama-3.1-8b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


@pytest.mark.parametrize(
    "text",
    ["", "12", "12x", "x768", "gpt", "2x32:depth=3", "2x32:heads", "2x32:heads=0", "0x32",
     "2x32:heads=4:kv_heads=3", "2x32:head_dim=7", "2x32:heads=²"],
)  # fmt: skip
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--random-model"):
        parse_shape(text)
