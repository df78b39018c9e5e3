"""Checkpoints that PEFT wrote are read as PEFT means them: PEFT's own modules are the oracle."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import AdapterError, ModelError
from server.model import patterns
from server.model.adapter_config import HARMLESS, AdapterConfig, _Reproduced
from server.model.checkpoint import LoraModule, lora_layers, module_kinds, read_checkpoint
from server.model.targets import Target, Targets
from tests.model.peft_checkpoints import (
    NUM_LAYERS,
    build_base,
    peft_layers,
    save_adapter,
    targets_of,
)

LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", LLAMA),
    "rslora": ("llama", LLAMA | {"use_rslora": True, "r": 4}),
    "dora": ("llama", LLAMA | {"use_dora": True}),
    "dora_rslora": ("llama", LLAMA | {"use_dora": True, "use_rslora": True, "r": 3}),
    "lora_bias": ("llama", LLAMA | {"lora_bias": True}),
    "patterns": (
        "llama",
        LLAMA
        | {
            "rank_pattern": {"q_proj": 1, r".*\.1\.mlp\.down_proj": 4},
            "alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 5, "down_proj": 1.5},
        },
    ),
    "layers_to_transform": ("llama", LLAMA | {"layers_to_transform": [0, 2]}),
    "one_layer": ("llama", LLAMA | {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "regex": ("llama", {"target_modules": r".*\.[01]\..*(q_proj|up_proj)"}),
    "exclude": ("llama", LLAMA | {"exclude_modules": ["layers.1.self_attn.q_proj"]}),
    "exclude_regex": ("llama", LLAMA | {"exclude_modules": r".*\.0\..*"}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "lm_head_dora": ("llama", {"target_modules": ["lm_head"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding_only": ("llama", {"target_modules": ["embed_tokens"]}),
    "tied_lm_head": ("tied_llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied_both": (
        "tied_llama",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "gaussian": ("llama", LLAMA | {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", LLAMA | {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", LLAMA | {"init_lora_weights": "mica"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d_dora": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "conv1d_all_linear": ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "gemma3_embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "mixtral_attention": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "qwen3_moe_attention": ("qwen3_moe", {"target_modules": ["k_proj", "v_proj"]}),
}


def test_layers_are_found_whatever_they_are_called() -> None:
    expected = {
        "llama": "model.layers.2.mlp.down_proj",
        "gpt2": "transformer.h.2.mlp.c_fc",
        "gpt_neox": "gpt_neox.layers.2.mlp.dense_h_to_4h",
        "mixtral": "model.layers.2.self_attn.q_proj",  # beside a list of as many experts
    }
    for base, name in expected.items():
        targets = targets_of(base)
        assert targets.num_layers == NUM_LAYERS
        assert targets[name].layer_idx == 2
    assert targets_of("gpt2")["transformer.wte"].layer_idx == -1
    assert targets_of("gpt2")["lm_head"].layer_idx == NUM_LAYERS
    assert "transformer.wpe" not in targets_of("gpt2")


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    model = build_base("llama")
    model.config.num_hidden_layers = NUM_LAYERS + 1
    with pytest.raises(ModelError, match="4 decoder layers, found 0"):
        Targets(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_means_what_peft_means(variant: str, tmp_path: Path) -> None:
    base, fields = VARIANTS[variant]
    oracle = peft_layers(save_adapter(base, tmp_path, **fields))
    targets = targets_of(base)

    checkpoint = read_checkpoint(tmp_path, targets)

    assert checkpoint.modules.keys() == oracle.keys()
    for name, module in checkpoint.modules.items():
        target, peft_layer = targets[name], oracle[name]
        assert checkpoint.layers[name] == target.layer_idx
        assert module.scaling == pytest.approx(peft_layer.scaling["default"])
        delta = module.scaling * (module.lora_B @ module.lora_A)
        if target.kind in ("conv1d", "embedding"):
            delta = delta.T
        torch.testing.assert_close(delta, peft_layer.get_delta_weight("default").detach())
        given = _inputs(target)
        torch.testing.assert_close(
            _apply(module, target, given), peft_layer(given).detach(), rtol=1e-4, atol=1e-5
        )


def _inputs(target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if target.kind == "embedding":
        return torch.randint(target.in_features, (5,), generator=generator)
    return torch.randn(5, target.in_features, generator=generator)


@torch.no_grad()
def _apply(module: LoraModule, target: Target, given: Tensor) -> Tensor:
    """The formulas of `checkpoint`'s docstring, as plainly as they can be said."""
    base: Tensor = target.module(given)
    if target.kind == "embedding":
        scale = getattr(target.module, "embed_scale", 1.0)
        return base + scale * module.scaling * module.lora_A.T[given] @ module.lora_B.T
    delta = given @ module.lora_A.T @ module.lora_B.T
    if module.bias is not None:
        delta = delta + module.bias
    delta = module.scaling * delta
    if module.gain is None:
        return base + delta
    base_bias = getattr(target.module, "bias", None)
    unbiased = base if base_bias is None else base - base_bias
    return base + (module.gain - 1) * unbiased + module.gain * delta


