"""Checkpoints that must be refused: each spoils a good one and names what the refusal must name.

The good one is rank 2 on q_proj of the tiny Llama of `peft_checkpoints`, three layers, as PEFT
saved it. Knows nothing of how the reader works.
"""

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
B2 = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"

Spoil = Callable[[Path], None]


class Case(NamedTuple):
    """How to spoil the good checkpoint, and what the message must hold."""

    spoil: Spoil
    culprits: tuple[str, ...]


def config(**fields: object) -> Spoil:
    """Set fields of adapter_config.json."""

    def spoil(path: Path) -> None:
        file = path / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return spoil


def without(field: str) -> Spoil:
    def spoil(path: Path) -> None:
        file = path / CONFIG
        fields = json.loads(file.read_text())
        del fields[field]
        file.write_text(json.dumps(fields))

    return spoil


def config_bytes(data: bytes) -> Spoil:
    return lambda path: void((path / CONFIG).write_bytes(data))


def weight_bytes(edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(path: Path) -> None:
        file = path / WEIGHTS
        file.write_bytes(edit(file.read_bytes()))

    return spoil


def tensors(**edits: Tensor | None) -> Spoil:
    """Set or, with None, drop tensors. `A0`, `B0`, `B2` stand for their names."""
    names = {"A0": A0, "B0": B0, "B2": B2}
    return named_tensors({names[key]: value for key, value in edits.items()})


def named_tensors(edits: dict[str, Tensor | None]) -> Spoil:
    def spoil(path: Path) -> None:
        stored: dict[str, Tensor | None] = {**load_file(path / WEIGHTS), **edits}
        kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
        save_file(kept, path / WEIGHTS)

    return spoil


def rename(old: str, new: str) -> Spoil:
    """Replace `old` by `new` in every tensor's name."""

    def spoil(path: Path) -> None:
        stored = load_file(path / WEIGHTS)
        save_file({name.replace(old, new): t for name, t in stored.items()}, path / WEIGHTS)

    return spoil


def header(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    """Edit the header in place as JSON; the data stays as it was."""

    def edited(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:start])
        edit(fields)
        return with_header(json.dumps(fields).encode(), data[start:])

    return weight_bytes(edited)


def entry(name: str, **fields: object) -> Spoil:
    """Set fields of one tensor's header entry."""
    return header(lambda entries: entries[name].update(fields))


def with_header(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def sparse(**shapes: list[int]) -> Spoil:
    """Give `A0`, `B0` other shapes, in a file of zeros that takes no room on the disk."""

    def spoil(path: Path) -> None:
        file = path / WEIGHTS
        data = file.read_bytes()
        fields = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        fields.pop("__metadata__", None)
        for key, shape in shapes.items():
            fields[{"A0": A0, "B0": B0}[key]]["shape"] = shape
        end = 0
        for one in fields.values():
            begin, end = end, end + 4 * math.prod(one["shape"])
            one["data_offsets"] = [begin, end]
        text = with_header(json.dumps(fields).encode())
        file.write_bytes(text)
        os.truncate(file, len(text) + end)

    return spoil


def _many_tensors(number: int) -> bytes:
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(number)
    }
    return with_header(json.dumps(entries).encode(), b"\0" * 4 * number)


def both(*spoils: Spoil) -> Spoil:
    def spoil(path: Path) -> None:
        for one in spoils:
            one(path)

    return spoil


def void(_: object) -> None:
    """Drop a value, for lambdas that must return nothing."""


def replace_by(name: str, make: Callable[[Path], object]) -> Spoil:
    """Replace a file of the checkpoint by what `make` creates at its path."""

    def spoil(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return spoil


def _value(value: float) -> Tensor:
    tensor = torch.zeros(16, 2)
    tensor[3, 1] = value
    return tensor


def _repeat_first(data: bytes) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    text = data[8:start].rstrip()
    first = json.dumps(A0).encode() + b":" + json.dumps(json.loads(text)[A0]).encode()
    return with_header(text[:-1] + b"," + first + b"}", data[start:])


CASES: dict[str, Case] = {
    # --- files ---
    "no config": Case(lambda path: (path / CONFIG).unlink(), (CONFIG, "missing")),
    "no weights": Case(lambda path: (path / WEIGHTS).unlink(), (WEIGHTS, "missing")),
    "pickle only": Case(
        lambda path: void((path / WEIGHTS).rename(path / "adapter_model.bin")),
        ("adapter_model.bin", "pickle"),
    ),
    "config is a directory": Case(replace_by(CONFIG, Path.mkdir), (CONFIG, "regular file")),
    "weights are a directory": Case(replace_by(WEIGHTS, Path.mkdir), (WEIGHTS, "regular file")),
    "weights are a pipe": Case(replace_by(WEIGHTS, os.mkfifo), (WEIGHTS, "regular file")),
    "config is a device": Case(
        replace_by(CONFIG, lambda path: path.symlink_to("/dev/zero")), (CONFIG, "regular file")
    ),
    "weights link to nothing": Case(
        replace_by(WEIGHTS, lambda path: path.symlink_to("nowhere")), (WEIGHTS, "missing")
    ),
    "weights link to themselves": Case(
        replace_by(WEIGHTS, lambda path: path.symlink_to(path)), (WEIGHTS, "opened")
    ),
    # --- the config as a file ---
    "config is empty": Case(config_bytes(b""), (CONFIG, "JSON")),
    "config is no JSON": Case(config_bytes(b"r: 8"), (CONFIG, "JSON")),
    "config is cut off": Case(config_bytes(b'{"peft_type": "LO'), (CONFIG, "JSON")),
    "config is a list": Case(config_bytes(b"[]"), (CONFIG, "object")),
    "config is no UTF-8": Case(config_bytes(b'{"r": "\xff\xfe"}'), (CONFIG, "UTF-8")),
    "config has a lone surrogate": Case(
        config_bytes(b'{"peft_type": "LORA", "base_model_name_or_path": "\\ud800"}'),
        (CONFIG, "UTF-8"),
    ),
    "config is nested": Case(config_bytes(b'{"a":' + b"[" * 100_000), (CONFIG, "nested")),
    "config repeats a key": Case(config_bytes(b'{"r": 8, "r": 9}'), (CONFIG, "'r'", "repeated")),
    "config has a huge number": Case(config_bytes(b'{"r": ' + b"9" * 5000 + b"}"), (CONFIG,)),
    "config is over the limit": Case(config_bytes(b" " * (1 << 20) + b"{}"), (CONFIG, "limit")),
    # --- the config's fields ---
    "no peft_type": Case(without("peft_type"), ("peft_type", "required")),
    "another peft_type": Case(config(peft_type="IA3"), ("peft_type", "IA3", "only LoRA")),
    "unknown peft_type": Case(config(peft_type=["LORA"]), ("peft_type",)),
    "sequence classification": Case(config(task_type="SEQ_CLS"), ("task_type", "SEQ_CLS")),
    "no target_modules": Case(without("target_modules"), ("target_modules",)),
    "target_modules is null": Case(config(target_modules=None), ("target_modules",)),
    "target_modules is empty": Case(config(target_modules=[]), (A0, "target_modules")),
    "target_modules holds numbers": Case(config(target_modules=[1]), ("target_modules",)),
    "target_modules is no pattern": Case(config(target_modules="(q_proj"), ("target_modules",)),
    "target_modules misses the tensors": Case(
        config(target_modules=["k_proj"]), (A0, "does not target")
    ),
    "target_modules asks for more": Case(
        config(target_modules=["q_proj", "k_proj"]), ("layers.0.self_attn.k_proj.lora_A", "missing")
    ),
    "target is a norm": Case(
        config(target_modules=["q_proj", "norm"]), ("target_modules", "model.norm", "not a Linear")
    ),
    "target is a whole block": Case(
        config(target_modules=["q_proj", "mlp"]), ("target_modules", "layers.0.mlp")
    ),
    "layers_to_transform misses a layer": Case(
        config(layers_to_transform=[0, 1]), ("layers.2.self_attn.q_proj", "layers_to_transform")
    ),
    "layers_to_transform with a pattern": Case(
        config(layers_to_transform=[0], target_modules=".*q_proj"), ("layers_to_transform",)
    ),
    "layers_pattern is no pattern": Case(
        config(layers_to_transform=[0], layers_pattern="("), ("layers_pattern",)
    ),
    "exclude_modules hits the tensors": Case(
        config(exclude_modules=["0.self_attn.q_proj"]), (A0, "exclude_modules")
    ),
    "r is zero": Case(config(r=0), ("r:", "greater than 0", "0")),
    "r is text": Case(config(r="2"), ("r:", "'2'")),
    "r is true": Case(config(r=True), ("r:", "True")),
    "r differs from the tensors": Case(config(r=4), (A0, "rank 2", "4")),
    "rank_pattern differs from the tensors": Case(
        config(rank_pattern={"0.self_attn.q_proj": 3}), (A0, "rank_pattern", "3")
    ),
    "rank_pattern is no pattern": Case(config(rank_pattern={"[": 2}), ("rank_pattern",)),
    "rank_pattern is a list": Case(config(rank_pattern=[2]), ("rank_pattern",)),
    "lora_alpha is NaN": Case(config(lora_alpha=float("nan")), ("lora_alpha",)),
    "lora_alpha overflows": Case(config(lora_alpha=1e300), ("lora_alpha",)),
    "alpha_pattern overflows": Case(config(alpha_pattern={"q_proj": 1e300}), ("alpha_pattern",)),
    "alpha_pattern is no number": Case(config(alpha_pattern={"q_proj": "1"}), ("alpha_pattern",)),
    "use_rslora is text": Case(config(use_rslora="false"), ("use_rslora", "'false'")),
    "base model is a number": Case(
        config(base_model_name_or_path=7), ("base_model_name_or_path", "7")
    ),
    # --- variants that are not reproduced ---
    "bias": Case(config(bias="lora_only"), ("bias", "lora_only")),
    "modules_to_save": Case(config(modules_to_save=["lm_head"]), ("modules_to_save", "lm_head")),
    "layer_replication": Case(config(layer_replication=[[0, 2]]), ("layer_replication", "depth")),
    "trainable tokens": Case(config(trainable_token_indices=[1]), ("trainable_token_indices",)),
    "target_parameters": Case(config(target_parameters=["x.w"]), ("target_parameters",)),
    "aLoRA": Case(config(alora_invocation_tokens=[1, 2]), ("alora_invocation_tokens",)),
    "Arrow": Case(config(arrow_config={"top_k": 3}), ("arrow_config",)),
    "KaSA": Case(config(kasa_config={}, use_kasa=True), ("use_kasa", "does not know")),
    "KaSA's config": Case(config(kasa_config={"a": 1}), ("kasa_config",)),
    "MonteCLoRA": Case(config(monteclora_config={"num_samples": 8}), ("monteclora_config",)),
    "QA-LoRA": Case(config(use_qalora=True), ("use_qalora",)),
    "BD-LoRA": Case(config(use_bdlora={"nblocks": 2}), ("use_bdlora",)),
    "VeLoRA": Case(config(velora_config={"num_groups": 4}), ("velora_config",)),
    "Megatron": Case(config(megatron_config={"x": 1}), ("megatron_config",)),
    "a variant of the future": Case(config(use_newlora=True), ("use_newlora", "does not know")),
    "PiSSA": Case(config(init_lora_weights="pissa"), ("init_lora_weights", "pissa", "onvert")),
    "PiSSA by subspace iteration": Case(
        config(init_lora_weights="pissa_niter_16"), ("init_lora_weights", "pissa_niter_16")
    ),
    "OLoRA": Case(config(init_lora_weights="olora"), ("init_lora_weights", "olora")),
    "CorDA": Case(config(init_lora_weights="corda"), ("init_lora_weights", "corda")),
    "LoRA-GA": Case(config(init_lora_weights="lora_ga"), ("init_lora_weights", "lora_ga")),
    "LoftQ": Case(
        config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}),
        ("init_lora_weights", "loftq", "quantized"),
    ),
    "an init of the future": Case(config(init_lora_weights="new"), ("init_lora_weights", "'new'")),
    "DoRA with lora_bias": Case(config(use_dora=True, lora_bias=True), ("lora_bias", "use_dora")),
    "DoRA on the embedding": Case(
        both(
            config(target_modules=["embed_tokens"], use_dora=True),
            lambda path: save_file(
                {
                    "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 40),
                    "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(16, 2),
                    "base_model.model.model.embed_tokens.lora_magnitude_vector": torch.ones(16),
                },
                path / WEIGHTS,
            ),
        ),
        ("use_dora", "embed_tokens"),
    ),
    # --- the weights as a file ---
    "weights are empty": Case(weight_bytes(lambda _: b""), (WEIGHTS, "too short")),
    "weights are 7 bytes": Case(weight_bytes(lambda data: data[:7]), (WEIGHTS, "too short")),
    "weights end in the header": Case(weight_bytes(lambda data: data[:100]), (WEIGHTS, "fit")),
    "weights end in a tensor": Case(weight_bytes(lambda data: data[:-3]), (B2, "truncated")),
    "weights go on": Case(weight_bytes(lambda data: data + b"tail"), (WEIGHTS, "4 bytes after")),
    "weights are a pickle": Case(
        lambda path: torch.save({A0: torch.ones(2, 16)}, path / WEIGHTS), (WEIGHTS, "header")
    ),
    "weights are an LFS pointer": Case(
        weight_bytes(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), (WEIGHTS, "header")
    ),
    "header of 2**63 bytes": Case(
        weight_bytes(lambda data: struct.pack("<Q", 2**63) + data[8:]), (WEIGHTS, "limit")
    ),
    "header over the limit": Case(
        weight_bytes(lambda _: with_header(b"{}" + b" " * (8 << 20))), (WEIGHTS, "limit")
    ),
    "header of no bytes": Case(weight_bytes(lambda _: with_header(b"")), (WEIGHTS, "header")),
    "header is no JSON": Case(weight_bytes(lambda _: with_header(b"{oops}")), (WEIGHTS, "JSON")),
    "header is a list": Case(weight_bytes(lambda _: with_header(b"[]")), (WEIGHTS, "header")),
    "header is no UTF-8": Case(
        weight_bytes(lambda _: with_header(b'{"\xff": 1}')), (WEIGHTS, "UTF-8")
    ),
    "header is nested": Case(
        weight_bytes(lambda _: with_header(b'{"a":' + b"[" * 200_000)), (WEIGHTS, "nested")
    ),
    "header repeats a tensor": Case(weight_bytes(_repeat_first), (A0, "repeated")),
    "metadata is no map": Case(header(lambda h: h.update(__metadata__=[1])), ("__metadata__",)),
    "an entry is no object": Case(header(lambda h: h.update({A0: 3})), (A0, "header entry")),
    "an entry lacks its shape": Case(header(lambda h: h[A0].pop("shape")), (A0, "header entry")),
    "a shape is negative": Case(entry(A0, shape=[-2, -16]), (A0, "shape")),
    "a shape is fractional": Case(entry(A0, shape=[2.0, 16]), (A0, "shape")),
    "a shape is astronomic": Case(entry(A0, shape=[2**62, 2**62]), (A0, "need")),
    "a shape has a hundred axes": Case(entry(A0, shape=[1] * 100), (A0, "shape")),
    "offsets point past the end": Case(
        entry(B2, data_offsets=[10**12, 10**12 + 128]), (B2, "hole")
    ),
    "offsets run backwards": Case(entry(A0, data_offsets=[128, 0]), (A0, "data_offsets")),
    "offsets are true and false": Case(entry(A0, data_offsets=[False, True]), (A0, "offsets")),
    "two tensors overlap": Case(
        header(lambda h: h[B0].update(data_offsets=h[A0]["data_offsets"])), ("hole or overlap",)
    ),
    "a name of 10000 characters": Case(
        header(lambda h: h.update({"x" * 10_000: h.pop(A0)})), ("xxx", "512 characters")
    ),
    "no tensor at all": Case(weight_bytes(lambda _: with_header(b"{}")), (A0, "missing")),
    # --- more than there is room for ---
    "a terabyte of zeros": Case(
        both(config(r=2**30), sparse(A0=[2**30, 16], B0=[16, 2**30])), (A0, str(2**30), "limit")
    ),
    "a terabyte in one tensor": Case(sparse(A0=[2**16, 2**22]), (A0, str(2**16))),
    "a terabyte in a partner": Case(sparse(B0=[2**34, 16]), (B0, str(2**34), "[16, 2]")),
    "70,000 tensors": Case(
        weight_bytes(lambda _: _many_tensors(70_000)), (WEIGHTS, "70000 tensors", "limit")
    ),
    "a pattern that backtracks for ever": Case(
        config(target_modules=r"(.|[a-z._])*[XYZ]"), ("target_modules", "takes over")
    ),
    "a pattern that takes gigabytes": Case(
        config(target_modules="((a{999}){999}){999}"), ("target_modules", "repeat")
    ),
    "code beside the weights": Case(
        config(auto_mapping={"parent_library": "evil"}, use_evil=True), ("use_evil",)
    ),
    # --- the tensors ---
    "a tensor of integers": Case(tensors(A0=torch.ones(2, 16, dtype=torch.int8)), (A0, "'I8'")),
    "a tensor of float8": Case(
        tensors(A0=torch.ones(2, 16).to(torch.float8_e4m3fn)), (A0, "F8_E4M3")
    ),
    "a tensor of doubles": Case(tensors(A0=torch.ones(2, 16, dtype=torch.float64)), (A0, "F64")),
    "an unknown dtype": Case(entry(A0, dtype="F3"), (A0, "'F3'")),
    "a dtype that is no text": Case(entry(A0, dtype={}), (A0, "dtype")),
    "NaN": Case(tensors(B0=_value(float("nan"))), (B0, "NaN")),
    "Inf": Case(tensors(B2=_value(float("-inf"))), (B2, "Inf")),
    "NaN in bfloat16": Case(tensors(B0=_value(float("nan")).bfloat16()), (B0, "NaN")),
    "A is transposed": Case(tensors(A0=torch.ones(16, 2)), (A0, "[16, 2]", "[16, 16]")),
    "B is too narrow": Case(tensors(B0=torch.ones(8, 2)), (B0, "[8, 2]", "[16, 2]")),
    "B has another rank": Case(tensors(B0=torch.ones(16, 3)), (B0, "[16, 3]", "[16, 2]")),
    "A is flat": Case(tensors(A0=torch.ones(32)), (A0, "[32]", "[32, 16]")),
    "A is a number": Case(tensors(A0=torch.tensor(1.0)), (A0, "[]")),
    "A is empty": Case(tensors(A0=torch.ones(0, 16)), (A0, "empty")),
    "rank over the limit": Case(
        both(config(r=5000), tensors(A0=torch.ones(5000, 16), B0=torch.ones(16, 5000))),
        (A0, "5000", "limit"),
    ),
    "A is missing": Case(tensors(A0=None), (A0, "missing")),
    "B is missing": Case(tensors(B2=None), (B2, "missing")),
    "an extra tensor": Case(
        named_tensors({"base_model.model.extra": torch.ones(1)}), ("base_model.model.extra",)
    ),
    "a tensor of AdaLoRA": Case(
        named_tensors({A0.replace("lora_A.weight", "lora_E"): torch.ones(1)}), ("lora_E",)
    ),
    "an adapter's name in the names": Case(
        rename("lora_A.weight", "lora_A.default.weight"), ("lora_A.default.weight",)
    ),
    "no prefix": Case(rename("base_model.model.", ""), (A0.removeprefix("base_model.model."),)),
    "a trained norm": Case(
        named_tensors({"base_model.model.model.norm.weight": torch.ones(16)}), ("model.norm",)
    ),
    "a bias of the base": Case(
        named_tensors({A0.replace("lora_A.weight", "base_layer.bias"): torch.ones(16)}),
        ("base_layer.bias",),
    ),
    "lora_bias without the flag": Case(
        named_tensors({B0.replace(".weight", ".bias"): torch.ones(16)}),
        ("q_proj.lora_B.bias", "lora_bias"),
    ),
    "the flag without lora_bias": Case(config(lora_bias=True), ("q_proj.lora_B.bias", "missing")),
    "a magnitude without the flag": Case(
        named_tensors({A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}),
        ("lora_magnitude_vector", "use_dora"),
    ),
    "the flag without a magnitude": Case(
        config(use_dora=True), ("q_proj.lora_magnitude_vector", "missing")
    ),
    "an embedding's tensor on a Linear": Case(
        named_tensors({A0.replace("lora_A.weight", "lora_embedding_A"): torch.ones(2, 16)}),
        ("q_proj.lora_embedding_A", "linear"),
    ),
    "a Linear's tensor on the embedding": Case(
        named_tensors({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(2, 16)}),
        ("embed_tokens.lora_A.weight", "embedding"),
    ),
    # --- another base ---
    "a layer this base lacks": Case(
        rename("layers.2.", "layers.7."), ("layers.7.self_attn.q_proj", "another base", "3 layers")
    ),
    "another architecture": Case(
        rename("model.layers.", "transformer.h."), ("transformer.h.0", "LlamaForCausalLM")
    ),
    "routed experts": Case(
        rename("self_attn.q_proj", "mlp.experts.0.w1"), ("experts.0.w1", "routed")
    ),
    "a whole lm_head": Case(
        named_tensors({"base_model.model.lm_head.weight": torch.ones(40, 16)}),
        ("lm_head.weight", "differs"),
    ),
    "a resized embedding": Case(
        named_tensors(
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(41, 16)}
        ),
        ("embed_tokens.base_layer.weight", "[41, 16]", "resized"),
    ),
}
