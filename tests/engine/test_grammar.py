"""Random walks through grammars: whatever the masks allow, the finished text must match."""

import json
import random
import re
import threading
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, grammar_from
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PythonBackend

from server.engine import grammar as grammar_module
from server.engine.grammar import MAX_COMPILED, MAX_GRAMMAR_BYTES, GrammarCompiler, Matcher
from server.errors import BadRequest, GenerationError

VOCAB_SIZE = 301


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ('"', ":"), ("{", '"'), ("1", "2"), ("a", "b")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<end>"]
    )


TOKENIZER = make_tokenizer()
NUM_TOKENS = len(TOKENIZER)
EOS_ID, END_ID = TOKENIZER.convert_tokens_to_ids(["<eos>", "<end>"])
EOS = frozenset({EOS_ID, END_ID})


class Dish(BaseModel):
    """What the JSON walks must validate as, read by pydantic, which knows nothing of llguidance."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=8)
    price: int = Field(ge=0, le=500)
    kind: Literal["starter", "main"]
    is_hot: bool
    tags: list[Literal["ab", "c"]] = Field(max_length=3)


SUM = 'start: expr\nexpr: NUMBER | NUMBER "+" expr | "(" NUMBER ")"\nNUMBER: /[1-9][0-9]{0,2}/'
GRAMMARS: dict[str, tuple[str, Callable[[str], object]]] = {
    "regex": (
        grammar_from("regex", r"[a-f]{2,4}-(\d{3}|é你)?"),
        lambda text: re.fullmatch(r"[a-f]{2,4}-(\d{3}|é你)?", text),
    ),
    "json": (
        grammar_from("json_schema", json.dumps(Dish.model_json_schema())),
        Dish.model_validate_json,
    ),
    "lark": (
        grammar_from("lark", SUM),
        lambda text: re.fullmatch(r"([1-9]\d{0,2}\+)*(\([1-9]\d{0,2}\)|[1-9]\d{0,2})", text),
    ),
    "plain lark": (SUM, lambda text: re.fullmatch(r"[0-9+()]+", text)),
    "choice": (
        grammar_from("choice", json.dumps(["yes", "yes please", "no", "也许"])),
        lambda text: text in {"yes", "yes please", "no", "也许"},
    ),
}


def make_compiler(vocab_size: int = VOCAB_SIZE) -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab_size, EOS)


COMPILER = make_compiler()


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def step(matcher: Matcher, choices: random.Random, taken: list[int]) -> bool:
    """Take a random token; False once the walk has ended, by an end token or by the grammar."""
    if matcher.is_finished:
        assert set(allowed(matcher)) == EOS
        return False
    # Ends are taken when they may be, one time in four, so that walks end.
    ids = allowed(matcher)
    others = [i for i in ids if i not in EOS]
    assert others
    is_end = len(ids) > len(others) and choices.random() < 0.25
    token_id = choices.choice(sorted(EOS) if is_end else others)
    matcher.advance(token_id)
    if is_end:
        assert matcher.is_finished
        return False
    taken.append(token_id)
    return True


def walk(matcher: Matcher, token_ids: list[int]) -> None:
    for token_id in token_ids:
        matcher.mask()
        matcher.advance(token_id)


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_random_walk_ends_in_text_that_matches(name: str) -> None:
    grammar, check = GRAMMARS[name]
    texts = set()
    for seed in range(40):
        choices, matcher = random.Random(seed), COMPILER.matcher(grammar)
        taken: list[int] = []
        while step(matcher, choices, taken):
            assert len(taken) < 2000
        text = TOKENIZER.decode(taken)
        assert isinstance(text, str)
        assert check(text), text
        texts.add(text)
    assert len(texts) >= 4


def test_walks_without_the_mask_do_not_match() -> None:
    _, check = GRAMMARS["lark"]
    choices = random.Random(0)
    texts = [TOKENIZER.decode(choices.choices(range(256), k=5)) for _ in range(50)]
    assert not any(check(str(text)) for text in texts)


def test_matchers_in_one_batch_do_not_disturb_each_other() -> None:
    def walk_together(walks: list[tuple[str, int]]) -> list[list[int]]:
        live = [(COMPILER.matcher(GRAMMARS[n][0]), random.Random(s), list[int]()) for n, s in walks]
        results = [taken for _, _, taken in live]
        while live:
            live = [walk for walk in live if step(*walk)]
        return results

    walks = [(name, seed) for name in GRAMMARS for seed in range(5)]
    assert walk_together(walks) == [walk_together([walk])[0] for walk in walks]


@pytest.mark.parametrize("vocab_size", [100, 255, 256, NUM_TOKENS - 1, NUM_TOKENS, 288, 301, 4000])
def test_a_mask_has_the_models_size_and_only_the_tokenizers_tokens(vocab_size: int) -> None:
    matcher = make_compiler(vocab_size).matcher(grammar_from("regex", r"[ -~]*"))
    assert matcher.mask().shape == (-(-vocab_size // 32),)
    assert matcher.mask().dtype == np.int32
    full = allowed(COMPILER.matcher(grammar_from("regex", r"[ -~]*")))
    assert max(full) < NUM_TOKENS
    assert allowed(matcher) == [i for i in full if i < vocab_size]
    assert not matcher.is_finished


def test_a_complete_text_may_end_and_one_that_cannot_go_on_is_finished() -> None:
    matcher = COMPILER.matcher(grammar_from("regex", "ab?"))
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    assert not EOS & set(allowed(matcher))
    matcher.advance(a)
    assert set(allowed(matcher)) == {b} | EOS
    assert not matcher.is_finished
    matcher.advance(b)
    assert matcher.is_finished
    assert set(allowed(matcher)) == EOS


def test_a_grammar_of_the_empty_text_is_finished_at_once() -> None:
    assert COMPILER.matcher('start: ""').is_finished


def test_the_tokenizers_end_token_serves_a_model_that_names_none() -> None:
    matcher = GrammarCompiler(TOKENIZER, VOCAB_SIZE, frozenset()).matcher('start: ""')
    assert allowed(matcher) == [EOS_ID]


@pytest.mark.parametrize("token_id", [5, 299, 10**6, EOS_ID])
def test_a_token_that_is_not_allowed_fails_its_own_sequence(token_id: int) -> None:
    matcher, other = (COMPILER.matcher(GRAMMARS["json"][0]) for _ in range(2))
    before = allowed(other)
    with pytest.raises(GenerationError, match=f"token {token_id}"):
        matcher.advance(token_id)
    with pytest.raises(GenerationError):
        matcher.mask()
    assert not matcher.is_finished
    assert allowed(other) == before
    assert allowed(COMPILER.matcher(GRAMMARS["json"][0])) == before


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "Empty grammar"),
        ("%%%", "lexer error"),
        ("start: foo", 'unknown name: "foo"'),
        ('start: "a" <nope>', "unknown special token"),
        ("{", "EOF"),
        ('{"grammars": []}', "grammar"),
        (grammar_from("regex", "("), "unclosed group"),
        (grammar_from("regex", r"(?!a)b"), "look-around"),
        (grammar_from("json_schema", '{"type": "dish"}'), "dish"),
        (grammar_from("json_schema", '{"if": {}, "type": "object"}'), '"if"'),
        (grammar_from("json_schema", '{"$ref": "http://localhost/x"}'), "does not fetch"),
        (grammar_from("lark", r"start: /[^\s\S]/"), "no text can match"),
        ("start: \ud800", "surrogate"),
        ("start: /((a{900}){900}){900}/", "compiling it takes"),  # more memory or time
        (grammar_from("regex", "(a*)*" * 3000), "too many expressions"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_compilers_words(grammar: str, words: str) -> None:
    for ask in (COMPILER.check, COMPILER.matcher):
        with pytest.raises(BadRequest, match=re.escape(words)) as caught:
            ask(grammar)
        assert caught.value.code == "invalid_grammar"
        assert len(caught.value.message) < 1200
    COMPILER.check(SUM)


def test_a_grammar_may_have_64_kib() -> None:
    head = 'start: "a" // '
    COMPILER.check(head + "x" * (MAX_GRAMMAR_BYTES - len(head)))
    with pytest.raises(BadRequest, match="65537 bytes, and the limit is 65536"):
        COMPILER.check(head + "x" * (MAX_GRAMMAR_BYTES - len(head) + 1))
    with pytest.raises(BadRequest, match="limit"):
        COMPILER.check(head + "é" * (MAX_GRAMMAR_BYTES // 2))


def test_a_slow_tokenizer_is_refused() -> None:
    slow = PythonBackend.__new__(PythonBackend)
    with pytest.raises(BadRequest, match="slow"):
        GrammarCompiler(slow, VOCAB_SIZE, EOS).check(SUM)


def test_a_grammar_that_outgrows_its_limits_fails_its_own_sequence() -> None:
    tokenizer = COMPILER._tokenizer_once()
    limits = LLParserLimits(step_max_items=20)
    ambiguous = 'start: item*\nitem: "a" | "a" item | item "a" | item item'
    matcher = Matcher(LLMatcher(tokenizer, ambiguous, log_level=0, limits=limits), tokenizer, 301)
    with pytest.raises(GenerationError):
        walk(matcher, [TOKENIZER.encode("a")[0]] * 50)


def test_the_door_compiles_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, num_compiled = make_compiler(), 0

    class Counted:
        def __new__(cls, *args: object, **kwargs: object) -> LLMatcher:  # type: ignore[misc]
            nonlocal num_compiled
            num_compiled += 1
            return LLMatcher(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar_module, "LLMatcher", Counted)
    compiler.check(SUM)
    compiler.check(SUM)
    first = compiler.matcher(SUM)
    assert num_compiled == 1
    second = compiler.matcher(SUM)
    assert num_compiled == 2
    first.advance(TOKENIZER.encode("(")[0])
    assert allowed(second) == allowed(COMPILER.matcher(SUM)) != allowed(first)
    compiler.check(SUM)
    for i in range(MAX_COMPILED):
        compiler.check(f'start: "{i}"')
    assert len(compiler._checked) == MAX_COMPILED
    assert SUM not in compiler._checked


def test_threads_share_one_compiler() -> None:
    compiler = make_compiler()
    expected = {name: allowed(COMPILER.matcher(grammar)) for name, (grammar, _) in GRAMMARS.items()}
    found: list[bool] = []

    def use(offset: int) -> None:
        names = list(GRAMMARS)
        for i in range(20):
            name = names[(i + offset) % len(names)]
            compiler.check(GRAMMARS[name][0])
            found.append(allowed(compiler.matcher(GRAMMARS[name][0])) == expected[name])

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80
