"""Many connections to one server, held at once by a process of their own.

    python crowd.py HOST PORT IDLE HALF_OPEN STREAMS BODY

IDLE connections have had an answer and keep still, HALF_OPEN are in the middle of a head, STREAMS have
sent BODY (JSON) and read nothing yet. It prints one JSON object when all stand there: how many of each,
and how many were refused in words or cut off without any. Told so by a line on its standard input,
the idle ask again, the half-open end their heads, the streams are read to their ends, and it prints
how many of each were answered.
"""

import asyncio
import json
import resource
import sys
from collections import Counter
from dataclasses import dataclass, field

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

NUM_AT_ONCE = 200
"""That connect or read at one time: more than a listener's queue would have to try again."""
MAX_ANSWER_BYTES = 1 << 20
HEAD = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n"


@dataclass(slots=True)
class Crowd:
    host: str
    port: int
    body: bytes
    held: dict[str, list[Stream]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    door: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(NUM_AT_ONCE))

    async def gather(self, idle: int, half_open: int, streams: int) -> None:
        for kind, number in (("idle", idle), ("streams", streams), ("half_open", half_open)):
            self.held[kind] = []
            await asyncio.gather(*(self._come(kind) for _ in range(number)))

    async def _come(self, kind: str) -> None:
        async with self.door:
            try:
                reader, writer = await asyncio.open_connection(
                    self.host, self.port, limit=MAX_ANSWER_BYTES
                )
                if kind == "idle":
                    writer.write(HEAD + b"\r\n")
                    status = await answer(reader)
                    if status != 200:
                        self.seen[f"refused {status}"] += 1
                        return
                elif kind == "streams":
                    length = str(len(self.body)).encode()
                    writer.write(
                        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
                        b"content-type: application/json\r\ncontent-length: " + length + b"\r\n\r\n"
                    )
                    writer.write(self.body)
                else:
                    writer.write(HEAD)
                await writer.drain()
            except (ConnectionError, asyncio.IncompleteReadError):
                self.seen["cut off"] += 1
                return
        self.held[kind].append((reader, writer))
        self.seen[kind] += 1

    async def end(self) -> Counter[str]:
        ended: Counter[str] = Counter()
        for kind, streams in self.held.items():
            outcomes = await asyncio.gather(*(self._end(kind, *each) for each in streams))
            ended.update(f"{kind} {outcome}" for outcome in outcomes)
        return ended

    async def _end(
        self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> str:
        async with self.door:
            try:
                if kind == "streams":
                    await reader.readuntil(b"data: [DONE]")
                    return "whole"
                writer.write((HEAD if kind == "idle" else b"") + b"\r\n")
                return str(await answer(reader))
            except (ConnectionError, asyncio.IncompleteReadError):
                return "gone"
            finally:
                writer.close()


async def answer(reader: asyncio.StreamReader) -> int:
    """The status of one answer, which is read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(head.split()[1])


async def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port, idle, half_open, streams, body = sys.argv[1:]
    crowd = Crowd(host, int(port), body.encode())
    await crowd.gather(int(idle), int(half_open), int(streams))
    sys.stdout.write(json.dumps(crowd.seen) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    sys.stdout.write(json.dumps(await crowd.end()) + "\n")


if __name__ == "__main__":
    asyncio.run(main())
