"""Adapters come and go while requests run, by the routes that vLLM's clients call.

PEFT is the oracle for what each content writes. Every checkpoint that is refused is followed by an
answer that shows the server going on.
"""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from tests.live.asking import ask_async
from tests.live.process import (
    ADMIN_KEY,
    API_KEY,
    BASE,
    BLOCK_SIZE,
    LLAMA,
    LiveServer,
    Site,
    metric,
    text_of,
)
from tests.model import hostile
from tests.parity.adapters import save_adapter
from tests.parity.oracle import Oracle
from tests.parity.zoo import BOS, BY_NAME, NUM_LAYERS

PROMPT = "What is written here is kept in blocks."
IDS = (BOS, *PROMPT.encode())
LENGTH = 10
WISH: dict[str, Any] = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True}


@pytest.fixture(scope="module")
def contents(site: Site) -> tuple[Path, Path]:
    """Two checkpoints with different weights."""
    root = site.root / "contents"
    return (
        save_adapter(LLAMA, "plain", root / "first", seed=11),
        save_adapter(LLAMA, "rslora", root / "second", seed=12),
    )


@pytest.fixture(scope="module")
def texts(site: Site, contents: tuple[Path, Path]) -> tuple[str, str]:
    """What the two write after the prompt."""
    first, second = (
        text_of(Oracle(site.model, path).greedy(IDS, LENGTH, NUM_LAYERS).token_ids)
        for path in contents
    )
    assert first != second
    return first, second


