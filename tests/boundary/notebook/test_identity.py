"""A model in memory is called what its files are called, or the reason is said why it cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import boundary
from boundary.notebook.identity import Unknowable, adapter_of, base_of
from server.model import loader
from server.model.checkpoint import read_checkpoint
from server.model.targets import Targets
from tests.parity.adapters import EXTRA_VARIANTS, VARIANTS, expected_peft_warnings
from tests.parity.conftest import adapter_path as adapter_path
from tests.parity.conftest import model_path as model_path
from tests.tiny import Tiny

CELLS = [
    *(("llama", variant) for variant in (*VARIANTS, *EXTRA_VARIANTS)),
    *((name, "plain") for name in ("gpt2", "gpt_neox", "gemma2", "mixtral")),
]


def load(model: Path, adapter: Path, **options: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(model, **options)
    with expected_peft_warnings():
        return PeftModel.from_pretrained(base, adapter).eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(("architecture", "variant"), CELLS)
def test_both_are_called_as_the_server_calls_their_files(
    model_path: Callable[[str], Path],
    adapter_path: Callable[..., Path],
    architecture: str,
    variant: str,
    tmp_path: Path,
) -> None:
    place, adapter = model_path(architecture), adapter_path(architecture, variant)
    served = loader.load(str(place), None, "cpu", "float32")
    digest = read_checkpoint(adapter, Targets(served.model)).digest
    model = load(place, adapter)
    assert base_of(model) == served.revision
    with expected_peft_warnings():
        content = adapter_of(model, "default")
        model.save_pretrained(tmp_path)
    assert content.fingerprint == digest
    assert content.beside(adapter) == digest
    assert content.beside(tmp_path) == read_checkpoint(tmp_path, Targets(served.model)).digest


def test_another_content_has_another_name(tiny: Tiny) -> None:
    model = load(tiny.model_path, tiny.adapter("a"))
    base, adapter = base_of(model), adapter_of(model, "default").fingerprint
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.3" in name and ("lora_B" in name or "q_proj.base_layer" in name):
                parameter.mul_(1.5)
    assert base_of(model) != base
    assert adapter_of(model, "default").fingerprint != adapter


def test_what_training_writes_into_the_config_changes_no_name(tiny: Tiny) -> None:
    model = load(tiny.model_path, tiny.adapter("a"))
    config = model.get_base_model().config
    config.use_cache, config.pad_token_id = False, 0
    assert base_of(model) == tiny.base.revision


def test_a_base_of_the_hub_is_called_by_its_commit(tiny: Tiny) -> None:
    model = load(tiny.model_path, tiny.adapter("a"))
    config = model.get_base_model().config
    config._name_or_path, config._commit_hash = "somebody/model", "c" * 40
    assert base_of(model) == "c" * 40
    assert base_of(model, tiny.model_path) == tiny.base.revision


def quantized(model: PeftModel) -> None:
    model.get_base_model().is_quantized = True


def moved(model: PeftModel) -> None:
    model.get_base_model().config._name_or_path = "/nowhere"


def offloaded(model: PeftModel) -> None:
    base = model.get_base_model()
    base.model.norm.weight = torch.nn.Parameter(base.model.norm.weight.to("meta"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (quantized, "quantized"),
        (moved, "no config .* could be read at '/nowhere'"),
        (offloaded, "not in memory"),
        (lambda model: model.to(torch.float16), "float16"),
    ],
)
def test_weights_that_are_not_the_files_own_have_no_name(
    tiny: Tiny, spoil: Callable[[PeftModel], object], why: str
) -> None:
    model = load(tiny.model_path, tiny.adapter("a"))
    spoil(model)
    with pytest.raises(Unknowable, match=why):
        base_of(model)


def test_a_fresh_adapter_has_a_name_before_it_was_ever_saved(tiny: Tiny, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.model_path)
    with expected_peft_warnings():
        model = get_peft_model(base, LoraConfig(target_modules="all-linear"), adapter_name="new")
    content = adapter_of(model, "new")
    assert content.beside(tmp_path) == content.fingerprint
    model.save_pretrained(tmp_path)
    assert content.beside(tmp_path / "new") == content.fingerprint
    assert read_checkpoint(tmp_path / "new", tiny.targets).digest == content.fingerprint


def test_the_library_offers_what_notebooks_use() -> None:
    assert set(boundary.__all__) <= set(dir(boundary))
    for name in boundary.__all__:
        assert getattr(boundary, name).__module__.startswith("boundary.")
    with pytest.raises(AttributeError, match="no attribute 'calibrte'"):
        boundary.calibrte  # noqa: B018
