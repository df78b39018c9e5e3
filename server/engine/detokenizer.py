"""Token ids to text as they come, held back where a later token could still change it.

Knows tokenizers and stop strings; knows no engine. One `Detokenizer` a sequence, fed by the
engine's postprocessing. What is released is never taken back: no half of a character, and no
beginning of a stop string.

Text is decoded in a window of the last tokens that gave text and the tokens after them: a token's
text depends on what it follows (SentencePiece and WordPiece put a space before all but the first),
so the window starts inside the prompt, and the text of its context is cut off. This is what
tokenizers' `DecodeStream` does, but that raises when a byte-fallback run turns invalid after a
released character, and gives out the prompt's text where the prompt ends inside a character
(tokenizers 0.23), and it serves fast tokenizers only.

The released text adds up to `decode(prompt + generated)` after the prompt's own text, with three
exceptions. Clean-up of spaces (`clean_up_tokenization_spaces`) is not applied: it rewrites text
that is already out. A byte-fallback run that turns invalid keeps the characters it began with,
where a whole decode replaces every byte of it. And slow tokenizers may look further back than
the window.
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NUM_CONTEXT_TOKENS = 7
"""How much of the prompt's end is context: at least one whole character where each takes up to 4
byte tokens, wherever the first is cut."""

MAX_PARTIAL_TOKENS = 3
"""How many of the prompt's last tokens may be the beginning of a character that comes to its end
in the first generated tokens."""

NUM_PROBE_TOKENS = 8
"""A window longer than this that ends in these tokens' incomplete character is not decoded again
until it may be complete, so that a run of garbage bytes costs no more a token than text does."""

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental text of one sequence, ending before the first stop string."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...],
        skip_special_tokens: bool,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Text that completes before the `min_tokens`-th token is searched for no stop string."""
        self._decode = _decoder(tokenizer, skip_special_tokens)
        self._stop = stop
        self._include_stop = include_stop_str_in_output
        self._released: list[str] = []
        self._held = ""
        self._is_stopped = False
        self._num_before_stop = max(min_tokens - 1, 0)
        context, partial = _prompt_end(
            self._decode, list(prompt_token_ids[-(NUM_CONTEXT_TOKENS + MAX_PARTIAL_TOKENS) :])
        )
        self._window = context + partial
        self._num_context = len(context)
        self._context = self._decode(context)
        # What a beginning of a character is as text belongs to the prompt, unless it is completed.
        self._prompt_rest = self._behind_context(self._decode(self._window))

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._released)

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Take tokens; return the text they release and the stop string they complete, if any.

        The stop string that is complete first wins, and of two that end together the longer, so
        the text does not depend on how many tokens come in a call. It ends before the stop
        string (or behind it, with `include_stop_str_in_output`), and no more may be appended.
        """
        assert not self._is_stopped
        text = ""
        for token_id in token_ids:
            self._window.append(token_id)
            advanced = self._advance()
            if self._num_before_stop > 0:
                self._num_before_stop -= 1
                self._released.append(advanced)
                text += advanced
                continue
            released, stop = self._release(advanced)
            text += released
            if stop is not None:
                return text, stop
        return text, None

    def finish(self) -> str:
        """Release everything held back; an incomplete character as the tokenizer decodes it."""
        if self._is_stopped:
            return ""
        rest = self._behind_context(self._decode(self._window))
        text, stop = self._release(rest.removeprefix(self._prompt_rest))
        self._is_stopped = True
        if stop is None:
            self._released.append(self._held)
            text += self._held
        return text

    def _advance(self) -> str:
        """The text that the window's newest token completes, if any; then the window moves on."""
        if len(self._window) - self._num_context > NUM_PROBE_TOKENS:
            probe = self._decode(self._window[-NUM_PROBE_TOKENS:])
            if probe.endswith(REPLACEMENT):
                return ""
        window = self._decode(self._window)
        if window.endswith(REPLACEMENT):
            return ""
        text = self._behind_context(window)
        if text:
            moved = self._window[self._num_context :]
            self._context = self._decode(moved)
            if self._context:
                self._window = moved
            else:  # a decoder that strips a leading space reads nothing in a lone one: more is kept
                self._context = window
            self._num_context = len(self._window)
            text = text.removeprefix(self._prompt_rest)
            self._prompt_rest = ""
        return text

    def _behind_context(self, window: str) -> str:
        if window.startswith(self._context):
            return window[len(self._context) :]
        # A run of byte tokens turned invalid, and its first characters are out already.
        return self._decode(self._window[self._num_context :])

    def _release(self, text: str) -> tuple[str, str | None]:
        """Add decoded text; release all that no stop string can begin in, or end at one."""
        if not self._stop:
            self._released.append(text)
            return text, None
        text = self._held + text
        found = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop)) >= 0
        ]
        if found:
            end, start, stop = min(found)
            self._is_stopped = True
            self._held = ""
            released = text[: end if self._include_stop else start]
        else:
            stop = None
            num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
            released, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        self._released.append(released)
        return released, stop


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _prompt_end(
    decode: Callable[[list[int]], str], token_ids: list[int]
) -> tuple[list[int], list[int]]:
    """The prompt's last tokens that read as whole characters, and those behind that do not."""
    for num_partial in range(min(MAX_PARTIAL_TOKENS, len(token_ids)) + 1):
        whole = token_ids[: len(token_ids) - num_partial]
        for num_context in range(min(NUM_CONTEXT_TOKENS, len(whole)), 0, -1):
            context = whole[-num_context:]
            text = decode(context)
            # One incomplete character spoils all of a run of byte-fallback tokens.
            if text and not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                return context, token_ids[len(whole) :]
    return token_ids[-NUM_CONTEXT_TOKENS:], []


def _decoder(
    tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool
) -> Callable[[list[int]], str]:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        return lambda ids: str(backend.decode(ids, skip_special_tokens=skip_special_tokens))
    num_tokens = len(tokenizer)

    def decode(ids: list[int]) -> str:
        # A model may know more ids than its tokenizer; fast tokenizers pass over them too.
        known = [token_id for token_id in ids if token_id < num_tokens]
        return str(
            tokenizer.decode(
                known,
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    return decode
