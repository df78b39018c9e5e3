"""Incremental text against decoding everything at once, and stop strings against a plain search."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from server.engine.detokenizer import Detokenizer

REPLACEMENT = "\ufffd"
TEXT = "Hello, world! 你好世界 😀👩‍👩‍👧 naïve the end."


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, some merges within and across characters of several bytes, special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for left, right in ["he", "ll", ("he", "ll"), "Ġw", "or", "ä½", "½ł", "ðŁ", ("ðŁ", "ĺ")]:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: metaspace, `<0xNN>` tokens for what has none, one space stripped."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [
        *("▁", "▁Hello", "Hello", "▁world", "!", ",", "▁▁", "lo", "é", "你", "▁你好"),
    ]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", "</s>", "▁", "▁Hello", "Hello", "▁world", "!", "lo", "▁▁", "你", "▁好", "😀"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    pieces = [
        "[UNK]",
        "[SEP]",
        "hello",
        "##ing",
        "##s",
        ".",
        ",",
        "n't",
        "do",
        "not",
        "你",
        "##好",
        "'s",
    ]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", unk_token="[UNK]")


class SlowByteTokenizer(PythonBackend):
    """A slow tokenizer of bytes, as ByT5's: ids are bytes, 256 is its end token."""

    vocab_size = 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(256)} | dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        data = b"".join(t.encode() if len(t) > 1 else t.encode("latin-1") for t in tokens)
        return data.decode(errors="replace")


