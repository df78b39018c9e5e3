"""A loopback server of the part of the hub's HTTP that its client uses to fetch files.

    HEAD, GET /ORG/NAME/resolve/REVISION/FILE    a file; weights by a redirect, as the hub's LFS has it
    GET /blob/SHA256                             where that redirect leads, which is another host
    GET /api/models/ORG/NAME/revision/REVISION   the list of files

The headers, status codes and error codes are the hub's as huggingface_hub reads them. It keeps what
it was asked for, and can misbehave: see `Repository`.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Repository:
    """Commits by revision, and what is wrong with the repository.

    token: who may read it; None: anybody. is_gated: nobody was let in.
    status: answered instead of anything. cut_after: bytes of weights sent before the connection ends.
    announced: the size of weights as told, whatever it is. more: bytes sent after those of the weights.
    held: weights wait for it. no_commit: the header that names the commit is missing.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    is_gated: bool = False
    status: int | None = None
    cut_after: int | None = None
    announced: int | None = None
    more: int = 0
    held: threading.Event | None = None
    no_commit: bool = False

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit that these branches and tags now mean; its hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        for name in names:
            self.revisions[name] = digest
        return digest


def files_of(folder: Path) -> dict[str, bytes]:
    """A checkpoint's files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class HubSite:
    """Repositories by `ORG/NAME`, and every request as `METHOD path`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.token_at_blob = False
        self.url = self.store_url = ""

    def paths(self, method: str | None = None) -> list[str]:
        found = (request.split(" ", 1) for request in self.requests)
        return [path for verb, path in found if method in (None, verb)]

    @contextmanager
    def served(self) -> Iterator["HubSite"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.store_url = f"http://localhost:{server.server_address[1]}"
        try:
            yield self
        finally:
            for repository in self.repositories.values():
                if repository.held is not None:
                    repository.held.set()
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(site: HubSite) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def answer(self, *, is_head: bool) -> None:
            site.requests.append(f"{self.command} {self.path}")
            authorization = self.headers.get("authorization", "")
            token = authorization.removeprefix("Bearer ") or None
            if token is not None:
                site.tokens.add(token)
            parts = [unquote(part) for part in self.path.lstrip("/").split("/")]
            if parts[0] == "blob":
                site.token_at_blob |= token is not None
                self.blob(parts[1], is_head)
                return
            is_list = parts[:2] == ["api", "models"]
            if len(parts) < 5:  # what else the client may want to know of a hub
                self.refuse(404, None)
                return
            org, name, verb, revision, *rest = parts[2:] if is_list else parts
            repository = site.repositories.get(f"{org}/{name}")
            if repository is None or (repository.token is not None and token is None):
                # The hub does not tell strangers which repositories there are.
                self.refuse(401, "RepoNotFound")
            elif repository.status is not None:
                self.refuse(repository.status, None, f"what came with it was {token}")
            elif repository.token is not None and token != repository.token:
                self.refuse(403, None, f"the token {token} may not")
            elif repository.is_gated:
                self.refuse(403, "GatedRepo")
            elif (commit := repository.revisions.get(revision, revision)) not in repository.commits:
                self.refuse(404, "RevisionNotFound")
            elif is_list:
                files = [*repository.commits[commit], "../../../outside.txt", "run.py"]
                body = {"sha": commit, "siblings": [{"rfilename": file} for file in files]}
                self.send(200, json.dumps(body).encode(), {}, is_head)
            else:
                assert verb == "resolve"
                self.file(repository, commit, "/".join(rest), is_head)

        def file(self, repository: Repository, commit: str, name: str, is_head: bool) -> None:
            headers = {} if repository.no_commit else {"X-Repo-Commit": commit}
            content = repository.commits[commit].get(name)
            if content is None:
                self.refuse(404, "EntryNotFound", headers=headers)
            elif not name.endswith((".safetensors", ".bin")):
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
                self.send(200, content, headers, is_head)
            else:
                digest = hashlib.sha256(content).hexdigest()
                size = len(content) if repository.announced is None else repository.announced
                headers |= {
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(size),
                    "Location": f"{site.store_url}/blob/{digest}",
                }
                self.send(302, b"", headers, is_head)

        def blob(self, digest: str, is_head: bool) -> None:
            for repository in site.repositories.values():
                for files in repository.commits.values():
                    for content in files.values():
                        if hashlib.sha256(content).hexdigest() == digest:
                            self.weights(repository, content, is_head)
                            return
            self.refuse(404, None)

        def weights(self, repository: Repository, content: bytes, is_head: bool) -> None:
            if repository.held is not None:
                repository.held.wait(60)
            content += bytes(repository.more)
            cut = content[: repository.cut_after]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not is_head:
                self.wfile.write(cut)
            self.close_connection = len(cut) < len(content)

        def refuse(
            self,
            status: int,
            code: str | None,
            text: str = "",
            headers: dict[str, str] | None = None,
        ) -> None:
            given = dict(headers or {}) | ({"X-Error-Code": code} if code else {})
            if text:
                given["X-Error-Message"] = text
            self.send(status, json.dumps({"error": text}).encode(), given, self.command == "HEAD")

        def send(self, status: int, body: bytes, headers: dict[str, str], is_head: bool) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
