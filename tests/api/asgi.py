"""One HTTP exchange at the ASGI seam, where a test can watch each chunk and hang up."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI


class Exchange:
    """A POST that is under way."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._to_receive: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content = json.dumps(body).encode()
        self._to_receive.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.done = asyncio.create_task(app(scope, self._receive, self.sent.put))

    def hang_up(self) -> None:
        """The client goes away."""
        self._to_receive.put_nowait({"type": "http.disconnect"})

    async def _receive(self) -> dict[str, Any]:
        """A client that has gone stays so, however often a server is asked."""
        message = await self._to_receive.get()
        if message["type"] == "http.disconnect":
            self._to_receive.put_nowait(message)
        return message

    async def event(self) -> Any:
        """The next server-sent event's JSON."""
        while True:
            message = await self.sent.get()
            if message.get("body"):
                return json.loads(message["body"].removeprefix(b"data: "))
