"""No line of the log holds what a client wrote or was told, or a key, at any level, whatever happens.

The texts are planted wherever they could slip through: in exceptions, in local variables of a
traceback, in refused values. `--log-prompts` is the control that finds them.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from server.api.app import create_app
from server.config import Settings
from server.console.assets import load_assets
from server.engine.async_engine import AsyncEngine
from server.errors import Draining, EngineDead, GenerationError
from server.logs import configure_logs
from tests.api.asgi import Exchange
from tests.api.conftest import ADMIN_KEY, API_KEY
from tests.api.fake_engine import FakeEngine
from tests.tiny import Tiny, make_core, make_request, open_tiny

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("process_as_it_was")]

PROMPT = "sesame-of-the-prompt"
COMPLETION = "walnut-of-the-answer"
WORDS = (PROMPT, COMPLETION, API_KEY, ADMIN_KEY)
CLIENT = {"authorization": f"Bearer {API_KEY}"}
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
BODY = {"model": "tuned@3", "prompt": PROMPT, "max_tokens": 64}
CHAT = {"model": "base", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64}

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        api_key=API_KEY, admin_key=ADMIN_KEY, database=f"sqlite:///{tmp_path / 'fathom.db'}"
    )


@pytest.fixture
def engine(engine: FakeEngine) -> FakeEngine:
    engine.reply = lambda request, index: COMPLETION
    return engine


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was logged since the last call, every line as JSON."""

    def read() -> list[dict[str, Any]]:
        captured = capsys.readouterr()
        assert captured.out == ""
        return [json.loads(line) for line in captured.err.splitlines()]

    return read


@contextlib.asynccontextmanager
async def asked(settings: Settings, engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings, engine)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://fathom", headers=CLIENT) as client,
    ):
        yield client


async def everything(settings: Settings, engine: FakeEngine) -> None:
    """Success, streams, refusals, failures, a bug, a stream that breaks, a timeout and the admin's work."""
    async with asked(settings, engine) as client:
        for path, body in (("/v1/completions", BODY), ("/v1/chat/completions", CHAT)):
            for stream in (False, True):
                response = await client.post(path, json=body | {"stream": stream})
                assert response.status_code == 200
        assert (await client.get(f"/v1/models/x?q={PROMPT}&key={API_KEY}")).status_code == 404
        for bad in (
            {"max_tokens": PROMPT}, {"stop": [PROMPT] * 99}, {PROMPT: 1}, {"lora_depth": 99},
            {"response_format": {"type": PROMPT}}, {"structured_outputs": {"regex": f"({PROMPT}"}},
        ):  # fmt: skip
            assert (await client.post("/v1/completions", json=BODY | bad)).status_code == 400
        garbage = await client.post(
            "/v1/completions",
            content=f'{{"prompt": "{PROMPT}',
            headers={"content-type": "application/json"},
        )
        assert garbage.status_code == 400
        wrong = {"authorization": f"Bearer {PROMPT}{API_KEY}"}
        assert (await client.post("/v1/completions", json=BODY, headers=wrong)).status_code == 401
        engine.fail_after, engine.error = 1, GenerationError(f"{PROMPT} {COMPLETION}")
        for stream in (False, True):
            await client.post("/v1/completions", json=BODY | {"stream": stream})
        engine.fail_after, engine.bug = None, RuntimeError(f"{PROMPT} {COMPLETION} {API_KEY}")
        for engine.bug_after in (0, 1):
            for stream in (False, True):
                await client.post("/v1/completions", json=BODY | {"stream": stream})
        engine.bug = None
        samples = [{"prompt": PROMPT, "completion": COMPLETION}] * 40
        for path, method, admin_body in (
            ("adapters/tuned/recalibrate", "POST", {"dataset": {"samples": samples}}),
            ("adapters/tuned/recalibrate", "POST", {"dataset": {"samples": [{"x": PROMPT}]}}),
            ("adapters/tuned/boundary", "PUT", {"depth": 3, "reason": "a trial"}),
            ("adapters/new", "PUT", {"path": "/adapters/new"}),
            ("audit", "GET", None),
        ):
            await client.request(method, f"/admin/{path}", json=admin_body, headers=ADMIN)


async def stray(loop: asyncio.AbstractEventLoop) -> None:
    """A task whose exception nobody fetches: asyncio's own message would quote it."""

    async def fail() -> None:
        raise ValueError(PROMPT)

    task = loop.create_task(fail())
    await asyncio.wait([task])
    del task


