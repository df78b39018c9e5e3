"""The JSON of a stream's chunks, which differ in one text alone.

All but a stream's first and last chunks say nothing new beside their text. Making and writing a model for
each was a fifth of what the event loop did for a token; the frame around the text is written once.
"""

from collections.abc import Callable
from uuid import uuid4

from pydantic import BaseModel
from pydantic_core import to_json


class TextFrame:
    """What a model is as JSON, fields that were not set left out, with one text left open."""

    def __init__(self, model_of: Callable[[str], BaseModel]) -> None:
        """model_of: the model that says a text, once, as it is."""
        mark = uuid4().hex  # nothing else in it reads like this
        whole = model_of(mark).model_dump_json(exclude_unset=True).encode()
        self._before, self._after = whole.split(to_json(mark))

    def around(self, text: str) -> bytes:
        """The model that says this text, as JSON."""
        return self._before + to_json(text) + self._after


class TextFrames:
    """Those of one stream's choices, each made when its choice first says text alone."""

    def __init__(self) -> None:
        self._by_choice: dict[int, TextFrame] = {}

    def around(self, choice: int, text: str, model_of: Callable[[str], BaseModel]) -> bytes:
        """The choice's chunk that says this text, as JSON. model_of: see `TextFrame`."""
        frame = self._by_choice.get(choice)
        if frame is None:
            frame = self._by_choice[choice] = TextFrame(model_of)
        return frame.around(text)
