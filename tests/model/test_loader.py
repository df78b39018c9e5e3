"""Loading a base model: what is refused and why, and what is known of one that is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, Phi3Config

from boundary.fingerprint import base_fingerprint
from server.errors import ModelError
from server.model import loader
from server.model.attention import ATTENTION_NAME
from server.model.attention_probe import AttentionProbe
from server.model.kv_cache import KVCache, KVSpec, plan_num_blocks
from tests.parity.zoo import BY_NAME, EOS, NUM_LAYERS, PAD, VOCAB_SIZE, build_model
from tests.tiny import Tiny

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def load(path: Path, **changes: Any) -> loader.LoadedModel:
    return loader.load(
        str(path), **({"revision": None, "device": "cpu", "dtype": "auto"} | changes)
    )


@pytest.fixture
def spoiled(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of the model's directory, to be spoiled."""
    return Path(shutil.copytree(tiny.model_path, tmp_path / "model"))


def change_config(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- what is known


def test_a_loaded_model_says_what_it_is(tiny: Tiny) -> None:
    base = tiny.base
    assert (base.num_layers, base.vocab_size, base.max_position) == (NUM_LAYERS, VOCAB_SIZE, 256)
    assert base.kv_specs == [KVSpec(2, 16, 16)] * NUM_LAYERS
    assert base.eos_token_ids == {EOS}
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == ATTENTION_NAME
    assert base.tokenizer.decode([104, 105]) == "hi"


def test_progress_is_told(tiny: Tiny) -> None:
    told: list[tuple[str, int, int]] = []
    load(tiny.model_path, progress=lambda *stage: told.append(stage))
    assert told == [("weights", 0, 1), ("weights", 1, 1)]


@pytest.mark.parametrize(
    ("dtype", "stored", "on_cpu", "on_cuda"),
    [
        ("auto", torch.float32, torch.float32, torch.bfloat16),
        ("auto", torch.bfloat16, torch.float32, torch.bfloat16),
        ("auto", torch.float16, torch.float32, torch.float16),
        ("auto", None, torch.float32, torch.bfloat16),
        ("float16", torch.float32, torch.float16, torch.float16),
        ("bfloat16", torch.float16, torch.bfloat16, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_what_was_asked_for_or_suits_the_device(
    dtype: str, stored: torch.dtype | None, on_cpu: torch.dtype, on_cuda: torch.dtype
) -> None:
    config: Any = SimpleNamespace(dtype=stored)
    assert loader.pick_dtype(dtype, CPU, config) == on_cpu
    assert loader.pick_dtype(dtype, CUDA, config) == on_cuda


@pytest.mark.parametrize("has_cuda", [True, False])
def test_the_device_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch, has_cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert loader.pick_device("cpu") == CPU
    if has_cuda:
        assert loader.pick_device("auto") == loader.pick_device("cuda") == CUDA
        assert loader.pick_device("cuda:1") == torch.device("cuda", 1)
    else:
        assert loader.pick_device("auto") == CPU
        with pytest.raises(ModelError, match="no CUDA device") as refusal:
            loader.pick_device("cuda")
        assert refusal.value.param == "device"


@pytest.mark.parametrize(
    ("generation", "tokenizer", "expected"),
    [(None, None, set()), (5, 5, {5}), (5, 6, {5, 6}), ([5, 7], 6, {5, 6, 7}), (None, 6, {6})],
)
def test_every_id_that_ends_a_sequence_is_known(
    generation: Any, tokenizer: Any, expected: set[int]
) -> None:
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation))
    assert loader.eos_token_ids(model, SimpleNamespace(eos_token_id=tokenizer)) == expected  # type: ignore[arg-type]


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=512, rope_parameters=rope("linear", factor=4.0)), 512),
        (
            LlamaConfig(max_position_embeddings=512, rope_parameters=rope("dynamic", factor=4.0)),
            512,
        ),
        (
            Phi3Config(
                max_position_embeddings=512,
                original_max_position_embeddings=64,
                hidden_size=64,
                num_attention_heads=4,
                pad_token_id=0,
                rope_parameters=rope("longrope", **LONG),
            ),
            64,
        ),
        (
            SimpleNamespace(
                max_position_embeddings=512,
                rope_parameters={
                    "full_attention": rope("longrope", original_max_position_embeddings=32),
                    "sliding_attention": rope("default"),
                },
            ),
            32,
        ),
        (SimpleNamespace(max_position_embeddings=None), 1 << 20),
    ],
)
def test_context_ends_where_frequencies_would_depend_on_the_step(
    config: Any, expected: int
) -> None:
    assert loader.max_position(config) == expected


