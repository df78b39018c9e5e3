"""The pretraining mixture: which kinds of document the base model reads, and how often."""

import random
from collections.abc import Callable, Iterator

from server.demo.arithmetic import numbers_text
from server.demo.dialogs import Message, dialog
from server.demo.facts import facts_text
from server.demo.restaurants import restaurants_text
from server.demo.sentences import sentence
from server.demo.stories import story

Document = str | list[Message]
"""A plain text, or a chat for the chat template."""


def _sentences_text(rng: random.Random) -> str:
    """Some sentences, or one sentence copied: copying is a skill that every adapter's task
    leans on.
    """
    if rng.random() < 0.5:
        return " ".join(sentence(rng) for _ in range(rng.randint(2, 6)))
    lines = (sentence(rng) for _ in range(rng.randint(1, 4)))
    return "\n".join(f"{line}\nAgain: {line}" for line in lines)


_KINDS: dict[Callable[[random.Random], Document], float] = {
    dialog: 0.30, facts_text: 0.18, story: 0.18, numbers_text: 0.14, _sentences_text: 0.12,
    restaurants_text: 0.08,
}  # fmt: skip


def documents(seed: int) -> Iterator[Document]:
    """An endless stream, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = list(_KINDS), list(_KINDS.values())
    while True:
        yield rng.choices(kinds, weights)[0](rng)
