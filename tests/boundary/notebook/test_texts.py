"""Texts of a model at a depth, against a loop that recomputes everything for every token."""

from collections.abc import Sequence

import pytest
import torch
from peft import PeftModel
from transformers import GenerationConfig

from boundary import lora_depth
from boundary.dataset import Sample
from boundary.notebook.texts import Texts
from boundary.progress import drain
from tests.parity.adapters import expected_peft_warnings
from tests.parity.zoo import BY_NAME, EOS, NUM_LAYERS, build_model, byte_tokenizer
from tests.tiny import Tiny

PROMPTS = ["a", "the sea and", "\u00e9t\u00e9 ", "x" * 40]
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PeftModel:
    with expected_peft_warnings():
        return PeftModel.from_pretrained(build_model(BY_NAME["llama"]), tiny.adapter("a")).eval()


def samples() -> list[Sample]:
    tokenizer = byte_tokenizer()
    return [Sample(tuple(tokenizer.encode(prompt)), (1,), "") for prompt in PROMPTS]


@torch.no_grad()
def plainly(model: PeftModel, prompt: Sequence[int], depth: int, max_tokens: int) -> str:
    token_ids = list(prompt)
    with lora_depth(model, depth):
        for _ in range(max_tokens):
            token_id = int(model(input_ids=torch.tensor([token_ids])).logits[0, -1].argmax())
            if token_id == EOS:
                break
            token_ids.append(token_id)
    tokenizer = byte_tokenizer()
    text, before = (str(tokenizer.decode(ids)) for ids in (token_ids, list(prompt)))
    return text.removeprefix(before)


@pytest.mark.parametrize("max_len", [256, 45])
def test_a_text_is_the_greedy_one_at_its_depth_in_any_batch(model: PeftModel, max_len: int) -> None:
    texts = Texts(model, byte_tokenizer(), samples(), MAX_TOKENS, max_len)
    places = [(index, depth) for index in range(len(PROMPTS)) for depth in (0, 2, NUM_LAYERS)]
    written = drain(texts.at(places, "generate"))
    for index, depth in places:
        prompt = samples()[index].prompt_token_ids
        room = min(MAX_TOKENS, max_len - len(prompt))
        assert written[index, depth] == plainly(model, prompt, depth, room)
    assert len({written[1, depth] for depth in (0, 2, NUM_LAYERS)}) > 1  # depths differ
    if max_len == 45:  # the longest prompt's text is cut, its neighbours' are not
        whole = drain(Texts(model, byte_tokenizer(), samples(), MAX_TOKENS, 256).at(places, "g"))
        assert len(written[3, 2]) < len(whole[3, 2])
        assert written[0, 2] == whole[0, 2]


def test_no_text_is_written_twice(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts(model, byte_tokenizer(), samples(), 2, 256)
    first = dict(drain(texts.at([(0, 1), (1, 1)], "generate")))
    monkeypatch.setattr(model, "generate", None)
    assert dict(drain(texts.at([(1, 1), (0, 1)], "outputs"))) == first


def test_what_the_model_says_of_sampling_does_not_come_in(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(1, 2), (2, 2)]
    plain = dict(drain(Texts(model, byte_tokenizer(), samples(), 6, 256).at(places, "g")))
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.5, top_k=3, repetition_penalty=9.0, num_beams=2,
        no_repeat_ngram_size=1, min_new_tokens=1, max_length=3, eos_token_id=EOS,
    )  # fmt: skip
    monkeypatch.setattr(model.get_base_model(), "generation_config", own)
    assert dict(drain(Texts(model, byte_tokenizer(), samples(), 6, 256).at(places, "g"))) == plain
