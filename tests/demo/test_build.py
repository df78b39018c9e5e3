"""A build of a few steps runs end to end, and what it writes loads in transformers and PEFT."""

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo import adapters, held_out_path, model_path, valid_path
from server.demo.build import TASKS, build
from server.demo.evaluate import as_markdown, evaluate, read_scores, write_scores
from server.demo.recipe import QUICK
from server.demo.samples import read_samples

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    build(out, seed=1, recipe=QUICK, device="cpu", console=Console(quiet=True))
    return out


def test_model_and_tokenizer_load(data) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(data))
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == QUICK.num_layers
    tokenizer = AutoTokenizer.from_pretrained(model_path(data))
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_every_adapter_loads_in_peft(data) -> None:
    assert list(adapters(data)) == sorted(TASKS)
    for path in adapters(data).values():
        base = AutoModelForCausalLM.from_pretrained(model_path(data))
        model = PeftModel.from_pretrained(base, str(path))
        assert all("lora_" in name for name, p in model.named_parameters() if p.dtype != base.dtype)


def test_held_out_samples_lie_beside_the_adapter(data) -> None:
    for name in TASKS:
        assert len(read_samples(valid_path(name, data))) == QUICK.num_valid
        assert len(read_samples(held_out_path(name, data))) == QUICK.num_test


def test_evaluate_scores_every_depth(data, tmp_path) -> None:
    scores = evaluate(data, 2, lambda name, one: None)
    for of_name in scores.values():
        assert [one.depth for one in of_name] == list(range(QUICK.num_layers + 1))
    write_scores(tmp_path / "depths.json", scores)
    assert read_scores(tmp_path / "depths.json") == scores
    assert len(as_markdown(scores).splitlines()) == QUICK.num_layers + 3


@pytest.mark.parametrize("text", ["17 + 3 = 20", "Grüße 🚀 日本\n\ttab", "  two  spaces "])
def test_any_text_round_trips(data, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(data))
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_chat_template_ends_a_turn_with_eos_and_knows_its_roles(data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path(data))
    messages = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye!"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>Hello!<|assistant|>Hi.<|eos|><|user|>Bye!<|assistant|>"
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
