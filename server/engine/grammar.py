"""Structured output: an llguidance grammar as a mask of the tokens that may come next.

Knows tokenizers and llguidance; knows no logits and no engine. One `GrammarCompiler` a model is
shared: the door checks a grammar before anything is queued, then the engine takes one `Matcher`
a sequence. A matcher belongs to the thread that uses it. A grammar that nobody compiled before is
proved by `grammar_prover` first.
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from hashlib import blake2b

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engine.grammar_prover import LIMITS, GrammarProver, rehearse
from server.errors import BadRequest, GenerationError, GrammarFailed, QueueFull

MAX_GRAMMAR_BYTES = 64 * 1024

MAX_COMPILED = 32
"""Checked grammars kept compiled for the engine, the oldest out first: each costs a millisecond,
the largest a second, for which the engine's thread then need not wait."""

NUM_CHECKING, MAX_SUBMITTED = 2, 64
"""Threads that compile for the door, and the grammars that may be on or before them."""

MAX_PROVED = 4096
"""Grammars of which it is remembered that they may be compiled here."""

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
        self._prover: GrammarProver | None = None
        self._proved: OrderedDict[bytes, None] = OrderedDict()
        self._checked: OrderedDict[str, LLMatcher] = OrderedDict()
        self._checking = ThreadPoolExecutor(NUM_CHECKING, "fathom-grammar")
        self._num_submitted = 0

    def submit_check(self, grammar: str) -> "Future[None]":
        """`check` on one of few threads. Raises QueueFull while many others wait for these."""
        with self._lock:
            if self._num_submitted >= MAX_SUBMITTED:
                raise QueueFull(
                    f"{self._num_submitted} grammars are being compiled, which is the limit"
                )
            self._num_submitted += 1
        future = self._checking.submit(self.check, grammar)
        future.add_done_callback(self._note_checked)
        return future

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

    def close(self) -> None:
        """End the threads that compile, and the process that proves grammars, if one runs."""
        self._checking.shutdown(wait=False, cancel_futures=True)
        if self._prover is not None:
            self._prover.close()

    def _note_checked(self, _: "Future[None]") -> None:
        with self._lock:
            self._num_submitted -= 1

    def _compile(self, grammar: str) -> LLMatcher:
        try:
            content = grammar.encode()
        except UnicodeEncodeError as error:
            raise _refusal(str(error)) from error
        if len(content) > MAX_GRAMMAR_BYTES:
            raise _refusal(f"it has {len(content)} bytes, and the limit is {MAX_GRAMMAR_BYTES}")
        tokenizer = self._tokenizer_once()
        self._prove(grammar, content)
        compiled = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        if compiled.is_error():
            raise _refusal(compiled.get_error())
        # The first mask builds the lexer, which is where some grammars turn out to be too large;
        # the second is the first to say so.
        rehearsal = compiled.deep_copy()
        for start in (rehearsal, compiled):
            try:
                mask = Matcher(start, tokenizer, self._vocab_size).mask()
            except GrammarFailed as error:
                raise _refusal(error.message) from error
        if not mask.any():
            raise _refusal("no token of this model may begin it")
        if problem := rehearse(rehearsal, tokenizer.eos_tokens):
            raise _refusal(_outgrown(problem).message)
        return compiled

    def _prove(self, grammar: str, content: bytes) -> None:
        assert self._prover is not None
        key = blake2b(content, digest_size=16).digest()
        with self._lock:
            if key in self._proved:
                self._proved.move_to_end(key)
                return
        try:
            reason = self._prover.refusal(grammar)
        except OSError as error:  # nothing that the client could change
            raise GenerationError(str(error)) from error
        if reason is not None:
            raise _refusal(reason)
        with self._lock:
            self._proved[key] = None
            if len(self._proved) > MAX_PROVED:
                self._proved.popitem(last=False)

    def _tokenizer_once(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, made on first use: about a second for 128k tokens."""
        with self._lock:
            if self._ll_tokenizer is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
                    raise _refusal("this model's tokenizer is a slow one: it cannot be constrained")
                num_tokens = len(self._tokenizer)
                eos = sorted(i for i in self._eos_token_ids if i < num_tokens)
                content = _json_of(self._tokenizer)
                self._ll_tokenizer = LLTokenizer(content, eos_token=eos or None)
                self._prover = GrammarProver(content, eos)
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

        Not to be written to. Raises GrammarFailed when llguidance gives up on the grammar.
        """
        if self._mask is None:
            words = allocate_token_bitmask(1, self._tokenizer.vocab_size)
            fill_next_token_bitmask(self._matcher, words)
            # After an error llguidance's mask is the end token, as if the text were complete.
            if self._matcher.is_error():
                raise _outgrown(self._matcher.get_error())
            self._mask = _fit(words[0], self._vocab_size)
        return self._mask

    def advance(self, token_id: int) -> None:
        """Take a token. Raises GenerationError when the grammar does not allow it, GrammarFailed
        when it does and llguidance gives up on it.
        """
        mask, self._mask = self._mask, None
        if not self._matcher.consume_token(token_id):
            if mask is not None and _allows(mask, token_id):
                raise _outgrown(self._matcher.get_error())
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


def _allows(mask: NDArray[np.int32], token_id: int) -> bool:
    word = token_id // 32
    return word < len(mask) and bool(int(mask[word]) >> token_id % 32 & 1)


def _json_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """With the tokens that were added to it, and without what was set for batches of texts."""
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    content: str = backend.to_str()
    return content


def _outgrown(problem: str) -> GrammarFailed:
    reason = _reason(problem)
    if reason == "NoExtensionBias":
        reason = "no text can match it from here"
    return GrammarFailed(f"the grammar failed: {reason}")


def _refusal(reason: str) -> BadRequest:
    return BadRequest(f"the grammar is refused: {_reason(reason)}", code="invalid_grammar")


def _reason(message: str) -> str:
    message = message.removesuffix("<non-verbose/>").strip()
    return message if len(message) <= MAX_REASON_CHARS else message[:MAX_REASON_CHARS] + " ..."