@pytest.mark.parametrize(
    ("variant", "max_depth", "rank", "layers"),
    [
        ("plain", 3, 2, (0, 1, 2)),
        ("one_layer", 2, 2, (1,)),
        ("regex", 2, 2, (0, 1)),
        ("embedding_only", 1, 2, ()),
        ("lm_head_dora", NUM_LAYERS, 2, ()),
        ("patterns", 3, 4, (0, 1, 2)),
    ],
)
def test_max_depth_rank_and_layers(
    variant: str, max_depth: int, rank: int, layers: tuple[int, ...], tmp_path: Path
) -> None:
    base, fields = VARIANTS[variant]
    save_adapter(base, tmp_path, **fields)
    targets = targets_of(base)
    checkpoint = read_checkpoint(tmp_path, targets)
    assert (checkpoint.max_depth, checkpoint.rank) == (max_depth, rank)
    assert lora_layers(checkpoint.modules, targets) == layers
    assert set(module_kinds(checkpoint.modules)) == {
        name.split(".")[-1] for name in checkpoint.modules
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, **LLAMA)
    _edit_tensors(tmp_path, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    checkpoint = read_checkpoint(tmp_path, targets_of("llama"))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, module in checkpoint.modules.items():
        assert module.lora_A.dtype == dtype
        assert torch.equal(module.lora_A, stored[f"base_model.model.{name}.lora_A.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_saved_base_weight_is_compared_in_the_coarser_dtype(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    # Trained over float32, served over half precision, and the other way round.
    save_adapter("llama", tmp_path, target_modules=["embed_tokens"])
    half = build_base("llama")
    for parameter in half.parameters():
        parameter.data = parameter.data.to(dtype)
    assert read_checkpoint(tmp_path, Targets(half)).rank == 2
    _edit_tensors(tmp_path, lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})
    assert read_checkpoint(tmp_path, targets_of("llama")).rank == 2


def test_num_bytes_counts_every_tensor(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, target_modules=["q_proj"], use_dora=True)
    # 3 layers of A [2, 16], B [16, 2], m [16] and g [16], four bytes a number.
    assert read_checkpoint(tmp_path, targets_of("llama")).num_bytes == 3 * (32 + 32 + 16 + 16) * 4


def test_the_base_model_is_told_as_written(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, **LLAMA)
    _edit_config(tmp_path, base_model_name_or_path="some/base")
    assert read_checkpoint(tmp_path, targets_of("llama")).base_model == "some/base"


def test_a_converted_pissa_adapter_is_plain_lora(tmp_path: Path) -> None:
    # PEFT's conversion writes init_lora_weights: true, twice the rank, and the config it came from.
    save_adapter("llama", tmp_path, **LLAMA)
    _edit_config(tmp_path, corda_config={"corda_method": "kpm"}, init_lora_weights=True)
    assert read_checkpoint(tmp_path, targets_of("llama")).rank == 2


def test_memory_is_not_the_file(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, **LLAMA)
    weights = tmp_path / "adapter_model.safetensors"
    checkpoint = read_checkpoint(tmp_path, targets_of("llama"))
    before = {name: module.lora_A.clone() for name, module in checkpoint.modules.items()}
    with weights.open("r+b") as file:  # in place, as `cp` does it
        file.write(b"\xff" * weights.stat().st_size)
    assert all(torch.equal(checkpoint.modules[name].lora_A, a) for name, a in before.items())


# --- digest ---------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    return read_checkpoint(path, targets_of("llama")).digest


def test_digest_does_not_depend_on_where_and_how_the_tensors_lie(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path / "a", **LLAMA)
    digest = _digest(tmp_path / "a")
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    _edit_config(copy, peft_version="0.1", inference_mode=False, base_model_name_or_path="other")
    _reorder(copy / "adapter_model.safetensors")
    assert (copy / "adapter_model.safetensors").read_bytes() != (
        tmp_path / "a" / "adapter_model.safetensors"
    ).read_bytes()
    assert _digest(copy) == digest


def test_digest_is_pinned_across_machines_and_releases(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, target_modules=["q_proj"], layers_to_transform=[0])
    _edit_tensors(
        tmp_path,
        lambda tensors: {
            k: torch.arange(v.numel(), dtype=v.dtype).view(v.shape) for k, v in tensors.items()
        },
    )
    assert (
        _digest(tmp_path)
        == "sha256:a37e031f3b39eea725d6b1d59c89f4d8fcc7081970b408c2f776601c1a8001d9"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 2},
        {"lora_alpha": 7},
        {"use_rslora": True},
        {"use_rslora": True, "r": 1},  # the same scaling as without, yet another variant
        {"use_dora": True},
        {"lora_bias": True},
        {"alpha_pattern": {"q_proj": 1}},
        {"target_modules": ["k_proj", "down_proj"]},
    ],
    ids=str,
)
def test_digest_changes_with_what_the_adapter_does(fields: dict[str, Any], tmp_path: Path) -> None:
    rank = {"r": fields["r"]} if "r" in fields else {}
    save_adapter("llama", tmp_path / "a", **LLAMA | rank)
    save_adapter("llama", tmp_path / "b", **LLAMA | fields)
    assert _digest(tmp_path / "a") != _digest(tmp_path / "b")


