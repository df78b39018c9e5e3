"""A stand-in for the hub, on this machine: the part of its HTTP API that an upload of a folder uses.

It answers the real client of `huggingface_hub` and keeps what was committed. It is not the hub: whether that
would take the same commit is not seen here.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What arrived."""

    address: str = ""
    repositories: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization") or "")
            hub.paths.append(self.path)
            if self.path == "/api/repos/create":
                name = json.loads(content)["organization"] + "/" + json.loads(content)["name"]
                hub.repositories.append(name)
                return self._answer({"url": f"{hub.address}/{name}", "name": name})
            if self.path == "/api/validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if self.path.endswith("/preupload/main"):
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(content)["files"]
                ]
                return self._answer({"files": files})
            if self.path.endswith("/commit/main"):
                for line in map(json.loads, content.splitlines()):
                    if line["key"] == "file":
                        assert line["value"]["encoding"] == "base64"
                        hub.files[line["value"]["path"]] = base64.b64decode(
                            line["value"]["content"]
                        )
                oid = "0" * 40
                url = f"{hub.address}/{hub.repositories[0]}/commit/{oid}"
                return self._answer({"success": True, "commitOid": oid, "commitUrl": url})
            return self._answer({"error": self.path}, status=404)

        def _answer(self, body: dict[str, Any], status: int = 200) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