# ---------------------------------------------------------------- its revision


def test_the_revision_names_the_content_wherever_it_lies(tiny: Tiny, spoiled: Path) -> None:
    assert load(spoiled).revision == tiny.base.revision
    assert tiny.base.revision.startswith("sha256:")


def scale_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.weight"] *= 1.01


@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_content_is_another_revision(tiny: Tiny, spoiled: Path, what: str) -> None:
    if what == "weights":
        change_weights(spoiled, scale_one)
    else:
        change_config(spoiled, rms_norm_eps=1e-3)
    assert load(spoiled).revision != tiny.base.revision


def test_a_commit_of_the_hub_is_the_revision() -> None:
    config = BY_NAME["llama"].make_config()
    config._commit_hash = "abc"
    model = build_model(BY_NAME["llama"])
    assert base_fingerprint("owner/name", config, model.state_dict().items()) == "abc"


# ---------------------------------------------------------------- refusals


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight"]


def narrow_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(8, 8)


def spoil(path: Path, how: str) -> None:
    weights = path / "model.safetensors"
    match how:
        case "empty directory":
            shutil.rmtree(path)
            path.mkdir()
        case "config is no JSON":
            (path / "config.json").write_text("{")
        case "unknown model type":
            change_config(path, model_type="no_such_model", architectures=[])
        case "no weights":
            weights.unlink()
        case "truncated weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "a weight is missing":
            change_weights(path, drop_one)
        case "a weight has another shape":
            change_weights(path, narrow_one)
        case "no tokenizer":
            for file in path.glob("tokenizer*"):
                file.unlink()
        case "tokenizer is no tokenizer":
            (path / "tokenizer.json").write_text("{}")
        case "tokenizer is no JSON":
            (path / "tokenizer.json").write_text("{")
        case "tokenizer of another version":
            data = json.loads((path / "tokenizer.json").read_text())
            data["model"]["type"] = "NoSuchModel"
            (path / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "how",
    [
        "empty directory",
        "config is no JSON",
        "unknown model type",
        "no weights",
        "truncated weights",
        "a weight is missing",
        "a weight has another shape",
        "no tokenizer",
        "tokenizer is no tokenizer",
        "tokenizer is no JSON",
        "tokenizer of another version",
    ],
)
def test_a_directory_that_is_no_whole_model_is_refused(spoiled: Path, how: str) -> None:
    spoil(spoiled, how)
    with pytest.raises(ModelError) as refusal:
        load(spoiled)
    assert refusal.value.param == "model"
    if how == "a weight is missing":
        assert "model.layers.2.mlp.up_proj.weight" in refusal.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"kv_lora_rank": 16}, "MLA"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
    ],
)
def test_what_the_configuration_shows_is_refused(fields: dict[str, Any], message: str) -> None:
    text = SimpleNamespace(**({"num_hidden_layers": 4} | fields))
    is_encoder_decoder = fields.get("is_encoder_decoder", False)
    config: Any = SimpleNamespace(
        model_type="odd", is_encoder_decoder=is_encoder_decoder, get_text_config=lambda: text
    )
    with pytest.raises(ModelError, match=message):
        loader.refuse_config(config)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss", "qwen3_moe"])
def test_what_is_served_is_not_refused(name: str) -> None:
    loader.refuse_config(BY_NAME[name].make_config())