def test_digest_changes_with_one_bit_of_one_tensor(tmp_path: Path) -> None:
    save_adapter("llama", tmp_path, **LLAMA)
    before = _digest(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    weights.write_bytes(data)
    assert _digest(tmp_path) != before


# --- the config's names, against PEFT's own matching ----------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "mlp.down_proj", "model.layers.1.self_attn.v_proj", "proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "l.*"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
        {"target_modules": r"(?i).*Q_PROJ", "exclude_modules": r".*\.1\..*"},
        {
            "target_modules": ["q_proj", "k_proj"],
            "exclude_modules": ["1.self_attn.q_proj", "_proj"],
        },
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_targeted_modules_are_those_peft_matches(fields: dict[str, Any]) -> None:
    targets = targets_of("llama")
    oracle = LoraConfig(**fields)
    expected = {name for name in targets.names if check_target_module_exists(oracle, name)}
    assert AdapterConfig({"peft_type": "LORA"} | fields).targeted(targets) == expected


def test_patterns_pick_the_rank_that_peft_picks() -> None:
    pattern = {
        "q_proj": 1,
        r"layers\.1\..*": 2,
        "^model.layers.2.mlp.down_proj": 3,
        "mlp": 4,
        "2.self.attn.k_proj": 6,  # a dot is any character, here an underscore
        "k_proj": 7,
        "roj": 9,  # begins inside a word
        "up_proj|gate_proj": 5,
    }
    config = AdapterConfig({"peft_type": "LORA", "target_modules": "x", "rank_pattern": pattern})
    names = [name for name in targets_of("llama").names if name]
    expected = {name: pattern.get(get_pattern_key(list(pattern), name), 8) for name in names}
    assert {name: config.rank(name) for name in names} == expected
    assert set(expected.values()) == {1, 2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_never_ends_is_stopped(field: str, tmp_path: Path) -> None:
    endless = r"(.|[a-z._])*[XYZ]"
    save_adapter("llama", tmp_path, **LLAMA)
    _edit_config(tmp_path, **{field: {endless: 2} if field == "rank_pattern" else endless})
    with pytest.raises(AdapterError, match=f"{field}: .*takes over"):
        read_checkpoint(tmp_path, targets_of("llama"))


@pytest.mark.parametrize("pattern", ["q_proj", "q_.*"])
def test_too_much_matching_is_stopped(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter("llama", tmp_path, **LLAMA)
    _edit_config(tmp_path, alpha_pattern={pattern: 2})
    monkeypatch.setattr(patterns, "TOTAL_TIMEOUT_S", 0.0)
    with pytest.raises(AdapterError, match="alpha_pattern: its patterns take over"):
        read_checkpoint(tmp_path, targets_of("llama"))


def _edit_config(path: Path, **fields: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _edit_tensors(path: Path, edit: Any) -> None:
    file = path / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)


def _reorder(file: Path) -> None:
    """Write the same tensors in the opposite order, with other metadata."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    body, turned = b"", {}
    for name, entry in reversed(header.items()):
        begin, end = entry["data_offsets"]
        turned[name] = entry | {"data_offsets": [len(body), len(body) + end - begin]}
        body += data[start + begin : start + end]
    text = json.dumps({"__metadata__": {"made": "by hand"}} | turned).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


# --- the config's fields, against PEFT's own class ------------------------------------------------


@pytest.mark.parametrize("target_modules", ["q_proj", "all-linear", ["q_proj"]], ids=str)
@pytest.mark.parametrize("layers_to_transform", [None, 1, [0, 2], []], ids=str)
@pytest.mark.parametrize("layers_pattern", [None, "layers", ["layers"], "", []], ids=repr)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_fields_go_together_where_peft_says_so(
    target_modules: Any, layers_to_transform: Any, layers_pattern: Any, variant: dict[str, Any]
) -> None:
    fields = variant | {
        "target_modules": target_modules,
        "layers_to_transform": layers_to_transform,
        "layers_pattern": layers_pattern,
    }

    def is_refused(read: Callable[[], object], error: type[Exception]) -> bool:
        try:
            read()
        except error:
            return True
        return False

    ours = is_refused(lambda: AdapterConfig({"peft_type": "LORA"} | fields), AdapterError)
    assert ours == is_refused(lambda: LoraConfig(**fields), ValueError)


def test_every_field_that_must_be_off_is_off_in_peft_by_default() -> None:
    """Else an adapter that says nothing new would be refused, since PEFT writes every field."""
    known = _Reproduced.model_fields.keys() | HARMLESS
    left = {f.name: f for f in dataclasses.fields(LoraConfig) if f.name not in known}
    assert left.keys() >= {"modules_to_save", "layer_replication"}
    on = [n for n, f in left.items() if f.default is dataclasses.MISSING or f.default]
    assert not on


def test_what_is_left_out_means_what_peft_means() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, field in _Reproduced.model_fields.items():
        if not field.is_required() and name not in ("rank_pattern", "alpha_pattern"):  # {} there
            assert field.default == defaults[name], name
