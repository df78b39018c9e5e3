"""Data sets over a byte tokenizer that starts a text with `<s>`, as many do."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from boundary.dataset import Dataset, DatasetError, from_records, load

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no role ' ~ message.role) }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LEN = 64


def make_tokenizer(
    template: str | None = CHAT_TEMPLATE, *, merges: tuple[str, ...] = (), space: bool = False
) -> PreTrainedTokenizerFast:
    """Bytes and `merges`; `space` puts one before every text, as SentencePiece does."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *merges]
    vocab = {piece: i for i, piece in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(piece[0], piece[1]) for piece in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = make_tokenizer()


def pairs(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def texts(dataset: Dataset, tokenizer: Any = TOKENIZER) -> list[tuple[str, str]]:
    return [
        (tokenizer.decode(s.prompt_token_ids), tokenizer.decode(s.completion_token_ids))
        for s in dataset.samples
    ]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD_CHAT = chat(("user", "Hi"), ("assistant", "Ho"))


def error(records: list[Any], tokenizer: Any = TOKENIZER, max_len: int = MAX_LEN) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        from_records(records, tokenizer, max_len)
    return caught.value


def test_pairs_are_a_text_with_bos_and_what_follows_it() -> None:
    dataset = from_records(pairs(("Q: 1", " A"), ("Q: 2", " B")), TOKENIZER, MAX_LEN)
    assert dataset.kind == "completion"
    assert texts(dataset) == [("<s>Q: 1", " A"), ("<s>Q: 2", " B")]
    assert [sample.completion for sample in dataset.samples] == [" A", " B"]
    assert dataset.truncated_lines == ()


def test_a_completion_is_tokenised_as_what_follows_its_prompt() -> None:
    """On its own this tokenizer would put a space before it."""
    spaced = make_tokenizer(space=True)
    (sample,) = from_records(pairs(("a", "bc")), spaced, MAX_LEN).samples
    assert spaced.decode(sample.completion_token_ids) == "bc"
    assert spaced.encode("bc", add_special_tokens=False) != list(sample.completion_token_ids)


def test_a_token_never_spans_prompt_and_completion() -> None:
    merging = make_tokenizer(merges=("ab",))
    assert len(merging.encode("ab", add_special_tokens=False)) == 1
    dataset = from_records(pairs(("xa", "bc")), merging, MAX_LEN)
    assert texts(dataset, merging) == [("<s>xa", "bc")]


def test_chat_is_the_templates_prompt_and_its_reply_up_to_the_end_of_turn() -> None:
    record = chat(
        ("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "?"), ("assistant", "!")
    )
    dataset = from_records([record], TOKENIZER, MAX_LEN)
    assert dataset.kind == "chat"
    prompt = "<s><system>S<user>Hi<assistant>Ho</s>\n<user>?<assistant>"
    assert texts(dataset) == [(prompt, "!</s>")]
    assert dataset.samples[0].completion == "!"


def test_prompts_alone_have_no_completion() -> None:
    dataset = from_records([{"prompt": "a"}, {"prompt": "b"}], TOKENIZER, MAX_LEN)
    assert dataset.kind == "prompt"
    assert texts(dataset) == [("<s>a", ""), ("<s>b", "")]


def test_a_file_is_its_records(tmp_path: Path) -> None:
    records = pairs(("é", " ü"), ("\n", "\u2028"))  # a line separator that ends no line of JSONL
    path = write(tmp_path / "d.jsonl", *(json.dumps(r, ensure_ascii=False) for r in records))
    assert load(path, TOKENIZER, MAX_LEN) == from_records(records, TOKENIZER, MAX_LEN)


def test_the_last_line_needs_no_end_and_windows_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\r\n{"prompt": "b"}')
    assert len(load(path, TOKENIZER, MAX_LEN).samples) == 2


def test_one_line_is_a_data_set(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"prompt": "a"}')
    assert len(load(str(path), TOKENIZER, MAX_LEN).samples) == 1


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=5))
def test_fingerprint_knows_content_and_order_alone(samples: list[tuple[str, str]]) -> None:
    records = pairs(*samples)
    dataset = from_records(records, TOKENIZER, 10_000)
    turned = [dict(reversed(record.items())) for record in records]
    respelt = [json.loads(json.dumps(record, indent=3)) for record in turned]
    assert from_records(respelt, TOKENIZER, 10_000).fingerprint == dataset.fingerprint
    others = [records[:-1], records[::-1], [*records, *pairs(("x", "y"))]]
    for other in (other for other in others if other and other != records):
        assert from_records(other, TOKENIZER, 10_000).fingerprint != dataset.fingerprint


def test_fingerprint_tells_where_the_prompt_ends() -> None:
    one, two = (from_records(pairs(p), TOKENIZER, MAX_LEN) for p in (("a", "bc"), ("ab", "c")))
    assert one.fingerprint != two.fingerprint


def test_fingerprint_stays_what_it_was() -> None:
    """Records on disk hold it: whoever changes the content's form changes its first line too."""
    content = b'boundary data set 1\n{"completion":"\xc3\xa9","prompt":"a"}\n'
    dataset = from_records(pairs(("a", "é")), TOKENIZER, MAX_LEN)
    assert dataset.fingerprint == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_long_prompt_loses_its_start_but_bos_and_is_reported() -> None:
    records = pairs(("short", "12"), ("0123456789", "ab"), ("0123456", "ab"))
    dataset = from_records(records, TOKENIZER, 10)
    assert texts(dataset) == [("<s>short", "12"), ("<s>3456789", "ab"), ("<s>0123456", "ab")]
    assert dataset.truncated_lines == (2,)


def test_a_long_prompt_alone_is_cut_to_the_whole_context() -> None:
    dataset = from_records([{"prompt": "0123456789"}], TOKENIZER, 4)
    assert texts(dataset) == [("<s>789", "")]
    assert dataset.truncated_lines == (1,)


@given(prompt=st.text(min_size=1), completion=st.text("ab", min_size=1), max_len=st.integers(2, 40))
def test_every_sample_fits_and_completions_are_whole(
    prompt: str, completion: str, max_len: int
) -> None:
    records = pairs((prompt, completion))
    if len(completion) >= max_len:
        assert error(records, max_len=max_len).field == "completion"
        return
    dataset = from_records(records, TOKENIZER, max_len)
    (sample,) = dataset.samples
    whole = TOKENIZER.encode(prompt)
    assert len(sample.prompt_token_ids) == min(len(whole), max_len - len(completion))
    assert texts(dataset)[0][1] == completion
    assert (sample.prompt_token_ids == tuple(whole)) == (dataset.truncated_lines == ())


def test_a_completion_that_leaves_a_prompt_no_room_is_refused_with_its_line() -> None:
    found = error(pairs(("a", "b"), ("a", "x" * 10)), max_len=10)
    assert (found.line, found.field) == (2, "completion")
    assert "10 tokens" in str(found)
    long_chat = chat(("user", "Hi"), ("assistant", "x" * 10))
    assert error([long_chat], max_len=10).field == "messages[1].content"


@pytest.mark.parametrize(
    ("record", "field", "what"),
    [
        ([], None, "line 2 is not a JSON object: []"),
        (None, None, "not a JSON object"),
        ({}, "prompt", "missing"),
        ({"completion": "a"}, "prompt", "line 2: 'prompt' is missing"),
        ({"prompt": "a", "completion": "b", "x": 1}, "x", "no field"),
        ({"prompt": "a", "messages": []}, "messages", "stands alone"),
        ({"prompt": 1, "completion": "b"}, "prompt", "must be a string, got 1"),
        ({"prompt": "a", "completion": None}, "completion", "must be a string, got None"),
        ({"prompt": "a", "completion": ["b"]}, "completion", "must be a string"),
        ({"prompt": "a", "completion": ""}, "completion", "encodes to no token"),
        ({"prompt": "a", "completion": "\ud800"}, "completion", "lone surrogate"),
        ({"prompt": "a"}, None, "has prompt, but the lines before have prompt and completion"),
        (GOOD_CHAT, None, "has messages, but"),
    ],
)
def test_a_bad_sample_is_refused_with_line_and_field(
    record: Any, field: str | None, what: str
) -> None:
    found = error([*pairs(("a", "b")), record])
    assert (found.line, found.field) == (2, field)
    assert what in str(found)


@pytest.mark.parametrize(
    ("messages", "field", "what"),
    [
        ("Hi", "messages", "must be a list"),
        ([], "messages", "got 0"),
        ([{"role": "assistant", "content": "a"}], "messages", "got 1"),
        (["Hi", "Ho"], "messages[0]", "must be an object"),
        ([{"role": "user"}] * 2, "messages[0].content", "is missing"),
        ([{"content": "a"}] * 2, "messages[0].role", "is missing"),
        ([{"role": "user", "content": "a"}] * 2, "messages[1].role", "must be 'assistant'"),
        ([{"role": "user", "content": [1]}] * 2, "messages[0].content", "must be a string"),
        ([{"role": "u", "content": "", "tool": 1}] * 2, "messages[0]", "unknown field 'tool'"),
        (chat(("tool", "a"), ("assistant", "b"))["messages"], "messages", "no role tool"),
        (chat(("user", "a"), ("assistant", ""))["messages"], "messages[1].content", "no token"),
    ],
)
def test_a_bad_chat_is_refused_with_line_and_field(messages: Any, field: str, what: str) -> None:
    found = error([GOOD_CHAT, {"messages": messages}])
    assert (found.line, found.field) == (2, field)
    assert what in str(found)


def test_chat_needs_a_template() -> None:
    found = error([GOOD_CHAT], make_tokenizer(None))
    assert (found.line, found.field) == (1, "messages")
    assert "chat template" in str(found)


def test_a_template_that_replies_otherwise_than_it_prompts_is_refused() -> None:
    thinking = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    assert "cannot be split" in str(error([GOOD_CHAT], make_tokenizer(thinking)))


def test_a_prompt_of_no_token_is_refused() -> None:
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    assert error(pairs(("", "a")), bare).field == "prompt"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"", "line 2 is blank"),
        (b" \t\r", "line 2 is blank"),
        (b'{"prompt": "a"', "line 2 is not JSON"),
        (b"\xff\xfe", "line 2 is not UTF-8: byte 0 is 0xff"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "line 2 is not JSON"),
        (b'{"prompt": NaN}', "line 2 holds NaN"),
        (b'{"prompt": "a", "prompt": "b"}', "line 2 gives 'prompt' more than once"),
        (b'{"prompt": "\\ud800"}', "line 2 holds a lone surrogate"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
        (b"1" * 5000, "line 2"),
        (b'{"prompt": "a"}{"prompt": "b"}', "line 2 is not JSON: Extra data"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    with pytest.raises(DatasetError) as caught:
        load(path, TOKENIZER, MAX_LEN)
    assert caught.value.line == 2
    assert what in str(caught.value)


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with suppress(DatasetError):
        load(path, TOKENIZER, MAX_LEN)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no samples"):
        load(write(tmp_path / "d.jsonl"), TOKENIZER, MAX_LEN)
    assert "no samples" in str(error([]))


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *['{"prompt": "a"}'] * 3)
    size = path.stat().st_size
    assert len(load(path, TOKENIZER, MAX_LEN, max_file_bytes=size, max_samples=3).samples) == 3
    with pytest.raises(DatasetError, match=f"limit of {size - 1} bytes"):
        load(path, TOKENIZER, MAX_LEN, max_file_bytes=size - 1)
    with pytest.raises(DatasetError, match="3 lines are over the limit of 2"):
        load(path, TOKENIZER, MAX_LEN, max_samples=2)
    with pytest.raises(DatasetError, match="3 samples are over the limit of 2"):
        from_records([{"prompt": "a"}] * 3, TOKENIZER, MAX_LEN, max_samples=2)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, what in [("none", "No such file"), (".", "regular"), ("pipe", "regular")]:
        with pytest.raises(DatasetError, match=what):
            load(tmp_path / name, TOKENIZER, MAX_LEN)
    with pytest.raises(DatasetError, match="null"):
        load("a\0b", TOKENIZER, MAX_LEN)


def test_a_context_too_short_for_anything_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="max_len"):
        from_records([{"prompt": "a"}], TOKENIZER, 1)


def test_no_more_than_the_first_are_taken_or_looked_at(tmp_path: Path) -> None:
    records: list[object] = [*pairs(("a", "b"), ("c", "d")), "no record"]
    lines = [json.dumps(record) for record in records[:2]] + ["{"]
    path = write(tmp_path / "data.jsonl", *lines)
    whole = from_records(records[:2], TOKENIZER, MAX_LEN)
    for taken in (
        from_records(records, TOKENIZER, MAX_LEN, first=2),
        load(path, TOKENIZER, MAX_LEN, first=2),
    ):
        assert (taken.samples, taken.fingerprint) == (whole.samples, whole.fingerprint)
        assert (taken.num_given, whole.num_given) == (3, 2)
    with pytest.raises(DatasetError, match="line 3"):
        load(path, TOKENIZER, MAX_LEN, first=3)
    with pytest.raises(DatasetError, match="no samples"):
        load(path, TOKENIZER, MAX_LEN, first=0)
