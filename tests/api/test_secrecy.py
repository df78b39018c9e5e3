"""No key in any log line, response or file: all failing paths, at the most talkative log level.

The application runs under uvicorn with the logs of `fathom serve`. What is looked for are whole keys
and their secret parts; that they would be found is shown too.
"""

import asyncio
import base64
import contextlib
import io
import logging
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import uvicorn

from boundary.store.store import StoreError
from server.access import key_file, keyring
from server.access.key import Grant, NewKey
from server.api.app import create_app
from server.config import ConfigError, Settings
from server.environment import load_settings
from server.errors import QueueFull
from server.logs import configure_logs
from tests.api.conftest import ADMIN_KEY, API_KEY
from tests.api.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"model": "base", "prompt": "hello", "max_tokens": 4}
NEVER_MADE = "fathom-0123456789abcdef-" + "Qx7" * 14 + "Z"


@dataclass
class Site:
    """A server that runs, the keys of which nothing may be seen, and what was seen."""

    client: httpx.AsyncClient
    app: Any
    path: Path
    keys: dict[str, str]
    log: io.StringIO
    answers: list[str]

    async def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        response = await self.client.request(method, path, **how)
        self.answers.append(f"{response.headers} {response.text}")
        return response

    def seen(self) -> str:
        """All that was logged, answered or written to disk."""
        files = [
            each.read_bytes().decode("latin-1")
            for each in self.path.parent.iterdir()
            if each.is_file()
        ]
        return "\n".join([self.log.getvalue(), *self.answers, *files])

    def leaks(self) -> list[str]:
        """Keys that can be seen: whole, their secret part, or as somebody might encode them."""
        seen = self.seen()
        found = []
        for name, text in self.keys.items():
            part = text.split("-", 2)[2] if text.startswith("fathom-") else text
            forms = {text, part, part[:16], base64.b64encode(text.encode()).decode()}
            found += [f"{name}: {form}" for form in forms if form in seen]
        return found


@pytest.fixture
async def site(
    engine: FakeEngine,
    tmp_path: Path,
    process_as_it_was: None,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Site]:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    configure_logs("debug")
    path = tmp_path / "keys.json"
    limited = Grant(adapters=("base",), max_depth=1, requests_per_minute=3, tokens_per_minute=60)
    keys = {
        "api flag": API_KEY,
        "admin flag": ADMIN_KEY,
        "never made": NEVER_MADE,
        "file": key_file.add(path, NewKey(name="ada"))[1],
        "limited": key_file.add(path, NewKey(name="bob", grant=limited))[1],
        "revoked": key_file.add(path, NewKey(name="eve"))[1],
        "file admin": key_file.add(path, NewKey(name="root", scope="admin"))[1],
    }
    key_file.revoke(path, keys["revoked"].split("-")[1])
    settings = Settings(
        api_key=API_KEY,
        admin_key=ADMIN_KEY,
        keys_file=path,
        database=f"sqlite:///{tmp_path / 'fathom.db'}",
        request_timeout_s=0.2,
        log_level="debug",
    )
    app = create_app(settings, engine)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=True, ws="none")
    server = uvicorn.Server(config)
    listener = config.bind_socket()
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield Site(client, app, path, keys, log, [])
    server.should_exit = True
    await serving


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/nobody"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/admin/adapters"),
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("DELETE", "/admin/keys/0123456789abcdef"),
    ("GET", "/admin/usage"),
    ("GET", "/admin/audit"),
    ("GET", "/nowhere"),
    ("PATCH", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/metrics"),
]


