"""What became of one request, as its client saw it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.soak.site import Content


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked, and what may be answered besides 200."""

    name: str
    """The base model or an adapter."""
    depth: int | str
    prompts: tuple[int, ...]
    """By their place in the site's list; each is a sequence, or `n` of them."""
    max_tokens: int
    n: int = 1
    is_greedy: bool = True
    priority: int = 0
    is_stream: bool = False
    key: str = "free"
    allowed: frozenset[int] = frozenset()
    """Statuses that are right for this key and model: 401, 403, 404, 429."""
    leaves_after: float | None = None
    """Seconds, or a share of the events of a stream, after which the client hangs up."""
    reads_slowly: bool = False

    @property
    def num_sequences(self) -> int:
        return self.n * len(self.prompts)


@dataclass(slots=True)
class Record:
    """One request from its beginning to its end. Times are the driver's monotonic clock."""

    id: str
    wish: Wish
    began_s: float
    ended_s: float = 0.0
    status: int | None = None
    code: str | None = None
    """Of the error, in the body or in the last event."""
    num_ends: int = 0
    """Whole answers, refusals and last events: each request has one."""
    num_late: int = 0
    """Events after the last."""
    has_left: bool = False
    broke: str | None = None
    """How the connection failed, which the client did not want."""
    retry_after: str | None = None
    depth: int | None = None
    """As the answer says."""
    texts: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Answered to the end and well."""
        return self.status == 200 and self.code is None and self.num_ends == 1


@dataclass(frozen=True, slots=True)
class Spell:
    """A time in which a name may have had a content; None: it was not there."""

    content: Content | None
    since_s: float
    until_s: float


class Timeline:
    """Which contents a name may have had at a time.

    A change counts from when it was asked for, and what was before until it was answered.
    """

    def __init__(self, first: Content) -> None:
        self._spells = [Spell(first, float("-inf"), float("inf"))]

    def change(self, content: Content | None, began_s: float, ended_s: float) -> None:
        last = self._spells[-1]
        self._spells[-1] = Spell(last.content, last.since_s, ended_s)
        self._spells.append(Spell(content, began_s, float("inf")))

    @property
    def latest(self) -> Content | None:
        return self._spells[-1].content

    def possible(self, began_s: float, ended_s: float) -> list[Content | None]:
        """Of a request that lived from then to then."""
        return [
            spell.content
            for spell in self._spells
            if spell.since_s <= ended_s and began_s <= spell.until_s
        ]


Timelines = dict[str, Timeline]
References = dict[tuple[Content, int, int], str]
"""Content, depth and prompt -> the greedy answer of a server that does nothing else."""


def answer_of(
    references: References, contents: Sequence[Content | None], depth: int, prompt: int
) -> list[str]:
    """Every answer that would be right; none where one of the contents has a near tie for an answer."""
    keys = [(content, depth, prompt) for content in contents if content is not None]
    return [references[key] for key in keys] if references.keys() >= set(keys) else []