def bytes_to_chars() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_CHARS = bytes_to_chars()


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": metaspace(),
    "word_piece": word_piece(),
    "slow": SlowByteTokenizer(eos_token="<eos>"),
}
NAMES = st.sampled_from(list(TOKENIZERS))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip: bool) -> str:
    known = [i for i in ids if i < len(tokenizer)]
    text = tokenizer.decode(known, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def stream(
    detokenizer: Detokenizer, token_ids: Sequence[int], size: int = 1
) -> tuple[list[str], str | None]:
    """Append `size` tokens a call, then finish unless a stop string matched."""
    pieces = []
    for start in range(0, len(token_ids), size):
        piece, stop = detokenizer.append(token_ids[start : start + size])
        pieces.append(piece)
        if stop is not None:
            assert detokenizer.finish() == ""
            return pieces, stop
    pieces.append(detokenizer.finish())
    return pieces, None


def byte_runs(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Sequence[bytes]:
    """The runs of byte tokens, special tokens skipped, that byte fallback decodes as one."""
    runs, run = [], b""
    for token in tokenizer.convert_ids_to_tokens([i for i in ids if 2 < i < len(tokenizer)]):
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
        else:
            runs, run = [*runs, run], b""
    return [*runs, run]


def is_valid(run: bytes) -> bool:
    return REPLACEMENT not in run.decode(errors="replace")


@st.composite
def tokens(draw: st.DrawFn, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Random ids, some beyond the tokenizer, mixed with real text cut anywhere."""
    wild = st.lists(st.integers(0, len(tokenizer) + 3), max_size=12)
    text = st.text("é你😀👩‍ \ufffd" + "Hello, world!", max_size=8).map(
        lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    ids = [i for part in draw(st.lists(wild | text, max_size=5)) for i in part]
    start = draw(st.integers(0, min(3, len(ids))))
    return ids[start:]


@settings(max_examples=200, deadline=None)
@given(st.data(), NAMES, st.booleans())
def test_released_text_adds_up_to_decoding_everything(
    data: st.DataObject, name: str, skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(tokens(tokenizer))
    if name == "byte_fallback" and not all(map(is_valid, byte_runs(tokenizer, ids))):
        return
    pieces, _ = stream(Detokenizer(tokenizer, [], (), skip), ids)
    assert "".join(pieces) == decode(tokenizer, ids, skip)


@settings(max_examples=200, deadline=None)
@given(st.data(), NAMES, st.booleans())
def test_text_continues_the_prompt(data: st.DataObject, name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, ids = data.draw(tokens(tokenizer)), data.draw(tokens(tokenizer))
    before, whole = decode(tokenizer, prompt, skip), decode(tokenizer, prompt + ids, skip)
    special = set(tokenizer.all_special_ids)
    if before.endswith(REPLACEMENT) or not before or special.intersection(prompt):
        return
    if name == "byte_fallback" and not all(map(is_valid, byte_runs(tokenizer, prompt + ids))):
        return
    pieces, _ = stream(Detokenizer(tokenizer, prompt, (), skip), ids)
    assert before + "".join(pieces) == whole


@settings(max_examples=200, deadline=None)
@given(st.data(), NAMES)
def test_what_is_released_never_changes(data: st.DataObject, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(tokens(tokenizer))
    detokenizer = Detokenizer(tokenizer, [], (), True)
    released = ""
    for token_id in ids:
        piece, _ = detokenizer.append([token_id])
        assert not piece.endswith(REPLACEMENT)
        released += piece
        assert detokenizer.text == released
    assert detokenizer.text + detokenizer.finish() == detokenizer.text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_byte_fallback_keeps_the_characters_before_an_invalid_byte(data: st.DataObject) -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    run = data.draw(
        st.lists(st.sampled_from(["é", "你", "😀"]).map(str.encode) | st.binary(max_size=2)).map(
            b"".join
        )
    )
    offset = tokenizer.convert_tokens_to_ids("<0x00>")
    start, end = tokenizer.convert_tokens_to_ids(["lo", "!"])
    try:
        expected = run.decode()
    except UnicodeDecodeError as error:
        expected = run[: error.start].decode() + REPLACEMENT * (len(run) - error.start)
    pieces, _ = stream(
        Detokenizer(tokenizer, [], (), True), [start, *(offset + byte for byte in run), end]
    )
    assert "".join(pieces) == "lo" + expected + "!"


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "slow"])
def test_characters_cut_over_tokens_come_out_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces, _ = stream(Detokenizer(tokenizer, [], (), True), ids)
    assert "".join(pieces) == decode(tokenizer, ids, True)
    assert REPLACEMENT not in "".join(pieces)
    assert {"你", "😀"} <= {char for piece in pieces for char in piece}
    # Decoding each token by itself, the mistake this guards against, breaks characters.
    assert REPLACEMENT in "".join(decode(tokenizer, [i], True) for i in ids)


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_the_first_token_keeps_its_leading_space(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    hello, world = tokenizer.convert_tokens_to_ids(["▁Hello", "▁world"])
    assert Detokenizer(tokenizer, [hello], (), True).append([world]) == (" world", None)
    assert Detokenizer(tokenizer, [], (), True).append([world]) == ("world", None)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "slow"])
@pytest.mark.parametrize("num_chars", range(1, 5))
@pytest.mark.parametrize("cut", range(4))
def test_a_prompt_may_end_inside_a_character(name: str, num_chars: int, cut: int) -> None:
    tokenizer = TOKENIZERS[name]
    encoded = [
        tokenizer.convert_tokens_to_ids(
            {"byte_level": BYTE_CHARS[byte], "byte_fallback": f"<0x{byte:02X}>"}.get(
                name, chr(byte)
            )
        )
        for byte in ("x" + "😀" * num_chars + "!").encode()
    ]
    split = len(encoded) - 1 - cut
    pieces, _ = stream(Detokenizer(tokenizer, encoded[:split], (), True), encoded[split:])
    assert "".join(pieces) == ("😀!" if cut else "!")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "slow"])
@pytest.mark.parametrize("num_broken", range(1, 4))
def test_a_broken_end_of_the_prompt_is_not_text_of_the_continuation(
    name: str, num_broken: int
) -> None:
    tokenizer = TOKENIZERS[name]
    [broken] = {"byte_level": [tokenizer.convert_tokens_to_ids(BYTE_CHARS[0xFF])]}.get(
        name, [tokenizer.convert_tokens_to_ids("<0xFF>") if name == "byte_fallback" else 0xFF]
    )
    prompt = tokenizer.encode("x", add_special_tokens=False) + [broken] * num_broken
    ids = tokenizer.encode("!", add_special_tokens=False)
    assert "".join(stream(Detokenizer(tokenizer, prompt, (), True), ids)[0]) == "!"
    assert stream(Detokenizer(tokenizer, prompt, (), True), [])[0] == [""]


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, int, str] | None:
    """End, start and stop string of the match that is complete first, character by character."""
    for end in range(len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            longest = max(matches, key=len)
            return end, end - len(longest), longest
    return None


STOPS = st.lists(st.text("ab😀 ", min_size=1, max_size=4), max_size=3, unique=True).map(tuple)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab😀 ", max_size=30),
    stop=STOPS,
    size=st.integers(1, 7),
    name=st.sampled_from(["byte_level", "slow"]),
    include=st.booleans(),
)
def test_text_ends_at_the_first_stop_string(
    text: str, stop: tuple[str, ...], size: int, name: str, include: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, matched = stream(Detokenizer(tokenizer, [], stop, True, include), ids, size)
    first = first_stop(text, stop)
    if first is None:
        assert ("".join(pieces), matched) == (text, None)
    else:
        end, start, expected = first
        assert ("".join(pieces), matched) == (text[: end if include else start], expected)


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab", max_size=20), stop=STOPS)
def test_no_beginning_of_a_stop_string_is_released_and_nothing_else_is_held(
    text: str, stop: tuple[str, ...]
) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, [], stop, True)
    for length, token_id in enumerate(tokenizer.encode(text), start=1):
        _, matched = detokenizer.append([token_id])
        if matched is not None:
            return
        seen = text[:length]
        held = [n for n in range(length + 1) if any(s.startswith(seen[length - n :]) for s in stop)]
        assert detokenizer.text == seen[: length - max(held, default=0)]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("hell",), ("", "hell")),
        (("ell",), ("h", "ell")),
        (("o w", "world"), ("hell", "o w")),
        (("o world!",), ("hell", "o world!")),
        (("world", "o w"), ("hell", "o w")),
        (("worlds", "!"), ("hello world", "!")),
        (("llo", "lo"), ("he", "llo")),
        (("xyz",), ("hello world!", None)),
        (("!!",), ("hello world!", None)),
    ],
)
def test_stop_strings_inside_one_token_and_over_several(
    stop: tuple[str, ...], expected: tuple[str, str | None]
) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("hello world!")
    assert "hell" in tokenizer.convert_ids_to_tokens(ids)
    pieces, matched = stream(Detokenizer(tokenizer, [], stop, True), ids)
    assert ("".join(pieces), matched) == expected


def test_a_stop_string_is_not_looked_for_in_the_prompt() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("stop"), ("stop", "p!"), True)
    assert detokenizer.append(tokenizer.encode("!")) == ("!", None)


def test_special_tokens_are_text_only_when_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    for skip, expected in [(True, "ab"), (False, "a<eos>b")]:
        assert "".join(stream(Detokenizer(tokenizer, [], (), skip), ids)[0]) == expected
    assert stream(Detokenizer(tokenizer, [], ("<eos>",), False), ids)[1] == "<eos>"


def test_garbage_bytes_cost_no_more_than_text(monkeypatch: pytest.MonkeyPatch) -> None:
    detokenizer = Detokenizer(TOKENIZERS["slow"], [], (), True)
    num_decoded = 0
    decode_window = detokenizer._decode

    def counted(ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode_window(ids)

    monkeypatch.setattr(detokenizer, "_decode", counted)
    garbage = random.Random(0).choices(range(0x80, 0x100), k=2000)
    pieces, _ = stream(detokenizer, garbage)
    assert "".join(pieces) == bytes(garbage).decode(errors="replace")
    assert num_decoded < 20 * len(garbage)


def test_stop_strings_count_only_from_min_tokens_on() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a.b.c.d", add_special_tokens=False)
    assert len(ids) == 7

    def text(min_tokens: int) -> str:
        detokenizer = Detokenizer(tokenizer, [], (".",), True, min_tokens=min_tokens)
        for token_id in ids:
            if detokenizer.append([token_id])[1] is not None:
                break
        detokenizer.finish()
        return detokenizer.text

    assert [text(n) for n in (0, 1, 2, 3, 4, 5, 9)] == [
        "a",
        "a",
        "a",
        "a.b",
        "a.b",
        "a.b.c",
        "a.b.c.d",
    ]
