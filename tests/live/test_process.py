"""What a server process does when its clients leave, and when it is told to stop."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.live.process import BASE, MAX_SCRAPES, STOP_TIMEOUT_S, Site, metric, serve

LONG: dict[str, Any] = {"prompt": "and so on", "max_tokens": 900, "temperature": 0}


def wait_until(http: httpx.Client, **wanted: float) -> None:
    """Scrape until these metrics have these values."""
    names = {"running": "vllm:num_requests_running", "free": "fathom_kv_blocks_free"}
    for _ in range(MAX_SCRAPES):
        if all(metric(http, names[name]) == value for name, value in wanted.items()):
            return
    pytest.fail(f"never came to {wanted}")


def num_left(http: httpx.Client) -> float:
    return metric(http, "fathom_requests_aborted_total")


def num_written(http: httpx.Client) -> float:
    return metric(http, "vllm:generation_tokens_total")


@pytest.mark.parametrize("model", [BASE, "plain@2"])
def test_a_client_that_leaves_a_stream_frees_its_blocks(
    client: OpenAI, http: httpx.Client, model: str
) -> None:
    num_blocks, num_before = metric(http, "fathom_kv_blocks"), num_left(http)
    wait_until(http, running=0, free=num_blocks)
    num_tokens = num_written(http) + 2 * LONG["max_tokens"]
    stream = client.completions.create(model=model, stream=True, n=2, **LONG)
    next(stream)
    assert metric(http, "vllm:num_requests_running") > 0
    assert metric(http, "fathom_kv_blocks_free") < num_blocks
    stream.close()
    wait_until(http, running=0, free=num_blocks)
    assert num_left(http) == num_before + 1
    assert num_written(http) < num_tokens, "it ended by itself"


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_client_that_leaves_before_its_answer_frees_its_blocks(
    async_client: AsyncOpenAI, runner: asyncio.Runner, http: httpx.Client, num_prompts: int
) -> None:
    num_blocks, num_before = metric(http, "fathom_kv_blocks"), num_left(http)
    wait_until(http, running=0, free=num_blocks)
    num_tokens = num_written(http) + num_prompts * LONG["max_tokens"]

    async def leave() -> None:
        wish = LONG | {"prompt": [f"{place}" for place in range(num_prompts)]}
        asking = asyncio.create_task(async_client.completions.create(model="dora", **wish))
        for _ in range(MAX_SCRAPES):
            if metric(http, "vllm:num_requests_running") == num_prompts:
                break
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    runner.run(leave())
    wait_until(http, running=0, free=num_blocks)
    assert num_left(http) == num_before + num_prompts
    assert num_written(http) < num_tokens, "they ended by themselves"


def test_a_server_told_to_stop_finishes_its_streams_and_ends_well(
    client: OpenAI, site: Site, tmp_path: Path
) -> None:
    """It has no keys: the API is open, and loading adapters is off."""
    wish = LONG | {"model": "plain@2", "max_tokens": 200}
    whole = client.completions.create(**wish).choices[0].text
    with (
        serve(site, tmp_path / "stderr") as server,
        OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as stranger,
    ):
        for route in ("load_lora_adapter", "unload_lora_adapter"):
            body = {"lora_name": "plain", "lora_path": str(site.adapters["plain"])}
            refused = httpx.post(f"{server.url}/v1/{route}", json=body)
            assert refused.status_code == 403
            assert "--admin-key" in refused.json()["error"]["message"]

        with stranger.completions.create(**wish, stream=True) as stream:
            text = next(stream).choices[0].text
            server.process.send_signal(signal.SIGTERM)
            for chunk in stream:
                text += chunk.choices[0].text
            assert chunk.choices[0].finish_reason == "length"
        assert text == whole
        assert server.process.wait(STOP_TIMEOUT_S) == 0
        assert "Traceback" not in server.stderr