async def test_no_key_is_logged_answered_or_written_whatever_fails(
    site: Site, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every route with keys of every kind and in wrong forms.
    every_key = cycle(site.keys.values())
    forms = cycle([f"Basic {API_KEY}", f"{API_KEY}", f"bearer  {NEVER_MADE} x", "Bearer", ""])
    for method, path in ROUTES:
        for text in islice(every_key, 4):  # of seven: each route gets others
            await site.ask(method, path, headers=bearer(text), json={"model": "nobody", "x": 1})
        for form in islice(forms, 2):
            await site.ask(method, path, headers={"authorization": form}, content=b"{")

    # What is refused, limited, full, late, broken inside and gone.
    as_limited, as_ada = bearer(site.keys["limited"]), bearer(site.keys["file"])
    statuses = set()
    for fields in ({}, {"model": "tuned"}, {"max_tokens": 50}, {"max_tokens": 500}, {}):
        answer = await site.ask("POST", "/v1/completions", headers=as_limited, json=BODY | fields)
        statuses.add(answer.status_code)
    for trouble in (
        {"refusal": QueueFull("full")},
        {"hold_after": 1},
        {"bug": RuntimeError("a bug in the engine")},
        {"is_alive": False},
    ):
        with monkeypatch.context() as patch:
            for name, value in trouble.items():
                patch.setattr(engine, name, value)
            for stream in (False, True):
                with contextlib.suppress(httpx.RemoteProtocolError):
                    answer = await site.ask(
                        "POST", "/v1/completions", headers=as_ada, json=BODY | {"stream": stream}
                    )
                    statuses.add(answer.status_code)
    assert {200, 429, 500, 503, 504} <= statuses

    # Hashing that fails, too many at once, a store that fails, a file that breaks.
    with monkeypatch.context() as patch:
        patch.setattr(keyring, "MAX_HASHING", 0)
        answer = await site.ask("GET", "/v1/models", headers=bearer(NEVER_MADE + "y"))
        assert answer.status_code == 503

    def broken(*_: Any) -> bool:
        raise MemoryError("no memory for scrypt")

    with monkeypatch.context() as patch:
        patch.setattr(keyring.secret, "matches", broken)
        answer = await site.ask("GET", "/v1/models", headers=bearer(NEVER_MADE + "z"))
        assert answer.status_code == 500
    site.path.write_text("{" + site.path.read_text())
    while "keys stay as they were last read" not in site.log.getvalue():
        await asyncio.sleep(0.05)

    def gone(*_: Any) -> Any:
        raise StoreError("database: gone")

    with monkeypatch.context() as patch:
        patch.setattr("boundary.store.database.Database.writing", gone)
        answer = await site.ask(
            "POST", "/admin/keys", headers=bearer(ADMIN_KEY), json={"name": "a"}
        )
        assert answer.status_code == 503

    # A new key is in the answer that made it, and nowhere else.
    made = await site.client.post("/admin/keys", headers=bearer(ADMIN_KEY), json={"name": "new"})
    site.keys["database"] = made.json()["key"]
    for method, path in ROUTES:
        await site.ask(method, path, headers=bearer(site.keys["database"]), json={"x": 1})
    await site.ask("DELETE", f"/admin/keys/{made.json()['id']}", headers=bearer(ADMIN_KEY))

    assert site.leaks() == []
    logged = site.log.getvalue()
    assert "RuntimeError" in logged, "what fails is not logged"
    assert "no memory for scrypt" in logged
    assert '"path": "/v1/models"' in logged, "the access log is off"


async def test_a_key_that_were_seen_would_be_found(site: Site) -> None:
    """The control: each way in which one might be seen."""
    assert site.leaks() == []
    log = structlog.get_logger("a test")
    log.info("who asks", headers=bearer(site.keys["file"]))
    assert len(site.leaks()) >= 2
    site.log.truncate(0)
    logging.getLogger("uvicorn.error").warning("%r", site.keys["revoked"].split("-", 2)[2])
    assert len(site.leaks()) >= 1
    site.log.truncate(0)
    site.answers.append(site.keys["admin flag"])
    assert site.leaks() != []
    site.answers.clear()
    (site.path.parent / "copy").write_text(site.keys["limited"])
    assert len(site.leaks()) >= 2


async def test_an_exception_is_logged_without_the_variables_around_it(site: Site) -> None:
    """With them, as structlog does unless told, this very test finds the key."""

    def fail(given: str) -> None:
        raise RuntimeError(f"no use for {len(given)} characters")

    def log_it() -> None:
        try:
            fail(site.keys["file"])
        except RuntimeError:
            structlog.get_logger("a test").exception("it failed")

    log_it()
    assert "it failed" in site.log.getvalue()
    assert site.leaks() == []
    renderer = logging.getLogger().handlers[0].formatter
    assert isinstance(renderer, structlog.stdlib.ProcessorFormatter)
    index = [
        isinstance(each, structlog.processors.ExceptionRenderer) for each in renderer.processors
    ].index(True)
    processors = list(renderer.processors)
    processors[index] = structlog.processors.dict_tracebacks
    renderer.processors = processors
    log_it()
    assert site.leaks() != []


def test_settings_show_no_key_when_they_are_shown_or_refused(tmp_path: Path) -> None:
    settings = Settings(api_key=API_KEY, admin_key=ADMIN_KEY)
    assert API_KEY not in f"{settings!r} {settings}"
    with pytest.raises(ConfigError) as caught:
        load_settings(
            environ={"FATHOM_ADMIN_KEY": "", "FATHOM_API_KEY": API_KEY, "FATHOM_PORT": "x"}
        )
    assert API_KEY not in str(caught.value)
    path = tmp_path / "keys.json"
    path.write_text(f'{{"keys": ["{NEVER_MADE}"]}}')
    with pytest.raises(ConfigError) as caught:
        keyring.Keyring(Settings(keys_file=path))
    assert "Qx7" not in str(caught.value)
