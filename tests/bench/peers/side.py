"""Something that completes requests while its processes run: a server over HTTP, or a child by pipe."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Protocol

import uvloop

from server.bench.load import LoadResult, Timing, drive
from server.bench.workload import WorkItem
from tests.bench.peers.client import PeerClient
from tests.bench.peers.dialects import Dialect
from tests.bench.peers.process import Tree

Completions = dict[tuple[int, ...], list[int]]
"""Tokens by prompt."""


class Side(Protocol):
    """One variant of a peer, running."""

    tree: Tree
    is_pausable: bool
    """False where its processes would not outlive a SIGSTOP of minutes."""

    def run(self, items: Sequence[WorkItem], num_streams: int) -> tuple[LoadResult, Completions]:
        """Complete all items, `num_streams` of them at a time."""


@dataclass(frozen=True, slots=True)
class HttpSide:
    """A server, asked by the client that all servers share."""

    tree: Tree
    url: str
    dialect: Dialect
    is_pausable: bool = True

    def run(self, items: Sequence[WorkItem], num_streams: int) -> tuple[LoadResult, Completions]:
        """See `Side.run`."""
        return uvloop.run(self._run(items, num_streams))

    async def _run(
        self, items: Sequence[WorkItem], num_streams: int
    ) -> tuple[LoadResult, Completions]:
        async with PeerClient(self.url, self.dialect) as client:
            return await drive(client, items, num_streams), client.completions


@dataclass(frozen=True, slots=True)
class PipeSide:
    """A child that completes static batches: one line of JSON in, one line out. No HTTP is timed."""

    tree: Tree
    process: subprocess.Popen[str]
    is_pausable: bool = True

    def run(self, items: Sequence[WorkItem], num_streams: int) -> tuple[LoadResult, Completions]:
        """See `Side.run`; the duration is the child's own."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        requests = [[list(i.prompt), i.output_len, i.choice.adapter] for i in items]
        self.process.stdin.write(json.dumps({"items": requests, "batch": num_streams}) + "\n")
        self.process.stdin.flush()
        answer = read_line(self.process.stdout)
        completions = dict(zip((item.prompt for item in items), answer["completions"], strict=True))
        duration_s = answer["duration_s"]
        timings = tuple(
            Timing(0.0, [], duration_s, len(item.prompt), len(completions[item.prompt]))
            for item in items
        )
        return LoadResult(duration_s, timings), completions


def read_line(stream: IO[str]) -> dict:  # type: ignore[type-arg]
    """The next answer of a child. Raises RuntimeError where the child has ended."""
    line = stream.readline()
    if not line:
        raise RuntimeError("the child ended; its log says why")
    found: dict = json.loads(line)  # type: ignore[type-arg]
    return found