def found(lines: list[dict[str, Any]]) -> set[str]:
    text = json.dumps(lines)
    return {word for word in WORDS if word in text}


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
async def test_no_line_holds_a_prompt_a_completion_or_a_key(
    settings: Settings, engine: FakeEngine, lines: Lines, level: str
) -> None:
    configure_logs(level, "json")
    await everything(settings, engine)
    logged = lines()
    assert found(logged) == set()
    assert logged, "the failures are told at every level"
    errors = [line for line in logged if "exception" in line]
    assert {stack["exc_type"] for line in errors for stack in line["exception"]} >= {"RuntimeError"}
    assert all(
        "locals" not in frame
        for line in errors
        for stack in line["exception"]
        for frame in stack["frames"]
    )


async def test_the_operator_may_ask_for_them(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json", shows_prompts=True)
    settings = settings.model_copy(update={"log_prompts": True})
    await everything(settings, engine)
    logged = lines()
    assert found(logged) >= {PROMPT, COMPLETION}
    first = next(line for line in logged if line.get("path") == "/v1/completions")
    assert PROMPT in first["prompts"][0]
    assert first["completions"] == [COMPLETION]
    (text,) = {
        stack["exc_value"]
        for line in logged
        for stack in line.get("exception", [])
        if stack["exc_type"] == "RuntimeError"
    }
    assert PROMPT in text


async def test_the_console_is_as_silent(
    settings: Settings, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("debug", "console")
    await everything(settings, engine)
    text = capsys.readouterr().err
    assert not [word for word in WORDS if word in text]
    assert "RuntimeError" in text
    assert "fake_engine.py:" in text, "where it was raised"


def test_what_a_task_raised_is_not_quoted_by_the_event_loop(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json")

    async def scenario() -> None:  # on a loop of its own: the test runner's has a handler
        loop = asyncio.get_running_loop()
        await stray(loop)
        assert found(lines()) == {PROMPT}, "the control: asyncio's own handler"
        async with asked(settings, engine):
            await stray(loop)
            (line,) = [line for line in lines() if line["message"] == "event loop"]
            assert found([line]) == set()
            assert line["error"] == "ValueError"

    asyncio.run(scenario())


async def test_the_words_of_the_machine_are_kept(lines: Lines) -> None:
    configure_logs("info", "json")
    log = structlog.get_logger("server.test")
    try:
        raise FileNotFoundError(2, "No such file", "/adapters/x")
    except OSError as error:
        log.exception("it broke", error=error)
    log.warning("it broke", error=KeyError(PROMPT))
    first, second = lines()
    assert "/adapters/x" in first["error"]
    assert "/adapters/x" in first["exception"][0]["exc_value"]
    assert second["error"] == "KeyError"


async def test_what_caused_an_exception_is_silent_too(lines: Lines) -> None:
    configure_logs("info", "json")
    try:
        try:
            error = KeyError(PROMPT)
            error.add_note(PROMPT)
            raise error
        except KeyError as error:
            raise ExceptionGroup(PROMPT, [ValueError(PROMPT)]) from error
    except ExceptionGroup:
        logging.getLogger("uvicorn.error").exception("it broke")
    (line,) = lines()
    assert found([line]) == set()
    assert [stack["exc_type"] for stack in line["exception"]] == ["ExceptionGroup", "KeyError"]


async def test_one_line_a_request_says_how_it_went(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json")
    async with asked(settings, engine) as client:
        lines()
        labelled = {"x-request-id": "mine"}
        answer = await client.post("/v1/completions", json=BODY, headers=labelled)
        (line,) = lines()
        assert (line["request_id"], line["level"], line["message"]) == ("mine", "info", "request")
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert (line["adapter"], line["depth"], line["depth_source"]) == ("tuned", 3, "request")
        usage = answer.json()["usage"]
        for name in ("prompt_tokens", "completion_tokens"):
            assert line[name] == usage[name]
        assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert (line["finish"], line["response_id"]) == ("stop", answer.json()["id"])
        assert 0 <= line["ttft_s"] <= line["duration_s"]
        assert "error" not in line

        await client.post("/v1/completions", json=BODY | {"max_tokens": 0})
        (line,) = lines()
        assert (line["status"], line["error"]) == (400, "invalid_request_error")
        engine.bug = RuntimeError("x")
        broken = await client.post("/v1/completions", json=BODY)
        (line,) = [line for line in lines() if line["message"] == "request"]
        assert broken.headers["x-request-id"] == line["request_id"]
        assert (line["status"], line["error"], line["finish"]) == (
            500,
            "internal_error",
            "internal_error",
        )
        await client.get("/nowhere")
        (line,) = lines()
        assert (line["status"], line["error"]) == (404, "not_found")
        await client.get("/%1b[2J%0a" + "a" * 300)
        (line,) = lines()
        assert line["path"].startswith("/%1B%5B2J%0Aaaa")
        assert len(line["path"]) < 300
        await client.get("/health")
        await client.get("/metrics")
        await client.get(f"/console/{load_assets().digest}/main.js")
        assert lines() == [], "probes and the console's files are for debug"
        await client.get("/console/gone/main.js")
        (line,) = lines()
        assert line["status"] == 404
        engine.is_alive = False
        await client.get("/health")
        (line,) = lines()
        assert (line["status"], line["error"]) == (503, "engine_dead")


async def test_a_client_that_left_has_its_line_too(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json")
    app = create_app(settings.model_copy(update={"api_key": None}), engine)
    engine.hold_after = 1
    for stream in (True, False):
        engine.held.clear()
        exchange = Exchange(app, "/v1/completions", BODY | {"stream": stream})
        await engine.held.wait()
        exchange.hang_up()
        await exchange.done
        (line,) = lines()
        assert (line["finish"], line["completion_tokens"]) == ("disconnect", 1)


async def test_a_request_that_failed_midway_has_the_tokens_that_it_got(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json")
    engine.fail_after, engine.error = 2, Draining("the server stops")
    async with asked(settings, engine) as client:
        for stream in (True, False):
            await client.post("/v1/completions", json=BODY | {"stream": stream})
            (line,) = lines()
            assert line["finish"] == "shutting_down"
            assert (line["completion_tokens"], line["prompt_tokens"] > 0) == (2, True)


async def test_what_is_logged_meanwhile_carries_the_request_s_id(
    settings: Settings, engine: FakeEngine, lines: Lines
) -> None:
    configure_logs("info", "json")
    engine.bug = RuntimeError("x")
    async with asked(settings, engine) as client:
        body = BODY | {"stream": True}
        await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    ids = [line.get("request_id") for line in lines() if line["logger"].startswith("server.api")]
    assert ids == ["mine"] * len(ids)
    assert ids


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("log_format", ["auto", "json", "console"])
def test_the_format_is_the_operator_s_or_the_terminal_s(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log_format: Any,
    is_terminal: bool,
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    configure_logs("info", log_format)
    structlog.get_logger("server.test").info("hello", n=1)
    line = capsys.readouterr().err
    is_json = log_format == "json" or (log_format == "auto" and not is_terminal)
    assert line.startswith("{") == is_json
    assert "hello" in line


def test_a_crash_in_a_step_is_told_without_its_words(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError(PROMPT)

    for shows_prompts in (False, True):
        configure_logs("debug", "json", shows_prompts=shows_prompts)
        with open_tiny(tiny) as core:
            monkeypatch.setattr(core.runner, "run", crash)
            core.add(make_request("x", (1, 2, 3)))
            (output,) = core.step()
            assert PROMPT in str(output.error), "its owner is told"
        (line,) = [line for line in lines() if line["message"] == "request failed"]
        assert (line["request"], line["error"].partition(":")[0]) == ("x", "RuntimeError")
        assert (PROMPT in json.dumps(line)) == shows_prompts
        structlog.reset_defaults()


def test_the_death_of_the_engine_is_told_without_its_words(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    configure_logs("debug", "json")
    core = make_core(tiny)

    def die() -> None:
        raise RuntimeError(PROMPT)

    monkeypatch.setattr(core, "step", die)
    engine = AsyncEngine(core, max_live_requests=1)

    async def ask() -> None:
        async for output in engine.generate(make_request("x", (1, 2, 3))):
            assert isinstance(output.error, EngineDead)

    asyncio.run(ask())
    engine.shutdown()
    (line,) = [line for line in lines() if line["message"] == "the engine thread died"]
    assert found([line]) == set()
    assert line["exception"][0]["exc_type"] == "RuntimeError"
    core.close()


def test_debug_is_for_our_own_words(lines: Lines) -> None:
    configure_logs("debug", "json")
    logging.getLogger("aiosqlite").debug("executing %s", PROMPT)
    structlog.get_logger("server.test").debug("ours")
    assert [line["message"] for line in lines()] == ["ours"]


@pytest.fixture(autouse=True)
def uncached() -> Iterator[None]:
    """Loggers remember the configuration they were first used with; and the client has a log too."""
    client = logging.getLogger("httpx")
    level = client.level
    client.setLevel(logging.WARNING)
    yield
    client.setLevel(level)
    structlog.reset_defaults()
