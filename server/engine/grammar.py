"""Structured output: an llguidance grammar as a mask of the tokens that may come next.

Knows tokenizers and llguidance; knows no logits and no engine. One `GrammarCompiler` a model is
shared: the door checks a grammar before anything is queued, then the engine takes one `Matcher`
a sequence. A matcher belongs to the thread that uses it.
"""

import threading
from collections import OrderedDict

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.errors import BadRequest, GenerationError

MAX_GRAMMAR_BYTES = 64 * 1024

MAX_COMPILED = 32
"""Checked grammars kept compiled for the engine, the oldest out first: each costs a millisecond,
the largest a second, for which the engine's thread then need not wait."""

MAX_REASON_CHARS = 1000
"""Where llguidance's words are cut: some of its messages list every special token."""


class GrammarCompiler:
    """Compiles grammars for one model's tokenizer; any thread may call it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        """`vocab_size` is the model's; the tokenizer's may be smaller or larger."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._checked: OrderedDict[str, LLMatcher] = OrderedDict()

    def check(self, grammar: str) -> None:
        """Compile a grammar. Raises BadRequest with the compiler's words."""
        with self._lock:
            if grammar in self._checked:
                self._checked.move_to_end(grammar)
                return
        compiled = self._compile(grammar)
        with self._lock:
            self._checked[grammar] = compiled
            if len(self._checked) > MAX_COMPILED:
                self._checked.popitem(last=False)

    def matcher(self, grammar: str) -> "Matcher":
        """A matcher at the grammar's start, for one sequence. Raises BadRequest as `check` does.

        No two share a compilation: copies of one share its lexer, and with it each other's errors
        (llguidance 1.9).
        """
        with self._lock:
            compiled = self._checked.pop(grammar, None)
        if compiled is None:
            compiled = self._compile(grammar)
        return Matcher(compiled, self._tokenizer_once(), self._vocab_size)

    def _compile(self, grammar: str) -> LLMatcher:
        try:
            num_bytes = len(grammar.encode())
        except UnicodeEncodeError as error:
            raise _refusal(str(error)) from error
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise _refusal(f"it has {num_bytes} bytes, and the limit is {MAX_GRAMMAR_BYTES}")
        tokenizer = self._tokenizer_once()
        limits = LLParserLimits(verbose_errors=False)
        compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise _refusal(compiled.get_error())
        # The first mask builds the lexer, which is where some grammars turn out to be too large;
        # the second is the first to say so.
        for start in (compiled.deep_copy(), compiled):
            try:
                mask = Matcher(start, tokenizer, self._vocab_size).mask()
            except GenerationError as error:
                raise _refusal(error.message) from error
        if not mask.any():
            raise _refusal("no token of this model may begin it")
        return compiled

    def _tokenizer_once(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, made on first use: about a second for 128k tokens."""
        with self._lock:
            if self._ll_tokenizer is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise _refusal("this model's tokenizer is a slow one: it cannot be constrained")
                num_tokens = len(self._tokenizer)
                eos = sorted(i for i in self._eos_token_ids if i < num_tokens)
                self._ll_tokenizer = from_tokenizer(self._tokenizer, eos_token=eos or None)
            return self._ll_tokenizer


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._mask: NDArray[np.int32] | None = None

    def mask(self) -> NDArray[np.int32]:
        """Which tokens may come next: int32 [ceil(vocab_size / 32)], the lowest bit first.

        Not to be written to. Raises GenerationError when llguidance gives up on the grammar.
        """
        if self._mask is None:
            words = allocate_token_bitmask(1, self._tokenizer.vocab_size)
            fill_next_token_bitmask(self._matcher, words)
            # After an error llguidance's mask is the end token, as if the text were complete.
            if self._matcher.is_error():
                reason = _reason(self._matcher.get_error())
                if reason == "NoExtensionBias":
                    reason = "no text can match it from here"
                raise GenerationError(f"the grammar failed: {reason}")
            self._mask = _fit(words[0], self._vocab_size)
        return self._mask

    def advance(self, token_id: int) -> None:
        """Take a token. Raises GenerationError when the grammar does not allow it."""
        self._mask = None
        if not self._matcher.consume_token(token_id):
            reason = _reason(self._matcher.get_error())
            raise GenerationError(f"the grammar does not allow token {token_id}: {reason}")

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but an end token may follow."""
        if self._matcher.is_error() or not self._matcher.is_accepting():
            return False
        if self._matcher.is_stopped():
            return True
        others = self.mask().copy()
        for token_id in self._tokenizer.eos_tokens:
            if token_id < self._vocab_size:
                others.view(np.uint32)[token_id // 32] &= np.uint32(
                    ~(1 << token_id % 32) & 0xFFFFFFFF
                )
        return not others.any()


def _fit(words: NDArray[np.int32], vocab_size: int) -> NDArray[np.int32]:
    """A tokenizer's mask at the model's size: no bit set that the model has no token for."""
    fitted = np.zeros((vocab_size + 31) // 32, np.int32)
    num_words = min(len(words), len(fitted))
    fitted[:num_words] = words[:num_words]
    if vocab_size % 32:
        fitted.view(np.uint32)[-1] &= np.uint32((1 << vocab_size % 32) - 1)
    return fitted


def _refusal(reason: str) -> BadRequest:
    return BadRequest(f"the grammar is refused: {_reason(reason)}", code="invalid_grammar")


def _reason(message: str) -> str:
    message = message.removesuffix("<non-verbose/>").strip()
    return message if len(message) <= MAX_REASON_CHARS else message[:MAX_REASON_CHARS] + " ..."
