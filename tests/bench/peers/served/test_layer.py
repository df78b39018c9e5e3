"""The thin HTTP layer: batches of one adapter, and an answer for everyone."""

import asyncio

import httpx2

from tests.bench.peers.served import layer
from tests.bench.peers.served.layer import Waiting, application, gather, groups


def waiting(adapter: str | None, prompt_len: int = 2) -> Waiting:
    return Waiting([1] * prompt_len, 2, adapter, asyncio.get_running_loop().create_future())


def test_a_batch_has_one_adapter_and_one_length() -> None:
    async def run() -> list[list[tuple[str | None, int]]]:
        batch = [waiting("a"), waiting(None), waiting("a"), waiting("a", 3)]
        return [[(w.adapter, len(w.prompt)) for w in group] for group in groups(batch)]

    assert asyncio.run(run()) == [[("a", 2), ("a", 2)], [(None, 2)], [("a", 3)]]


def test_no_more_than_a_batch_is_gathered() -> None:
    async def run() -> tuple[int, int]:
        queue: asyncio.Queue[Waiting] = asyncio.Queue()
        for _ in range(layer.MAX_BATCH + 3):
            queue.put_nowait(waiting(None))
        return len(await gather(queue)), len(await gather(queue))

    assert asyncio.run(run()) == (layer.MAX_BATCH, 3)


def test_each_request_gets_its_own_answer_and_a_failure_is_told() -> None:
    asked: list[tuple[int, str | None]] = []

    def complete(prompts: list[list[int]], num: int, adapter: str | None) -> list[list[int]]:
        asked.append((len(prompts), adapter))
        if adapter == "broken":
            raise RuntimeError("out of memory")
        return [[prompt[0]] * num for prompt in prompts]

    async def run() -> list[str]:
        app = application(complete)
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://layer") as client,
        ):
            bodies = [
                {"model": model, "prompt": [token], "max_tokens": 2}
                for token, model in [(4, "base"), (5, "a0"), (6, "a0"), (7, "broken")]
            ]
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in bodies)
            )
        return [answer.text for answer in answers]

    texts = asyncio.run(run())
    assert [
        f"w{token} w{token}" in text for token, text in zip((4, 5, 6), texts, strict=False)
    ] == [True] * 3
    assert "out of memory" in texts[3]
    assert sorted(asked, key=str) == [(1, "broken"), (1, None), (2, "a0")]
