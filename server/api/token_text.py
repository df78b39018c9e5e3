"""Token id -> its own bytes, and a text that tells it from every other token.

A token may be part of a character. Decoding it alone gives a replacement character, which many
tokens share, so that a table keyed by text would merge them; such a token is written
`bytes:\\xe2\\x9c`, as OpenAI's completions do.
"""

import asyncio
from functools import cached_property

from llguidance import LLTokenizer, hf
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.errors import BadRequest


class TokenText:
    """Texts and bytes of single tokens.

    `load` builds the byte table, which takes a second for a large vocabulary, on a worker thread:
    requests that will report log-probabilities wait for it before they are queued.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)

    async def load(self) -> None:
        """Build the table if this is the first need of it. Raises BadRequest if it cannot be."""
        await asyncio.to_thread(getattr, self, "_table")

    def bytes(self, token_id: int) -> bytes:
        """What the token stands for, a leading space included."""
        return self._table.decode_bytes([token_id])

    def num_chars(self, token_id: int) -> int:
        """Characters that begin in this token."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes(token_id))

    def is_special(self, token_id: int) -> bool:
        """Whether texts may leave this token out."""
        return token_id in self._special_ids

    def text(self, token_id: int) -> str:
        """The token's text, or its bytes spelled out where they are no whole characters."""
        spelled = self.bytes(token_id)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    @cached_property
    def _table(self) -> LLTokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            raise BadRequest(
                "log-probabilities need a fast tokenizer, which this model has not",
                param="logprobs",
            )
        return hf.from_tokenizer(self._tokenizer, slices=[])
