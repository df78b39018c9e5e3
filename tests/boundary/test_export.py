"""An exported adapter, loaded by plain PEFT, is the original at that depth: `lora_depth` is the oracle."""

import copy
import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from boundary.checkpoint_files import CONFIG_NAME, WEIGHTS_NAME
from boundary.depth import lora_depth
from boundary.export import narrowing
from boundary.export.cut import Export, ExportError, export
from boundary.export.nothing import export_nothing
from server.model.checkpoint import read_checkpoint
from server.model.targets import Targets
from tests.parity.adapters import expected_peft_warnings, spread_adapter
from tests.parity.zoo import BY_NAME, NUM_LAYERS, build_model, seeded

INPUT_IDS = torch.arange(40, 64).view(2, 12)
DEPTHS = range(1, NUM_LAYERS + 1)

EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}
HEAD = {"gpt_neox": "embed_out"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # on GPT-2's head
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]


@cache
def base_of(name: str) -> PreTrainedModel:
    return build_model(BY_NAME[name])


@cache
def targets_of(name: str) -> Targets:
    return Targets(base_of(name))


def save(name: str, directory: Path, *, base: nn.Module | None = None, **fields: Any) -> Path:
    """An adapter with every LoRA parameter drawn, as PEFT writes it."""
    architecture = BY_NAME[name]
    given: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(architecture.targets),
        "fan_in_fan_out": architecture.fan_in_fan_out,
        "task_type": "CAUSAL_LM",
    }
    with seeded(1), expected_peft_warnings():
        model = get_peft_model(copy.deepcopy(base or base_of(name)), LoraConfig(**given | fields))
        spread_adapter(model)
        model.save_pretrained(str(directory))
    return directory


def load(name: str, directory: Path, base: nn.Module | None = None) -> PeftModel:
    with expected_peft_warnings():
        model = PeftModel.from_pretrained(copy.deepcopy(base or base_of(name)), str(directory))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS).logits


def at_depth(model: PeftModel, depth: int) -> torch.Tensor:
    with lora_depth(model, depth):
        return logits(model)


def assert_loads_whole(model: PeftModel, directory: Path) -> None:
    """Every LoRA tensor of the file is in the model, and the model has no other."""
    stored = {k: v for k, v in load_file(directory / WEIGHTS_NAME).items() if ".lora_" in k}
    with expected_peft_warnings():
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[key], stored[key]) for key in held)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / CONFIG_NAME).read_text())


def edit_config(directory: Path, **fields: object) -> Path:
    (directory / CONFIG_NAME).write_text(json.dumps(config_of(directory) | fields))
    return directory


def variant(name: str, kind: str) -> dict[str, Any]:
    first, second, *_ = BY_NAME[name].targets
    embedding, head = EMBEDDING.get(name, "embed_tokens"), HEAD.get(name, "lm_head")
    one = next(n for n, t in targets_of(name).items() if t.layer_idx == 2 and n.endswith(second))
    last = next(n for n, t in targets_of(name).items() if t.layer_idx == 3 and n.endswith(first))
    return {
        "plain": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "patterns": {
            # PEFT sorts them when it saves, and the first that matches counts.
            "rank_pattern": {f"^{last}": 3, first: 2, rf"^.*\.2\..*{second}": 6},
            "alpha_pattern": {second: 3, rf"^.*\.[13]\..*{first}": 12, f"^{last}": 5},
        },
        "some_layers": {"layers_to_transform": [0, 2]},
        "embedding": {"target_modules": [first, second, embedding]},
        "head": {"target_modules": [first, head]},
        "embedding_and_head": {"target_modules": [first, embedding, head], "r": 3},
        "all_linear": {"target_modules": "all-linear", "r": 2},
        "pattern_of_names": {"target_modules": rf".*\.[012]\..*{first}"},
        "without_some": {"exclude_modules": [last, one]},
    }[kind]


KINDS = (
    "plain",
    "rslora",
    "dora",
    "lora_bias",
    "patterns",
    "some_layers",
    "embedding",
    "head",
    "embedding_and_head",
    "all_linear",
    "pattern_of_names",
    "without_some",
)
ALIKE = {"some_layers": ({1, 2}, {3, 4}), "pattern_of_names": ({3, 4},)}
"""Depths between which the adapter has no LoRA."""