def test_every_layer_must_call_attention_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loader.probe_attention(tiny.base.model)[0] == tiny.base.kv_specs
    attend = AttentionProbe.attend

    def without(layer: int, *, twice: int = -1) -> Callable[..., Any]:
        def partly(self: AttentionProbe, layer_idx: int, *args: Any) -> Any:
            out = attend(self, layer_idx, *args)
            if layer_idx == layer:
                self.calls.remove(layer_idx)
            if layer_idx == twice:
                self.calls.append(layer_idx)
            return out

        return partly

    monkeypatch.setattr(AttentionProbe, "attend", without(2))
    with pytest.raises(ModelError, match=r"layers without attention: \[2\]"):
        loader.probe_attention(tiny.base.model)
    monkeypatch.setattr(AttentionProbe, "attend", without(-1, twice=1))
    with pytest.raises(ModelError, match="layers without attention: none"):
        loader.probe_attention(tiny.base.model)


def test_the_configuration_that_was_read_is_the_files(tiny: Tiny) -> None:
    """Loading pins eager and then our attention, and neither is written into what others read."""
    config = AutoConfig.from_pretrained(tiny.model_path)
    assert config._attn_implementation != ATTENTION_NAME
    assert config.pad_token_id == PAD


# ---------------------------------------------------------------- the cache


def test_blocks_are_planned_from_bytes_or_from_what_is_needed() -> None:
    specs = [KVSpec(2, 16, 16), KVSpec(1, 8, 24)]
    assert specs[0].bytes_per_token(torch.float32) == 256
    per_block = 4 * (256 + 128)

    def plan(cache_bytes: int | None, max_tokens: int) -> int:
        return plan_num_blocks(
            specs, torch.float32, CPU, block_size=4, cache_bytes=cache_bytes, max_tokens=max_tokens
        )

    assert plan(10 * per_block + 1, 1) == 10  # what was asked for, needed or not
    assert plan(None, 9) == 3  # no more than can be filled
    assert 0 < plan(None, 1 << 60) < 1 << 60


def test_a_cache_keeps_what_was_written_where_it_was() -> None:
    cache = KVCache([KVSpec(2, 3, 5)] * 2, 4, 2, torch.float32, CPU)
    key, value = torch.randn(3, 2, 3), torch.randn(3, 2, 5)
    cache.write(1, torch.tensor([6, 7, 2]), key, value)  # block 3, then the first of block 1
    keys, values = cache.gather(1, torch.tensor([3, 1]))
    assert torch.equal(keys[:3], key)
    assert torch.equal(values[:3], value)
    assert not keys[3:].any()
    assert cache.gather(1, torch.tensor([[3], [1]]))[0].shape == (2, 2, 2, 3)
    assert not cache.keys[0].any()
    cache.clear(1, torch.tensor([3]))
    assert not cache.gather(1, torch.tensor([3]))[0].any()
    assert torch.equal(cache.gather(1, torch.tensor([1]))[1][:1], value[2:])


def test_gathering_more_blocks_moves_nothing_until_they_are_more_than_the_pool() -> None:
    cache = KVCache([KVSpec(2, 3, 5)], 4, 2, torch.float32, CPU)
    cache.write(0, torch.arange(8), torch.randn(8, 2, 3), torch.randn(8, 2, 5))
    first = cache.gather(0, torch.tensor([0]))[0].data_ptr()
    assert cache.gather(0, torch.tensor([3, 2, 1, 0]))[0].data_ptr() == first
    rows = torch.tensor([[3, 2, 1, 0], [1, 3, 3, 3]])  # a short row is padded with blocks
    for gathered, pool in zip(cache.gather(0, rows), (cache.keys[0], cache.values[0]), strict=True):
        assert torch.equal(gathered, pool[rows].flatten(1, 2))


def test_the_revision_does_not_depend_on_the_dtype_that_is_served(tiny: Tiny) -> None:
    """A depth calibrated in float32 is that of the same files served in bfloat16."""
    served = loader.load(str(tiny.model_path), None, "cpu", "bfloat16")
    assert served.model.dtype == torch.bfloat16
    assert served.revision == tiny.base.revision
