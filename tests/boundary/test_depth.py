"""lora_depth against an oracle that zeroes the upper layers' lora_B."""

import copy
import itertools
import re
from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from boundary.depth import Depth, decoder_layers, lora_depth, num_decoder_layers

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


@pytest.mark.parametrize("depth", [None, "full"])
def test_full_has_two_more_names(model: PeftModel, depth: Depth) -> None:
    with lora_depth(model, depth):
        assert switches(model) == switches(adapted(LINEARS))


@pytest.mark.parametrize("depth", [1.0, True, "2", "auto"])
def test_a_depth_that_is_no_number_is_refused(model: PeftModel, depth: Any) -> None:
    with pytest.raises(TypeError, match=r'a number, "full" or None'), lora_depth(model, depth):
        pytest.fail("entered")


@pytest.mark.parametrize("depth", range(NUM_LAYERS + 1))
def test_modules_above_the_depth_launch_nothing(model: PeftModel, depth: int) -> None:
    launched: Counter[int] = Counter()
    for name, module in model.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default", ".lora_dropout.default")):
            layer_idx = int(name.split(".layers.")[1].split(".")[0])
            module.register_forward_hook(lambda *_, i=layer_idx: launched.update([i]))
    with lora_depth(model, depth):
        logits(model)
    assert launched == {layer_idx: 3 * len(LINEARS) for layer_idx in range(depth)}


def test_generate_writes_at_the_depth(model: PeftModel) -> None:
    def written(model: PeftModel) -> list[int]:
        prompt = INPUT_IDS[:1]
        generated = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
        row: list[int] = generated[0].tolist()
        return row

    expected = [written(zeroed_above(model, depth)) for depth in range(NUM_LAYERS + 1)]
    assert len({tuple(row) for row in expected}) > 1
    for depth, row in enumerate(expected):
        with lora_depth(model, depth):
            assert written(model) == row


@pytest.mark.slow
def test_a_compiled_model_has_the_depth_too(model: PeftModel) -> None:
    compiled = torch.compile(model, backend="eager")
    whole = logits(model)
    for depth in (1, 3, 1):
        with lora_depth(model, depth):
            assert torch.equal(logits(compiled), logits(model))
        assert torch.equal(logits(compiled), whole)


def test_what_peft_switches_meanwhile_undoes_nothing(model: PeftModel) -> None:
    """A reference model in the middle of a block, as preference training takes one."""
    with lora_depth(model, 1):
        shallow = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_llama()))
        assert torch.equal(logits(model), shallow)
    with model.disable_adapter(), lora_depth(model, 1):
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert not torch.equal(logits(model), shallow)


def test_blocks_may_end_in_any_order(model: PeftModel) -> None:
    whole = logits(model)
    first, second = lora_depth(model, 3), lora_depth(model, 1)
    first.__enter__()
    second.__enter__()
    shallow = logits(model)
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), shallow)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), whole)
    assert switches(model) == switches(adapted(LINEARS))


def test_in_training_layers_above_the_depth_get_no_gradient(model: PeftModel) -> None:
    oracle = zeroed_above(model, 2).train()
    model.train()

    def grad_norms(model: PeftModel) -> dict[str, float]:
        model.zero_grad()
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        return {
            name: float(param.grad.norm())
            for name, param in model.named_parameters()
            if param.grad is not None
        }

    with lora_depth(model, 2):
        found = grad_norms(model)
    expected = grad_norms(oracle)
    assert all(int(name.split(".layers.")[1][0]) < 2 for name in found)
    assert found == {name: pytest.approx(expected[name], rel=1e-4) for name in found}
    assert len(found) == 2 * 2 * len(LINEARS)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_layers_that_a_backward_pass_would_run_again_are_refused(model: PeftModel) -> None:
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing"), lora_depth(model, 1):
        pytest.fail("entered")
    with lora_depth(model, None):
        pass  # nothing is held back
    model.eval()
    with lora_depth(model, 1):
        assert not torch.equal(logits(model), logits(tiny_llama()))


@pytest.fixture
def two(model: PeftModel) -> PeftModel:
    """Beside the first adapter another of fewer modules and another strength."""
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".other." in name:
                param.normal_(std=0.5)
    return model.eval()


def only(model: PeftModel, adapter: str, depth: int) -> torch.Tensor:
    """The oracle's logits of one adapter alone."""
    model = copy.deepcopy(model)
    model.set_adapter(adapter)
    return logits(zeroed_above(model, depth))


@pytest.mark.parametrize("depths", [(0, 2), (2, NUM_LAYERS), (3, 1), (NUM_LAYERS, NUM_LAYERS)])
def test_rows_of_a_mixed_batch_have_their_adapters_depths(
    two: PeftModel, depths: tuple[int, int]
) -> None:
    by_adapter = dict(zip(("default", "other"), depths, strict=True))
    names = ["default", "other", "__base__"]
    rows = INPUT_IDS[:1].repeat(3, 1)
    with lora_depth(two, by_adapter), torch.no_grad():
        mixed = two(input_ids=rows, adapter_names=names).logits
    expected = [only(two, name, depth)[0] for name, depth in by_adapter.items()]
    expected.append(logits(tiny_llama())[0])
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=0, atol=1e-5)


def test_one_depth_holds_for_a_mixed_batch(two: PeftModel) -> None:
    with lora_depth(two, 2), torch.no_grad():
        mixed = two(input_ids=INPUT_IDS, adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed[0], only(two, "default", 2)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed[1], only(two, "other", 2)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("depths", [(1, NUM_LAYERS), (3, 1)])
def test_active_adapters_have_their_own_depths(two: PeftModel, depths: tuple[int, int]) -> None:
    two.base_model.set_adapter(["default", "other"])
    oracle = copy.deepcopy(two)
    with torch.no_grad():
        for name, param in oracle.named_parameters():
            if "lora_B" in name:
                depth = depths[".other." in name]
                if int(name.split(".layers.")[1].split(".")[0]) >= depth:
                    param.zero_()
    with lora_depth(two, {"default": depths[0], "other": depths[1]}):
        torch.testing.assert_close(logits(two), logits(oracle), rtol=0, atol=1e-5)
    assert two.active_adapters == ["default", "other"]


def test_an_adapter_that_is_not_named_stays_whole(two: PeftModel) -> None:
    whole = only(two, "default", NUM_LAYERS)
    with lora_depth(two, {"other": 0}):
        torch.testing.assert_close(logits(two), whole, rtol=0, atol=1e-5)


def test_a_depth_of_an_adapter_that_is_not_there_is_refused(two: PeftModel) -> None:
    with (
        pytest.raises(ValueError, match="no adapter 'third'; it has 'default', 'other'"),
        lora_depth(two, {"third": 1}),
    ):
        pytest.fail("entered")
