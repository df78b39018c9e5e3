"""How each kind of server is asked and how its stream is read: bodies and events, no sockets.

Tokens are read back from text: the tokenizer has one word a token (`w17` is token 17), so a stream's
text is its token ids. llama.cpp's GGUF has words of its own and sends ids beside them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from server.bench.workload import WorkItem


@dataclass(frozen=True, slots=True)
class Event:
    """What one message of a stream carried."""

    tokens: tuple[int, ...] = ()
    num_output_tokens: int | None = None
    """The server's own total, where the message states it."""
    error: str | None = None


class Dialect(Protocol):
    """One way of asking."""

    path: str
    has_new_connections: bool
    """True where each request gets a connection of its own."""

    def body(self, item: WorkItem) -> dict[str, Any]:
        """A request for exactly `item.output_len` greedy tokens, streamed."""

    def read(self, event: Mapping[str, Any]) -> Event:
        """One message of the answer."""


class OpenAIDialect:
    """`/v1/completions` with token ids as the prompt; an adapter is a model's name.

    `extra` goes into bodies that name an adapter.
    """

    path = "/v1/completions"
    has_new_connections = False

    def __init__(self, base: str, extra: Mapping[str, Any] | None = None) -> None:
        self._base = base
        self._extra = dict(extra or {})

    def body(self, item: WorkItem) -> dict[str, Any]:
        """See `Dialect.body`."""
        body: dict[str, Any] = {
            "model": item.choice.adapter or self._base,
            "prompt": list(item.prompt),
            "max_tokens": item.output_len,
            "min_tokens": item.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return body | (self._extra if item.choice.adapter else {})

    def read(self, event: Mapping[str, Any]) -> Event:
        """See `Dialect.read`."""
        if "error" in event:
            return Event(error=str(event["error"]))
        text = "".join(choice["text"] for choice in event.get("choices", ()))
        usage = event.get("usage")
        return Event(words(text), None if usage is None else usage["completion_tokens"])


class TransformersDialect(OpenAIDialect):
    """transformers serve refuses fields it does not know and takes no token ids: words are the prompt."""

    def body(self, item: WorkItem) -> dict[str, Any]:
        """See `Dialect.body`."""
        body = super().body(item)
        kept = ("model", "max_tokens", "temperature", "stream")
        prompt = " ".join(f"w{token}" for token in item.prompt)
        return {key: body[key] for key in kept} | {"prompt": prompt}


class LlamaDialect:
    """llama-server's own `/completion`: every adapter's scale is told each time.

    A body that omits `lora` or leaves an id out applies the scale of the command line, which is 1.
    """

    path = "/completion"
    has_new_connections = True

    def __init__(self, adapters: tuple[str, ...]) -> None:
        self._adapters = adapters

    def body(self, item: WorkItem) -> dict[str, Any]:
        """See `Dialect.body`."""
        return {
            "prompt": list(item.prompt),
            "n_predict": item.output_len,
            "temperature": 0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
            "lora": [
                {"id": index, "scale": float(name == item.choice.adapter)}
                for index, name in enumerate(self._adapters)
            ],
        }

    def read(self, event: Mapping[str, Any]) -> Event:
        """See `Dialect.read`."""
        if "error" in event:
            return Event(error=str(event["error"]))
        total = event["tokens_predicted"] if event.get("stop") else None
        return Event(tuple(event.get("tokens", ())), total)


def words(text: str) -> tuple[int, ...]:
    """The token ids of a text of `w17 w4`; a word of anything else is -1, which equals no token."""
    return tuple(
        int(word[1:]) if re.fullmatch(r"w\d+", word, re.ASCII) else -1 for word in text.split()
    )