def cases() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every depth below full of one architecture, one depth of the others."""
    for name in ("llama", "gpt2", "gpt_neox", "qwen3_moe", "gemma3"):
        for kind in KINDS:
            # PEFT widens a pattern of names on models with experts, so that there is none to test.
            if name != "qwen3_moe" or kind not in ("all_linear", "pattern_of_names"):
                yield name, kind, (1, 2, 3) if name == "llama" else (2,)


@pytest.mark.parametrize(("name", "kind", "depths"), list(cases()))
def test_an_export_is_the_original_at_that_depth_and_at_no_other(
    name: str, kind: str, depths: tuple[int, ...], tmp_path: Path
) -> None:
    adapter = save(name, tmp_path / "adapter", **variant(name, kind))
    original = load(name, adapter)
    expected = {depth: at_depth(original, depth) for depth in DEPTHS}
    alike = [{depth} for depth in DEPTHS] + list(ALIKE.get(kind, ()))

    for depth in depths:
        out = tmp_path / f"cut-{depth}"
        done = export(adapter, out, depth, NUM_LAYERS)
        model = load(name, out)
        assert_loads_whole(model, out)
        found = logits(model)
        for other in DEPTHS:
            is_same = any({depth, other} <= group for group in alike)
            assert torch.equal(found, expected[other]) == is_same, (depth, other)
        served = read_checkpoint(out, targets_of(name))
        assert served.max_depth <= depth
        layers = {layer for layer in served.layers.values() if 0 <= layer < NUM_LAYERS}
        assert layers == set(done.layers_kept)


def test_the_report_adds_up(tmp_path: Path) -> None:
    adapter = save("llama", tmp_path / "adapter", layers_to_transform=[0, 2, 3])
    done = export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    per_layer = 2 * len(BY_NAME["llama"].targets)
    assert done == Export(
        depth=2,
        num_layers=NUM_LAYERS,
        layers_kept=(0,),
        layers_dropped=(2, 3),
        num_tensors_before=3 * per_layer,
        num_tensors_after=per_layer,
        num_bytes_before=(adapter / WEIGHTS_NAME).stat().st_size,
        num_bytes_after=(tmp_path / "cut" / WEIGHTS_NAME).stat().st_size,
        notes=(),
    )
    assert done.num_bytes_after < done.num_bytes_before / 2
    assert sorted(os.listdir(tmp_path / "cut")) == [CONFIG_NAME, WEIGHTS_NAME]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "cut"]


@pytest.mark.parametrize("depth", [NUM_LAYERS, "full"])
def test_full_depth_is_a_copy(tmp_path: Path, depth: Any) -> None:
    adapter = save("llama", tmp_path / "adapter", **variant("llama", "embedding_and_head"))
    (adapter / "boundary.json").write_text("{}")
    done = export(adapter, tmp_path / "cut", depth, NUM_LAYERS)
    assert (done.depth, done.layers_dropped, done.notes) == (NUM_LAYERS, (), ())
    assert sorted(os.listdir(tmp_path / "cut")) == [CONFIG_NAME, WEIGHTS_NAME]
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "cut" / name).read_bytes() == (adapter / name).read_bytes()


def test_a_depth_that_the_adapter_does_not_reach_is_a_copy_that_says_so(tmp_path: Path) -> None:
    adapter = save("llama", tmp_path / "adapter", layers_to_transform=[0, 1])
    done = export(adapter, tmp_path / "cut", 3, NUM_LAYERS)
    assert done.notes == ("nothing is left out: the adapter reaches no deeper",)
    assert (tmp_path / "cut" / CONFIG_NAME).read_bytes() == (adapter / CONFIG_NAME).read_bytes()


def test_fields_that_need_no_change_stay_as_they_were(tmp_path: Path) -> None:
    adapter = save("llama", tmp_path / "adapter", lora_dropout=0.25)
    before = {"of_the_future": {"b": [1.5, None], "a": "\u00e4"}} | config_of(adapter)
    edit_config(adapter, **before)
    export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    after = config_of(tmp_path / "cut")
    assert list(after) == list(config_of(adapter))
    assert {key for key in after if after[key] != before[key]} == {"layers_to_transform"}
    assert after["layers_to_transform"] == [0, 1]


def test_patterns_without_a_module_are_dropped_and_the_others_keep_their_order(
    tmp_path: Path,
) -> None:
    adapter = save("llama", tmp_path / "adapter")
    patterns = {
        "z.q_proj": 4,
        r".*\.3\..*": 4,
        r"layers\.0\..*": 4,
        "q_proj": 4,
        "2.mlp.up_proj": 4,
    }
    edit_config(adapter, rank_pattern=patterns, alpha_pattern={"up_proj": 8})
    done = export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    after = config_of(tmp_path / "cut")
    assert list(after["rank_pattern"]) == [r"layers\.0\..*", "q_proj"]
    assert after["alpha_pattern"] == {"up_proj": 8}
    assert done.notes == ("rank_pattern: 3 left out, matching no module that is kept",)
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        load("llama", edit_config(tmp_path / "cut", rank_pattern=patterns))


@pytest.mark.parametrize(
    "kind", ["embedding", "embedding_and_head", "all_linear", "pattern_of_names"]
)
def test_names_are_written_out_where_layers_cannot_say_it(tmp_path: Path, kind: str) -> None:
    adapter = save("llama", tmp_path / "adapter", **variant("llama", kind))
    if kind == "all_linear":  # PEFT saves what it found
        edit_config(adapter, target_modules="all-linear")
    done = export(adapter, tmp_path / "cut", 1, NUM_LAYERS)
    after = config_of(tmp_path / "cut")
    assert after["layers_to_transform"] is None
    assert "model.layers.0.self_attn.q_proj" in after["target_modules"]
    assert ("model.embed_tokens" in after["target_modules"]) == ("embedding" in kind)
    assert len(set(after["target_modules"])) == len(after["target_modules"])
    assert any("full module names" in note for note in done.notes)
    assert torch.equal(logits(load("llama", tmp_path / "cut")), at_depth(load("llama", adapter), 1))


def test_endings_stay_and_a_full_name_that_is_dropped_goes(tmp_path: Path) -> None:
    names = ["q_proj", "lm_head", "model.layers.3.mlp.up_proj"]
    adapter = save("llama", tmp_path / "adapter", target_modules=names)
    original = load("llama", adapter)
    for depth, layers in ((1, [0]), (3, [0, 1, 2])):
        export(adapter, tmp_path / f"{depth}", depth, NUM_LAYERS)
        after = config_of(tmp_path / f"{depth}")
        assert (after["target_modules"], after["layers_to_transform"]) == (["q_proj"], layers)
        assert torch.equal(logits(load("llama", tmp_path / f"{depth}")), at_depth(original, depth))


def test_many_full_names_are_not_shortened_into_others(tmp_path: Path) -> None:
    # From 20 names on PEFT shortens them before it matches.
    names = [n for n, t in targets_of("llama").items() if t.kind in ("linear", "embedding")]
    adapter = save("llama", tmp_path / "adapter", target_modules=names)
    original = load("llama", adapter)
    export(adapter, tmp_path / "cut", 3, NUM_LAYERS)
    assert len(config_of(tmp_path / "cut")["target_modules"]) == 22
    found = load("llama", tmp_path / "cut")
    assert_loads_whole(found, tmp_path / "cut")
    assert torch.equal(logits(found), at_depth(original, 3))


def test_endings_that_hold_a_layer_are_kept_as_endings(tmp_path: Path) -> None:
    names = [f"layers.{i}.mlp.{part}_proj" for i in range(4) for part in ("gate", "up", "down")]
    names += [f"{i}.self_attn.{part}_proj" for i in range(4) for part in "qkvo"]
    adapter = save("llama", tmp_path / "adapter", target_modules=names)
    edit_config(adapter, target_modules=names)
    original = load("llama", adapter)
    export(adapter, tmp_path / "cut", 3, NUM_LAYERS)
    assert config_of(tmp_path / "cut")["target_modules"] == names
    assert torch.equal(logits(load("llama", tmp_path / "cut")), at_depth(original, 3))


def test_a_model_without_a_head_needs_the_name_of_its_layers(tmp_path: Path) -> None:
    base = base_of("llama").model  # its names begin with `layers.`, where PEFT sees no layer
    adapter = save("llama", tmp_path / "adapter", base=base, task_type=None)
    export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    assert config_of(tmp_path / "cut")["layers_pattern"] == ["layers"]
    found = load("llama", tmp_path / "cut", base)
    assert_loads_whole(found, tmp_path / "cut")
    original = load("llama", adapter, base)
    with torch.no_grad(), lora_depth(original, 2):
        expected = original(input_ids=INPUT_IDS).last_hidden_state
    with torch.no_grad():
        assert torch.equal(found(input_ids=INPUT_IDS).last_hidden_state, expected)


@pytest.mark.parametrize("pattern", ["layers", ["h", "layers"], "la.ers"])
def test_a_layers_pattern_of_its_own_is_kept(tmp_path: Path, pattern: Any) -> None:
    adapter = save(
        "llama", tmp_path / "adapter", layers_to_transform=[1, 2], layers_pattern=pattern
    )
    export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    after = config_of(tmp_path / "cut")
    assert (after["layers_pattern"], after["layers_to_transform"]) == (pattern, [1])
    assert_loads_whole(load("llama", tmp_path / "cut"), tmp_path / "cut")


def tied_llama() -> PreTrainedModel:
    model = copy.deepcopy(base_of("llama"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def test_a_tied_head_gets_no_lora_below_full_depth(tmp_path: Path) -> None:
    base = tied_llama()
    adapter = save(
        "llama",
        tmp_path / "adapter",
        base=base,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        ensure_weight_tying=True,
    )
    original = load("llama", adapter, base)
    for depth in DEPTHS:
        done = export(adapter, tmp_path / f"{depth}", depth, NUM_LAYERS)
        found = load("llama", tmp_path / f"{depth}", base)
        assert torch.equal(logits(found), at_depth(original, depth))
        assert any("ensure_weight_tying is off" in note for note in done.notes) == (depth < 4)


def test_a_changed_copy_of_the_base_stays_in_force(tmp_path: Path) -> None:
    fields = variant("llama", "embedding_and_head")
    adapter = save("llama", tmp_path / "adapter", **fields)
    tensors = load_file(adapter / WEIGHTS_NAME)
    tensors["base_model.model.lm_head.base_layer.weight"].neg_()
    save_file(tensors, adapter / WEIGHTS_NAME)
    done = export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    assert "the copy of the base's lm_head that PEFT saved is kept" in done.notes
    found = logits(load("llama", tmp_path / "cut"))
    assert torch.equal(found, at_depth(load("llama", adapter), 2))


def test_every_dtype_is_copied_bit_for_bit(tmp_path: Path) -> None:
    adapter = save("llama", tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(adapter / WEIGHTS_NAME)
    for tensor, dtype in zip(
        list(tensors), itertools.cycle([torch.bfloat16, torch.float16, torch.float64])
    ):
        tensors[tensor] = tensors[tensor].to(dtype)
    first = next(name for name in tensors if ".0." in name)
    tensors[first][0, 0] = float("nan")
    save_file(tensors, adapter / WEIGHTS_NAME, metadata={"format": "pt", "who": "me"})
    export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    kept = load_file(tmp_path / "cut" / WEIGHTS_NAME)
    assert len(kept) == 4
    for name, tensor in kept.items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))
    header = (tmp_path / "cut" / WEIGHTS_NAME).read_bytes()
    assert json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"] == {
        "format": "pt",
        "who": "me",
    }


@pytest.mark.parametrize(
    ("depth", "num_layers", "about", "message"),
    [
        (0, 4, "depth", "0 is the base model"),
        (-1, 4, "depth", "from 1 to the 4 layers of the model, got -1"),
        (5, 4, "depth", "from 1 to the 4 layers of the model, got 5"),
        (4, None, "depth", "from 1 to 3, the highest layer with LoRA; the model may have more"),
        (1, 4, "depth", "no LoRA of this adapter lies below 1"),
        (2, 2, "adapter", "LoRA in layer 2, but the model has 2 layers"),
    ],
)
def test_a_depth_that_means_nothing_is_refused(
    tmp_path: Path, depth: int, num_layers: int | None, about: str, message: str
) -> None:
    adapter = save("llama", tmp_path / "adapter", layers_to_transform=[1, 2])
    with pytest.raises(ExportError, match=message) as refused:
        export(adapter, tmp_path / "cut", depth, num_layers)
    assert refused.value.about == about
    assert os.listdir(tmp_path) == ["adapter"]


def test_without_the_number_of_layers_the_highest_is_the_last(tmp_path: Path) -> None:
    adapter = save("llama", tmp_path / "adapter", layers_to_transform=[1, 2])
    assert export(adapter, tmp_path / "a", 2).layers_kept == (1,)
    done = export(adapter, tmp_path / "b", "full")
    assert (done.depth, done.num_layers) == (3, 3)


def test_without_the_number_of_layers_nobody_knows_if_the_head_belongs_to_a_depth(
    tmp_path: Path,
) -> None:
    first = BY_NAME["llama"].targets[0]
    fields = {"target_modules": rf".*(\.[01]\..*{first}|lm_head)"}
    adapter = save("llama", tmp_path / "adapter", **fields)
    with pytest.raises(ExportError, match="if 2 is full depth"):
        export(adapter, tmp_path / "cut", 2)
    # Beside the LoRA of layers and head lies the copy of the head that PEFT saved.
    assert export(adapter, tmp_path / "a", 1).num_tensors_after == 2 + 1
    assert export(adapter, tmp_path / "b", 2, NUM_LAYERS).num_tensors_after == 4 + 1
    assert export(adapter, tmp_path / "c", "full").num_tensors_after == 6 + 1
    only_head = save("llama", tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(ExportError, match="LoRA in no layer"):
        export(only_head, tmp_path / "d", "full")
    assert export(only_head, tmp_path / "d", "full", NUM_LAYERS).layers_kept == ()


Spoil = Callable[[Path], object]


def config(**fields: object) -> Spoil:
    return lambda path: edit_config(path, **fields)


def weights(edit: Callable[[bytes], bytes]) -> Spoil:
    return lambda path: (path / WEIGHTS_NAME).write_bytes(edit((path / WEIGHTS_NAME).read_bytes()))


def named(old: str, new: str) -> Spoil:
    """Replace `old` in every tensor's name."""

    def spoil(path: Path) -> None:
        stored = load_file(path / WEIGHTS_NAME)
        save_file({k.replace(old, new): v for k, v in stored.items()}, path / WEIGHTS_NAME)

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return spoil