@pytest.fixture
def folder(site: Site, tmp_path: Path) -> Path:
    """A directory below the adapter root that no other test uses."""
    folder = site.root / "folders" / tmp_path.name
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def name(admin: httpx.Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that is free, and is so again afterwards."""
    name = request.node.name.replace("[", "-").rstrip("]")
    yield name
    unload(admin, name)


def load(admin: httpx.Client, name: str, path: Path, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)} | fields
    return admin.post("/v1/load_lora_adapter", json=body)


def unload(admin: httpx.Client, name: str) -> httpx.Response:
    return admin.post("/v1/unload_lora_adapter", json={"lora_name": name})


def added(name: str) -> str:
    return f"Success: LoRA adapter '{name}' added successfully."


def written(client: OpenAI, model: str) -> str:
    return client.completions.create(model=model, **WISH).choices[0].text


def listed(client: OpenAI) -> set[str]:
    return {card.id for card in client.models.list()}


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_an_adapter_is_loaded_asked_and_unloaded(
    admin: httpx.Client,
    client: OpenAI,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    name: str,
) -> None:
    response = load(admin, name, contents[0])
    assert (response.status_code, response.text) == (200, added(name))
    assert response.headers["content-type"].startswith("text/plain")
    assert name in listed(client)
    assert written(client, name) == texts[0]

    again = refusal(load(admin, name, contents[1]), 400)
    assert (again["param"], again["code"]) == ("lora_name", "adapter_exists")
    assert "already been loaded" in again["message"]
    assert written(client, name) == texts[0]

    response = unload(admin, name)
    assert (response.status_code, response.text) == (
        200,
        f"Success: LoRA adapter '{name}' removed successfully.",
    )
    assert name not in listed(client)
    with pytest.raises(openai.NotFoundError):
        written(client, name)
    assert "cannot be found" in refusal(unload(admin, name), 404)["message"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"lora_path": "nowhere/at/all"}, 404, "lora_path"),
        ({"lora_path": "/nowhere/at/all"}, 400, "lora_path"),
        ({"lora_path": ""}, 400, "lora_path"),
        ({"lora_path": "\x00"}, 400, "lora_path"),
        ({"lora_path": 3}, 400, "lora_path"),
        ({"lora_name": BASE}, 400, "lora_name"),
        ({"lora_name": ""}, 400, "lora_name"),
        ({"lora_name": "a/b"}, 400, "lora_name"),
        ({"lora_name": "a@2"}, 400, "lora_name"),
        ({"lora_name": ".hidden"}, 400, "lora_name"),
        ({"load_inplace": "yes"}, 400, "load_inplace"),
        ({"lora_int_id": 3}, 400, "lora_int_id"),
    ],
)
def test_a_bad_load_is_refused_by_name(
    admin: httpx.Client,
    client: OpenAI,
    contents: tuple[Path, Path],
    fields: dict[str, Any],
    status: int,
    param: str,
) -> None:
    before = listed(client)
    body = {"lora_name": "bad", "lora_path": str(contents[0])} | fields
    error = refusal(admin.post("/v1/load_lora_adapter", json=body), status)
    assert error["param"] == param
    assert listed(client) == before


@pytest.mark.parametrize("route", ["load_lora_adapter", "unload_lora_adapter"])
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (ADMIN_KEY, 401),
        (f"Basic {ADMIN_KEY}", 401),
        (f"Bearer {API_KEY}", 403),
    ],
)
def test_only_the_admin_key_opens_these_routes(
    server: LiveServer, client: OpenAI, route: str, authorization: str | None, status: int
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    body = {"lora_name": "plain", "lora_path": "/"}
    response = httpx.post(f"{server.url}/v1/{route}", json=body, headers=headers)
    assert "admin key" in refusal(response, status)["message"]
    assert "plain" in listed(client)


def test_loading_and_unloading_disturbs_no_stream(
    server: LiveServer,
    async_client: AsyncOpenAI,
    runner: asyncio.Runner,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
) -> None:
    """Streams of other adapters run all the while, on a device with room for two adapters."""
    wishes = [LONG | {"model": model} for model in (BASE, "plain@2", "dora", "head@3")]

    async def play() -> None:
        alone = [(await ask_async(async_client, "completions", wish)).text for wish in wishes]
        streams = [
            asyncio.create_task(ask_async(async_client, "completions", wish)) for wish in wishes
        ]
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as admin:
            for place, path in enumerate(contents):
                name = f"passing-{place}"
                body = {"lora_name": name, "lora_path": str(path)}
                response = await admin.post("/v1/load_lora_adapter", json=body)
                assert response.text == added(name)
                answer = await ask_async(async_client, "completions", WISH | {"model": name})
                assert answer.text == texts[place]
                response = await admin.post("/v1/unload_lora_adapter", json={"lora_name": name})
                assert response.status_code == 200
        assert [(await stream).text for stream in streams] == alone

    runner.run(play())


@pytest.mark.parametrize("change", ["unload", "reload"])
def test_a_stream_ends_with_the_weights_it_began_with(
    admin: httpx.Client,
    client: OpenAI,
    site: Site,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    name: str,
    change: str,
) -> None:
    assert load(admin, name, contents[0]).text == added(name)
    wish = LONG | {"model": name, "max_tokens": 900}  # on a busy machine a change takes its time
    whole = "".join(chunk.choices[0].text for chunk in client.completions.create(**wish))
    assert whole.startswith(texts[0])
    with client.completions.create(**wish) as stream:
        text = next(stream).choices[0].text
        if change == "unload":
            assert unload(admin, name).status_code == 200
        else:
            assert load(admin, name, contents[1], load_inplace=True).text == added(name)
        is_running = metric(admin, "vllm:num_requests_running") == 1
        if change == "unload":
            with pytest.raises(openai.NotFoundError):
                written(client, name)
        else:
            assert written(client, name) == texts[1]
        for chunk in stream:
            text += chunk.choices[0].text
        assert chunk.choices[0].finish_reason == "length"
        assert chunk.lora["adapter"] == name  # type: ignore[attr-defined]
    assert text == whole
    assert is_running, "the stream was over before the change"


@pytest.mark.parametrize("same_path", [False, True])
def test_a_reload_in_place_never_answers_from_the_old_weights_cache(
    admin: httpx.Client,
    client: OpenAI,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    name: str,
    folder: Path,
    same_path: bool,
) -> None:
    def ask() -> tuple[str, int]:
        answer = client.completions.create(model=name, **WISH)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0

    all_cached = (len(IDS) - 1) // BLOCK_SIZE * BLOCK_SIZE
    path = shutil.copytree(contents[0], folder / "content")
    assert load(admin, name, path).text == added(name)
    assert ask()[0] == texts[0]
    assert ask() == (texts[0], all_cached)
    if same_path:
        shutil.rmtree(path)
        shutil.copytree(contents[1], path)
        assert ask() == (texts[0], all_cached), "what lies on the disk is not loaded"
    else:
        path = contents[1]
    assert load(admin, name, path, load_inplace=True).text == added(name)
    assert ask()[0] == texts[1]
    assert ask() == (texts[1], all_cached)
    # The first content once more: its blocks may be found again, those of the second may not.
    assert load(admin, name, contents[0], load_inplace=True).text == added(name)
    assert ask()[0] == texts[0]


def _foreign_base(path: Path) -> None:
    shutil.rmtree(path)
    save_adapter(BY_NAME["gpt2"], "plain", path)


A0, B0 = hostile.A0, hostile.B0
SPOILED: dict[str, tuple[hostile.Spoil, list[str]]] = {
    "corrupt": (hostile.weight_bytes(lambda data: b"\x00" * len(data)), [hostile.WEIGHTS]),
    "corrupt header": (
        hostile.entry(A0, data_offsets=[128, 0]),
        [A0, "data_offsets"],
    ),
    "truncated": (
        hostile.weight_bytes(lambda data: data[:-3]),
        ["lora_", "truncated"],
    ),
    "cut in the header": (hostile.weight_bytes(lambda data: data[:100]), [hostile.WEIGHTS]),
    "NaN": (hostile.tensors(B0=torch.full((64, 4), float("nan"))), [B0, "NaN"]),
    "Inf": (hostile.tensors(B0=torch.full((64, 4), float("inf"))), [B0, "Inf"]),
    "wrong shape": (hostile.tensors(B0=torch.ones(48, 4)), [B0, "[48, 4]", "[64, 4]"]),
    "wrong rank": (hostile.tensors(A0=torch.ones(3, 64), B0=torch.ones(64, 3)), [A0, "rank 3"]),
    "a partner is missing": (hostile.tensors(B0=None), [B0, "missing"]),
    "more layers than the base": (
        hostile.rename("layers.3.", "layers.9."),
        ["layers.9.", "another base", f"{NUM_LAYERS} layers"],
    ),
    "another architecture's": (_foreign_base, ["transformer.h.0", "LlamaForCausalLM"]),
    "a pickle": (
        lambda path: hostile.void((path / hostile.WEIGHTS).rename(path / "adapter_model.bin")),
        ["adapter_model.bin", "pickle"],
    ),
    "no LoRA": (hostile.config(peft_type="IA3"), ["peft_type", "IA3"]),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_spoiled_adapter_is_refused_by_tensor_and_the_server_goes_on(
    admin: httpx.Client,
    client: OpenAI,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    name: str,
    site: Site,
    folder: Path,
    spoiled: str,
) -> None:
    spoil, culprits = SPOILED[spoiled]
    path = shutil.copytree(contents[1], folder / "spoiled")
    spoil(path)
    with client.completions.create(model="plain", **LONG) as stream:
        next(stream)
        error = refusal(load(admin, "spoiled", path), 400)
        assert error["code"] == "adapter_refused"
        assert all(culprit in error["message"] for culprit in culprits), error["message"]
    assert "spoiled" not in listed(client)

    # In place of a good one: that one stays.
    assert load(admin, name, contents[0]).text == added(name)
    refusal(load(admin, name, path, load_inplace=True), 400)
    assert written(client, name) == texts[0]

    # Under the root, when a request asks for it.
    lazy = f"lazy-{folder.name}"
    shutil.copytree(path, site.root / lazy)
    with pytest.raises(openai.BadRequestError) as refused:
        written(client, lazy)
    assert all(culprit in refused.value.message for culprit in culprits)
    assert lazy not in listed(client)


def test_an_adapter_under_the_root_is_loaded_when_it_is_first_asked_for(
    admin: httpx.Client,
    client: OpenAI,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    site: Site,
    name: str,
) -> None:
    shutil.copytree(contents[0], site.root / name)
    assert name not in listed(client)
    assert written(client, name) == texts[0]
    assert name in listed(client)
    assert written(client, f"{name}@0") == written(client, BASE)

    # Unloaded on purpose, it does not come back by being asked for.
    assert unload(admin, name).status_code == 200
    with pytest.raises(openai.NotFoundError):
        written(client, name)
    assert load(admin, name, site.root / name).text == added(name)
    assert written(client, name) == texts[0]


def test_many_requests_for_one_cold_adapter_all_get_it(
    admin: httpx.Client,
    async_client: AsyncOpenAI,
    runner: asyncio.Runner,
    contents: tuple[Path, Path],
    texts: tuple[str, str],
    site: Site,
    name: str,
) -> None:
    shutil.copytree(contents[1], site.root / name)

    async def together() -> list[str]:
        questions = [
            ask_async(async_client, "completions", WISH | {"model": name}) for _ in range(6)
        ]
        return [answer.text for answer in await asyncio.gather(*questions)]

    assert runner.run(together()) == [texts[1]] * 6


@pytest.mark.parametrize("path", ["..", "../plain", "../root/../plain", "/", "%2e%2e/plain"])
def test_nothing_outside_of_the_root_is_reached_by_asking(client: OpenAI, path: str) -> None:
    with pytest.raises(openai.NotFoundError):
        written(client, path)
    with pytest.raises(openai.NotFoundError):
        written(client, f"{BASE}:{path}@2")
