"""lora_depth against an oracle that zeroes the upper layers' lora_B."""

import copy
import itertools
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from boundary.depth import decoder_layers, lora_depth, num_decoder_layers

NUM_LAYERS = 4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUT_IDS = torch.arange(12).view(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def adapted(target_modules: list[str], **options: object) -> PeftModel:
    config = LoraConfig(r=4, target_modules=target_modules, task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_llama(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                param.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def model() -> PeftModel:
    return adapted(LINEARS)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS).logits


def zeroed_above(model: PeftModel, depth: int) -> PeftModel:
    """The oracle: a copy whose upper layers add nothing, by their weights and by no switch."""
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in oracle.named_parameters():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            is_b = "lora_B" in name or "lora_embedding_B" in name
            needed = int(layer[1]) + 1 if layer else NUM_LAYERS if "lm_head" in name else 1
            if is_b and depth < needed:
                param.zero_()
    return oracle


def switches(model: PeftModel) -> list[tuple[str, bool, list[str], bool]]:
    return [
        (name, module.disable_adapters, module.active_adapters, "forward" in vars(module))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def grads(model: PeftModel) -> list[bool]:
    return [param.requires_grad for param in model.parameters()]


def test_depth_0_is_the_base_model(model: PeftModel) -> None:
    with lora_depth(model, 0):
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_full_depth_is_the_whole_adapter(model: PeftModel) -> None:
    whole = logits(model)
    with lora_depth(model, NUM_LAYERS):
        assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("depth", range(NUM_LAYERS + 1))
def test_every_depth_equals_zeroed_upper_layers(model: PeftModel, depth: int) -> None:
    expected = logits(zeroed_above(model, depth))
    with lora_depth(model, depth):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", range(NUM_LAYERS + 1))
def test_embedding_needs_depth_1_and_head_needs_full_depth(depth: int) -> None:
    model = adapted(["embed_tokens", "q_proj", "lm_head"])
    expected = logits(zeroed_above(model, depth))
    with lora_depth(model, depth):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_dora_at_depth_0_is_the_base_model() -> None:
    model = adapted(["q_proj", "down_proj"], use_dora=True)
    with lora_depth(model, 0):
        assert torch.equal(logits(model), logits(tiny_llama()))


def test_neighbouring_depths_differ(model: PeftModel) -> None:
    """Negative control: the comparisons above could not pass with a switch that does nothing."""
    seen = []
    for depth in range(NUM_LAYERS + 1):
        with lora_depth(model, depth):
            seen.append(logits(model))
    for lower, upper in itertools.pairwise(seen):
        assert (lower - upper).abs().max() > 1e-2


def test_everything_is_restored(model: PeftModel) -> None:
    before, trained, whole = switches(model), grads(model), logits(model)
    with lora_depth(model, 1):
        assert switches(model) != before
    assert switches(model) == before
    assert grads(model) == trained
    assert torch.equal(logits(model), whole)


def fail_inside(model: PeftModel) -> None:
    with lora_depth(model, 1):
        raise RuntimeError("inside")


def test_everything_is_restored_after_an_exception(model: PeftModel) -> None:
    before, whole = switches(model), logits(model)
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(model)
    assert switches(model) == before
    assert torch.equal(logits(model), whole)


def test_nested_depths_narrow(model: PeftModel) -> None:
    with lora_depth(model, 1):
        shallow = logits(model)
        with lora_depth(model, 3):
            assert torch.equal(logits(model), shallow)
        assert torch.equal(logits(model), shallow)


@pytest.mark.parametrize("depth", [-1, NUM_LAYERS + 1])
def test_depth_out_of_range_states_range_and_value(model: PeftModel, depth: int) -> None:
    with (
        pytest.raises(ValueError, match=f"between 0 and {NUM_LAYERS}, got {depth}"),
        lora_depth(model, depth),
    ):
        pytest.fail("entered")


def test_merged_lora_is_refused(model: PeftModel) -> None:
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), lora_depth(model, 1):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"bias": "lora_only"}, "bias='lora_only'")],
)
def test_parts_that_no_depth_switches_are_refused(options: dict[str, object], message: str) -> None:
    model = adapted(["q_proj"], **options)
    with pytest.raises(ValueError, match=message), lora_depth(model, 1):
        pytest.fail("entered")


def test_decoder_layers_are_found_with_and_without_peft(model: PeftModel) -> None:
    assert decoder_layers(tiny_llama())[0] == "model.layers"
    assert decoder_layers(model)[0].endswith(".model.layers")
    assert num_decoder_layers(model) == NUM_LAYERS


def test_two_lists_of_the_layers_length_are_ambiguous() -> None:
    model = tiny_llama()
    model.other = nn.ModuleList(nn.Identity() for _ in range(NUM_LAYERS))
    with pytest.raises(ValueError, match="other"):
        decoder_layers(model)