ENDLESS = r"(.|[a-z._])*[XYZ]"

HOSTILE: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda path: (path / CONFIG_NAME).unlink(), "No such file"),
    "config is a directory": (instead(CONFIG_NAME, Path.mkdir), "not a regular file"),
    "config is a pipe": (instead(CONFIG_NAME, os.mkfifo), "not a regular file"),
    "config is no JSON": (lambda path: (path / CONFIG_NAME).write_text("{r"), "is not JSON"),
    "config is a list": (lambda path: (path / CONFIG_NAME).write_text("[]"), "JSON object"),
    "config is endless": (instead(CONFIG_NAME, lambda p: p.symlink_to("/dev/zero")), "regular"),
    "config is huge": (lambda path: (path / CONFIG_NAME).write_text(" " * 2**21), "over the limit"),
    "config is deep": (lambda path: (path / CONFIG_NAME).write_text("[" * 10**5), "too deeply"),
    "another method": (config(peft_type="IA3"), "peft_type is 'IA3'"),
    "no method": (config(peft_type=None), "peft_type is None"),
    "a bias": (config(bias="all"), "bias is 'all'"),
    "layer_replication": (config(layer_replication=[[0, 2]]), "layer_replication is"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "modules_to_save is"),
    "target_parameters": (config(target_parameters=["x"]), "target_parameters is"),
    "trainable tokens": (config(trainable_token_indices=[1]), "trainable_token_indices is"),
    "no targets": (config(target_modules=None), "target_modules is None"),
    "targets of numbers": (config(target_modules=[1]), "target_modules is"),
    "a layers_pattern of numbers": (config(layers_pattern=[1]), "layers_pattern is"),
    "a rank_pattern of text": (config(rank_pattern="q_proj"), "rank_pattern is"),
    "a rank_pattern that is none": (config(rank_pattern={"(": 2}), "no usable pattern"),
    "a rank_pattern without end": (config(rank_pattern={ENDLESS: 2}), "takes over"),
    "no weights": (lambda path: (path / WEIGHTS_NAME).unlink(), "missing"),
    "a pickle": (
        instead(WEIGHTS_NAME, lambda p: (p.parent / "adapter_model.bin").touch()),
        "pickle",
    ),
    "weights are a pipe": (instead(WEIGHTS_NAME, os.mkfifo), "not a regular file"),
    "weights are a directory": (instead(WEIGHTS_NAME, Path.mkdir), "not a regular file"),
    "weights are empty": (weights(lambda _: b""), "cannot be read"),
    "weights are cut off": (weights(lambda data: data[:-3]), "cannot be read"),
    "weights are cut off in the header": (weights(lambda data: data[:100]), "cannot be read"),
    "weights go on": (weights(lambda data: data + b"more"), "cannot be read"),
    "a header of 2**63 bytes": (
        weights(lambda data: struct.pack("<Q", 2**63) + data[8:]),
        "cannot be read",
    ),
    "no tensor": (lambda path: save_file({}, path / WEIGHTS_NAME), "holds no LoRA"),
    "no prefix": (named("base_model.model.", ""), "is no part of a LoRA"),
    "a trained norm": (named("mlp.up_proj.lora_A", "norm"), "is no part of a LoRA"),
    "no layer": (named(".layers.", ".layers_"), "belongs to no depth"),
    "a layer over any limit": (named("layers.2.", f"layers.{'9' * 5000}."), "over the limit"),
    "a layer in other digits": (named("layers.2.", "layers.\u0662."), "belongs to no depth"),
    "nothing behind the number": (named("self_attn.q_proj.", ""), "belongs to no depth"),
    "two lists of layers": (named("layers.3.", "towers.3."), "one list of layers"),
    "routed experts": (named("mlp.up_proj", "mlp.experts.0.up_proj"), "routed experts"),
    "a router": (named("mlp.up_proj", "mlp.gate"), "routed experts"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("good"), target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_adapter_is_refused_by_name(
    good: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrowing, "MATCH_TIMEOUT_S", 0.01)
    spoil, message = HOSTILE[case]
    adapter = Path(shutil.copytree(good, tmp_path / "adapter"))
    spoil(adapter)
    with pytest.raises(ExportError, match=message) as refused:
        export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    assert refused.value.about == "adapter"
    assert len(str(refused.value)) < 400
    assert os.listdir(tmp_path) == ["adapter"]


def test_patterns_together_have_a_limit(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrowing, "TOTAL_TIMEOUT_S", 0.0)
    config = config_of(good) | {"rank_pattern": {"never": 1}}
    with pytest.raises(ValueError, match="rank_pattern: its patterns take over"):
        narrowing.narrow(config, {"model.layers.0.q_proj": 0}, ["model.layers.0.q_proj"], "layers")


def test_a_layers_pattern_that_could_run_for_ever_is_not_run(good: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(good, tmp_path / "adapter"))
    edit_config(adapter, layers_to_transform=[0, 1, 2, 3], layers_pattern=ENDLESS)
    export(adapter, tmp_path / "cut", 2, NUM_LAYERS)
    after = config_of(tmp_path / "cut")
    assert (after["layers_pattern"], after["layers_to_transform"]) == (None, None)
    assert_loads_whole(load("llama", tmp_path / "cut"), tmp_path / "cut")


PLACES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "it has files": (lambda root: (root / "out" / "x").mkdir(parents=True), "out", "not empty"),
    "it is a file": (lambda root: (root / "out").touch(), "out", "not a directory"),
    "it is inside a file": (lambda root: (root / "f").touch(), "f/out", "not a directory"),
    "its parent is missing": (lambda root: None, "a/out", "not a directory"),
    "it is a link": (lambda root: (root / "out").symlink_to("."), "out", "symbolic link"),
    "it is a link to nothing": (lambda root: (root / "out").symlink_to("n"), "out", "symbolic"),
    "it is a link to itself": (lambda root: (root / "out").symlink_to("out"), "out", "symbolic"),
    "it is a pipe": (lambda root: os.mkfifo(root / "out"), "out", "not a directory"),
    "its name is too long": (lambda root: None, "x" * 300, "File name too long"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_is_taken_is_refused_and_stays_as_it_is(
    good: Path, tmp_path: Path, case: str
) -> None:
    make, name, message = PLACES[case]
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=message) as refused:
        export(good, tmp_path / name, 2, NUM_LAYERS)
    assert refused.value.about == "out"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_directory_is_filled(good: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(".")
    export(good, tmp_path / "link" / "out", 2, NUM_LAYERS)
    assert sorted(os.listdir(tmp_path / "out")) == [CONFIG_NAME, WEIGHTS_NAME]
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("boundary.export.cut._sync", fail)
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export(good, tmp_path / "out", 2, NUM_LAYERS)
    assert os.listdir(tmp_path) == []


def test_what_somebody_else_puts_there_meanwhile_is_not_touched(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(*_: object) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr("boundary.export.cut._sync", put)
    with pytest.raises(ExportError, match="not empty"):
        export(good, tmp_path / "out", 2, NUM_LAYERS)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize(
    "fields", [{}, {"target_modules": ["q_proj", "embed_tokens"]}, {"lora_bias": True}]
)
def test_depth_0_as_a_checkpoint_is_the_base_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    adapter = save("llama", tmp_path / "adapter", **fields)
    export_nothing(adapter, tmp_path / "nothing", 1, NUM_LAYERS)
    assert torch.equal(logits(load("llama", tmp_path / "nothing")), logits(base_of("llama")))
    assert not torch.equal(logits(load("llama", adapter)), logits(base_of("llama")))
