"""The engine's `TokenLogprobs` -> the three shapes in which clients read them.

Completions have parallel lists, chat a list of tokens with bytes, and vLLM's `prompt_logprobs` a
table by token id. A position reports its own token and the most likely ones, so a completion's
table may hold one more than was asked for.
"""

from collections.abc import Iterable, Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob

from server.api.responses import PromptLogprob, TextLogprobs
from server.api.token_text import TokenText
from server.engine.request import TokenLogprobs

Positions = Iterable[TokenLogprobs | None]
"""One entry a token; None for the first of a prompt, which nothing precedes."""


class TextLogprobsWriter:
    """One choice's `logprobs` in the shape of completions, part by part as its text grows.

    Offsets count characters of the choice's text: a token inside a character has the offset of what
    follows that character, and a special token that the text leaves out takes no room.
    """

    def __init__(self, tokens: TokenText, num_top: int, *, skips_special: bool) -> None:
        self._tokens = tokens
        self._num_top = num_top
        self._skips_special = skips_special
        self._offset = 0

    def echo(
        self, part: TextLogprobs, token_ids: Sequence[int], positions: Positions, text: str
    ) -> None:
        """Add a prompt's tokens, whose text is known and may lack a first space or special tokens."""
        for token_id, position in zip(token_ids, positions, strict=True):
            self._add(part, token_id, position)
            piece = self._tokens.text(token_id)
            if self._tokens.is_special(token_id):
                self._offset += len(piece) if text.startswith(piece, self._offset) else 0
            else:
                lacks_space = piece.startswith(" ") and not text.startswith(" ", self._offset)
                self._offset += self._tokens.num_chars(token_id) - lacks_space
        self._offset = len(text)

    def write(self, part: TextLogprobs, token_ids: Sequence[int], positions: Positions) -> None:
        """Add the next generated tokens."""
        for token_id, position in zip(token_ids, positions, strict=True):
            self._add(part, token_id, position)
            if not (self._skips_special and self._tokens.is_special(token_id)):
                self._offset += self._tokens.num_chars(token_id)

    def _add(self, part: TextLogprobs, token_id: int, position: TokenLogprobs | None) -> None:
        text = self._tokens.text(token_id)
        part.tokens.append(text)
        part.text_offset.append(self._offset)
        if position is None:
            part.token_logprobs.append(None)
            part.top_logprobs.append(None)
            return
        part.token_logprobs.append(position.logprob)
        top = {
            self._tokens.text(other): logprob for other, logprob in position.top[: self._num_top]
        }
        top.setdefault(text, position.logprob)
        part.top_logprobs.append(top)


def chat_logprobs(
    tokens: TokenText, positions: Iterable[TokenLogprobs], num_top: int
) -> list[ChatCompletionTokenLogprob]:
    """One entry a token in the shape of chat."""
    return [
        ChatCompletionTokenLogprob(
            token=tokens.text(position.token_id),
            bytes=list(tokens.bytes(position.token_id)),
            logprob=position.logprob,
            top_logprobs=[
                TopLogprob(
                    token=tokens.text(token_id), bytes=list(tokens.bytes(token_id)), logprob=logprob
                )
                for token_id, logprob in position.top[:num_top]
            ],
        )
        for position in positions
    ]


def prompt_logprobs(
    tokens: TokenText, positions: Positions, num_top: int
) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's `prompt_logprobs`: by token id, each with rank and text."""
    table: list[dict[str, PromptLogprob] | None] = []
    for position in positions:
        if position is None:
            table.append(None)
            continue
        ranked = [
            (token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(position.top[:num_top], start=1)
        ]
        own = (position.token_id, position.logprob, position.rank)
        table.append(
            {
                str(token_id): PromptLogprob(
                    logprob=logprob, rank=rank, decoded_token=tokens.text(token_id)
                )
                for token_id, logprob, rank in [own, *ranked]
            }
        )
    return table
