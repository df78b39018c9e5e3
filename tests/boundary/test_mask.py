"""lora_mask: depths are masks, and any other mask is what zeroed layers are."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from boundary.depth import lora_depth, lora_mask
from boundary.mask import depth_masks
from tests.boundary.adapted import traces
from tests.parity.adapters import expected_peft_warnings, save_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model

INPUT_IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def model(tmp_path: Path) -> PeftModel:
    save_adapter(BY_NAME["llama"], "plain", tmp_path)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(build_model(BY_NAME["llama"]), tmp_path).eval()


@torch.no_grad()
def logits(model: PeftModel) -> torch.Tensor:
    return model(input_ids=INPUT_IDS).logits


def test_depths_are_masks(model: PeftModel) -> None:
    masks = depth_masks(NUM_LAYERS)
    assert [sum(mask) for mask in masks] == list(range(NUM_LAYERS + 1))
    for depth, mask in enumerate(masks):
        with lora_depth(model, depth):
            expected = logits(model)
        with lora_mask(model, mask):
            assert torch.equal(logits(model), expected)


def test_a_mask_is_a_model_with_zeroed_layers(model: PeftModel) -> None:
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "lora_B" in name and (".layers.0." in name or ".layers.2." in name):
                parameter.zero_()
    with lora_mask(model, (False, True, False, True)):
        torch.testing.assert_close(logits(model), logits(oracle), rtol=0, atol=1e-5)


def fail_inside(model: PeftModel) -> None:
    with lora_mask(model, (False, True, False, True)):
        raise RuntimeError("inside")


def test_the_model_is_restored(model: PeftModel) -> None:
    with lora_mask(model, (False, True, False, True)):
        assert traces(model)
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(model)
    assert traces(model) == []


def test_a_mask_of_another_length_is_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="4 values"), lora_mask(model, (True,)):
        pytest.fail("entered")
